"""Runs the real trainer in this process and writes down exactly what it did.

    torchrun ... drive.py OUT --module M --config C [torchtitan flags]

OUT gets one file per rank, `rank<r>.pt`: losses as logged, token weights of every loss call, and,
on rank 0, the final parameters, whole.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger


def main() -> None:
    """Train as the flags say, and save what happened."""
    out, *flags = sys.argv[1:]
    init_logger()
    config = ConfigManager().parse_args(flags)
    losses, validations, weights = [], [], []
    trainer = config.build()
    processor = trainer.metrics_processor
    log, log_validation = processor.log, processor.log_validation

    def note(step, loss, *args, **kwargs):
        losses.append((step, loss))
        log(step, loss, *args, **kwargs)

    def note_validation(loss, step, *args, **kwargs):
        validations.append((step, loss))
        log_validation(loss, step, *args, **kwargs)

    processor.log, processor.log_validation = note, note_validation
    state = getattr(trainer, "state", None)
    if state is not None:
        weigh = state.weigh

        def note_weights(*args):
            found = weigh(*args)
            weights.append(found.token.clone())
            return found

        state.weigh = note_weights
    assert isinstance(trainer.loss_fn, BaseLoss)
    trainer.train()
    (model,) = trainer.model_parts
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    rank = torch.distributed.get_rank()
    found = {
        "losses": losses,
        "validations": validations,
        "weights": weights,
        "parameters": parameters if rank == 0 else {},
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

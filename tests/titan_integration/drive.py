"""Runs the real trainer in this process and writes down exactly what it did.

    torchrun ... drive.py OUT --module M --config C [torchtitan flags]

OUT gets one file per rank, `rank<r>.pt`: losses as logged, token weights of every loss call, the
tokens of the last validation with their losses by the final model, and, on rank 0, the final
parameters, whole.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torchtitan.components.loss import BaseLoss
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger

from titan_integration.state.run import Run


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
    weigh = Run.weigh

    def note_weights(*args):
        found = weigh(*args)
        weights.append(found.token.clone())
        return found

    Run.weigh = note_weights
    batches = note_batches(trainer.validator) if config.validator.enable else []
    assert isinstance(trainer.loss_fn, BaseLoss)
    trainer.train()
    model, *_ = trainer.model_parts
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    dims = trainer.parallel_dims
    if dims.tp_enabled or dims.cp_enabled or dims.pp_enabled:  # a part of the logits only
        batches.clear()
    validated = [token_losses(model, *batch) for batch in batches[-config.validator.steps :]]
    rank = torch.distributed.get_rank()
    found = {
        "losses": losses,
        "validations": validations,
        "validated": validated,
        "weights": weights,
        "parameters": parameters if rank == 0 else {},
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    trainer.close()
    torch.distributed.destroy_process_group()


def note_batches(validator):
    """Return a list that gets what the validator is given, and what the host makes of it."""
    batches = []
    process = validator.post_dataloading_process

    def note(input_dict, labels, model_parts):
        found = process(input_dict, labels, model_parts)
        inputs, _, kwargs = found
        batches.append((inputs, kwargs, labels, input_dict.get("domain_ids")))
        return found

    validator.post_dataloading_process = note
    return batches


@torch.no_grad()
def token_losses(model, inputs, kwargs, labels, domain_ids):
    """Return the losses of a batch from whole logits, 0 where ignored, its labels and domains."""
    model.eval()
    model._skip_lm_head = False
    logits = model(inputs, **kwargs)
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses, labels, domain_ids


if __name__ == "__main__":
    main()

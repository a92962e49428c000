"""Forward passes over a whole step without gradient, so that its batches are weighed as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

    from titan_integration.state.run import Run

Prepared = tuple[Tensor, Tensor, dict[str, Any]]
"""Tokens and labels of a batch, [B, L], and what else the model takes."""


@torch.no_grad()
def look_ahead(trainer: Trainer, run: Run, batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
    """Weigh all batches of a step, by a forward pass over each, before any is trained on."""
    seen, pipelined = trainer.ntokens_seen, trainer.parallel_dims.pp_enabled
    size = trainer.num_pipeline_parallel_microbatches
    with run.microbatches.looking_ahead():
        for start in range(0, len(batches), size):
            run.microbatches.forget_prepared()
            prepared: list[Prepared] = []
            for given, given_labels in batches[start : start + size]:
                moved = {
                    key: x.to(trainer.device) if isinstance(x, Tensor) else x
                    for key, x in given.items()
                }
                labels = given_labels.to(trainer.device)
                prepared.append(trainer.post_dataloading_process(moved, labels))
                if not pipelined:
                    _forward_only(trainer, prepared.pop())
            if prepared:
                _forward_only(trainer, *prepared)
        if not pipelined or trainer.pp_has_last_stage:
            run.weigh_noted()
    trainer.ntokens_seen = seen


def _forward_only(trainer: Trainer, *prepared: Prepared) -> None:
    """Run model and loss on prepared batches, through the pipeline if there is one."""
    inputs, labels, kwargs = zip(*prepared, strict=True)
    with trainer.train_context():
        if not trainer.parallel_dims.pp_enabled:
            trainer.loss_fn(trainer.model_parts[0](inputs[0], **kwargs[0]), labels[0])
            return
        trainer.pp_schedule.eval(
            arg_mbs=[(x,) for x in inputs] if trainer.pp_has_first_stage else None,
            kwarg_mbs=list(kwargs),
            target_mbs=list(labels) if trainer.pp_has_last_stage else None,
            losses=[] if trainer.pp_has_last_stage else None,
        )

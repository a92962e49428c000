"""Weighs the same batches by several specs under one layout, and writes down what came of it.

    torchrun ... matrix.py OUT SPECS --module M --config C [torchtitan flags]

SPECS is a JSON file of spec texts by name.  For each spec the real trainer takes a step, and a
second one if the spec remembers, but for the optimizer's, so that every layout and every spec sees
the same model.  OUT gets one file per rank, `rank<r>.pt`: for each spec, of the last step, where
each of the rank's tokens stands in the data, its weight, the way through the output layer, and the
gradients of the rank's parameters, whole.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger

import weighting as wt
from titan_integration.state.microbatches import When
from titan_integration.state.run import Run
from weighting.loss import path

MOST_STEPS = 2
WHERE = "columns.where"
WEIGH = Run.weigh


@wt.stage("hidden_peak")
class HiddenPeak(wt.Source):
    """Read the largest entry of what the output layer is given, whose length a norm has fixed."""

    needs = frozenset({"hidden"})
    pointwise = True

    def read(self, signals: wt.Signals, scope: wt.Scope) -> Tensor:
        """Return an entry for each token, [T]."""
        del scope
        assert signals.hidden is not None
        return signals.hidden.abs().amax(-1)


def main() -> None:
    """Take the steps and save what happened."""
    out, specs, *flags = sys.argv[1:]
    init_logger()
    config = ConfigManager().parse_args(flags)
    trainer = config.build()
    trainer.checkpointer.load(step=config.checkpoint.load_step)
    trainer.optimizers.step = lambda: None
    path.MIN_CHUNK = 1  # small batches are cut as large ones are
    texts = json.loads(Path(specs).read_text())
    reads = any("(a)" in text for text in texts.values())
    references = two_references(trainer) if reads and not trainer.parallel_dims.pp_enabled else None
    microbatches = trainer._calls_in_a_step
    batches = [*islice(trainer.dataloader, MOST_STEPS * microbatches)]
    found = {}
    for name, text in texts.items():
        try:
            reads = "(a)" in text
            config.weighting.reference = "a=ema:1,b=ema:1" if reads else ""
            trainer.references = references if reads and references else {}
            found[name] = run(trainer, config, wt.loads(text), batches)
        except ValueError as error:
            found[name] = {"refused": str(error)}
    rank = torch.distributed.get_rank()
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    trainer.close()
    torch.distributed.destroy_process_group()


@torch.no_grad()
def two_references(trainer: Any) -> dict[str, Any]:
    """Return two models like the one that trains, each a little off."""
    from titan_integration.loss.reference_model import build_reference, follow  # noqa: PLC0415

    found = {name: build_reference(trainer.config, trainer.parallel_dims, None) for name in "ab"}
    for model, off in zip(found.values(), (1.2, 0.7), strict=True):
        follow(model, trainer.model_parts[0], 0)
        for parameter in model.parameters():
            parameter.mul_(off)
    return found


def run(trainer: Any, config: Any, spec: wt.Spec, batches: list[Any]) -> dict[str, Any]:
    """Return where the tokens of the last step stand, their weights, the path, the gradients."""
    from titan_integration.trainer.preflight import refuse_unsupported  # noqa: PLC0415 - after the device
    from weighting.build import plan_of  # noqa: PLC0415

    plan = plan_of(spec)
    refuse_unsupported(config, plan)
    trainer._join(config, plan)
    calls, noted = trainer.run.microbatches, {"where": [], "token": []}
    set_batch = calls.set_batch

    def note_weights(run, given):
        weights = WEIGH(run, given)
        noted["token"].append(weights.token.flatten().clone())
        return weights

    def note_place(given, *rest):
        if calls._looking_ahead == (calls.when is When.LOOKAHEAD):
            noted["where"].append(given[WHERE].flatten().clone())
        set_batch(given, *rest)

    Run.weigh, calls.set_batch = note_weights, note_place
    stream = trainer.batch_generator(with_columns(batches))
    for step in range(1, 1 + (MOST_STEPS if trainer.run.fn.state_dict() else 1)):
        for kept in noted.values():
            kept.clear()
        trainer.step = step
        trainer.train_step(stream)
    token = noted["token"] or [torch.zeros(0)]
    where = noted["where"] if noted["token"] else [torch.zeros(0, dtype=torch.int64)]
    return {
        "where": torch.cat(where),
        "token": torch.cat(token),
        "path": (path := trainer.loss_fn._path) and path._asdict(),
        "gradients": {
            name.replace("_checkpoint_wrapped_module.", ""): whole(p.grad)
            for model in trainer.model_parts
            for name, p in model.named_parameters()
            if p.grad is not None
        },
    }


def with_columns(batches: list[Any]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield batches with a reference loss, examples, and where each token stands in the data."""
    for given, labels in batches:
        tokens, length = given["input"], labels.shape[1]
        rows = (tokens.double() * torch.arange(1, length + 1)).sum(1).long()  # tells rows apart
        where = rows[:, None] * length + torch.arange(length)
        reference = 7.6 + 0.3 * (labels % 7 - 3) / 3
        example = (rows % 1000)[:, None].expand_as(labels).contiguous()
        more = {WHERE: where, "columns.ref_loss": reference, "columns.example": example}
        yield given | more, labels


def whole(gradient: Tensor) -> Tensor:
    """Return a gradient whole, whatever it is cut over."""
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


if __name__ == "__main__":
    main()

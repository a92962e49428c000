"""What a run trains with, made once and bound to its loss, metrics and validator.

The host captures forward, loss and backward in a CUDA graph: the Python of the loss runs twice and
never again.  So the step, what the batch brings along, the state of the stages and the statistics
all live in tensors at fixed addresses; the trainer fills them before a step and reads them when it
logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from titan_integration.state.draws import Draws
from titan_integration.state.microbatches import WEIGHTS, Microbatches, When
from weighting.build.step import StepStatistics
from weighting.compiled import compiled
from weighting.contract import Alone
from weighting.loss.cross_entropy import signals_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from titan_integration.state.observer import Observer
    from weighting import Weighting, Weights
    from weighting.contract import Collectives, Level, Signals


class Pipeline(NamedTuple):
    """The stages of a pipeline.

    Attributes:
        stages: Reaches the ranks of the other stages.
        last: The place among them of the one that computes the loss.
    """

    stages: Collectives
    last: int


@dataclass(frozen=True, eq=False)
class Run:
    """A built weighting with its step, the calls of the loss, and statistics of the step.

    Attributes:
        fn: The built spec.
        step: Optimizer step, 0-D int64 on the device.
        microbatches: The calls of the loss.
        statistics: Of this rank's tokens in the current step.
        observer: Is shown every weighted call, if anybody is.
        ranks: Reaches the ranks that hold other tokens.
        pipeline: The stages, where losses and state are known on the last one only.
        row_domains: How many domains the rows of a call may be of, each row of one; 0 where a row
            may have tokens of several.
        draws: The proportions that data is drawn in, if they move.
    """

    fn: Weighting
    step: Tensor
    microbatches: Microbatches
    statistics: StepStatistics
    observer: Observer | None
    ranks: Collectives
    pipeline: Pipeline | None
    _weigh: Callable[[Signals, Tensor], Weights]
    row_domains: int = 0
    draws: Draws | None = None

    @property
    def reads_documents(self) -> bool:
        """Whether the weighting or the observer asks which document each token is in."""
        asked = self.observer is not None and self.observer.reads_documents
        return asked or "segment_ids" in self.fn.needs

    def begin_step(self, step: int) -> None:
        """Set the optimizer step and forget the last one's statistics."""
        self.step.fill_(step)
        self.statistics.begin_step()
        self.microbatches.begin_step()
        if self.observer is not None:
            self.observer.begin_step(step)

    def end_step(self) -> None:
        """Let the observer keep what it saw of the step."""
        if self.observer is not None:
            self.observer.end_step()

    def flush(self) -> None:
        """Let the observer write what it keeps; every rank must call it."""
        if self.observer is not None:
            self.observer.flush()

    def weigh(self, found: Mapping[str, Tensor]) -> Weights:
        """Return the weights of a batch and add to the statistics of the step.

        Args:
            found: All signals that the weighting needs, by name, each [B, L].
        """
        out = self._weigh(signals_of(found), self.step)
        self.statistics.add(out)
        return out

    def weigh_further(self, found: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each token of a further head, [B, L], which no statistic counts.

        Args:
            found: As of `weigh`; the weighting remembers nothing.
        """
        return self._weigh(signals_of(found), self.step).token

    def weigh_noted(self) -> None:
        """Weigh the calls that were noted as one batch."""
        self.microbatches.weigh_noted(self.weigh(self.microbatches.noted()).token)

    def local_part(self, found: Mapping[str, Tensor]) -> Tensor:
        """Return the part of some tokens' weights that their own signals decide, by name."""
        if WEIGHTS in found:
            return found[WEIGHTS]
        return self.fn.local_part(signals_of(found), self.step)

    def from_last(self, x: Tensor) -> Tensor:
        """Return what the last stage of a pipeline has, on every stage; x without a pipeline."""
        if self.pipeline is None:
            return x
        return self.pipeline.stages.gather(x)[self.pipeline.last]

    def read_statistics(self) -> dict[str, float]:
        """Return what `StepStatistics.read` finds over all ranks; every rank must call it."""
        return self.statistics.read(self.ranks, self.from_last)


def start(
    fn: Weighting,
    device: torch.device,
    *,
    when: When = When.NOW,
    calls: int = 1,
    observer: Observer | None = None,
    ranks: Collectives | None = None,
    pipeline: Pipeline | None = None,
    backend: str | None = None,
    row_domains: int = 0,
) -> Run:
    """Return a run of a built weighting, which is moved to the device.

    Args:
        fn: The built spec.
        device: Where batches are.
        when: When the weights of a call are made.
        calls: How many calls of the loss make up a batch of a pipeline.
        observer: Is shown every weighted call.
        ranks: Reaches the ranks that hold other tokens.
        pipeline: The stages, if there are any.
        backend: Compiles the weighting to one graph, if given.  Without it an accelerator's
            compiler is asked, and is not needed.
        row_domains: How many domains the rows of a call may be of, each row of one, if they are.
    """
    fn = fn.to(device)
    weigh: Callable[[Signals, Tensor], Weights] = fn
    if backend is not None:
        weigh = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)
    elif device.type != "cpu":
        weigh = compiled(fn)
    return Run(
        fn,
        torch.zeros((), dtype=torch.int64, device=device),
        Microbatches(fn, when, calls, observer, device),
        StepStatistics(fn, device, _MORE_UNITS),
        observer,
        ranks or Alone(),
        pipeline,
        weigh,
        row_domains,
        Draws(fn, device) if fn.plan.draws_live else None,
    )


_MORE_UNITS: dict[Level, str] = {
    "sequence": (
        "a row is a sequence: take more rows at once (--training.local_batch_size), or write "
        "scope: step or scope: running into the spec"
    ),
    "document": (
        "take more text at once (--training.local_batch_size, --training.seq_len), or write "
        "scope: step or scope: running into the spec"
    ),
    "domain": "mix domains in each batch (--training.local_batch_size, or the order of the data)",
}
"""What to do where a batch has one unit of a level."""

"""The loss that an example had when it was last seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.contract.levels import sum_by
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


class OfExamples(Source):
    """Remembers numbers of each example, which the column `key` numbers."""

    examples: int = Field(ge=1, le=2**24)  # numbers that a float32 column holds exactly
    key: Annotated[str, Field(min_length=1)] = "example"

    @override
    def reads(self) -> frozenset[str]:
        """Return the loss and the column, by name."""
        return frozenset({"loss", signal_of(self.key)})

    def places(self, signals: Signals, scope: Scope) -> Tensor:
        """Return where each token's example is remembered, [T]; 0 at tokens that do not count."""
        return torch.where(scope.valid, signals.columns[self.key], 0).long() % self.examples


@stage("remembered")
class Remembered(OfExamples):
    """Mean loss of a token's example in the last batch before this one that it was in, in nats.

    score_t = m_e of the batches before, or m_e of this batch for an example never seen
    m_e <- mean loss of the tokens of example e      for each example of a batch

    The column `key` numbers the examples: documents, from 0, in their order in the data.  The
    trainer's loader counts them where `key` is `example` and data is read by index; streams and
    other hosts have a column of that name.  Numbers that differ by a multiple of `examples` share a
    place, so take as many as the data has.  Every batch sums two numbers per place over all ranks,
    and the state has four.

    Source: Loshchilov and Hutter (2015), arXiv:1511.06343 (latest known losses); Qin et al. (2024),
    "InfoBatch", ICLR, arXiv:2303.04947 (scores of the epoch before).  Differs: of a document that
    is cut over rows, the tokens of the last batch count.
    """

    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "known": saved.between(0, 1),
        "earlier_known": saved.between(0, 1),
    }

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return losses of examples and whether they are known, now and before the last batch."""
        del domains
        names = ("losses", "known", "earlier_losses", "earlier_known")
        return {name: torch.zeros(self.examples) for name in names}

    @override
    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Remember the mean losses of the batch's examples."""
        state = scope.state
        at = self.places(signals, scope)
        there, means = means_by(at, signals.loss, scope, self.examples)
        return {
            "losses": torch.where(there, means, state["losses"]),
            "known": torch.where(there, 1, state["known"]),
            # Copies, as the state is written where it is, one tensor after the other.
            "earlier_losses": state["losses"].clone(),
            "earlier_known": state["known"].clone(),
        }

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return what was known of each token's example."""
        state = scope.state
        found = torch.where(state["earlier_known"] > 0, state["earlier_losses"], state["losses"])
        return found[self.places(signals, scope)]


def means_by(at: Tensor, x: Tensor, scope: Scope, examples: int) -> tuple[Tensor, Tensor]:
    """Return which places have a token in the batch of all ranks, and the means of x there, [E].

    Args:
        at: Place of each token's example, [T].
        x: A number of each token, [T].
        scope: Which tokens count, and the ranks.
        examples: How many places there are.
    """
    both = torch.where(scope.valid, torch.stack([x, torch.ones_like(x)]), 0)
    sums = sum_by(at, examples, both)
    total, count = sums if scope.collectives is None else scope.collectives.sum(sums)
    return count > 0, total / count.clamp(min=1)

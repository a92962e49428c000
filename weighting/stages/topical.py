"""Weights of topics that move every so many batches, by how a topic's loss compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("topical")
class Topical(Weigh):
    """Every `every` batches, move each domain's weight by how its loss compares with the mean.

    gap_d = (mean loss of d - mean loss) / mean loss, over the batches since the last move
    lift = 1:  w_d <- w_d (1 + gap_d)      where gap_d > 0
    lift = 0:  w_d <- w_d (1 - gap_d)      where gap_d > 0,   w_d (1 + |gap_d|) elsewhere
    w_d is kept from `low` to `high`

    `lift` is a schedule: raise topics that are behind first, and lower them later.

    Source: Zhu et al. (2025), "ToReMi", arXiv:2504.00695.  Differs: one topic (domain) per token,
    where theirs average the weights of several; the means run over all ranks, theirs per rank.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    scaled: ClassVar[bool] = False
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "weights": saved.weights,
        "times": saved.count,
        "batches": saved.count,
    }
    every: int = Field(default=100, ge=1)
    lift: UnitNumber = Constant(value=1)
    low: NonNegativeNumber = Constant(value=0.1)
    high: NonNegativeNumber = Constant(value=5)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return weights of one, and empty sums of losses."""
        size = max(len(domains), 1)
        return {
            "weights": torch.ones(size),
            "losses": torch.zeros(size),
            "times": torch.zeros(size),
            "batches": torch.zeros((), dtype=torch.int64),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Add the batch to the sums; move the weights when it is time."""
        state = scope.state
        losses = state["losses"] + torch.where(scope.valid, x, 0)
        times = state["times"] + scope.valid
        batches = state["batches"] + 1
        gain = gains(losses, times, self.lift(scope.step))
        moved = (state["weights"] * gain).clamp(self.low(scope.step), self.high(scope.step))
        due = batches % self.every == 0
        return {
            "weights": torch.where(due, moved, state["weights"]),
            "losses": torch.where(due, 0, losses),
            "times": torch.where(due, 0, times),
            "batches": batches,
        }

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights as they are now."""
        del x
        return scope.state["weights"]


def gains(losses: Tensor, times: Tensor, lift: Tensor) -> Tensor:
    """Return the factor of each topic's weight from its summed losses, [K], and how many they are.

    1 + max(gap, 0) where lift is positive, 1 - gap otherwise; 1 for a topic not seen.
    """
    seen = times > 0
    mean = losses.sum() / times.sum().clamp(min=1)
    gap = torch.where(seen, losses / times.clamp(min=1) - mean, 0) / mean.clamp(min=1e-6)
    # Below the mean, 1 + |gap| is 1 - gap too.
    return torch.where(lift > 0, 1 + gap.clamp(min=0), (1 - gap).clamp(min=0))

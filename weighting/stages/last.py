"""Earlier scores of each domain."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Shape
from weighting.registry import stage
from weighting.stages.ema import or_mean

if TYPE_CHECKING:
    from torch import Tensor


class RecentScores(Shape):
    """What remembers the last scores of each domain, newest first, and how many there have been."""

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {"times": saved.count}

    @abstractmethod
    def remembered(self) -> int:
        """Return how many scores of each domain are kept."""

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return no scores, newest first, and how many of each domain there have been."""
        count = max(len(domains), 1)
        return {
            "scores": torch.zeros(count, self.remembered()),
            "times": torch.zeros(count, dtype=torch.int64),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Put the scores of the domains in the batch before the older ones."""
        scores, times = scope.state["scores"], scope.state["times"]
        moved = torch.cat([x[:, None], scores[:, :-1]], dim=1)
        return {
            "scores": torch.where(scope.valid[:, None], moved, scores),
            "times": times + scope.valid,
        }


@stage("last")
class Last(RecentScores):
    """Score of each domain `ago` batches with it back: 0 is the batch at hand, if it is in it.

    y_d(t) = x_d(t - ago),   t counts the batches with d

    Where there have been fewer batches, the oldest counts; a domain not yet seen counts with the
    mean of the others.  Known between batches, so data can be drawn by it.
    """

    ago: int = Field(default=0, ge=0, le=10_000)

    @override
    def remembered(self) -> int:
        """Return one more than goes back."""
        return self.ago + 1

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the earlier scores."""
        del x
        scores, times = scope.state["scores"], scope.state["times"]
        place = (times - 1).clamp(min=0, max=self.ago)
        return or_mean(scores.gather(1, place[:, None])[:, 0], times > 0)

"""A moving average of each domain's score."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting.contract import Level, Scope, Shape
from weighting.registry import stage
from weighting.schedules import Constant, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("ema")
class Ema(Shape):
    """Smooth the score of each domain over the batches it is in.

    y_d(t) = decay * y_d(t - 1) + (1 - decay) * x_d(t),   t counts the batches with d

    The first batch with a domain sets its average; before it, the domain counts with the mean of
    the others.  Known between batches, so data can be drawn by it.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    known_between_batches: ClassVar[bool] = True
    decay: UnitNumber = Constant(value=0.9)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return averages, and which domains have been seen."""
        count = max(len(domains), 1)
        return {"smoothed": torch.zeros(count), "seen": torch.zeros(count, dtype=torch.bool)}

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Move the averages of the domains in the batch."""
        before, seen, decay = scope.state["smoothed"], scope.state["seen"], self.decay(scope.step)
        moved = torch.where(seen, decay * before + (1 - decay) * x, x)
        return {"smoothed": torch.where(scope.valid, moved, before), "seen": seen | scope.valid}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the averages."""
        del x
        return or_mean(scope.state["smoothed"], scope.state["seen"])


def or_mean(score: Tensor, seen: Tensor) -> Tensor:
    """Return scores [K], those of domains not yet seen being the mean of the others; 0 of none."""
    mean = torch.where(seen, score, 0).sum() / seen.sum().clamp(min=1)
    return torch.where(seen, score, mean)

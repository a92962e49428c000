"""How fast each domain's score moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from typing_extensions import override

from weighting.registry import stage
from weighting.stages.last import RecentScores

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract import Scope


@stage("slope")
class Slope(RecentScores):
    """Change of each domain's score per batch: the line of least squares through its last scores.

    y_d = sum_t (t - mean t) (x_d(t) - mean x_d) / sum_t (t - mean t)^2,   t the last `history`

    A loss that falls has a negative slope.  A domain seen less than twice has slope 0.  Known
    between batches, so data can be drawn by it.
    """

    history: int = Field(default=100, ge=2, le=10_000)

    @override
    def remembered(self) -> int:
        """Return how far the line goes back."""
        return self.history

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the slopes."""
        del x
        scores, times = scope.state["scores"], scope.state["times"]
        age = torch.arange(self.history, device=scores.device)
        there = (age < times[:, None]).to(scores.dtype)
        count = there.sum(1, keepdim=True).clamp(min=1)
        time = -age - (there * -age).sum(1, keepdim=True) / count
        change = scores - (there * scores).sum(1, keepdim=True) / count
        squares = (there * time * time).sum(1)
        return (there * time * change).sum(1) / torch.where(squares > 0, squares, 1)

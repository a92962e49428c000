"""Which side of a threshold a score is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.contract.statistic import NumberOrStatistic, value_of
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("indicator")
class Indicator(Shape):
    """Map scores on one side of a threshold to 1, the others to 0.

    y_i = 1[x_i >= at]  for side above,  1[x_i <= at]  for side below

    `at` may be a statistic of the scores, as in indicator(mean).  `threshold` does the same and
    makes weights of it; this goes on as a score.
    """

    at: NumberOrStatistic
    side: Literal["above", "below"] = "above"

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return ones and zeros."""
        at = value_of(self.at, x, scope)
        return torch.where((x >= at) if self.side == "above" else (x <= at), 1.0, 0.0)

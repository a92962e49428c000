"""Keep the units on one side of a threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import model_validator
from typing_extensions import override

from weighting.contract import Scope, Weigh
from weighting.contract.statistic import NumberOrStatistic, value_of
from weighting.registry import stage
from weighting.schedules import UnitNumber

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@stage("threshold")
class Threshold(Weigh):
    """Weigh units on one side of a score 1, the others 0; if none is, all weigh 0.

    w_i = 1[x_i >= at]  for side above,  1[x_i <= at]  for side below

    `quantile` q sets the threshold in the scope: above keeps the highest floor((1 - q) n), below
    the lowest floor(q n); at least one, ties included.  `at` may be a statistic of the scores:
    threshold(at=mean+3*std) keeps what stands out.  Not mean one by itself: `normalize: none`
    keeps the plain 0 and 1.

    Source: Bal et al. (2025), "ESLM", arXiv:2505.19893 (value at risk); Li et al. (2024), "Error
    Norm Truncation", arXiv:2310.00840 (below).
    """

    scaled: ClassVar[bool] = False
    at: NumberOrStatistic | None = None
    quantile: UnitNumber | None = None
    side: Literal["above", "below"] = "above"

    @override
    def max_active_fraction(self) -> float:
        """Return the share on that side of the quantile; all units for a fixed threshold."""
        if self.quantile is None:
            return 1.0
        shares = self.quantile.extremes()
        return 1 - min(shares) if self.side == "above" else max(shares)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.at is None) == (self.quantile is None):
            msg = "give at or quantile, not both"
            raise ValueError(msg)
        return self

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return 1 for what is kept, 0 for the rest."""
        if self.at is not None:
            at = value_of(self.at, x, scope)
        else:
            assert self.quantile is not None
            count, q = scope.count(), self.quantile(scope.step)
            if self.side == "above":
                k = (count * (1 - q) + 1e-4).floor()  # 0.3 * 10 is 3
            else:
                k = count + 1 - (count * q + 1e-4).floor().clamp(min=1)
            at = scope.kth_largest(x, k)
        return torch.where((x >= at) if self.side == "above" else (x <= at), 1.0, 0.0)

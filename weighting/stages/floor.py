"""A least weight, as an exact projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from weighting.capped_simplex import raise_to
from weighting.contract import Constrain, Scope
from weighting.registry import stage
from weighting.schedules import FloorNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("floor")
class Floor(Constrain):
    """Let no weight fall below `min`, keeping sum and order; weights already above it stay.

    w' = maximum(min, s * w),  s such that sum(w') = sum(w)

    `min` is a multiple of the mean weight, or a share of the total: 0.1/n is a tenth of the mean.
    To mix with uniform weights instead, as DoReMi smooths, use interpolate.
    """

    min: FloorNumber

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the raised weights."""
        return raise_to(x, self.min(scope.step), scope)

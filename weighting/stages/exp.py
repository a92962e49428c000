"""Exponential."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("exp")
class Exp(Shape):
    """Exponential of the score.

    y = exp(minimum(x, 60))

    The bound keeps it, and sums of it, finite in float32.
    """

    pointwise: ClassVar[bool] = True

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return exp(x)."""
        del scope
        return x.clamp(max=60).exp()

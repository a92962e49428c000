"""Stretch and shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage
from weighting.schedules import Constant, Number

if TYPE_CHECKING:
    from torch import Tensor


@stage("affine")
class Affine(Shape):
    """Stretch and shift the score.

    y = scale * x + shift
    """

    pointwise: ClassVar[bool] = True
    scale: Number = Constant(value=1)
    shift: Number = Constant(value=0)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return scale * x + shift."""
        return self.scale(scope.step) * x + self.shift(scope.step)

"""Absolute value."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("abs")
class Abs(Shape):
    """Absolute value of the score.

    y = |x|
    """

    pointwise: ClassVar[bool] = True

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return |x|."""
        del scope
        return x.abs()

"""Sigmoid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("sigmoid")
class Sigmoid(Shape):
    """Sigmoid of the score: from 0 to 1, a half at 0.

    y = 1 / (1 + exp(-x))
    """

    pointwise: ClassVar[bool] = True

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the sigmoids."""
        del scope
        return x.sigmoid()

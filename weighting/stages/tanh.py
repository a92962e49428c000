"""Hyperbolic tangent."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("tanh")
class Tanh(Shape):
    """Hyperbolic tangent of the score: from -1 to 1, 0 at 0.

    y = tanh(x)
    """

    pointwise: ClassVar[bool] = True

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return tanh(x)."""
        del scope
        return x.tanh()

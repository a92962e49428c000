"""Logarithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("log")
class Log(Shape):
    """Natural logarithm of the score.

    y = log(maximum(x, 1e-30))
    """

    pointwise: ClassVar[bool] = True

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return log(x)."""
        del scope
        return x.clamp(min=1e-30).log()

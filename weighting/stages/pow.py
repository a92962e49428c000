"""Raise to a power."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage
from weighting.schedules import Constant, Number

if TYPE_CHECKING:
    from torch import Tensor


@stage("pow")
class Pow(Shape):
    """Raise the score to a power.

    y = x ** exponent

    A negative score has a real power only for a whole constant exponent; for any other it counts
    as 0.
    """

    pointwise: ClassVar[bool] = True
    exponent: Number

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the powers."""
        if isinstance(self.exponent, Constant) and self.exponent.value == round(
            self.exponent.value
        ):
            return torch.pow(x, self.exponent.value)
        return torch.pow(x.clamp(min=0), self.exponent(scope.step))

"""Cut scores off at a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import model_validator
from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage
from weighting.schedules import Number

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@stage("clip")
class Clip(Shape):
    """Cut the score off below `min` and above `max`; either may be left out.

    y = minimum(maximum(x, min), max)
    """

    pointwise: ClassVar[bool] = True
    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is None and self.max is None:
            msg = "needs min, max or both"
            raise ValueError(msg)
        if self.min and self.max and max(self.min.extremes()) > min(self.max.extremes()):
            msg = "min must not exceed max"
            raise ValueError(msg)
        return self

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the clipped scores."""
        if self.min is not None:
            x = torch.maximum(x, self.min(scope.step))
        if self.max is not None:
            x = torch.minimum(x, self.max(scope.step))
        return x

"""How many different ones among so many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting.contract import Scope, Shape
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("effective_number")
class EffectiveNumber(Shape):
    """Effective number of a count: of x drawn from `volume` possible ones, how many differ.

    E = volume * (1 - beta^x) = (1 - beta^x) / (1 - beta),   beta = 1 - 1 / volume

    Few are nearly as many as they are; many add less and less, up to `volume`.  The class-balanced
    weight is its inverse: effective_number(10000) -> pow(-1), of beta 0.9999.  A negative count is
    0.

    Source: Cui et al. (2019), "Class-Balanced Loss Based on Effective Number of Samples", CVPR,
    arXiv:1901.05555 (Proposition 1).
    """

    pointwise: ClassVar[bool] = True
    volume: int = Field(ge=2, le=10**9)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the effective numbers."""
        del scope
        # 1 - beta^x by expm1: beta^x is near one for small counts.
        rate = math.log1p(-1 / self.volume)
        return -self.volume * torch.expm1(x.clamp(min=0) * rate)

"""The cap on any weight, as an exact projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from weighting.capped_simplex import cap as capped
from weighting.contract import Constrain, Scope
from weighting.registry import stage
from weighting.schedules import CapNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("clamp")
class Clamp(Constrain):
    """Let no weight exceed `max`, keeping sum and order; weights already below it stay.

    w' = minimum(max, s * w),  s such that sum(w') = sum(w)

    `max` is a multiple of the mean weight, or a share of the total: 2/n means twice the mean.
    Clipping alone would lose part of the sum and rescaling would break the cap; this is the
    Kullback-Leibler projection onto the capped simplex.

    Source: Sow et al. (2025), ICLR, arXiv:2502.06733, theorem 1 (w <= 2/n) and proposition 1.
    Differs: the authors' code has no cap; it holds there by itself only for tau above 1.38-1.44.
    """

    max: CapNumber

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the capped weights."""
        return capped(x, self.max(scope.step), scope)

    @override
    def cap(self, step: Tensor) -> Tensor | None:
        """Return `max`."""
        return self.max(step)

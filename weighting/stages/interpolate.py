"""Mix with uniform weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Constrain, Scope
from weighting.registry import stage
from weighting.schedules import UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("interpolate")
class Interpolate(Constrain):
    """Mix with uniform weights: lam 1 is plain training, lam 0 changes nothing.

    w' = lam + (1 - lam) * w

    Source: Xie et al. (2023), "DoReMi", NeurIPS, arXiv:2305.10429, algorithm 1 (smoothing c).
    """

    pointwise: ClassVar[bool] = True
    lam: UnitNumber

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the mixed weights."""
        lam = self.lam(scope.step)
        return lam + (1 - lam) * x

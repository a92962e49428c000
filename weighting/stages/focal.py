"""Focal score: how far the label is from being certain."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("focal")
class Focal(Source):
    """Rises with the probability the label was missing.

    score_t = (1 - p_t) ** gamma,  p_t = exp(-loss_t)

    Source: Lin et al. (2017), "Focal Loss for Dense Object Detection", arXiv:1708.02002, eq. 4.
    Differs: gamma is 1 by default, as in MiLe's language-model runs; 1 - p is taken as
    -expm1(-loss), exact where 1 - exp(-loss) rounds to zero.
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    gamma: NonNegativeNumber = Constant(value=1)

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the focal score."""
        return (-(-signals.loss).expm1()).clamp(min=0) ** self.gamma(scope.step)

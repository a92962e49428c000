"""Take scores for weights, as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Weigh
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("as_is")
class AsIs(Weigh):
    """Take non-negative scores for weights, unscaled; negative ones count as 0.

    w = maximum(x, 0)

    For published methods that do not normalise; write `normalize: none` beside it.
    """

    pointwise: ClassVar[bool] = True
    scaled: ClassVar[bool] = False

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the scores, at most 1e30."""
        del scope
        return x.clamp(0, 1e30)

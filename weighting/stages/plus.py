"""Sum of two scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from weighting.contract import Combine, Scope
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("plus")
class Plus(Combine):
    """Add the score of another pipeline of the same level.

    y = x + other
    """

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the sums."""
        del scope
        return x[0] + x[1]

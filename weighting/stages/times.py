"""Product of two scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from weighting.contract import Combine, Scope
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 1e30


@stage("times")
class Times(Combine):
    """Multiply by the score of another pipeline of the same level.

    y = x * other,   kept from -1e30 to 1e30
    """

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the products."""
        del scope
        return (x[0] * x[1]).clamp(-_LARGEST, _LARGEST)

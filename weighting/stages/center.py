"""Scores against their middle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from weighting.contract import Scope, Shape, Within
from weighting.contract.statistic import value_of
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("center")
class Center(Shape):
    """Subtract the mean of the scope's scores, or their median.

    y = x - mean(x)

    `within: sequence` (or document, domain) takes the mean inside each unit, of tokens;
    `within: domain` of documents and sequences too.
    """

    at: Literal["mean", "median"] = "mean"
    within: Within | None = None

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the differences."""
        return x - value_of(self.at, x, scope)

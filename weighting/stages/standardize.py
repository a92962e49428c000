"""Scores in standard deviations from their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.contract import Scope, Shape, Within
from weighting.contract.statistic import mean_and_deviation
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("standardize")
class Standardize(Shape):
    """Count the scope's standard deviations from its mean; a scope of equal scores maps to 0.

    y = (x - mean(x)) / std(x)

    The deviation is that of all scores, not of a sample.  Scores that differ by less than a
    millionth of their mean count as equal.  `within: sequence` (or document, domain) works inside
    each unit, of tokens; `within: domain` of documents and sequences too.
    """

    within: Within | None = None

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the standardised scores."""
        mean, std = mean_and_deviation(x, scope)
        flat = std <= 0
        return torch.where(flat, 0, (x - mean) / torch.where(flat, 1, std))

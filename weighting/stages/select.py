"""Keep a share of the units, drop the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from weighting.contract import Scope, Weigh, Within
from weighting.registry import stage
from weighting.schedules import ShareNumber

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@stage("select")
class Select(Weigh):
    """Weigh the highest `keep` of the scores alike and the others 0; ties are kept together.

    w_i = n / k  where x_i is among the k = floor(keep * n) highest (at least one), else 0

    `slice` s skips the s * k highest first: the second slice of an eighth is
    select(0.125, slice=1).  `within: sequence` (or document, domain) selects inside each unit
    instead, of tokens; `within: domain` of documents and sequences too.

    Source: Lin et al. (2024), "Rho-1", arXiv:2404.07965; Mindermann et al. (2022), "RHO-LOSS",
    ICML, arXiv:2206.07137; Chen et al. (2024), arXiv:2402.14270 (the slice).
    """

    keep: ShareNumber
    slice: int = Field(default=0, ge=0)

    within: Within | None = None

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def max_active_fraction(self) -> float:
        """Return the largest `keep`."""
        return max(self.keep.extremes())

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if max(self.keep.extremes()) * (self.slice + 1) > 1:
            msg = "keep * (slice + 1) must not exceed 1: the slice lies beyond the last unit"
            raise ValueError(msg)
        return self

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return n / k for what is kept, 0 for the rest."""
        count = scope.count()
        k = (count * self.keep(scope.step) + 1e-4).floor().clamp(min=1)  # 0.3 * 10 is 3
        lowest = scope.kth_largest(x, k * (self.slice + 1))
        kept, tie = x >= lowest, x == lowest
        if self.slice:
            kept &= x < scope.kth_largest(x, k * self.slice)
        number, tied = scope.sum(torch.stack([kept, tie]).float())
        empty = number == 0  # the slice lies inside one tie: keep the tie
        kept = torch.where(empty, tie, kept)
        return torch.where(kept, count / torch.where(empty, tied, number).clamp(min=1), 0)

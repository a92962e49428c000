"""From a score per token to a score per document, sequence or domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.contract import Pool
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.levels import Groups


@stage("mean")
class Mean(Pool):
    """Mean over the valid tokens of each unit.

    score_u = sum_{t in u} score_t / |u|
    """

    @override
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return the means."""
        total, count = groups.sum(
            torch.stack([torch.where(valid, score, 0), valid.to(score.dtype)])
        )
        return total / count.clamp(min=1)


@stage("sum")
class Sum(Pool):
    """Sum over the valid tokens of each unit.

    score_u = sum_{t in u} score_t
    """

    @override
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return the sums."""
        return groups.sum(torch.where(valid, score, 0))


@stage("max")
class Max(Pool):
    """Largest score among the valid tokens of each unit.

    score_u = max_{t in u} score_t
    """

    @override
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return the maxima."""
        largest = groups.max(torch.where(valid, score, -torch.inf))
        return torch.where(largest == -torch.inf, 0, largest)

"""From a score per token to a score per document, sequence or domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator
from typing_extensions import override

from weighting.contract import Pool
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract.levels import Groups


def _not_zero(tilt: float) -> float:
    if tilt == 0:
        msg = "must not be 0; that is the mean"
        raise ValueError(msg)
    return tilt


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


@stage("tilted")
class Tilted(Pool):
    """Tilted mean: from the minimum (t to -inf) over the mean (t to 0) to the maximum (t to inf).

    score_u = log(mean_{t in u} exp(tilt * score_t)) / tilt

    Source: Li et al. (2021), "Tilted Empirical Risk Minimization", ICLR, arXiv:2007.01162, eq. 2.
    """

    tilt: Annotated[float, AfterValidator(_not_zero)]

    @override
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return the tilted means."""
        z = score * self.tilt
        top = groups.max(torch.where(valid, z, -torch.inf))
        top = torch.where(top == -torch.inf, 0, top)
        # exp(x) - 1 and log(1 + x), lest a small tilt drown in the rounding of 1.
        raised = torch.where(valid, (z - groups.broadcast(top)).expm1(), 0)
        total, count = groups.sum(torch.stack([raised, valid.to(z.dtype)]))
        mean = (total / count.clamp(min=1)).clamp(min=-1 + 1e-7)
        return torch.where(count > 0, (top + mean.log1p()) / self.tilt, 0)


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


@stage("length")
class Length(Pool):
    """Number of valid tokens of each unit, whatever their scores.

    score_u = |u|
    """

    @override
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return the lengths."""
        return groups.sum(valid.to(score.dtype))

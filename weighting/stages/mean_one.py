"""Scale scores to mean one: the scores are the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.contract import DeferredScale, Scope, Stage, Sugar, Weigh, Within
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("mean_one")
class MeanOne(Weigh):
    """Scale the scores to mean one over the scope; negative scores count as 0.

    w = x * n / sum(x)

    When every score is 0, every weight is 1.  `within: sequence` (or document, domain) scales
    inside each unit instead, of tokens; `within: domain` of documents and sequences too.

    Source: Su et al. (2024), "MiLe Loss", arXiv:2310.19531 (the factor alpha).
    Differs: one mean over all valid tokens; the authors average the reciprocals of per-rank means
    that also count ignored positions.
    """

    within: Within | None = None

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def deferred_scale(self) -> DeferredScale | None:
        """Return the clamped scores, and their division by the mean; None within units."""
        return None if self.within else DeferredScale(_raw, _scale)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights."""
        w = _raw(x)
        total, count = scope.sum(torch.stack([w, torch.ones_like(w)]))
        return _scale(w, total, count)


def _raw(x: Tensor) -> Tensor:
    return x.clamp(0, 1e30)  # a finite sum of up to 1e8 scores


def _scale(raw: Tensor, total: Tensor, count: Tensor) -> Tensor:
    zero = total <= 0
    # Dividing first keeps scores of 1e-40 from overflowing n / sum.
    return torch.where(zero, 1, raw / torch.where(zero, 1, total) * count)


@stage("token_scale")
class TokenScale(Sugar):
    """Scale scores to mean one, as MiLe says it.

    Sugar: mean_one.
    """

    gives = "weight"
    kind = "weigh"

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return `mean_one`."""
        return (MeanOne(),)

"""Softmax with a temperature: from scores to weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.capped_simplex import TINY
from weighting.contract import Scope, Weigh, Within
from weighting.contract.statistic import PositiveNumberOrStatistic, value_of
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("temperature")
class Temperature(Weigh):
    """Softmax over the scope, scaled to mean one; all weights tend to 1 as tau grows.

    w = n * exp(x / tau) / sum(exp(x / tau))

    The exponent is at least log(1e-30) below its maximum, so that no weight underflows to zero
    and a later cap can always restore the sum.  `within: sequence` (or document, domain) weighs
    inside each unit instead, of tokens; `within: domain` of documents and sequences too.  A
    statistic for tau is that of the scores' sizes: temperature(median) divides by median |x|.

    Source: Sow et al. (2025), ICLR, arXiv:2502.06733, (tau is the paper's r; KL-regularised
    weights, after Qi et al. 2021).
    """

    tau: PositiveNumberOrStatistic

    within: Within | None = None

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights."""
        tau = value_of(self.tau, x.abs(), scope).clamp(min=TINY)
        below = (x - scope.max(x)) / tau
        w = torch.where(scope.valid, below.clamp(min=math.log(TINY)).exp(), 0)
        total, count = scope.sum(torch.stack([w, scope.valid.to(w.dtype)]))
        return w * (count / total.clamp(min=TINY))

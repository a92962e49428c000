"""Multiplicative weights per domain, as DoReMi and Group DRO keep them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from typing_extensions import override

from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage
from weighting.schedules import Constant, Number, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("exponentiated")
class Exponentiated(Weigh):
    """Raise the weight of domains with high scores, step by step; it is remembered.

    a <- a * exp(step_size * x) / Z;   a <- (1 - smoothing) * a + smoothing / K;   w = K * a

    A domain absent from the batch counts with its last score (`absent: last`, 0 before it was
    first seen) or not at all (`skip`).  The state also holds the average of a over all batches,
    the initial weights 1/K included: the proportions DoReMi exports.

    Source: Xie et al. (2023), "DoReMi", arXiv:2305.10429, algorithm 1, and the authors' code;
    Sagawa et al. (2020), Group DRO, arXiv:1911.08731.  Differs: a domain not yet seen counts 0,
    in the authors' code log(vocabulary size); all ranks use the new weights at once, where
    theirs lag a step behind rank 0.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    scaled: ClassVar[bool] = False  # over all domains, absent ones too
    statistics: ClassVar[str] = "sum"
    step_size: Number = Constant(value=1)
    smoothing: UnitNumber = Constant(value=1e-3)
    absent: Literal["last", "skip"] = "last"

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights, their average so far, how many it averages, and the last scores."""
        count = max(len(domains), 1)
        return {
            "log_weights": torch.full((count,), -math.log(count)),
            "average": torch.full((count,), 1 / count),
            "batches": torch.ones((), dtype=torch.int64),
            "last": torch.zeros(count),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Take one step of the update."""
        state = scope.state
        last = torch.where(scope.valid, x, state["last"])
        score = last if self.absent == "last" else torch.where(scope.valid, x, 0)
        weights = (state["log_weights"] + self.step_size(scope.step) * score).softmax(0)
        smoothing = self.smoothing(scope.step)
        weights = (1 - smoothing) * weights + smoothing / weights.numel()
        batches = state["batches"] + 1
        average = state["average"] + (weights - state["average"]) / batches
        return {
            "log_weights": weights.clamp(min=1e-30).log(),
            "average": average,
            "batches": batches,
            "last": last,
        }

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return K times the weights, mean one over all domains, present or not."""
        weights = scope.state["log_weights"].exp()
        return weights * weights.numel()

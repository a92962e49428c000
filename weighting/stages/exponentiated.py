"""Multiplicative weights per domain, as DoReMi and Group DRO keep them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage
from weighting.schedules import Constant, Number, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("exponentiated")
class Exponentiated(Weigh):
    """Raise the weight of domains with high scores, step by step; it is remembered.

    a <- a * exp(step_size * x) / Z;   a <- (1 - smoothing) * a + smoothing / K;   w = K * a

    A domain absent from the batch counts with its last score (`absent: last`; `unseen` before it
    was first seen) or not at all (`skip`).  The state also holds the average of a over all batches,
    the initial weights 1/K included: the proportions DoReMi exports.

    Source: Xie et al. (2023), "DoReMi", arXiv:2305.10429, algorithm 1, and the authors' code;
    Sagawa et al. (2020), Group DRO, arXiv:1911.08731.  Differs: all ranks use the new weights at
    once, where DoReMi's lag a step behind rank 0; `unseen` is 0 unless it is given, and
    log(vocabulary size) in DoReMi's code, where it makes up most of the weights after one batch.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    scaled: ClassVar[bool] = False  # over all domains, absent ones too
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "log_weights": saved.log_shares,
        "average": saved.shares,
        "batches": saved.between(1),
    }
    step_size: Number = Constant(value=1)
    smoothing: UnitNumber = Constant(value=1e-3)
    absent: Literal["last", "skip"] = "last"
    unseen: float = Field(default=0, ge=0, le=1e30)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights, their average so far, how many it averages, and the last scores."""
        count = max(len(domains), 1)
        return {
            "log_weights": torch.full((count,), -math.log(count)),
            "average": torch.full((count,), 1 / count),
            "batches": torch.ones((), dtype=torch.int64),
            "last": torch.full((count,), self.unseen),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Take one step of the update."""
        state = scope.state
        last = torch.where(scope.valid, x, state["last"])
        score = last if self.absent == "last" else torch.where(scope.valid, x, 0)
        gains = self.step_size(scope.step) * score
        weights = raised(state["log_weights"], gains, self.smoothing(scope.step))
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


def raised(log_weights: Tensor, gains: Tensor, smoothing: Tensor) -> Tensor:
    """Return weights that sum to one, [K]: each times the exponential of its gain, smoothed."""
    weights = (log_weights + gains).softmax(0)
    return (1 - smoothing) * weights + smoothing / weights.numel()

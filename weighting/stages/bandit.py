"""Weights per domain of a bandit that is rewarded with loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("bandit")
class Bandit(Weigh):
    """Draw domains with a high loss more often, less and less by chance: the EXP3 bandit.

    R_d <- R_d + reward * x_d / a_d   for each domain in the batch
    a <- (1 - K e_t) exp(e_{t-1} R) / Z + e_t;   w = K * a
    e_t = min(1/K, sqrt(log(K) / (K t))),  t: batches so far

    Made for `apply: sampling`: dividing by the probability of the draw makes the reward unbiased
    where a domain is seen by chance.

    Source: Albalak et al. (2023), "Efficient Online Data Mixing", arXiv:2312.02406, algorithm 1,
    and the authors' code (reward: a tenth of the loss).  Differs: theirs draw one domain for each
    batch and reward that one; here every domain in the batch is rewarded.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    scaled: ClassVar[bool] = False  # over all domains, absent ones too
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {"weights": saved.shares, "batches": saved.count}
    reward: NonNegativeNumber = Constant(value=0.1)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return summed rewards, equal weights, and the number of batches."""
        count = max(len(domains), 1)
        return {
            "rewards": torch.zeros(count),
            "weights": torch.full((count,), 1 / count),
            "batches": torch.zeros((), dtype=torch.int64),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Reward the domains of the batch and take one step of the update."""
        state, batches = scope.state, scope.state["batches"] + 1
        gains = torch.where(scope.valid, self.reward(scope.step) * x / state["weights"], 0)
        rewards = (state["rewards"] + gains).clamp(max=1e30)
        return {"rewards": rewards, "weights": exp3(rewards, batches), "batches": batches}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return K times the weights, mean one over all domains, present or not."""
        del x
        weights = scope.state["weights"]
        return weights * weights.numel()


def exp3(rewards: Tensor, rounds: Tensor) -> Tensor:
    """Return the weights after so many rounds, of summed rewards, [K]; they sum to one."""
    count = rewards.numel()
    explored, last = (
        (math.log(count) / (count * t.float().clamp(min=1e-9))).sqrt().clamp(max=1 / count)
        for t in (rounds, rounds - 1)
    )
    return (1 - count * explored) * (last * rewards).softmax(0) + explored

"""Weights per domain of a bandit that is rewarded with validation loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.capped_simplex import TINY
from weighting.contract import Feedback, Scope
from weighting.contract.feedback_source import FeedbackSource
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber
from weighting.stages.bandit import exp3

if TYPE_CHECKING:
    from torch import Tensor


@stage("validation_bandit")
class ValidationBandit(FeedbackSource):
    """Draw domains with a high validation loss more often: `bandit`, moved by each validation.

    R_d <- R_d + reward * V_d / a_d   for each domain with validation text
    a <- (1 - K e_t) exp(e_{t-1} R) / Z + e_t;   w = K * a
    e_t = min(1/K, sqrt(log(K) / (K t))),  t: validations so far

    V_d is the mean validation loss of domain d in nats; a domain without validation text keeps its
    reward.  Made for `apply: sampling`.

    Source: Albalak et al. (2023), "Efficient Online Data Mixing", arXiv:2312.02406, algorithm 1;
    with validation loss as the reward, the online data mixing of IBM's fms-acceleration.  Differs:
    e_t falls as in the paper, where that code explores with a constant share.
    """

    listens_to: ClassVar[Feedback | None] = "validation"
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        **FeedbackSource.state_rules,
        "validations": saved.count,
    }
    reward: NonNegativeNumber = Constant(value=0.1)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights, summed rewards, and the number of validations."""
        state = super().initial_state(domains)
        rewards = torch.zeros_like(state["log_weights"])
        return {**state, "rewards": rewards, "validations": torch.zeros((), dtype=torch.int64)}

    @override
    def on_feedback(self, feedback: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Reward the domains and take one step of the update."""
        state, validations = scope.state, scope.state["validations"] + 1
        gains = self.reward(scope.step) * feedback / state["log_weights"].exp()
        gains = torch.where(gains.isfinite(), gains, 0)
        rewards = (state["rewards"] + gains).clamp(max=1e30)
        weights = exp3(rewards, validations).clamp(min=TINY)
        return {"log_weights": weights.log(), "rewards": rewards, "validations": validations}

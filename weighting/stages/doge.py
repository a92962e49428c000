"""Weights per domain that follow how far its gradient helps all domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.contract import Feedback, Scope
from weighting.contract.feedback_source import FeedbackSource
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber, UnitNumber
from weighting.stages.exponentiated import raised

if TYPE_CHECKING:
    from torch import Tensor


@stage("doge")
class DoGE(FeedbackSource):
    """Raise domains whose gradient points where those of all domains do, step by step.

    x_d = min(max(g_d . sum_e g_e, 0) / mean_e |g_e|, most)
    a <- a * exp(step_size * x) / Z;   a <- (1 - smoothing) * a + smoothing / K;   w = K * a

    g_d is the gradient of the mean loss of domain d.  The weights move when the trainer tells the
    inner products of the gradients, which it takes domain by domain; until then, and in a loop
    that tells none, they are one.  The state also holds their average over all moves: the
    proportions DoGE exports.

    Source: Fan et al. (2024), "DoGE", ICML, arXiv:2310.15393, algorithm 1, and the authors' code,
    which includes g_d . g_d in the sum.  step_size is their learning rate over mu: 5e-4 / 0.01.
    Differs: the learning rate in it is constant unless step_size is a schedule.
    """

    listens_to: ClassVar[Feedback | None] = "gradients"
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        **FeedbackSource.state_rules,
        "average": saved.shares,
        "moves": saved.count,
    }
    step_size: NonNegativeNumber = Constant(value=0.05)
    most: NonNegativeNumber = Constant(value=5)
    smoothing: UnitNumber = Constant(value=0)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights, their average over moves, and how many moves it averages."""
        state = super().initial_state(domains)
        average = state["log_weights"].exp()
        return {**state, "average": average, "moves": torch.zeros((), dtype=torch.int64)}

    @override
    def on_feedback(self, feedback: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Take one step of the update."""
        state, step = scope.state, scope.step
        length = feedback.diagonal().clamp(min=0).sqrt().mean()
        helps = (feedback.sum(1) / (length + 1e-6)).clamp(min=0)
        gains = self.step_size(step) * torch.minimum(helps, self.most(step))
        gains = torch.where(gains.isfinite(), gains, 0)  # one bad batch must not end the memory
        weights = raised(state["log_weights"], gains, self.smoothing(step))
        moves = state["moves"] + 1
        return {
            "log_weights": weights.clamp(min=1e-30).log(),
            "average": state["average"] + (weights - state["average"]) / moves,
            "moves": moves,
        }

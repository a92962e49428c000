"""Weights per domain that follow how far its gradient helps all domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from typing_extensions import override

from weighting import saved
from weighting.capped_simplex import TINY
from weighting.contract import Feedback, Scope
from weighting.contract.feedback_source import FeedbackSource
from weighting.errors import nearest
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


def _several(given: object) -> object:
    """Return one name as a list of one."""
    return given if isinstance(given, tuple) else (given,)


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    """Raise where a name is given twice, or none."""
    if not names:
        msg = "must be given at least one name"
        raise ValueError(msg)
    for name in names:
        if names.count(name) > 1:
            msg = f"{name!r} is given twice; keep one"
            raise ValueError(msg)
    return names


_NAME = {"type": "string", "minLength": 1}
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_several),
    AfterValidator(_once),
    WithJsonSchema({"anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1}]}),
]
"""A name, or a list of names, each once."""


@stage("doge")
class DoGE(FeedbackSource):
    """Raise domains whose gradient points where those of all domains do, step by step.

    x_d = min(max(g_d . sum_e g_e, 0) / mean_e |g_e|, most)
    a <- a * exp(step_size * x) / Z;   a <- (1 - smoothing) * a + smoothing / K;   w = K * a

    g_d is the gradient of the mean loss of domain d.  With a target, or several as in
    doge(target=[wiki, books]), e are these domains alone, which themselves weigh nothing: the mean,
    Z and K are of the others.  The weights move when the trainer
    tells the inner products of the gradients, which it takes domain by domain; until then, and in a
    loop that tells none, they are one.  The state also holds their average over all moves: the
    proportions DoGE exports.

    Source: Fan et al. (2024), "DoGE", ICML, arXiv:2310.15393, algorithm 1 (with targets, its
    out-of-domain form), and the authors' code, which includes g_d . g_d in the sum.  step_size is
    their learning rate over mu: 5e-4 / 0.01, out of domain 5e-4 / 0.05.
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
    target: Names | None = None

    @override
    def problem_with(self, domains: tuple[str, ...]) -> str | None:
        """Return that there is no such target, or nothing beside the targets, if so."""
        for name in self.target or ():
            if name not in domains:
                return f"doge: the data has no domain {name!r}{nearest(name, domains)}"
        trained = self.target is None or len(domains) > len(self.target)
        return None if trained else "doge: every domain is a target; add another"

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights, their average over moves, and how many moves it averages."""
        trained = self._trained(domains or ("",))
        average = trained / trained.sum().clamp(min=1)
        state = {"log_weights": average.clamp(min=TINY).log(), "average": average}
        return {**state, "moves": torch.zeros((), dtype=torch.int64)}

    @override
    def on_feedback(self, feedback: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Take one step of the update."""
        state, step = scope.state, scope.step
        trained = self._trained(scope.domains).to(feedback.device)
        lengths = feedback.diagonal().clamp(min=0).sqrt()
        length = torch.where(trained > 0, lengths, 0).sum() / trained.sum()
        along = feedback if self.target is None else feedback[:, trained == 0]
        helps = (along.sum(1) / (length + 1e-6)).clamp(min=0)
        gains = self.step_size(step) * torch.minimum(helps, self.most(step))
        gains = torch.where(gains.isfinite(), gains, 0)  # one bad batch must not end the memory
        logs = torch.where(trained > 0, state["log_weights"] + gains, -torch.inf)
        smoothing = self.smoothing(step)
        weights = (1 - smoothing) * logs.softmax(0) + smoothing * trained / trained.sum()
        moves = state["moves"] + 1
        return {
            "log_weights": weights.clamp(min=TINY).log(),
            "average": state["average"] + (weights - state["average"]) / moves,
            "moves": moves,
        }

    def _trained(self, domains: tuple[str, ...]) -> Tensor:
        """Return one for each domain but the targets, which are 0, [K]."""
        return torch.tensor([float(name not in (self.target or ())) for name in domains])

"""Weights per domain that follow how far its validation loss is behind a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting.contract import Feedback, Scope
from weighting.contract.feedback_source import FeedbackSource
from weighting.registry import stage
from weighting.schedules import NonNegativeNumber
from weighting.stages.exponentiated import raised
from weighting.stages.table import misfit

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = 1e-4


@stage("dynamic_loading")
class DynamicLoading(FeedbackSource):
    """Raise domains whose validation loss is above a target: dynamic_loading(web=1.9, code=0.7).

    a <- a * exp(loss_d - targets_d) / Z;   a <- (1 - c) * a + c / K, c = 1e-4;   w = K * a

    The weights move after every validation, by its mean loss of each domain in nats; a domain
    without validation text counts as on target.  To start from other weights than equal ones,
    multiply by a table.

    Source: Xia et al. (2024), "Sheared LLaMA", ICLR, arXiv:2310.06694, algorithm 1, as in the
    authors' code, where a domain ahead of its target is lowered too; the paper has
    max(loss - target, 0).
    """

    listens_to: ClassVar[Feedback | None] = "validation"
    collects: ClassVar[str | None] = "targets"
    targets: Annotated[dict[str, NonNegativeNumber], Field(min_length=1)]

    @override
    def problem_with(self, domains: tuple[str, ...]) -> str | None:
        """Return what keeps the targets from covering these domains exactly, if anything."""
        return misfit("dynamic_loading", self.targets, domains)

    @override
    def on_feedback(self, feedback: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Take one step of the update."""
        targets = torch.stack([self.targets[name](scope.step) for name in scope.domains])
        gains = torch.where(feedback.isfinite(), feedback - targets, 0)
        smoothing = torch.full_like(targets[0], _SMOOTHING)
        weights = raised(scope.state["log_weights"], gains, smoothing)
        return {"log_weights": weights.log()}

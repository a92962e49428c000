"""Weights of topics of which a document may have several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.columns import signal_of
from weighting.contract import Form, Scope, Signals, Source
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber, UnitNumber
from weighting.stages.topical import gains

if TYPE_CHECKING:
    from torch import Tensor


@stage("topics")
class Topics(Source):
    """Weigh a token by the mean weight of its topics; they move as in `topical`.

    w_t = mean over the topics k of token t of v_k, 0 without a topic
    v_k <- v_k * gain_k every `every` batches, kept from `low` to `high`

    The column `key` holds a whole number whose bits are the topics: 5 is topics 0 and 2 of
    `number`.  gain_k compares the mean loss of the topic's tokens with the mean over all pairs of
    token and topic.

    Source: Zhu et al. (2025), "ToReMi", arXiv:2504.00695.  Differs: means of tokens over all
    ranks, theirs of sequences per rank.
    """

    gives: ClassVar[Form] = "weight"
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "weights": saved.weights,
        "tokens": saved.count,
        "batches": saved.count,
    }
    key: Annotated[str, Field(min_length=1)]
    number: int = Field(ge=1, le=24)  # bits a float32 holds exactly
    every: int = Field(default=100, ge=1)
    lift: UnitNumber = Constant(value=1)
    low: NonNegativeNumber = Constant(value=0.1)
    high: NonNegativeNumber = Constant(value=5)

    @override
    def reads(self) -> frozenset[str]:
        """Return the loss and the column, by name."""
        return frozenset({"loss", signal_of(self.key)})

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return weights of one, and empty sums of losses."""
        empty = torch.zeros(self.number)
        batches = torch.zeros((), dtype=torch.int64)
        return {"weights": empty + 1, "losses": empty, "tokens": empty, "batches": batches}

    @override
    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Add the batch to the sums; move the weights when it is time."""
        state, member = scope.state, self._members(signals)
        sums = scope.sum(torch.cat([torch.where(member, signals.loss, 0), member.float()]))
        losses = state["losses"] + sums[: self.number]
        tokens = state["tokens"] + sums[self.number :]
        batches = state["batches"] + 1
        moved = state["weights"] * gains(losses, tokens, self.lift(scope.step))
        moved = moved.clamp(self.low(scope.step), self.high(scope.step))
        due = batches % self.every == 0
        return {
            "weights": torch.where(due, moved, state["weights"]),
            "losses": torch.where(due, 0, losses),
            "tokens": torch.where(due, 0, tokens),
            "batches": batches,
        }

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the mean weight of each token's topics."""
        member = self._members(signals).float()
        return scope.state["weights"] @ member / member.sum(0).clamp(min=1)

    def _members(self, signals: Signals) -> Tensor:
        """Return which topics each token has, [K, T]."""
        bits = torch.arange(self.number, device=signals.loss.device)[:, None]
        return (signals.columns[self.key].long() >> bits) % 2 == 1

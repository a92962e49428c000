"""What stages share whose weights of domains move by feedback alone, never by a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.contract.stage import Form, Source

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract.scope import Scope
    from weighting.contract.signals import Signals


class FeedbackSource(Source):
    """A weight for each domain, K times those in its state, which `on_feedback` moves."""

    gives: ClassVar[Form] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({"domain_ids"})
    pointwise: ClassVar[bool] = True
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {"log_weights": saved.log_shares}

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return log weights."""
        count = max(len(domains), 1)
        return {"log_weights": torch.full((count,), -math.log(count))}

    @override
    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Return the state as it is."""
        del signals
        return dict(scope.state)

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return K times the weight of each token's domain."""
        assert signals.domain_ids is not None, "build checks what a pipeline needs"
        weights = scope.state["log_weights"].exp()
        return (weights * weights.numel())[signals.domain_ids]

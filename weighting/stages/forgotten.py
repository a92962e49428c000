"""How often an example was right, and then wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.columns import plain_name
from weighting.registry import stage
from weighting.stages.correct import RIGHT
from weighting.stages.remembered import OfExamples, means_by

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract import Scope, Signals


@stage("forgotten")
class Forgotten(OfExamples):
    """How often a token's example has been forgotten in the batches it was in, with this one.

    score_t = f_e,   f_e <- f_e + max(0, a_e(before) - a_e(now))      at each visit but the first
    a_e: share of the labels of example e that are `correct`

    Of an example with one label that is how often it was right at one visit and wrong at the next;
    of a document, how much accuracy it has lost in all.  Examples are numbered by the column `key`,
    and remembered, as in `remembered`; the state has two numbers per place.

    Source: Toneva et al. (2019), "An Empirical Study of Example Forgetting", ICLR,
    arXiv:1812.05159 (section 3, for one label).  Differs: what was never right counts as never
    forgotten, where the authors rank it last; they prune by the counts of a whole earlier run.
    """

    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "accuracy": saved.between(0, 1),
        "events": saved.between(0),
    }

    @override
    def reads(self) -> frozenset[str]:
        """Return the column, and whether labels are right."""
        return super().reads() | {RIGHT}

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the accuracy of each example when it was last seen, and its events."""
        del domains
        return {name: torch.zeros(self.examples) for name in ("accuracy", "events")}

    @override
    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Add a visit of the batch's examples."""
        state, right = scope.state, signals.columns[plain_name(RIGHT)].clamp(0, 1)
        there, now = means_by(self.places(signals, scope), right, scope, self.examples)
        lost = (state["accuracy"] - now).clamp(min=0)  # nothing at the first visit
        return {
            "accuracy": torch.where(there, now, state["accuracy"]),
            "events": state["events"] + torch.where(there, lost, 0),
        }

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return how often each token's example was forgotten."""
        return scope.state["events"][self.places(signals, scope)]

"""How much an example's probability has moved from visit to visit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.registry import stage
from weighting.stages.remembered import OfExamples, means_by

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract import Scope, Signals


@stage("variability")
class Variability(OfExamples):
    """Spread of the probability that a token's example had in the batches it was in, with this one.

    score_t = sqrt(v_e + v_e^2 / (n_e - 1)),   0 before the second visit
    v_e: variance over its n_e visits of the mean of exp(-loss) over the tokens of example e

    What is learnt, or hopeless, stays where it is; what is being learnt moves.  Examples are
    numbered by the column `key`, and remembered, as in `remembered`; the state has three numbers
    per place.

    Source: Chang et al. (2017), "Active Bias", NeurIPS, arXiv:1704.07433 (standard deviation of
    predictions, with its uncertainty); Swayamdipta et al. (2020), arXiv:2009.10795 (variability).
    Differs: the batch at hand is a visit too.
    """

    state_rules: ClassVar[dict[str, saved.Rule]] = {
        "visits": saved.between(0),
        "means": saved.between(0, 1),
        "squares": saved.between(0),
    }

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return numbers of visits, and means and sums of squares about them, of probabilities."""
        del domains
        return {name: torch.zeros(self.examples) for name in ("visits", "means", "squares")}

    @override
    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Add a visit of the batch's examples."""
        at = self.places(signals, scope)
        there, now = means_by(at, (-signals.loss).exp().clamp(max=1), scope, self.examples)
        visits, means = scope.state["visits"] + there, scope.state["means"]
        # Welford's way, which loses no digits where the probability hardly moves.
        moved = means + (now - means) / visits.clamp(min=1)
        squares = scope.state["squares"] + ((now - means) * (now - moved)).clamp(min=0)
        return {
            "visits": visits,
            "means": torch.where(there, moved, means),
            "squares": torch.where(there, squares, scope.state["squares"]),
        }

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the spread of each token's example."""
        visits = scope.state["visits"]
        variance = scope.state["squares"] / visits.clamp(min=1)
        spread = (variance + variance**2 / (visits - 1).clamp(min=1)).sqrt()
        return spread[self.places(signals, scope)]

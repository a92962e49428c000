"""The probability of the label."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("target_prob")
class TargetProb(Source):
    """Probability the model gives to the label, from 0 to 1.

    score_t = p_t = exp(-loss_t)
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"target_prob"})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the probability, from the loss when the signal is not given."""
        del scope
        given = signals.target_prob
        return (-signals.loss).exp() if given is None else given

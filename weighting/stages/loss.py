"""The loss of each token: where a pipeline starts unless it says otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("loss")
class Loss(Source):
    """Negative log-likelihood of the label, in nats.

    score_t = -log p_t
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the loss."""
        del scope
        return signals.loss

"""How much worse than a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from weighting.registry import stage
from weighting.stages.ref_loss import OfReference

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract import Scope, Signals


@stage("excess_loss")
class ExcessLoss(OfReference):
    """Loss minus the reference loss, in nats: what is still to be learnt.

    score_t = loss_t - ref_loss_t

    The reference may be another model, the same one on a shorter context, or an older copy of it;
    whoever trains says which.  One of several has a name: excess_loss(old), as in `ref_loss`.

    Source: Xie et al. (2023), "DoReMi", arXiv:2305.10429; Lin et al. (2024), "Rho-1",
    arXiv:2404.07965 ("excess loss").
    """

    @override
    def reads(self) -> frozenset[str]:
        """Return the loss, and that of the reference."""
        return super().reads() | {"loss"}

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the difference."""
        return signals.loss - super().read(signals, scope)

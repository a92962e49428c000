"""How much worse than a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("excess_loss")
class ExcessLoss(Source):
    """Loss minus the reference loss, in nats: what is still to be learnt.

    score_t = loss_t - ref_loss_t

    The reference may be another model, the same one on a shorter context, or an older copy of it;
    whoever trains says which.

    Source: Xie et al. (2023), "DoReMi", arXiv:2305.10429; Lin et al. (2024), "Rho-1",
    arXiv:2404.07965 ("excess loss").
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"loss", "ref_loss"})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the difference."""
        del scope
        assert signals.ref_loss is not None, "build checks what a pipeline needs"
        return signals.loss - signals.ref_loss

"""How much worse than a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage
from weighting.stages.ref_loss import Reference, reference_loss, reference_of

if TYPE_CHECKING:
    from torch import Tensor


@stage("excess_loss")
class ExcessLoss(Source):
    """Loss minus the reference loss, in nats: what is still to be learnt.

    score_t = loss_t - ref_loss_t

    The reference may be another model, the same one on a shorter context, or an older copy of it;
    whoever trains says which.  One of several has a name: excess_loss(old), as in `ref_loss`.

    Source: Xie et al. (2023), "DoReMi", arXiv:2305.10429; Lin et al. (2024), "Rho-1",
    arXiv:2404.07965 ("excess loss").
    """

    pointwise: ClassVar[bool] = True
    of: Reference | None = None

    @override
    def reads(self) -> frozenset[str]:
        """Return the loss, and that of the reference."""
        return frozenset({"loss", reference_of(self.of)})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the difference."""
        del scope
        return signals.loss - reference_loss(signals, self.of)

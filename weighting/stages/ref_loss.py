"""The loss of a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("ref_loss")
class RefLoss(Source):
    """Loss of a reference model, in nats, to compare with the model's own.

    score_t = ref_loss_t

    The reference is that of `excess_loss`: loss -> minus(ref_loss) is the excess loss.
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"ref_loss"})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the reference loss."""
        del scope
        assert signals.ref_loss is not None, "build checks what a pipeline needs"
        return signals.ref_loss

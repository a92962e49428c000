"""The loss of a reference model, and what stages share that read what a reference tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import column_of, signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


Reference = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
"""What a reference is called, one of several."""


class OfReference(Source):
    """Reads what a reference model tells: the only one, or one of several by its name."""

    pointwise: ClassVar[bool] = True
    tells: ClassVar[str] = "ref_loss"
    """What is read of it."""
    takes_model: ClassVar[bool] = False
    """Whether the model's own prediction is read beside it, for which that goes forward too."""
    of: Reference | None = None

    @property
    def signal(self) -> str:
        """The signal: `tells` of the only reference, and `tells`_`of` of one with a name."""
        if self.of is None:
            return self.tells if self.tells == "ref_loss" else signal_of(self.tells)
        return signal_of(f"{self.tells}_{self.of}")

    @override
    def reads(self) -> frozenset[str]:
        """Return the signal."""
        return frozenset({self.signal})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return it, [T]."""
        del scope
        column = column_of(self.signal)
        found = signals.ref_loss if column is None else signals.columns[column]
        assert found is not None, "build checks what a pipeline needs"
        return found


@stage("ref_loss")
class RefLoss(OfReference):
    """Loss of a reference model, in nats, to compare with the model's own.

    score_t = ref_loss_t

    The reference is that of `excess_loss`: loss -> minus(ref_loss) is the excess loss.  One of
    several has a name: ref_loss(old) is told by a model that runs beside the one that trains,
    `--weighting.reference old=CHECKPOINT`, or is the column ref_loss_old of the data, which
    `weighting score --name old` writes.
    """

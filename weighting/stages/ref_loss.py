"""The loss of a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


Reference = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
"""What a reference is called, one of several."""


@stage("ref_loss")
class RefLoss(Source):
    """Loss of a reference model, in nats, to compare with the model's own.

    score_t = ref_loss_t

    The reference is that of `excess_loss`: loss -> minus(ref_loss) is the excess loss.  One of
    several has a name: ref_loss(old) is the column ref_loss_old of the data, which `weighting score
    --name old` writes.
    """

    pointwise: ClassVar[bool] = True
    of: Reference | None = None

    @override
    def reads(self) -> frozenset[str]:
        """Return the reference loss, or the column that a name stands for."""
        return frozenset({reference_of(self.of)})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the reference loss."""
        del scope
        return reference_loss(signals, self.of)


def reference_of(name: str | None) -> str:
    """Return the signal of a reference: of the only one, or of one with a name."""
    return "ref_loss" if name is None else signal_of(f"ref_loss_{name}")


def reference_loss(signals: Signals, name: str | None) -> Tensor:
    """Return that signal, [T]."""
    if name is not None:
        return signals.columns[f"ref_loss_{name}"]
    assert signals.ref_loss is not None, "build checks what a pipeline needs"
    return signals.ref_loss

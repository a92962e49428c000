"""Whether the label is the model's own guess."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

RIGHT = signal_of("label_is_top")


@stage("correct")
class Correct(Source):
    """Whether the label is the model's own guess: 1 where no other word is more probable, else 0.

    score_t = 1 if p_label >= p_v for all v, else 0

    The logits tell it at no cost, and its mean over a unit is the accuracy there.  Only what the
    model gets wrong: correct -> affine(-1, 1) -> as_is.  Where the loss is not one of this package,
    it is the column `label_is_top`.
    """

    pointwise: ClassVar[bool] = True

    @override
    def reads(self) -> frozenset[str]:
        """Return the signal."""
        return frozenset({RIGHT})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return it."""
        del scope
        return signals.columns["label_is_top"]

"""The model's own loss on a short context."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("short_loss")
class ShortLoss(Source):
    """Loss of the model where a new context begins every `window` tokens, in nats.

    score_t = short_loss_t

    short_loss(1024) -> minus(loss) is context_gain(1024).
    """

    pointwise: ClassVar[bool] = True
    window: int = Field(ge=1)

    @override
    def reads(self) -> frozenset[str]:
        """Return the signal, which carries its window in its name."""
        return frozenset({signal_of(f"short_loss_{self.window}")})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the short loss."""
        del scope
        return signals.columns[f"short_loss_{self.window}"]

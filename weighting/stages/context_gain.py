"""What a long context brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("context_gain")
class ContextGain(Source):
    """Loss on a short context minus loss on the full one, in nats.

    score_t = short_loss_t - loss_t

    The short loss is the model's own where a new context begins every `window` tokens.

    Source: Fang et al. (2025), LongCE, ICLR, arXiv:2410.23771; Helm et al. (2025), "Token
    Weighting for Long-Range Language Modeling", arXiv:2503.09202.  Differs: LongCE slides its
    window by 1,024 tokens, so that every token but the first keeps at least three quarters of it.
    """

    pointwise: ClassVar[bool] = True
    window: int = Field(ge=1)

    @override
    def reads(self) -> frozenset[str]:
        """Return the loss, and the short loss, which carries its window in its name."""
        return frozenset({"loss", signal_of(f"short_loss_{self.window}")})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the difference."""
        del scope
        return signals.columns[f"short_loss_{self.window}"] - signals.loss

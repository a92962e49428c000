"""The entropy among the most probable words."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("topk_entropy")
class TopkEntropy(Source):
    """Entropy of the prediction among its k most probable words, in nats: from 0 to log(k).

    score_t = -sum_{v in top k} q_v log q_v,   q = p / sum_{v in top k} p_v

    Source: the weight of EAFT, as LLaMA-Factory codes it (top 20 logits, renormalised).
    """

    pointwise: ClassVar[bool] = True
    k: int = Field(default=20, ge=2)

    @override
    def reads(self) -> frozenset[str]:
        """Return the signal, which carries its k in its name."""
        return frozenset({signal_of(f"topk_entropy_{self.k}")})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the entropy."""
        del scope
        return signals.columns[f"topk_entropy_{self.k}"]

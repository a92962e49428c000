"""Where a token stands in its document."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("position")
class Position(Source):
    """Place of the token in its piece of a document, from 0.

    score_t = position_t

    The trainer gives it; in a loop of your own it is the column "position".
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({signal_of("position")})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the numbers."""
        del scope
        return signals.columns["position"]

"""Which word the label is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("token_id")
class TokenId(Source):
    """Number of the label in the vocabulary.

    score_t = label_t

    Made for `where`: where(token_id, equals=2).  The trainer gives it; in a loop of your own it is
    the column "token_id".
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({signal_of("token_id")})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the numbers."""
        del scope
        return signals.columns["token_id"]

"""A column of the data set, as a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from weighting.columns import signal_of
from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("column")
class Column(Source):
    """The value of a numeric column of the data, of a document or of a single token.

    score_t = column[document_t]

    Records of torchtitan's data have one number each.  In other trainers a row has one, or a list
    of one for each token of its `input_ids`, which is the score of that token.
    """

    pointwise: ClassVar[bool] = True
    key: Annotated[str, Field(min_length=1)]

    @override
    def reads(self) -> frozenset[str]:
        """Return the column, by name."""
        return frozenset({signal_of(self.key)})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the column."""
        del scope
        return signals.columns[self.key]

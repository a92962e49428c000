"""Where a score stands among the others, or among those seen lately."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting.contract import Level, Scope, Shape
from weighting.registry import stage
from weighting.saved import between, broken

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


@stage("rank")
class Rank(Shape):
    """Share of the scope's scores that are lower; with history, of the last `history` scores.

    y_i = #{j : x_j < x_i} / n

    The history includes the batch at hand, newest first.  Only the units at hand are compared, so
    it works on sequences and domains, which ranks bring together, and not on tokens.

    Source: Jiang et al. (2019), "Accelerating Deep Learning by Focusing on the Biggest Losers",
    arXiv:1910.00762 (the percentile, history of 1,024 losses).
    """

    levels: ClassVar[tuple[Level, ...]] = ("sequence", "domain")
    history: int = Field(default=0, ge=0, le=1_000_000)  # all are sorted at every step

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return an empty history: `seen` scores, and how many of them count."""
        if not self.history:
            return {}
        return {"seen": torch.zeros(self.history), "count": torch.zeros((), dtype=torch.int64)}

    @override
    def problems_with_state(
        self, state: Mapping[str, Tensor], domains: tuple[str, ...]
    ) -> Iterator[tuple[str, str]]:
        """Demand no more scores than the history holds."""
        yield from super().problems_with_state(state, domains)
        if self.history:
            yield from broken(state, {"count": between(0, self.history)})

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Put the valid scores of the batch before the older ones."""
        if not self.history:
            return {}
        seen, count = scope.state["seen"], scope.state["count"]
        kept = torch.arange(self.history, device=x.device) < count
        values, usable = torch.cat([x, seen]), torch.cat([scope.valid, kept])
        newest = usable.to(torch.int8).argsort(descending=True, stable=True)[: self.history]
        total = (count + scope.valid.sum()).clamp(max=self.history)
        return {"seen": values[newest], "count": total}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the shares."""
        others, usable = x, scope.valid
        if self.history:
            others = scope.state["seen"]
            usable = torch.arange(self.history, device=x.device) < scope.state["count"]
        # Whatever does not count comes last, and is lower than nothing.
        ordered = torch.where(usable, others, torch.inf).sort().values
        return torch.searchsorted(ordered, x) / usable.sum().clamp(min=1)

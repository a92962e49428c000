"""A score for each domain, given as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.errors import nearest
from weighting.registry import stage
from weighting.schedules import Constant, Number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@stage("table")
class Table(Source):
    """The table's entry for the token's domain: table(web=1, code=2).

    score_t = weights[domain_t],   at least 0, or of any sign where the factor ends in signed

    Every domain of the data needs an entry and every entry a domain, so that neither a new
    domain nor a misspelt one goes unnoticed.
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"domain_ids"})
    collects: ClassVar[str | None] = "weights"
    weights: Annotated[dict[str, Number], Field(min_length=1)]

    @override
    def always_zero(self) -> frozenset[str]:
        """Return the domains with a constant 0."""
        return frozenset(name for name, x in self.weights.items() if x == Constant(value=0))

    @override
    def below_zero(self) -> frozenset[str]:
        """Return the domains whose entry is negative at some step."""
        return frozenset(name for name, x in self.weights.items() if min(x.extremes()) < 0)

    @override
    def problem_with(self, domains: tuple[str, ...]) -> str | None:
        """Return what keeps the table from covering these domains exactly, if anything."""
        return misfit("the table", self.weights, domains)

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Look every token's domain up."""
        assert signals.domain_ids is not None, "build checks what a pipeline needs"
        entries = torch.stack([self.weights[name](scope.step) for name in scope.domains])
        return entries[signals.domain_ids]


def misfit(what: str, entries: Iterable[str], domains: tuple[str, ...]) -> str | None:
    """Return what keeps something with these entries from covering the domains, or None."""
    known = [*entries]
    # What is known is said once, for all of them.
    hints = {name: nearest(name, domains).partition("; known")[0] for name in known}
    unknown = [f"{name!r}{hint}" for name, hint in hints.items() if name not in domains]
    missing = sorted({*domains} - {*known})
    both = f"{what} has {', '.join(known)}; the data has {', '.join(domains)}"
    if unknown:
        return f"the data has no domain {', '.join(sorted(unknown))} ({both})"
    if missing:
        return f"{what} has no entry for {', '.join(missing)} ({both})"
    return None

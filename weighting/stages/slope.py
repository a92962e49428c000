"""How fast each domain's score moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting.contract import Level, Scope, Shape
from weighting.registry import stage
from weighting.saved import not_between
from weighting.stages.last import no_scores, with_newest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


@stage("slope")
class Slope(Shape):
    """Change of each domain's score per batch: the line of least squares through its last scores.

    y_d = sum_t (t - mean t) (x_d(t) - mean x_d) / sum_t (t - mean t)^2,   t the last `history`

    A loss that falls has a negative slope.  A domain seen less than twice has slope 0.  Known
    between batches, so data can be drawn by it.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    known_between_batches: ClassVar[bool] = True
    history: int = Field(default=100, ge=2, le=10_000)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return no scores, newest first, and how many of each domain there have been."""
        return no_scores(domains, self.history)

    @override
    def problems_with_state(
        self, state: Mapping[str, Tensor], domains: tuple[str, ...]
    ) -> Iterator[tuple[str, str]]:
        """Demand counts."""
        yield from super().problems_with_state(state, domains)
        yield from not_between(state, 0, math.inf, "times")

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Put the scores of the domains in the batch before the older ones."""
        return with_newest(x, scope)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the slopes."""
        del x
        scores, times = scope.state["scores"], scope.state["times"]
        age = torch.arange(self.history, device=scores.device)
        there = (age < times[:, None]).to(scores.dtype)
        count = there.sum(1, keepdim=True).clamp(min=1)
        time = -age - (there * -age).sum(1, keepdim=True) / count
        change = scores - (there * scores).sum(1, keepdim=True) / count
        squares = (there * time * time).sum(1)
        return (there * time * change).sum(1) / torch.where(squares > 0, squares, 1)

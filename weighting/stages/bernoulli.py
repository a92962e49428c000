"""Keep units by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Weigh
from weighting.counter_rng import uniform
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


class Drawing(Weigh):
    """What draws anew in every batch: the seed and how many there have been decide."""

    levels: ClassVar[tuple[Level, ...]] = ("document", "sequence", "domain")
    scaled: ClassVar[bool] = False
    state_rules: ClassVar[dict[str, saved.Rule]] = {"batches": saved.count}

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return how many batches there have been."""
        return {"batches": torch.zeros((), dtype=torch.int64)}

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Count the batch."""
        return {"batches": scope.state["batches"] + 1}


@stage("bernoulli")
class Bernoulli(Drawing):
    """Take a score for the probability of keeping the unit, and draw.

    w_i = 1[draw_i < p_i],   divided by p_i when `correct`,   p = clip(x, 0, 1)

    Draws depend on the seed and on how many batches there have been, so they are the same on
    every rank and after a resume; with `scope: rank` all ranks draw alike.  With `correct` the
    expected weight is 1 for every unit.

    Source: Jiang et al. (2019), Selective-Backprop, arXiv:1910.00762 (no correction).
    """

    correct: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return 1, or 1 / p, for what is kept."""
        p = x.clamp(0, 1)
        draws = uniform(self.seed, scope.state["batches"], x.numel())
        # By its place among the units there are: how many slots are empty changes no draw.
        kept = draws[(scope.valid.cumsum(0) - 1).clamp(min=0)] < p
        return torch.where(kept, 1 / p.clamp(min=1e-6) if self.correct else torch.ones_like(p), 0)

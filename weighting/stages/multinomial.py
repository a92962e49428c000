"""Draw units with replacement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from typing_extensions import override

from weighting.counter_rng import uniform
from weighting.registry import stage
from weighting.schedules import ShareNumber
from weighting.stages.bernoulli import Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.contract import Scope


@stage("multinomial")
class Multinomial(Drawing):
    """Draw k = floor(draws * n) units with replacement, in proportion to their scores.

    w_i = c_i * n / k,   divided by n p_i when `correct`,   p = x / sum(x), c_i: times drawn

    Draws depend on the seed and on how many batches there have been, so they are the same on
    every rank and after a resume; with `scope: rank` all ranks draw alike.  With `correct` the
    expected weight is 1 for every unit.

    Source: Katharopoulos and Fleuret (2018), "Not All Samples Are Created Equal", ICML,
    arXiv:1803.00942, section 3 (importance sampling; `correct`).
    """

    draws: ShareNumber
    correct: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return how often each unit was drawn, scaled."""
        score = torch.where(scope.valid, x.clamp(0, 1e30), 0)
        total, count = scope.sum(torch.stack([score, torch.ones_like(score)]))
        flat = scope.valid / count.clamp(min=1)
        p = torch.where(total > 0, score / torch.where(total > 0, total, 1), flat)
        k = (count * self.draws(scope.step) + 1e-4).floor().clamp(min=1)
        drawn = torch.arange(x.numel(), device=x.device) < k
        edges = p.cumsum(0)
        points = uniform(self.seed, scope.state["batches"], x.numel()) * edges[-1]
        places = torch.searchsorted(edges, points, right=True).clamp(max=x.numel() - 1)
        times = torch.zeros_like(p).index_add(0, places, drawn.to(p.dtype))
        weight = times * count / k
        return weight / (count * p).clamp(min=1e-30) if self.correct else weight

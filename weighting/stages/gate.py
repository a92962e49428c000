"""Equal scores until differences would matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting import saved
from weighting.contract import Scope, Shape
from weighting.registry import stage
from weighting.schedules import Constant, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("gate")
class Gate(Shape):
    """Make all scores 1 while their effective sample size, averaged over batches, is high.

    y = x  if e < ess_below else 1,   e <- decay * e + (1 - decay) * (sum x)^2 / (n sum x^2)

    e starts at 1; negative scores count as 0.  It measures what weights in proportion to the
    scores would do.  For a burn-in by steps write interpolate(step(1, 0, at=1000)).

    Source: Katharopoulos and Fleuret (2018), "Not All Samples Are Created Equal", ICML,
    arXiv:1803.00942, whose tau is 1 / sqrt(e): ess_below 0.25 is their threshold of 2.
    """

    state_rules: ClassVar[dict[str, saved.Rule]] = {"ess": saved.between(0, 1)}
    ess_below: UnitNumber
    decay: UnitNumber = Constant(value=0.9)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return an average of one: equal scores."""
        return {"ess": torch.ones(())}

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Move the average."""
        x = x.clamp(0, 1e15)  # squares that sum up within float32
        total, squares, count = scope.sum(torch.stack([x, x * x, torch.ones_like(x)]))
        flat = squares <= 0  # no score at all is no difference either
        here = torch.where(flat, 1, total * total / torch.where(flat, 1, count * squares))
        decay, before = self.decay(scope.step), scope.state["ess"]
        return {"ess": torch.where(count > 0, decay * before + (1 - decay) * here, before)}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the scores, or ones."""
        return torch.where(scope.state["ess"] < self.ess_below(scope.step), x, 1)

"""Plain training until weights would matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting.contract import Constrain, Scope
from weighting.registry import stage
from weighting.schedules import Constant, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("gate")
class Gate(Constrain):
    """Weigh all units 1 while the effective sample size, averaged over batches, is high.

    w' = w  if e < ess_below else 1,   e <- decay * e + (1 - decay) * (sum w)^2 / (n sum w^2)

    e starts at 1, so training starts plain.  For a burn-in by steps write
    interpolate(step(1, 0, at=1000)).

    Source: Katharopoulos and Fleuret (2018), "Not All Samples Are Created Equal", ICML,
    arXiv:1803.00942, whose tau is 1 / sqrt(e): ess_below 0.25 is their threshold of 2.
    """

    statistics: ClassVar[str] = "sum"
    ess_below: UnitNumber
    decay: UnitNumber = Constant(value=0.9)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return an average of one: equal weights."""
        return {"ess": torch.ones(())}

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Move the average."""
        total, squares, count = scope.sum(torch.stack([x, x * x, torch.ones_like(x)]))
        here = total * total / (count * squares).clamp(min=1e-30)
        decay, before = self.decay(scope.step), scope.state["ess"]
        return {"ess": torch.where(count > 0, decay * before + (1 - decay) * here, before)}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights, or ones."""
        return torch.where(scope.state["ess"] < self.ess_below(scope.step), x, 1)

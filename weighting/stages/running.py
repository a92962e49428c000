"""Exponential weights with a normaliser that moves slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting.contract import Scope, Weigh
from weighting.registry import stage
from weighting.schedules import Constant, PositiveNumber, UnitNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("running")
class Running(Weigh):
    """Exponential of the score over a moving average of its mean, so that batches compare.

    w = exp(x / tau) / u,   u <- decay * u + (1 - decay) * mean(exp(x / tau))

    Mean one over time, not in every batch: write `normalize: none` beside it.  The average is
    kept as a logarithm, which cannot overflow; the first batch sets it.

    Source: Qi et al. (2021), ABSGD, arXiv:2012.06951; Li et al. (2021), TERM, arXiv:2007.01162
    (decay 0.5).  Differs: the authors of ABSGD start u at 0 and scale its updates by a constant
    factor, which scales all weights alike.
    """

    scaled: ClassVar[bool] = False
    tau: PositiveNumber
    decay: UnitNumber = Constant(value=0.9)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the logarithm of u, and whether a batch has set it."""
        return {"log_average": torch.zeros(()), "started": torch.zeros((), dtype=torch.bool)}

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Move the average."""
        z = x / self.tau(scope.step)
        top, count = scope.max(z), scope.count()
        mean = scope.sum((z - top).exp()) / count.clamp(min=1)
        new = top + mean.clamp(min=1e-30).log()
        old, decay = scope.state["log_average"], self.decay(scope.step)
        moved = torch.logaddexp(decay.log() + old, (-decay).log1p() + new)
        any_here, started = count > 0, scope.state["started"]
        first = torch.where(any_here, new, old)
        average = torch.where(started, torch.where(any_here, moved, old), first)
        return {"log_average": average, "started": started | any_here}

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights."""
        z = x / self.tau(scope.step) - scope.state["log_average"]
        return z.clamp(-69, 69).exp()  # within float32, and finite sums

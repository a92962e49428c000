"""DoReMi's proxy weights in one word."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from weighting.contract import Form, Stage, Sugar
from weighting.registry import stage
from weighting.schedules import Constant, Number, UnitNumber
from weighting.stages.clip import Clip
from weighting.stages.excess_loss import ExcessLoss
from weighting.stages.exponentiated import Exponentiated
from weighting.stages.pools import Mean


@stage("doremi")
class DoReMi(Sugar):
    """Weigh domains by how far the model lags behind a reference, remembered over the run.

    a <- a * exp(step_size * mean_domain(max(loss - ref_loss, 0))) / Z, smoothed

    Sugar: excess_loss -> clip(min=0) -> mean(domain) -> exponentiated(step_size, smoothing).

    Source: Xie et al. (2023), "DoReMi", NeurIPS, arXiv:2305.10429, algorithm 1.
    """

    kind: ClassVar[str] = "source"
    takes: ClassVar[Form | None] = None
    gives: ClassVar[Form] = "weight"
    step_size: Number = Constant(value=1)
    smoothing: UnitNumber = Constant(value=1e-3)

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the clipped excess loss per domain and its multiplicative weights."""
        weigh = Exponentiated(step_size=self.step_size, smoothing=self.smoothing)
        return (ExcessLoss(), Clip(min=Constant(value=0)), Mean(level="domain"), weigh)

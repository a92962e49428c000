"""DoReMi's proxy weights in one word."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
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

    Sugar: excess_loss -> clip(min=0) -> mean(domain) -> exponentiated(step_size, smoothing,
    unseen).

    Source: Xie et al. (2023), "DoReMi", NeurIPS, arXiv:2305.10429, algorithm 1, and the authors'
    code.  The DoGE repository's own copy clips after the mean over a domain instead of token by
    token: excess_loss -> mean(domain) -> clip(min=0) -> exponentiated(0.1, smoothing=0).
    Differs: as `exponentiated`.
    """

    kind: ClassVar[str] = "source"
    takes: ClassVar[Form | None] = None
    gives: ClassVar[Form] = "weight"
    step_size: Number = Constant(value=1)
    smoothing: UnitNumber = Constant(value=1e-3)
    unseen: float = Field(default=0, ge=0, le=1e30)

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the clipped excess loss per domain and its multiplicative weights."""
        given = {"step_size": self.step_size, "smoothing": self.smoothing}
        weigh = Exponentiated(**given, unseen=self.unseen)
        return (ExcessLoss(), Clip(min=Constant(value=0)), Mean(level="domain"), weigh)

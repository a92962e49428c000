"""LinUpper: grow with the normalised loss, level off at a cap."""

from __future__ import annotations

from typing_extensions import override

from weighting.contract import Stage, Sugar
from weighting.registry import stage
from weighting.schedules import Constant, PositiveNumber
from weighting.stages.affine import Affine
from weighting.stages.clip import Clip


@stage("linupper")
class LinUpper(Sugar):
    """Down-weight low normalised losses; treat all above alpha - 1 alike.

    f(h) = minimum(h + 1, alpha)

    Sugar: affine(shift=1) -> clip(max=alpha).

    The paper's delta is not alpha: its f(h) = minimum(h + delta, delta) of h in [-delta, delta] is
    delta times this one at alpha 1, as if the temperature were divided by delta.  As it stands in
    the paper, with delta 2: normalize(delta=2) -> affine(shift=2) -> clip(max=2).

    Source: Sow et al. (2025), ICLR, arXiv:2502.06733 ("LinUpper").
    """

    alpha: PositiveNumber = Constant(value=1)

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the shift and the cap."""
        return (Affine(shift=Constant(value=1)), Clip(max=self.alpha))

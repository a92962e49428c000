"""Extremes: weigh the lowest and the highest losses most."""

from __future__ import annotations

from typing_extensions import override

from weighting.contract import Stage, Sugar
from weighting.registry import stage
from weighting.stages.abs import Abs


@stage("extremes")
class Extremes(Sugar):
    """Lowest for a normalised loss of 0, highest at both ends.

    f(h) = |h|

    Sugar: abs.

    Source: Sow et al. (2025), ICLR, arXiv:2502.06733 ("Extremes").
    """

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the absolute value."""
        return (Abs(),)

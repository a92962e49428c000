"""Quadratic: weigh losses in the middle most."""

from __future__ import annotations

from typing_extensions import override

from weighting.contract import Stage, Sugar
from weighting.registry import stage
from weighting.schedules import Constant
from weighting.stages.affine import Affine
from weighting.stages.pow import Pow


@stage("quadratic")
class Quadratic(Sugar):
    """Highest for a normalised loss of 0, lowest at both ends.

    f(h) = 1 - h ** 2

    Sugar: pow(2) -> affine(scale=-1, shift=1).

    Source: Sow et al. (2025), ICLR, arXiv:2502.06733 ("Quadratic").
    """

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the square and its mirror."""
        one = Constant(value=1)
        return (Pow(exponent=Constant(value=2)), Affine(scale=Constant(value=-1), shift=one))

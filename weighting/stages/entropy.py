"""The entropy of the prediction, and MiLe's score of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source, Stage
from weighting.registry import stage
from weighting.schedules import Constant, NonNegativeNumber, Number
from weighting.stages.affine import Affine
from weighting.stages.pow import Pow

if TYPE_CHECKING:
    from torch import Tensor


@stage("entropy")
class Entropy(Source):
    """Entropy of the predicted distribution, in nats; with arguments, MiLe's score of it.

    score_t = H_t                        for `entropy`
    score_t = (sigma + H_t) ** gamma     for `entropy(gamma, sigma=1)`

    The second is sugar: entropy -> affine(shift=sigma) -> pow(gamma).

    Source: Su et al. (2024), "MiLe Loss", NAACL Findings, arXiv:2310.19531.
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    gamma: Number | None = None
    sigma: NonNegativeNumber | None = None

    @override
    def expand(self) -> tuple[Stage, ...]:
        """Return the raw entropy, shifted and raised when arguments are given."""
        if self.gamma is None and self.sigma is None:
            return (self,)
        one = Constant(value=1)
        return (Entropy(), Affine(shift=self.sigma or one), Pow(exponent=self.gamma or one))

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the entropy."""
        del scope
        assert signals.entropy is not None, "build checks what a pipeline needs"
        return signals.entropy

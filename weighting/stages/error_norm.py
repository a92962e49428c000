"""The length of the loss's gradient at the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("error_norm")
class ErrorNorm(Source):
    """Euclidean norm of prediction minus one-hot label, from 0 to sqrt(2).

    score_t = |p - y|_2 = sqrt(1 - 2 p_label + sum_v p_v^2)

    Source: Li et al. (2024), "Error Norm Truncation", ICLR, arXiv:2310.00840; Katharopoulos and
    Fleuret (2018), "Not All Samples Are Created Equal", ICML, arXiv:1803.00942.
    """

    pointwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"error_norm"})

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return the norm."""
        del scope
        assert signals.error_norm is not None, "build checks what a pipeline needs"
        return signals.error_norm

"""Take scores for weights, with their sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("signed")
class Signed(Weigh):
    """Take scores for weights as they are: a token of negative weight is unlearned.

    w = x,   kept from -1e30 to 1e30

    It ends a factor whose score each token decides alone.  Its size, |w|, multiplies with the other
    factors and is scaled to mean one (`normalize: none` leaves it).  Its sign multiplies what comes
    of that: where it is -1, the loss of the token is climbed.  Metrics are of sizes, but for the
    smallest and largest weight; `weight/negative_frac` is the part of all sizes that is below 0.
    A climb has no end of its own: take a small learning rate, and watch the unweighted loss.

    Source: gradient ascent and the difference of gradients, as compared by Zhang et al. (2024),
    "Negative Preference Optimization", arXiv:2404.05868.
    """

    pointwise: ClassVar[bool] = True
    scaled: ClassVar[bool] = False
    signed: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("token",)

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the scores."""
        del scope
        return x.clamp(-1e30, 1e30)

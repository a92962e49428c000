"""Min-max normalisation: makes losses of any size comparable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.contract import Scope, Shape, Within
from weighting.registry import stage
from weighting.schedules import Constant, PositiveNumber

if TYPE_CHECKING:
    from torch import Tensor


@stage("normalize")
class Normalize(Shape):
    """Map the scope's [min, max] to [-delta, delta]; a scope of equal scores maps to 0.

    h = delta * (2 * (x - min) / (max - min) - 1)

    At the head of a pipeline it stands for loss -> mean(sequence) -> normalize.
    `within: sequence` (or document, domain) takes min and max inside each unit, of tokens;
    `within: domain` of documents and sequences too.

    Source: Sow et al. (2025), "Dynamic Loss-Based Sample Reweighting for Improved Large Language
    Model Pretraining", ICLR, arXiv:2502.06733.  Differs: the authors' code computes
    2x/range - (max+min)/range with range at least 1e-6, which cancels when the range is small
    and does not reach [-1, 1] when it is below 1e-6.
    """

    within: Within | None = None
    delta: PositiveNumber = Constant(value=1)

    @override
    def inside(self) -> Within | None:
        """Return `within`."""
        return self.within

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the normalised scores."""
        low, high = scope.range(x / 2)  # halves: the range of any float32 scores is finite
        width = high - low
        flat = width <= 0
        h = torch.where(flat, 0, 2 * ((x / 2 - low) / torch.where(flat, 1, width)) - 1)
        return self.delta(scope.step) * h

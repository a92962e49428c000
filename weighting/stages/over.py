"""Quotient of two scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.contract import Combine, Scope
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST, _SMALLEST = 1e30, 1e-12


@stage("over")
class Over(Combine):
    """Divide by the score of another pipeline of the same level.

    y = x / other,   kept from -1e30 to 1e30

    A divisor below 1e-12 in size counts as that much, of its sign.
    """

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the quotients."""
        del scope
        least = torch.where(x[1] < 0, -_SMALLEST, _SMALLEST)
        by = torch.where(x[1].abs() < _SMALLEST, least, x[1])
        return (x[0] / by).clamp(-_LARGEST, _LARGEST)

"""Weight one for every token: plain training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from weighting.contract import Form, Scope, Signals, Source
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor


@stage("uniform")
class Uniform(Source):
    """Weigh every token one; the loss is then bitwise the trainer's own.

    weight_t = 1
    """

    always_one: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True
    gives: ClassVar[Form] = "weight"

    @override
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return ones."""
        del scope
        return torch.ones_like(signals.loss)

"""Weights for some units only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import model_validator
from typing_extensions import override

from weighting.contract import Combine, Form, Scope
from weighting.registry import stage
from weighting.schedules import Number

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@stage("where")
class Where(Combine):
    """Keep the weight where the score of the brackets is in range; all other units weigh one.

    w'_i = w_i  if at_least <= x_i < below and x_i = equals, else 1;   what is left out holds

    The first 64 tokens of each document: where(position, below=64).  By role, told by a column:
    where(column(role), equals=1).  The mean of the weights may change.
    """

    kind: ClassVar[str] = "constrain"
    takes: ClassVar[Form | None] = "weight"
    gives: ClassVar[Form] = "weight"
    at_least: Number | None = None
    below: Number | None = None
    equals: Number | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.at_least is None and self.below is None and self.equals is None:
            msg = "needs at_least, below or equals"
            raise ValueError(msg)
        return self

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the weights, or ones."""
        weight, score = x
        chosen = torch.ones_like(score, dtype=torch.bool)
        if self.at_least is not None:
            chosen = chosen & (score >= self.at_least(scope.step))
        if self.below is not None:
            chosen = chosen & (score < self.below(scope.step))
        if self.equals is not None:
            chosen = chosen & (score == self.equals(scope.step))
        return torch.where(chosen, weight, 1)

"""Numbers by step, as tensors: what a line of a chart is drawn of, and what a table sums up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weighting.runs.files import Lines

Point = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """Finite values by step.

    Attributes:
        steps: Ascending, each once, float64, [n].
        values: float64, [n].
    """

    steps: Tensor
    values: Tensor

    @classmethod
    def of(cls, lines: Lines, name: str) -> Points:
        """Return a number's finite values by step."""
        if name not in lines.columns:
            return cls.pairs([])
        steps = torch.frombuffer(lines.steps, dtype=torch.int64).double()
        values = torch.frombuffer(lines.columns[name], dtype=torch.float64)
        finite = values.isfinite()
        return cls(steps, values) if finite.all() else cls(steps, values)[finite]

    @classmethod
    def pairs(cls, pairs: Sequence[Point]) -> Points:
        """Return pairs of step and value."""
        steps, values = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T.contiguous()
        return cls(steps, values)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Point]:
        return zip(self.steps.tolist(), self.values.tolist(), strict=True)

    def __getitem__(self, places: Tensor) -> Points:
        return Points(self.steps[places], self.values[places])

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at some steps, ascending, and which of these are there, [m] each."""
        if not len(self):
            return torch.zeros_like(steps), torch.zeros_like(steps, dtype=torch.bool)
        if torch.equal(self.steps, steps):  # runs that log alike
            return self.values, torch.ones_like(steps, dtype=torch.bool)
        places = torch.searchsorted(self.steps, steps).clamp(max=len(self) - 1)
        return self.values[places], self.steps[places] == steps

    def minus(self, others: Points) -> Points:
        """Return the differences at the steps of both."""
        values, there = others.at(self.steps)
        return Points(self.steps[there], (self.values - values)[there])

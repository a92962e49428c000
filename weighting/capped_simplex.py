"""Projections onto weights with a largest or a smallest value, keeping the sum.

Both are one number: the weights are scaled by the s for which clipping at the bound restores the
sum.  That is the Kullback-Leibler projection onto the capped (floored) simplex.  s is found by
narrowing a bracket with static shapes and only sums over the scope, so it compiles, captures and
works for units spread over ranks; Newton steps from the safe side of the bracket make it exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from weighting.contract import Scope

TINY = 1e-30
"""A weight of zero counts as this when the others cannot hold the sum under the cap."""
_NOTHING = 1e-12
_CANDIDATES, _PASSES, _NEWTON_STEPS = 32, 5, 3


def cap(weight: Tensor, largest: Tensor, scope: Scope) -> Tensor:
    """Return min(largest, s * weight) with the s that keeps the sum over the scope.

    Args:
        weight: [U], non-negative.
        largest: 0-D, the cap; if even all units at the cap fall short of the sum, all are there.
        scope: The units that count.
    """
    total = scope.sum(weight)
    w = torch.where(scope.valid, weight.clamp(min=TINY), 0)  # what does not count adds nothing
    top = 70 + torch.log(largest)  # e^70 > 1 / TINY: at this scale every unit is capped

    def capped_sum(log_scale: Tensor) -> Tensor:
        found = torch.minimum(largest, log_scale.exp()[:, None] * w).sum(-1)
        return found if scope.collectives is None else scope.collectives.sum(found)

    low, _ = _bracket(capped_sum, total, torch.zeros_like(top), top)
    scale = low.exp()
    for _ in range(_NEWTON_STEPS):  # the sum is concave in s: steps from below stay below
        full = scale * w >= largest
        rest, free = scope.sum(
            torch.stack([torch.where(full, largest, 0), torch.where(full, 0, w)])
        )
        scale = torch.where(free > 0, (total - rest) / free.clamp(min=TINY), scale)
    out = torch.minimum(largest, scale * w)
    out = torch.where((weight == 0) & (out < _NOTHING), 0, out)  # a zero nobody needed stays
    return torch.where(scope.max(weight) <= largest, weight, out)


def raise_to(weight: Tensor, smallest: Tensor, scope: Scope) -> Tensor:
    """Return max(smallest, s * weight) with the s that keeps the sum over the scope.

    Args:
        weight: [U], non-negative.
        smallest: 0-D, the floor; if it alone exceeds the mean, every unit is at the floor.
        scope: The units that count.
    """
    total = scope.sum(weight)

    def raised_sum(scale: Tensor) -> Tensor:
        return scope.sum(torch.maximum(smallest, scale[:, None] * weight))

    one = torch.ones_like(total)
    _, scale = _bracket(raised_sum, total, torch.zeros_like(total), one)
    for _ in range(_NEWTON_STEPS):  # the sum is convex in s: steps from above stay above
        low = scale * weight <= smallest
        rest, free = scope.sum(
            torch.stack([torch.where(low, smallest, 0), torch.where(low, 0, weight)])
        )
        scale = torch.where(free > 0, ((total - rest) / free.clamp(min=TINY)).clamp(0, 1), scale)
    out = torch.maximum(smallest, scale * weight)
    return torch.where(-scope.max(-weight) >= smallest, weight, out)


def _bracket(
    rising: Callable[[Tensor], Tensor], target: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a narrow [low, high] around where a rising function of [P] points meets target."""
    grid = torch.arange(1, _CANDIDATES + 1, device=target.device) / (_CANDIDATES + 1)
    for _ in range(_PASSES):
        points = low + (high - low) * grid
        below = (rising(points) < target).sum()  # points are sorted: this many lie below
        last = (below - 1).clamp(min=0), below.clamp(max=_CANDIDATES - 1)
        before, after = (points.gather(0, place[None]).squeeze(0) for place in last)
        low = torch.where(below == 0, low, before)
        high = torch.where(below == _CANDIDATES, high, after)
    return low, high

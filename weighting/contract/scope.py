"""The units a statistic runs over, here and on other ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weighting.contract.collectives import Collectives
    from weighting.contract.levels import Groups, Level


@dataclass(frozen=True)
class Scope:
    """The units a statistic runs over, and the step.

    Attributes:
        level: What one unit is.
        step: Optimizer step, 0-D.
        valid: [U] bool; units that count.
        domains: Names of the domains, in the order of their ids.
        collectives: Reaches units held by other ranks; None when all units are here.
        state: What the stage at hand remembers, as it is for this batch.
    """

    level: Level
    step: Tensor
    valid: Tensor
    domains: tuple[str, ...] = ()
    collectives: Collectives | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x [..., U] over valid units; 0 if there are none."""
        total = torch.where(self.valid, x, 0).sum(-1)
        return total if self.collectives is None else self.collectives.sum(total)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of x [..., U] over valid units; 0 if there are none."""
        largest = torch.where(self.valid, x, -torch.inf).amax(-1)
        largest = largest if self.collectives is None else self.collectives.max(largest)
        return torch.where(largest == -torch.inf, 0, largest)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return minimum and maximum of x [U] over valid units, in one collective; 0 if none."""
        low, high = self.max(torch.stack([-x, x]))
        return -low, high

    def count(self) -> Tensor:
        """Return the number of valid units, 0-D float32."""
        return self.sum(torch.ones_like(self.valid, dtype=torch.float32))

    def within(self, groups: Groups) -> ScopeWithin:
        """Return the same scope with statistics inside each group of tokens."""
        return ScopeWithin(
            self.level, self.step, self.valid, self.domains, self.collectives, self.state, groups
        )

    def kth_largest(self, x: Tensor, k: Tensor) -> Tensor:
        """Return the k-th largest of x [U] over valid units, exactly; the smallest if k is more.

        NaN if there are none.

        Where all units are here they are sorted.  Over ranks only sums leave a rank: the order of
        float32 numbers is that of their bits read as integers, so the answer is found digit by
        digit, by counting.  Shapes are static in both.
        """
        count = self.count()
        k = torch.minimum(k.to(torch.int64), count.to(torch.int64)).clamp(min=1)
        if self._all_here:
            found = self._kth_here(torch.where(self.valid, x.float(), -torch.inf), k)
            return torch.where(count > 0, found, torch.nan)
        keys = _sortable(x)
        low = torch.full_like(k, -(2**31), dtype=torch.int64)
        for shift in (26, 20, 14, 8, 4, 0):
            digits = 1 << (6 if shift >= 8 else 4)  # noqa: PLR2004 - 6+6+6+6+4+4 = 32 bits
            steps = torch.arange(digits, device=x.device) << shift
            points = low + steps.view(-1, *[1] * low.dim())
            against = points if low.dim() else points[:, None]
            reached = self.sum((keys >= against).float()) >= k
            low = low + ((reached.sum(0) - 1).clamp(min=0) << shift)
        return _from_sortable(low)

    @property
    def _all_here(self) -> bool:
        """Whether no other rank holds units of a statistic."""
        ranks = self.collectives
        return ranks is None or ranks.size == ranks.parts.size == 1

    def _kth_here(self, x: Tensor, k: Tensor) -> Tensor:
        """Return the k-th largest of all of x [U]."""
        return x.sort(descending=True).values.index_select(0, k.reshape(1) - 1).reshape(k.shape)


@dataclass(frozen=True)
class ScopeWithin(Scope):
    """A scope cut into groups of tokens: each statistic is that of the token's own group, [T]."""

    groups: Groups | None = None

    @override
    def sum(self, x: Tensor) -> Tensor:
        """Return for each token the sum over the valid tokens of its group."""
        assert self.groups is not None
        return self.groups.broadcast(self.groups.sum(torch.where(self.valid, x, 0)))

    @override
    def max(self, x: Tensor) -> Tensor:
        """Return for each token the maximum over the valid tokens of its group."""
        assert self.groups is not None
        masked = torch.where(self.valid, x, -torch.inf)
        rows = masked.unbind(0) if masked.dim() > 1 else (masked,)
        tops = torch.stack([self.groups.broadcast(self.groups.max(row)) for row in rows])
        tops = torch.where(tops == -torch.inf, 0, tops)
        return tops if masked.dim() > 1 else tops[0]

    @property
    @override
    def _all_here(self) -> bool:
        """Whether each group is whole on this rank."""
        assert self.groups is not None
        ranks = self.groups.collectives
        return ranks.size == ranks.parts.size == 1

    @override
    def _kth_here(self, x: Tensor, k: Tensor) -> Tensor:
        """Return for each token the k-th largest of x [T] in its group, k that of the group."""
        assert self.groups is not None
        by_size = x.argsort(descending=True)
        by_group = by_size[self.groups.ids[by_size].argsort(stable=True)]
        sizes = torch.zeros(self.groups.size, dtype=torch.int64, device=x.device)
        ends = sizes.index_add(0, self.groups.ids, torch.ones_like(self.groups.ids)).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return x[by_group[starts[self.groups.ids] + k - 1]]


def _sortable(x: Tensor) -> Tensor:
    """Return int64 keys in the order of float32 numbers; -0 and 0 are one key."""
    bits = (x.float() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(2**31) - 1 - bits, bits)


def _from_sortable(key: Tensor) -> Tensor:
    """Return the number of a key."""
    bits = torch.where(key < 0, -(2**31) - 1 - key, key)
    return bits.to(torch.int32).view(torch.float32)

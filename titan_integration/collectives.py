"""Statistics over the data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class OverRanks:
    """The collectives of a process group, as the core asks for them.

    A rank finds its own part by its rank in this very group: a local rank would hand every node
    but the first the weights of another one's sequences.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, [ranks, *x.shape], in rank order."""
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(out, x.contiguous()[None], group=self.group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        out = x.clone()
        dist.all_reduce(out, dist.ReduceOp.SUM, group=self.group)
        return out

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        out = x.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return out

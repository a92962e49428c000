"""Statistics over the ranks that hold other tokens of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from typing_extensions import override

from weighting.contract import Alone

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from weighting.contract import Collectives


class OverRanks:
    """The collectives of process groups, as the core asks for them.

    A rank finds its own part by its rank in the very group that gathers: a local rank would hand
    every node but the first the weights of another one's sequences.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        rows: ProcessGroup | None = None,
        parts: ProcessGroup | None = None,
    ) -> None:
        """Take the groups.

        Args:
            group: All ranks whose tokens count together, each token once; this rank alone if None.
            rows: One rank for each set of sequences, in the order of the data.
            parts: The ranks that hold other parts of this rank's sequences.  Without it a rank's
                sequences are whole, and `rows` is `group`.
        """
        self._group, self._rows, self._parts = group, rows if parts else group, parts
        self.rank = dist.get_rank(self._rows) if self._rows else 0
        self.size = dist.get_world_size(self._rows) if self._rows else 1

    @property
    def parts(self) -> Collectives:
        """Reaches the ranks that hold other parts of this rank's sequences."""
        return OverRanks(self._parts) if self._parts else Alone()

    def gather(self, x: Tensor) -> Tensor:
        """Return the x of every set of sequences, [ranks, *x.shape], in rank order."""
        if self._rows is None:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(out, x.contiguous()[None], group=self._rows)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self._group is None:
            return x
        out = x.clone()
        dist.all_reduce(out, op, group=self._group)
        return out


class UnevenRanks(OverRanks):
    """The same where ranks hold batches of different shapes, as padding-free ones are.

    Gathered units are filled up with zeros, none of which counts; how many the largest rank has is
    waited for.
    """

    @override
    def gather(self, x: Tensor) -> Tensor:
        """Return the x of every rank, [ranks, ..., U], U that of the rank that has most units."""
        if x.dim():
            most = int(self.max(torch.tensor(x.shape[-1], device=x.device)))
            x = F.pad(x, (0, most - x.shape[-1]))
        return super().gather(x)

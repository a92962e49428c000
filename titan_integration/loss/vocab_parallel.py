"""Where the vocabulary of an output layer is: whole on this rank, or cut over several.

Under tensor parallelism a rank holds the logits of a part of the vocabulary.  The core takes
losses, signals and gradients from that part and two small collectives; here it learns which part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.distributed.spmd_types import (
    current_spmd_mesh,
    get_spmd_backend,
    spmd_mesh_size,
)
from typing_extensions import override

from weighting.loss.logits import Slice, check_labels, divergence, gradient_, statistics
from weighting.ranks import OverRanks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import Placement


def slice_of(of: Tensor, vocab_size: int | None) -> Slice | None:
    """Return this rank's part of the vocabulary, given logits or the weight of an output layer.

    Args:
        of: Logits [B, L, V] or a weight [V, D]; a DTensor says itself how it is cut.
        vocab_size: Size of the whole vocabulary, for the backend that passes plain tensors.
    """
    if isinstance(of, DTensor):
        where = 0 if of.dim() == 2 else of.dim() - 1  # noqa: PLR2004 - a weight is [V, D]
        names = of.device_mesh.mesh_dim_names or ()
        if "tp" not in names or of.placements[names.index("tp")] != Shard(where):
            return None
        return part_of(of.device_mesh.get_group("tp"), of.shape[where])
    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        mesh = current_spmd_mesh()
        assert mesh is not None
        assert vocab_size is not None, "the host's configs give global_vocab_size"
        return part_of(mesh.get_group("tp"), vocab_size)
    return None


def size_of(of: Tensor, vocab_size: int | None) -> int:
    """Return the size of the whole vocabulary; arguments as those of `slice_of`."""
    if not isinstance(of, DTensor) and spmd_mesh_size("tp") > 1:
        assert vocab_size is not None, "the host's configs give global_vocab_size"
        return vocab_size
    return of.shape[0 if of.dim() == 2 else -1]  # noqa: PLR2004 - a weight is [V, D]


def part_of(group: ProcessGroup, size: int) -> Slice:
    """Return this rank's part of a vocabulary; parts are equal but for the last."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return Slice(min(size, -(-size // ranks) * rank), OverRanks(group), size)


def plain(x: Tensor, *, partial: bool = False) -> Tensor:
    """Return this rank's part of a tensor, through which gradient flows.

    Args:
        x: Any tensor.
        partial: The gradient is a sum over the ranks that hold x whole, each of which has a term.
    """
    if not isinstance(x, DTensor):
        return x
    grads: list[Placement] = [
        Partial() if partial and isinstance(where, Replicate) else where for where in x.placements
    ]
    return x.to_local(grad_placements=grads)


def losses_with_gradient(
    logits: Tensor, labels: Tensor, vocab_size: int | None, needs: frozenset[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token, through which gradient flows to the logits, and `signals`."""
    rows, local, cut = plain(logits).flatten(0, -2), plain(labels), slice_of(logits, vocab_size)
    losses, found = token_losses_of(rows, local, cut, needs)
    return losses.view(local.shape), {name: x.view(local.shape) for name, x in found.items()}


def token_losses_of(
    logits: Tensor, labels: Tensor, cut: Slice | None, needs: frozenset[str] = frozenset()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each row of logits [T, V], of which this rank may hold a part.

    Args:
        logits: [T, V], or this rank's part of the vocabulary.
        labels: [T], or of another shape with as many; -100 is ignored.
        cut: How the vocabulary is cut; None when it is whole.
        needs: Names of signals.

    Returns:
        Losses with gradient, and without it `loss` and what else of `needs` the logits tell, [T].

    Raises:
        IndexError: A label is outside the vocabulary.
    """
    labels, found = _told(logits, labels, cut, needs)
    return _TokenLoss.apply(logits, labels, found["loss"], found.pop("lse"), cut), found


@torch.no_grad()
def signals(
    logits: Tensor, labels: Tensor, vocab_size: int | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Return `loss`, `lse` and what else of `needs` logits tell, each [B, L], without gradient.

    Raises:
        IndexError: A label is outside the vocabulary.
    """
    rows, local, cut = plain(logits).flatten(0, -2), plain(labels), slice_of(logits, vocab_size)
    _, found = _told(rows, local, cut, needs)
    return {name: x.view(local.shape) for name, x in found.items()}


def _told(
    logits: Tensor, labels: Tensor, cut: Slice | None, needs: frozenset[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return checked labels, [T], and what logits tell of them."""
    vocabulary = logits.shape[-1] if cut is None else cut.size
    if vocabulary is not None:
        check_labels(labels, vocabulary)
    labels = labels.long().flatten()
    return labels, statistics(logits, labels, needs, cut)


@torch.no_grad()
def divergence_of(
    logits: Tensor, others: Tensor, lse: Tensor, other_lse: Tensor, vocab_size: int | None
) -> Tensor:
    """Return how far a prediction is from that of other logits, [B, L]; both are cut alike."""
    rows, other_rows = (plain(x).flatten(0, -2) for x in (logits, others))
    sums = lse.flatten(), other_lse.flatten()
    return divergence(rows, other_rows, *sums, slice_of(logits, vocab_size)).view(lse.shape)


class _TokenLoss(torch.autograd.Function):
    """Cross entropy of each row; backward keeps no probabilities but makes them again."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, logits: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, cut: Slice | None
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, lse)
        ctx.cut = cut
        return loss.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        return gradient_(logits.clone(), labels, lse, grads[0], ctx.cut), None, None, None, None

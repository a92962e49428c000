"""The loss and the signals of each token, from whole logits or from this rank's slice of them.

Under tensor parallelism a rank holds the logits of a part of the vocabulary.  Everything a token
needs is a sum over the vocabulary of something shifted by the largest logit, so two small
collectives do: one maximum, one sum of all the parts stacked.  The vocabulary is never gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import _LossParallelCrossEntropy
from torchtitan.distributed.spmd_types import (
    current_spmd_mesh,
    get_spmd_backend,
    spmd_mesh_size,
)

from weighting.losses import IGNORE_INDEX, TOPK, distribution_signals, token_loss, topk_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Slices:
    """How the vocabulary is cut: the ranks that hold the slices, and its whole size."""

    group: ProcessGroup
    size: int

    @property
    def start(self) -> int:
        """First label of this rank's slice; slices are equal but for the last."""
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return min(self.size, -(-self.size // ranks) * rank)


def slices_of(logits: Tensor, vocab_size: int | None) -> Slices | None:
    """Return how the vocabulary of some logits is cut over ranks; None when it is whole."""
    if isinstance(logits, DTensor):
        if logits.placements != (Shard(logits.ndim - 1),):
            return None
        return Slices(logits.device_mesh.get_group("tp"), logits.shape[-1])
    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        mesh = current_spmd_mesh()
        assert mesh is not None
        assert vocab_size is not None, "the host's configs give global_vocab_size"
        return Slices(mesh.get_group("tp"), vocab_size)
    return None


def losses_with_gradient(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """Return the loss of each token, nats, 0 where ignored; gradient flows to the logits."""
    cut, logits = slices_of(logits, vocab_size), _local(logits)
    if cut is None:
        return token_loss(logits, labels)
    flat = logits.flatten(0, -2).float()
    losses = _LossParallelCrossEntropy.apply(flat, labels.flatten(), cut.group, cut.size, "none")
    return losses.reshape(labels.shape)


@torch.no_grad()
def signals(
    logits: Tensor, labels: Tensor, vocab_size: int | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Return `loss` and what else of `needs` takes the predicted distribution, without gradient."""
    cut, logits = slices_of(logits, vocab_size), _local(logits)
    if cut is None:
        return {"loss": token_loss(logits, labels), **distribution_signals(logits, labels, needs)}
    return sliced_signals(logits.float(), labels, cut, needs)


def sliced_signals(
    logits: Tensor, labels: Tensor, cut: Slices, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Return signals from this rank's slice of the logits, the same on all ranks of the cut.

    loss       = log s - d_label           d = logit - max, s = sum_v exp d_v
    entropy    = log s - sum_v d_v exp d_v / s
    error_norm = sqrt(1 - 2 p_label + sum_v exp(d_v)^2 / s^2)
    """
    top = logits.amax(-1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=cut.group)
    shifted = logits - top[..., None]
    exp = shifted.exp()
    local = labels - cut.start
    mine = (local >= 0) & (local < logits.shape[-1]) & (labels != IGNORE_INDEX)
    hit = shifted.gather(-1, local.clamp(0, logits.shape[-1] - 1)[..., None]).squeeze(-1)
    parts = [exp.sum(-1), torch.where(mine, hit, 0)]
    if "entropy" in needs:
        # A logit of -inf contributes nothing, but 0 * -inf would be NaN.
        parts.append(torch.where(exp > 0, shifted * exp, 0).sum(-1))
    if "error_norm" in needs:
        parts.append((exp * exp).sum(-1))
    stacked = torch.stack(parts)
    dist.all_reduce(stacked, dist.ReduceOp.SUM, group=cut.group)
    total, hit, *rest = stacked
    loss = torch.where(labels != IGNORE_INDEX, total.log() - hit, 0)
    found = {"loss": loss}
    for name in needs:
        if name.startswith(TOPK):
            found[name] = topk_entropy(
                _top_of_all(logits, int(name.removeprefix(TOPK)), cut), 10**9
            )
    if "entropy" in needs:
        found["entropy"] = (total.log() - rest[0] / total).clamp(min=0)
    if "error_norm" in needs:
        squares = rest[-1] / (total * total)
        found["error_norm"] = (1 - 2 * (-loss).exp() + squares).clamp(min=0).sqrt()
    return found


def _top_of_all(logits: Tensor, k: int, cut: Slices) -> Tensor:
    """Return the k largest logits of the whole vocabulary, from the k largest of each slice."""
    mine = logits.new_full((*logits.shape[:-1], k), -torch.inf)
    width = min(k, logits.shape[-1])
    mine[..., :width] = logits.topk(width, dim=-1).values
    ranks = dist.get_world_size(cut.group)
    every = mine.new_empty(ranks, *mine.shape)
    dist.all_gather_into_tensor(every, mine[None].contiguous(), group=cut.group)
    return every.movedim(0, -2).flatten(-2).topk(k, dim=-1).values


def _local(logits: Tensor) -> Tensor:
    return logits.to_local() if isinstance(logits, DTensor) else logits

"""What a chunk of logits says about each token, and its gradient, in as few passes as it takes.

Everything is a sum over the vocabulary of something shifted by the largest logit.  So a vocabulary
that is cut over ranks takes two small collectives, one maximum and one sum of all parts stacked,
and is never gathered.

    d = z - max z,   s = sum_v exp d_v,   p = exp(d) / s
    lse        = max z + log s
    loss       = lse - z_label                                    nats
    entropy    = log s - sum_v d_v exp d_v / s                    nats
    error_norm = sqrt(1 - 2 p_label + sum_v exp(d_v)^2 / s^2)

On CPU the sums run over blocks of rows that stay in the cache; elsewhere they are compiled into one
pass.  Either way nothing of the size of the chunk is made beside the chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weighting.columns import signal_of
from weighting.errors import LabelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weighting.contract import Collectives

IGNORE_INDEX = -100
TOPK = signal_of("topk_entropy_")
"""How the name of a top-k entropy begins; its k follows."""
_BLOCK = 2**18
"""Logits in a block on CPU: 1 MiB of float32."""


@dataclass(frozen=True)
class Slice:
    """This rank's part of a vocabulary cut over ranks.

    Attributes:
        start: The first label it holds.
        ranks: Reaches the other parts.
        size: Labels of the whole vocabulary; None if that is not known, and then not checked.
    """

    start: int
    ranks: Collectives
    size: int | None = None


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Refuse labels that are neither in the vocabulary nor -100.

    On CPU in eager mode at once.  On CUDA, and in compiled code, by an assertion in the stream of
    operations, for which nothing waits; on other devices torch has no such assertion.

    Args:
        labels: Integers of any shape.
        vocabulary: Labels run from 0 to one less.

    Raises:
        LabelError: Says which label, where, and what labels may be.
        ValueError: They are not integers.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        msg = f"labels are {labels.dtype}; give integers, from 0 to {vocabulary - 1}"
        raise ValueError(msg)
    if labels.device.type not in {"cpu", "cuda", "meta"}:
        return
    right = ((labels >= 0) & (labels < vocabulary)) | (labels == IGNORE_INDEX)
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        torch._assert_async(right.all(), _OUTSIDE)  # noqa: SLF001 - its name in torch's own docs
        return
    try:
        torch._assert_async(right.all(), _OUTSIDE)  # noqa: SLF001 - here it raises at once
    except RuntimeError:
        raise LabelError(_about(labels, right, vocabulary)) from None


_OUTSIDE = (
    "a label is outside the vocabulary: labels run from 0 to one less than its size, and -100 is "
    "ignored"
)


def _about(labels: Tensor, right: Tensor, vocabulary: int) -> str:
    """Say which label is wrong, where it stands, and what it should be."""
    place = (~right).nonzero()[0].tolist()
    label, others = int(labels[tuple(place)]), int((~right).sum()) - 1
    also = f", and {others} more are" if others else ""
    hint = "give the model and its data the same tokenizer"
    if label < 0:
        hint = f"write {IGNORE_INDEX} for labels to ignore"
    return (
        f"label {label} at {place} is outside the vocabulary of {vocabulary}{also}; labels run "
        f"from 0 to {vocabulary - 1}, and {IGNORE_INDEX} is ignored: {hint}"
    )


@torch.no_grad()
def statistics(
    logits: Tensor, labels: Tensor, needs: frozenset[str], cut: Slice | None = None
) -> dict[str, Tensor]:
    """Return `loss`, `lse` and what else of `needs` the logits tell, each [T] float32.

    Args:
        logits: [T, V], or this rank's part of the vocabulary.
        labels: [T] int; -100 is ignored: its loss is 0, its other values mean nothing.
        needs: Names of signals; those that logits do not tell are left out.
        cut: How the vocabulary is cut; None when it is whole.
    """
    place, here = _place(labels, logits, cut)
    with_entropy, with_squares = "entropy" in needs, "error_norm" in needs
    top = logits.amax(-1).float()
    top = top if cut is None else cut.ranks.max(top)
    parts = _by_rows(_sums, logits, top, with_entropy, with_squares)
    hit = torch.where(here, logits.gather(-1, place).squeeze(-1).float() - top, 0)
    sums = torch.stack([hit, *parts])
    hit, total, *rest = sums if cut is None else cut.ranks.sum(sums)
    log_total = total.log()
    loss = torch.where(labels == IGNORE_INDEX, 0, log_total - hit)
    found = {"loss": loss, "lse": top + log_total}
    if with_entropy:
        found["entropy"] = (log_total - rest[0] / total).clamp(min=0)
    if with_squares:
        two_hits = 2 * (hit - log_total).exp()
        found["error_norm"] = (1 - two_hits + rest[-1] / (total * total)).clamp(min=0).sqrt()
    for name in needs:
        if name.startswith(TOPK):
            found[name] = _topk_entropy(logits, int(name.removeprefix(TOPK)), cut)
    return found


@torch.no_grad()
def gradient_(
    logits: Tensor, labels: Tensor, lse: Tensor, weight: Tensor, cut: Slice | None = None
) -> Tensor:
    """Overwrite logits by the gradient of sum(weight * loss) with respect to them.

        dz = weight * (p - onehot(label)),   0 where the weight is 0

    Args:
        logits: [T, V], or this rank's part of the vocabulary.
        labels: [T] int.
        lse: [T], from `statistics`.
        weight: [T], non-negative; must be 0 where the label is ignored.
        cut: How the vocabulary is cut; None when it is whole.
    """
    place, here = _place(labels, logits, cut)
    # p - 1 from the logit itself: in bfloat16, 1 less p would be lost to rounding.
    miss = torch.expm1(logits.gather(-1, place).squeeze(-1).float() - lse) * weight
    _by_rows(_weighted_softmax, logits, lse - weight.log(), weight == 0)
    miss = torch.where(here & (weight > 0), miss, logits.gather(-1, place).squeeze(-1))
    return logits.scatter_(-1, place, miss.to(logits.dtype)[:, None])


def _place(labels: Tensor, logits: Tensor, cut: Slice | None) -> tuple[Tensor, Tensor]:
    """Return each label's place in this part of the vocabulary, [T, 1], and whether it is there."""
    place = labels if cut is None else labels - cut.start
    here = (place >= 0) & (place < logits.shape[-1]) & (labels != IGNORE_INDEX)
    return torch.where(here, place, 0)[:, None], here


def _sums(
    logits: Tensor,
    top: Tensor,
    with_entropy: bool,
    with_squares: bool,
    scratch: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """Return sum exp d, and if wanted sum d exp d and sum (exp d)^2, each [T]."""
    d = torch.sub(logits, top[:, None], out=_rows(scratch[0], logits))
    if not (with_entropy or with_squares):
        return (d.exp_().sum(-1),)
    e = torch.exp(d, out=_rows(scratch[1], logits))
    sums = [e.sum(-1)]
    if with_entropy:  # a logit of -inf contributes nothing, but -inf * 0 would be NaN
        sums.append(d.clamp_(min=-1e4).mul_(e).sum(-1))
    if with_squares:
        sums.append(e.mul_(e).sum(-1))
    return tuple(sums)


def _weighted_softmax(
    logits: Tensor, shift: Tensor, zero: Tensor, scratch: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, ...]:
    """Overwrite logits by exp(logits - shift), and by 0 in rows that are to be."""
    out = logits if logits.dtype == torch.float32 else _rows(scratch[0], logits)
    p = torch.sub(logits, shift[:, None], out=out).exp_().masked_fill_(zero[:, None], 0)
    if p is not logits:
        logits.copy_(p)
    return (shift,)


def _rows(scratch: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if scratch is None else scratch[: len(logits)]


def _by_rows(
    kernel: Callable[..., tuple[Tensor, ...]], logits: Tensor, *rest: Tensor | bool
) -> tuple[Tensor, ...]:
    """Run a kernel over rows of logits: block by block on CPU, compiled elsewhere."""
    if torch.compiler.is_compiling():
        return kernel(logits, *rest, (None, None))
    if logits.device.type != "cpu":
        return _compiled(kernel)(logits, *rest, (None, None))
    size = min(max(1, _BLOCK // logits.shape[-1]), max(1, len(logits)))
    # New memory for every block would cost more than the arithmetic.
    scratch = tuple(logits.new_empty(size, logits.shape[-1], dtype=torch.float32) for _ in "de")
    blocks = [
        kernel(
            logits[start : start + size],
            *(x[start : start + size] if isinstance(x, Tensor) else x for x in rest),
            scratch,
        )
        for start in range(0, max(1, len(logits)), size)
    ]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel)


def _topk_entropy(logits: Tensor, k: int, cut: Slice | None) -> Tensor:
    """Return the entropy of the softmax of the k largest logits, nats, [T]."""
    width = min(k, logits.shape[-1])
    top = logits.float().topk(width, dim=-1).values
    if cut is not None:  # the k largest of all are among the k largest of each part
        padded = top.new_full((len(top), k), -torch.inf)
        padded[:, :width] = top
        every = cut.ranks.gather(padded).movedim(0, 1).flatten(1)
        top = every.topk(min(k, every.shape[-1]), dim=-1).values
    return torch.special.entr(top.softmax(-1)).sum(-1)

"""What a chunk of logits says about each token, and its gradient, in as few passes as it takes.

Everything is a sum over the vocabulary of something shifted by the largest logit.  So a vocabulary
that is cut over ranks takes two small collectives, one maximum and one sum of all parts stacked,
and is never gathered.

    d = z - max z,   s = sum_v exp d_v,   p = exp(d) / s
    lse        = max z + log s
    loss       = lse - z_label                                    nats
    entropy    = log s - sum_v d_v exp d_v / s                    nats
    error_norm = sqrt(1 - 2 p_label + sum_v exp(d_v)^2 / s^2)

The gradient is made of the very exponentials that are summed up, one for each logit.  They are not
scaled to probabilities: the products that follow are linear, so that 1/s goes with the weight of
the token to the other operand, the hidden states, which is the smaller by far.

On CPU the sums run over blocks of rows that stay in the cache; elsewhere they are compiled into one
pass.  Either way nothing of the size of the chunk is made beside the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weighting.columns import signal_of
from weighting.compiled import compiled
from weighting.errors import LabelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weighting.contract import Collectives

IGNORE_INDEX = -100
TOPK = signal_of("topk_entropy_")
"""How the name of a top-k entropy begins; its k follows."""
TOP = signal_of("label_is_top")
"""1 where no other word is more probable than the label, else 0."""
OF_LOGITS = (TOPK, TOP)
"""How the names of columns begin that logits tell."""
_BLOCK = 2**17
"""Logits in a block on CPU: half a MiB of float32, twice where entropies are taken too."""


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
    return _summed(logits, labels, needs, cut, store=False)[0]


@torch.no_grad()
def unscaled_gradient_(
    logits: Tensor, labels: Tensor, needs: frozenset[str], cut: Slice | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Overwrite logits by the gradient of each loss times a number of its own, in the same pass.

        dz' = exp(z - max z) - s * onehot(label) = s * (p - onehot(label))

    Rows of which a loss is not finite for their logits, and rows of ignored labels, hold something
    finite: give them a weight of 0.

    Args:
        logits: [T, V], or this rank's part of the vocabulary.
        labels: As those of `statistics`.
        needs: The same.
        cut: The same.

    Returns:
        What `statistics` returns; and s, [T], at least 1 where the loss is finite.
    """
    return _summed(logits, labels, needs, cut, store=True)


def _summed(
    logits: Tensor, labels: Tensor, needs: frozenset[str], cut: Slice | None, *, store: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the statistics and s; with `store`, overwrite the logits."""
    place, here = _place(labels, logits, cut)
    with_entropy, with_squares = "entropy" in needs, "error_norm" in needs
    found = {
        name: _topk_entropy(logits, int(name.removeprefix(TOPK)), cut)
        for name in needs
        if name.startswith(TOPK)
    }
    shift = own_top = None
    if cut is not None:
        own_top = logits.amax(-1).float()
        shift = cut.ranks.max(own_top)
    own = logits.gather(-1, place[:, None]).squeeze(-1).float()
    top, *parts = _by_rows(_sums, logits, shift, with_entropy, with_squares, store)
    own = own - top
    if cut is None:
        hit, (total, *rest) = own, parts
    else:
        # A maximum over ranks may pass over a NaN, and so would the sums of this part.
        assert own_top is not None
        lost = own_top.isnan() | (own_top == torch.inf)
        parts[0] = parts[0].masked_fill(lost, torch.nan)
        hit, total, *rest = cut.ranks.sum(torch.stack([own.masked_fill(~here, 0), *parts]))
    log_total = total.log()
    found["loss"] = (log_total - hit).masked_fill(labels == IGNORE_INDEX, 0)
    found["lse"] = top + log_total
    if TOP in needs:
        found[TOP] = (hit >= 0).float()
    if with_entropy:
        found["entropy"] = (log_total - rest[0] / total).clamp(min=0)
    if with_squares:
        two_hits = 2 * (hit - log_total).exp()
        found["error_norm"] = (1 - two_hits + rest[-1] / (total * total)).clamp(min=0).sqrt()
    if store:
        # p - 1 from the logit itself: in bfloat16, 1 less p would be lost to rounding.
        miss = torch.expm1(own - log_total) * total
        if cut is not None:
            miss = torch.where(here, miss, own.exp())
        _put_(logits, place, miss.nan_to_num(0))
    return found, total


@torch.no_grad()
def divergence(
    logits: Tensor, others: Tensor, lse: Tensor, other_lse: Tensor, cut: Slice | None = None
) -> Tensor:
    """Return how far the prediction p of logits is from q, that of others, nats, [T] float32.

        KL(p || q) = sum_v p_v (log p_v - log q_v)

    Args:
        logits: [T, V], or this rank's part of the vocabulary.
        others: The same of another model.
        lse: [T], from `statistics` of these logits.
        other_lse: [T], from that of the others.
        cut: How both vocabularies are cut; None when they are whole.
    """
    (part,) = _by_rows(_divergence, logits, others, lse, other_lse)
    return (part if cut is None else cut.ranks.sum(part)).clamp(min=0)


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
        weight: [T], of any sign; must be 0 where the label is ignored.
        cut: How the vocabulary is cut; None when it is whole.
    """
    place, here = _place(labels, logits, cut)
    # p - 1 from the logit itself: in bfloat16, 1 less p would be lost to rounding.
    own = logits.gather(-1, place[:, None]).squeeze(-1).float()
    miss = torch.expm1(own - lse) * weight
    shift, sign = lse - weight.abs().log(), weight.sign()
    _by_rows(_exponentials, logits, shift, sign)
    miss = torch.where(here & (weight != 0), miss, (own - shift).exp().nan_to_num(0) * sign)
    return _put_(logits, place, miss)


def _place(labels: Tensor, logits: Tensor, cut: Slice | None) -> tuple[Tensor, Tensor]:
    """Return each label's place in this part of the vocabulary, [T], and whether it is there."""
    wanted = labels if cut is None else labels - cut.start
    place = wanted.clamp(0, logits.shape[-1] - 1)
    return place, (place == wanted) & (labels != IGNORE_INDEX)


def _put_(logits: Tensor, place: Tensor, value: Tensor) -> Tensor:
    """Put a value into each row, at its place; `scatter_` takes its time in 16 bits on CPU."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits.index_put_((rows, place), value.to(logits.dtype))


def _sums(
    logits: Tensor,
    top: Tensor | None,
    with_entropy: bool,
    with_squares: bool,
    store: bool,
    scratch: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """Return the shift, sum exp d, and if wanted sum d exp d and sum (exp d)^2, each [T].

    Without a shift it is the largest logit.  With `store`, logits are overwritten by exp d.
    What is not finite, as d of a logit of -inf or all of a row with a NaN, counts as exp d = 0.
    """
    in_place = store and logits.dtype == torch.float32
    with_two = with_entropy or with_squares  # of d and exp d
    own_shift = top is None
    d, top = _difference(logits, top, scratch[0], in_place=in_place and not with_two)
    if own_shift and _is_finite(top, scratch):
        d.clamp_(min=-1e4)  # No NaN is among them; this takes a fifth of the time.
    else:
        d.nan_to_num_(nan=-1e4, neginf=-1e4)
    if not with_two:
        e = d.exp_()
    elif scratch[1] is None:
        e = d.exp()
    else:
        e = torch.exp(d, out=logits if in_place else scratch[1][: len(logits)])
    sums = [top, e.sum(-1)]
    if with_entropy:
        sums.append(d.mul_(e).sum(-1))
    if store and e is not logits:
        logits.copy_(e)
    if with_squares:
        sums.append(d.copy_(e).mul_(e).sum(-1))
    return tuple(sums)


def _exponentials(
    logits: Tensor, shift: Tensor, sign: Tensor, scratch: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, ...]:
    """Overwrite logits by sign * exp(logits - shift), and by 0 what is not finite."""
    d, _ = _difference(logits, shift, scratch[0], in_place=logits.dtype == torch.float32)
    if not _is_finite(shift, scratch):
        d.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    e = d.exp_().mul_(sign[:, None])
    if e is not logits:
        logits.copy_(e)
    return (shift,)


def _is_finite(shift: Tensor, scratch: tuple[Tensor | None, ...]) -> bool:
    """Tell whether a shift made of all logits is finite; False where that would be waited for."""
    return scratch[0] is not None and bool(shift.sum().isfinite())


def _divergence(
    logits: Tensor,
    others: Tensor,
    lse: Tensor,
    other: Tensor,
    scratch: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, ...]:
    """Return the sum over this part of the vocabulary, [T]; a probability of 0 adds nothing."""
    d, _ = _difference(logits, lse, scratch[0], in_place=False)
    less, _ = _difference(others, other, scratch[1], in_place=False)
    p = d.exp()
    return (torch.where(p == 0, 0, p * (d - less)).sum(-1),)


def _difference(
    logits: Tensor, shift: Tensor | None, scratch: Tensor | None, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return logits - shift, float32: in their place, in the scratch given, or anew; and the shift.

    Without one it is the largest logit of each row.
    """
    if scratch is None:
        wide = logits.float()
    else:
        # One after the other: a difference of two dtypes takes three times as long, and so does
        # the largest of 16 bits.
        wide = logits if in_place else scratch[: len(logits)].copy_(logits)
    shift = wide.amax(-1) if shift is None else shift
    return (wide - shift[:, None] if scratch is None else wide.sub_(shift[:, None])), shift


def _by_rows(
    kernel: Callable[..., tuple[Tensor, ...]], logits: Tensor, *rest: Tensor | bool | None
) -> tuple[Tensor, ...]:
    """Run a kernel over rows of logits: block by block on CPU, compiled elsewhere."""
    if torch.compiler.is_compiling():
        return kernel(logits, *rest, (None, None))
    if logits.device.type != "cpu":
        return compiled(kernel)(logits, *rest, (None, None))
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

"""The output layer, chunk by chunk, under weights that are known only when every loss is.

A weight that looks at the whole batch is known only when every loss is, but the gradient of the
output layer is linear in it.  So one pass over the chunks takes the losses *and* the gradient under
the part of the weights that is known at once, with one accumulator of the output layer's gradient
for each unit whose weight comes late; when the weights are known, the gradient is scaled.

    u_t = a_t * r(unit of t)     a: known in the chunk,   r: known after all chunks
    dh_t = r * a_t * dh'_t       dW = sum_units r * sum_{t in unit} a_t * dW'_t

That is three matrix products of the output layer, the floor, and no logits are kept.  Weights that
come late for every single token cannot be had so; then the logits are kept, or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from typing_extensions import override

from weighting.columns import HIDDEN
from weighting.compiled import compiled, compiles
from weighting.contract.levels import sum_by
from weighting.loss.cross_entropy import weighted_sum
from weighting.loss.logits import IGNORE_INDEX, Slice, gradient_, statistics, unscaled_gradient_
from weighting.loss.sums import Gradients, Head, Sums, fold_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weighting.loss.path import Path


class Rows(NamedTuple):
    """The row of each token, [T], ascending; and at which token each row ends."""

    of: Tensor
    ends: Sequence[int]


class Batch(NamedTuple):
    """A batch at the output layer.

    Attributes:
        labels: [B, L] or [T] int.
        head: The output layer.
        path: How to go through it.
        needs: Names of the signals to take.
        local: From signals of some tokens to the part of their weights that they alone decide.
        known: Signals known before the pass, by name, in the shape of the labels.
        scale: 0-D; multiplies the loss.
        rows: Which tokens are in which row; `begin` tells it.
    """

    labels: Tensor
    head: Head
    path: Path
    needs: frozenset[str]
    local: Callable[[dict[str, Tensor]], Tensor]
    known: Mapping[str, Tensor]
    scale: Tensor
    rows: Rows | None = None


Weigh = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
"""From signals by name, each in the shape of the labels, to token weights and what else to hand
on."""


def late_bound(
    hidden: Tensor,
    batch: Batch,
    weigh: Weigh,
    *,
    note: Callable[[dict[str, Tensor]], None] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return sum(weight * nll) * scale, differentiable in hidden states, weight and bias.

    Args:
        hidden: [B, L, D] or [T, D].
        batch: The batch.
        weigh: Gives the weights.
        note: If given, weights are not yet to be had in the forward pass: `note` then gets the
            signals, 0 is returned, and `weigh` is called in the backward pass.

    Returns:
        The sum, 0-D; and what `weigh` gave, if it was called, without gradient.
    """
    head = batch.head
    loss, *given = _LateBound.apply(hidden, head.weight, head.bias, batch, weigh, note)
    return loss, tuple(given)


class _LateBound(torch.autograd.Function):
    """Makes the gradient once the weights are there; hands it out times whatever arrives."""

    @staticmethod
    @override
    # Autograd calls it with what `apply` was given.
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: Batch,
        weigh: Weigh,
        note: Callable[[dict[str, Tensor]], None] | None,
    ) -> tuple[Tensor, ...]:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        found, finish = begin(batch, hidden, wants=(of_hidden, of_weight or of_bias))
        ctx.shape, ctx.gradients = hidden.shape, None
        if not torch.compiler.is_compiling():  # no zeros for what has no gradient
            ctx.set_materialize_grads(False)
        if note is None:
            given = weigh(found)
            # Compiled code knows only what the function returns of what was made in it.
            ctx.mark_non_differentiable(*given)
            loss, gradients = finish(given[0])
            ctx.gradients = lambda: gradients
            return loss, *given
        note(found)
        ctx.gradients = lambda: finish(weigh(found)[0])[1]
        return (torch.zeros_like(batch.scale),)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            msg = "the gradient is made once and can be had once; call the loss again"
            raise RuntimeError(msg)
        gradients, ctx.gradients = ctx.gradients(), None
        of_hidden, of_weight, of_bias = gradients
        for gradient in gradients:
            if gradient is not None:
                fold_([gradient], grads[0].view(1))
        of_hidden = None if of_hidden is None else of_hidden.view(ctx.shape)
        return of_hidden, of_weight, of_bias, None, None, None


Finish = Callable[[Tensor], tuple[Tensor, Gradients]]
"""From token weights to the loss, 0-D, and its gradients; to be called once."""


def begin(
    batch: Batch, hidden: Tensor, *, wants: tuple[bool, bool] = (True, True)
) -> tuple[dict[str, Tensor], Finish]:
    """Take the signals of a batch, and all of the gradient that does not wait for its weights.

    Args:
        batch: The batch.
        hidden: [B, L, D] or [T, D].
        wants: Whether gradients of hidden states, and of weight and bias, are wanted.

    Returns:
        Signals by name, `loss` among them and, if it is needed, `hidden`, in the shape of the
        labels; and how to finish.
    """
    known = {name: value.reshape(-1) for name, value in batch.known.items()}
    states = hidden.detach().reshape(-1, hidden.shape[-1])
    told = {HIDDEN: hidden.detach()} if HIDDEN in batch.needs else {}
    if told:
        known[HIDDEN] = states
    labels, path = batch.labels.reshape(-1), batch.path
    count = path.by_domain or path.units
    each = len(labels) // count
    row_of = torch.arange(len(labels), device=labels.device) // max(each, 1)
    in_rows = Rows(row_of, [each * (row + 1) for row in range(count)])
    flat = batch._replace(labels=labels, known=known, rows=in_rows)
    through = {"late": _late, "keep": _keep, "recompute": _twice}[path.memory]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        counted = _counted(labels)
        if counted is None:
            found, finish = through(flat, states, wants)
        else:
            found, finish = _without_ignored(through, flat, states, wants, counted)
    return {name: x.reshape(batch.labels.shape) for name, x in found.items()} | told, finish


def _counted(labels: Tensor) -> Tensor | None:
    """Return where the labels stand that count, or None for all.

    All are taken where none count, and where how many there are would have to be waited for: on an
    accelerator, and in compiled code, which has one size for all batches.
    """
    if compiles(labels.device) or torch.compiler.is_compiling():
        return None
    counted = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return counted if 0 < len(counted) < len(labels) else None


def _without_ignored(
    through: Callable[..., tuple[dict[str, Tensor], Finish]],
    batch: Batch,
    hidden: Tensor,
    wants: tuple[bool, bool],
    counted: Tensor,
) -> tuple[dict[str, Tensor], Finish]:
    """Go with the tokens that count alone; the others have signals and gradients of 0."""
    assert batch.rows is not None
    ends = torch.searchsorted(counted, torch.tensor(batch.rows.ends)).tolist()
    fewer = batch._replace(
        labels=batch.labels[counted],
        known={name: value[counted] for name, value in batch.known.items()},
        rows=Rows(batch.rows.of[counted], ends),
    )
    found, finish = through(fewer, hidden[counted], wants)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(hidden), *x.shape[1:]).index_copy_(0, counted, x)

    @torch.no_grad()
    def finish_all(token: Tensor) -> tuple[Tensor, Gradients]:
        loss, gradients = finish(token.reshape(-1)[counted])
        of_hidden = None if gradients.hidden is None else spread(gradients.hidden)
        return loss, gradients._replace(hidden=of_hidden)

    return {name: spread(x) for name, x in found.items()}, finish_all


def _late(
    batch: Batch, hidden: Tensor, wants: tuple[bool, bool]
) -> tuple[dict[str, Tensor], Finish]:
    """Go once: gradients under the local part of the weights, per late unit."""
    assert batch.rows is not None
    units, (row_of, ends) = batch.path.units, batch.rows
    of_rows = _domains_of_rows(batch, row_of) if batch.path.by_domain else None
    unit_of = row_of if of_rows is None else of_rows[row_of]
    sums = Sums(batch.head, hidden, wants, units, of_rows, ends=ends)
    signals: list[dict[str, Tensor]] = []
    parts: list[Tensor] = []
    scales: list[Tensor] = []
    compiling = torch.compiler.is_compiling()
    spans = _spans(ends, batch.path.chunk)
    room = None if compiling else _room(batch.head, hidden, spans)
    for span in spans:
        known = {name: value[span] for name, value in batch.known.items()}
        rows, labels = hidden[span], batch.labels[span]
        if room is None:
            # A copy, as what is compiled once for all chunks must not share memory with others.
            known = {name: value.clone() for name, value in known.items()}
            given = rows.clone(), labels.clone(), known, None
            found, part, scale, d_logits = _compiled_chunk(batch, *given)
        else:
            found, part, scale, d_logits = _chunk(batch, rows, labels, known, room[: len(rows)])
        sums.add(d_logits, scale, span)
        signals.append(found)
        parts.append(part)
        scales.append(scale)
    found, part, scale = _joined(signals), torch.cat(parts), torch.cat(scales)

    @torch.no_grad()
    def finish(token: Tensor) -> tuple[Tensor, Gradients]:
        bound = compiled(_bound) if compiles(token.device) else _bound
        given = token.reshape(-1), part, scale, found["loss"], batch.scale
        loss, per_token, late = bound(*given, units, unit_of)
        return loss, sums.scaled(per_token, late)

    return found, finish


def _bound(
    token: Tensor,
    part: Tensor,
    scale: Tensor,
    nll: Tensor,
    factor: Tensor,
    units: int,
    unit_of: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, 0-D, the factor of each token's gradient, [T], and of each unit's, [U]."""
    token = token * factor
    # Signs are the part's.
    whole, local = sum_by(unit_of, units, torch.stack([token, part]).abs())
    late = torch.where(local > 0, whole / local, whole)
    return weighted_sum(nll, token), scale * late[unit_of], late


def _domains_of_rows(batch: Batch, row_of: Tensor) -> Tensor:
    """Return the domain of each row, [B]; ids at ignored tokens may be anything."""
    ids = torch.where(batch.known["valid"], batch.known["domain_ids"].long(), 0)
    return ids.new_zeros(batch.path.by_domain).scatter_reduce(0, row_of, ids, "amax")


def _chunk(
    batch: Batch, rows: Tensor, labels: Tensor, known: dict[str, Tensor], room: Tensor | None
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return a chunk's signals, the local part of its weights, and its logits' gradient by that.

    The gradient comes in two: a factor for each token, and what it is to be multiplied with.
    """
    head = batch.head
    logits = head.logits(rows, out=room)
    # Collectives of a cut vocabulary stay outside of what is compiled.
    weigh = compiled(_weighed) if head.cut is None and compiles(logits.device) else _weighed
    found, part, scale = weigh(logits, labels, batch.needs, head.cut, batch.local, known)
    return found, part, scale, logits


def _weighed(
    logits: Tensor,
    labels: Tensor,
    needs: frozenset[str],
    cut: Slice | None,
    local: Callable[[dict[str, Tensor]], Tensor],
    known: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Overwrite logits by their unscaled gradient; return signals, local weights and scales."""
    found, total = unscaled_gradient_(logits, labels, needs, cut)
    del found["lse"]
    part = local({**found, **known})
    part = part.masked_fill(~found["loss"].isfinite(), 0)
    return found, part, _per_token(part, total)


_compiled_chunk = cast("Any", torch.compiler.nested_compile_region(_chunk))
"""For compiled callers: one graph for chunks of a size, where unrolled ones take a minute."""


def _per_token(weight: Tensor, total: Tensor) -> Tensor:
    """Return the factors that turn unscaled gradients of logits into those of weight * loss."""
    return torch.where(weight != 0, weight / total, weight)


def _keep(
    batch: Batch, hidden: Tensor, wants: tuple[bool, bool]
) -> tuple[dict[str, Tensor], Finish]:
    """Go once, and keep every logit's gradient until its token's weight is known."""
    head, path = batch.head, batch.path
    spans = _spans([len(hidden)], path.chunk)
    room = hidden.new_empty(len(hidden), len(head.weight))
    signals: list[dict[str, Tensor]] = []
    totals: list[Tensor] = []
    for span in spans:
        logits = head.logits(hidden[span], out=room[span])
        found, total = unscaled_gradient_(logits, batch.labels[span], batch.needs, head.cut)
        signals.append(found)
        totals.append(total)
    found, total = _joined(signals), torch.cat(totals)
    del found["lse"]

    @torch.no_grad()
    def finish(token: Tensor) -> tuple[Tensor, Gradients]:
        weight = token.reshape(-1) * batch.scale
        loss = weighted_sum(found["loss"], weight)
        sums = Sums(head, hidden, wants, whole=path.most is None)
        if path.most is None:
            scale = _per_token(weight, total)
            sums.add(room, scale, slice(None))
            return loss, sums.scaled(scale)
        weight, rows = _selected(weight, path.most)
        scale = _per_token(weight, total)
        for piece in rows.split(path.chunk):
            sums.add(room[piece], scale[piece], piece)
        return loss, sums.scaled(scale)

    return found, finish


def _twice(
    batch: Batch, hidden: Tensor, wants: tuple[bool, bool]
) -> tuple[dict[str, Tensor], Finish]:
    """Go once for the signals and, when the weights are known, once more for the gradients."""
    head, path = batch.head, batch.path
    spans = _spans([len(hidden)], path.chunk)
    room = _room(head, hidden, spans)
    signals: list[dict[str, Tensor]] = []
    for span in spans:
        rows = hidden[span]
        logits = head.logits(rows, out=room[: len(rows)])
        signals.append(statistics(logits, batch.labels[span], batch.needs, head.cut))
    found = _joined(signals)
    lse = found.pop("lse")
    # The second pass begins where the first one ended.
    last = spans[-1] if path.most is None else None

    @torch.no_grad()
    def finish(token: Tensor) -> tuple[Tensor, Gradients]:
        weight = token.reshape(-1) * batch.scale
        loss = weighted_sum(found["loss"], weight)
        sums = Sums(head, hidden, wants, whole=path.most is None)
        pieces: list[slice | Tensor] = [*reversed(spans)]
        if path.most is not None:
            weight, rows = _selected(weight, path.most)
            pieces = [*rows.split(len(room))]
        for piece in pieces:
            rows = hidden[piece]
            logits = room[: len(rows)]
            if piece is not last:
                head.logits(rows, out=logits)
            gradient_(logits, batch.labels[piece], lse[piece], weight[piece], head.cut)
            sums.add(logits, None, piece)
        return loss, sums.scaled(None)

    return found, finish


def _room(head: Head, hidden: Tensor, spans: list[slice]) -> Tensor:
    """Return room for the logits of the longest span, [tokens, V], which all share."""
    longest = max((span.stop - span.start for span in spans), default=0)
    return hidden.new_empty(longest, len(head.weight))


def _selected(weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the weights and where the first `most` that are not 0 stand.

    If more tokens tie at the threshold of a selection than there is room for, those that fit carry
    the weight of the others.
    """
    rows = (weight == 0).to(torch.int8).argsort(stable=True)[:most]
    carried, total = weight[rows].abs().sum(), weight.abs().sum()
    crowded = (weight != 0).sum() > most
    return weight * torch.where(crowded, total / torch.where(crowded, carried, 1), 1), rows


def _spans(ends: Sequence[int], chunk: int) -> list[slice]:
    """Return the tokens of each chunk: as many whole rows as fit, or an even part of a long one.

    Args:
        ends: Where each row ends.
        chunk: Tokens in a chunk, at most.
    """
    cuts, start = [0], 0
    for end in ends:
        if end - cuts[-1] > chunk:
            if start > cuts[-1]:
                cuts.append(start)
            pieces = -(-(end - start) // chunk)
            size = -(-(end - start) // pieces)
            cuts += range(start + size, end, size)
        start = end
    if start > cuts[-1]:
        cuts.append(start)
    return [slice(*pair) for pair in pairwise(cuts)]


def _joined(signals: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in signals]) for name in signals[0]}

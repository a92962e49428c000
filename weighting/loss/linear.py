"""Weighted cross entropy straight from hidden states: the output layer, chunk by chunk, late-bound.

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

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor
from typing_extensions import override

from weighting.build import Weights
from weighting.columns import HIDDEN, signal_of
from weighting.compiled import compiled
from weighting.contract.levels import sum_by
from weighting.loss.cross_entropy import signals_of, weighted_cross_entropy, weighted_sum
from weighting.loss.logits import (
    IGNORE_INDEX,
    Slice,
    check_labels,
    gradient_,
    statistics,
    unscaled_gradient_,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weighting.build import Plan, Weighting
    from weighting.contract import Collectives

Memory = Literal["auto", "late", "keep", "recompute", "full"]
CHUNKS = 8
"""Chunks a batch is cut into where nothing else is asked."""
MIN_CHUNK, MAX_CHUNK = 512, 2048
"""Tokens in a chunk, if there are as many: with fewer, adding each chunk's part to the gradient of
the layer takes as long as making it; products are no faster with more."""


def linear_weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    fn: Weighting,
    *,
    bias: Tensor | None = None,
    step: int | Tensor = 0,
    domain_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    ref_loss: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    memory: Memory = "auto",
    chunks: int = CHUNKS,
    sequence_ids: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """Return the weighted mean cross entropy of a batch from hidden states, and the weights.

        logits = hidden @ weight.T + bias
        loss   = sum_t u_t * nll_t / number of valid labels

    The same as `weighted_cross_entropy` of the logits, which never exist but for a chunk of tokens
    at a time.  The gradient is made in the forward pass, so it can be had once.
    On CPU, ignored tokens take no part in the products.

    Args:
        hidden: [B, L, D] or [T, D], the input of the output layer.
        weight: [V, D], that layer's weight; tied to the embedding or not.
        labels: [B, L] or [T] int; -100 is ignored.
        fn: A built spec.
        bias: [V], the layer's bias, if it has one.
        step: Optimizer step.
        domain_ids: Domain of each token, in the order given to `build`; or [B, 1], the domain of
            each row, which saves memory or products where domains are weighed.
        segment_ids: Document of each token, from 0 in each row.
        ref_loss: Loss of a reference model for each token, nats.
        columns: Dataset columns for each token, by name.
        memory: How weights that come late are met; see `path_of`.
        chunks: Into how many chunks the batch is cut, unless these had fewer than 512 tokens, or
            more than 2,048.
        sequence_ids: Sequence of each token: equal ids in one row are one, counted from 0 in each
            row or on from row to row.  None: each row of [B, L] is a sequence, and in [T] each
            document.  A padding-free batch needs them, see `Signals`.

    Returns:
        The loss, nats; and the weights, of which `fn.check(weights)` says now and then whether a
        signal was not finite.

    Raises:
        ValueError: Shapes differ, a signal the spec needs is missing, or `memory` cannot serve
            the spec or the dtype.
        IndexError: A label is outside the vocabulary.  On CUDA, and in compiled code, an assertion
            for which nothing waits says so.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        msg = (
            f"hidden {[*hidden.shape]}, weight {[*weight.shape]} and labels {[*labels.shape]} do "
            "not belong together; give [B, L, D], [V, D] and [B, L]"
        )
        raise ValueError(msg)
    domains = 0
    if domain_ids is not None and labels.dim() > 1 and domain_ids.shape == (len(labels), 1):
        domains, domain_ids = len(fn.domains), domain_ids.expand_as(labels)
    given = {"domain_ids": domain_ids, "segment_ids": segment_ids, "sequence_ids": sequence_ids}
    given["ref_loss"] = ref_loss
    if memory == "full":
        logits = F.linear(hidden, weight, bias)
        given[HIDDEN] = hidden
        return weighted_cross_entropy(logits, labels, fn, step=step, columns=columns, **given)
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    read = compiled(_read) if _compiles(labels.device) else _read
    labels, valid, scale = read(labels, len(weight))
    step = torch.as_tensor(step, device=labels.device)  # one graph for all steps
    columns = {signal_of(name): value for name, value in (columns or {}).items()}
    given = {"valid": valid, **given, **columns}
    known = {name: value for name, value in given.items() if value is not None}

    def weigh(found: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = fn(signals_of({**found, **known}), step)
        units = (out.compared[name] for name in fn.compares)
        return out.token, out.moments, *out.factors.values(), *units

    def local(found: dict[str, Tensor]) -> Tensor:
        return fn.local_part(signals_of(found), step)

    sizes = Sizes.of(labels, weight, domains)
    if sequence_ids is not None:  # a row may hold several sequences, each with a weight of its own
        sizes = sizes._replace(rows=0)
    batch = Batch(
        labels,
        Head(weight, bias),
        path_of(fn.plan, sizes, memory, chunks=chunks, collectives=fn.collectives),
        fn.needs,
        local,
        known,
        scale,
    )
    loss, (token, moments, *rest) = late_bound(hidden, batch, weigh)
    factors, units = rest[: len(fn.plan.factors)], rest[len(fn.plan.factors) :]
    out = Weights(
        token,
        dict(zip(fn.plan.factors, factors, strict=True)),
        moments,
        dict(zip(fn.compares, units, strict=True)),
    )
    fn.warn_of_one_unit(out, rows_are_sequences=sequence_ids is None)
    return loss, out


def _read(labels: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return checked labels as int64, which of them count, and 1 / their number, 0-D."""
    check_labels(labels, vocabulary)
    valid = labels != IGNORE_INDEX
    return labels.long(), valid, valid.sum().clamp(min=1).reciprocal()


def as_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states and the output layer in the dtype that autocast gives its product.

    Raises:
        ValueError: It is float16.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype == torch.float16:
        msg = (
            "the gradient is made before any loss scaling, where float16 loses it; use bfloat16, "
            "or memory='full'"
        )
        raise ValueError(msg)
    return hidden, weight, bias


class Head(NamedTuple):
    """An output layer: its weight [V, D], its bias [V], how its vocabulary is cut over ranks."""

    weight: Tensor
    bias: Tensor | None = None
    cut: Slice | None = None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits of hidden states [T, D], [T, V]."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class Sizes(NamedTuple):
    """How large the output layer's work is on this rank.

    Attributes:
        tokens: Tokens of the batch.
        rows: Sequences of the batch, if each is a row; 0 where ids tell them.
        domains: How many domains the rows may be of, each row of one; 0 where it may be of more.
        vocabulary: Rows of the weight.
        width: Columns of the weight.
        itemsize: Bytes of an element of the weight.
        budget: Bytes that may be spent beside one chunk of logits in any case; see `path_of`.
    """

    tokens: int
    rows: int
    vocabulary: int
    width: int
    itemsize: int
    budget: int
    domains: int = 0

    @property
    def row_of_logits(self) -> int:
        """Bytes of the logits of a token."""
        return self.vocabulary * self.itemsize

    @classmethod
    def of(cls, labels: Tensor, weight: Tensor, domains: int = 0) -> Sizes:
        """Return the sizes for labels [B, L] or [T] and a weight [V, D]."""
        rows = labels.shape[0] if labels.dim() > 1 else 0
        vocabulary, width = weight.shape
        item = weight.element_size()
        most = budget(weight.device)
        return cls(labels.numel(), rows, vocabulary, width, item, most, domains)


SHARE = 16
"""Of an accelerator's memory, the part that may be spent is one in so many."""


def budget(device: torch.device) -> int:
    """Return a sixteenth of an accelerator's memory, or 1 GiB of a CPU's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // SHARE
    return 2**30


class Path(NamedTuple):
    """How a batch goes through the output layer.

    Attributes:
        memory: late, keep or recompute.
        units: How many late units there are; they share the tokens evenly.
        chunk: Tokens in a chunk, at most.
        most: How many tokens can weigh more than 0; all of them when None.
        extra: Bytes beside one chunk of logits and the gradients themselves.
        by_domain: How many rows there are, where late units are the domains of rows; 0 otherwise.
    """

    memory: Literal["late", "keep", "recompute"]
    units: int
    chunk: int
    most: int | None
    extra: int
    by_domain: int = 0

    def __str__(self) -> str:
        """Say what is done, and what it costs."""
        if self.memory == "late":
            kept = "nothing kept" if self.extra == 0 else "a gradient of the output layer a call"
            what = f"one pass, {kept}"
            if self.units > 1:
                by = ", one for each domain" if self.by_domain else ""
                what = f"one pass, {self.units} gradients of the output layer{by}"
        elif self.memory == "keep":
            what = "logits kept until the weights are known"
        else:
            what = "logits computed twice"
        if self.most is not None:
            what += f"; gradients of at most {self.most} tokens"
        return f"{self.memory} ({what}; {self.extra / 2**20:.1f} MiB beside a chunk)"


def path_of(
    plan: Plan,
    sizes: Sizes,
    memory: Memory = "auto",
    *,
    chunks: int = CHUNKS,
    parts: int = 1,
    collectives: Collectives | None = None,
) -> Path:
    """Return the way through the output layer for a spec, given the sizes of a call.

        late       3 matrix products; a gradient of the layer for each further sequence, or for
                   each domain, if these are fewer and each sequence is of one, and no shorter
                   than the layer is wide
        keep       3 matrix products; the gradients of all logits, in the dtype of the weight
        recompute  4 matrix products; nothing more

    Where sequences are so short that their gradients take more than all logits, `late` is `keep`.
    The last two skip the gradient of tokens that a selection drops.  `auto` takes the one of the
    first two that needs less memory, `keep` where that is the same, if it is within the budget, and
    recompute otherwise.
    The budget is what an unweighted loss of as many chunks would take, if that is more than
    `sizes.budget`.  Where weights wait for `parts` calls, what each keeps is there at once, and
    counted.

    Raises:
        ValueError: `late` is asked for, but the weights come late for every token.
    """
    late, units, by_domain = plan.deferred_level, 1, 0
    needs_domains = late in {"domain", "sequence of a domain"}
    if late is not None and (not sizes.rows or (needs_domains and not sizes.domains)):
        late = "token"
    if late == "domain":
        # Shorter ones take longer to add to a gradient found on the device than a product takes.
        long = sizes.tokens >= sizes.rows * sizes.width
        by_domain = sizes.rows if long and 1 < sizes.domains < sizes.rows - 1 else 0
        units = sizes.domains if by_domain or sizes.domains == 1 else sizes.rows
    elif late is not None:
        units = sizes.rows
    chunk = chunk_of(sizes.tokens, chunks)
    logits = parts * sizes.tokens * sizes.row_of_logits
    extra = {
        "late": ((units + bool(by_domain)) * parts - 1) * sizes.width * sizes.row_of_logits,
        "keep": logits - chunk * sizes.row_of_logits,
        "recompute": 0,
    }
    least = "keep" if extra["keep"] <= extra["late"] > 0 else "late"
    if late == "token":
        least = "keep"
        del extra["late"]
        if memory == "late":
            rows = " where rows mix domains" if needs_domains and not sizes.domains else ""
            msg = (
                f"{plan.spec.name} weighs every token late{rows}; "
                "use memory auto, keep or recompute"
            )
            raise ValueError(msg)
    taken = memory
    if memory == "auto":
        allowed = max(sizes.budget, _plain_bytes(sizes, chunks) - chunk * sizes.row_of_logits)
        taken = least if extra[least] <= allowed else "recompute"
    elif memory == "late" and extra["late"] > logits:
        taken = "keep"
    assert taken in extra, "full logits take no path"
    share = plan.max_active_fraction(collectives)
    most = None
    if taken != "late" and share < 1 and sizes.rows:
        most = min(sizes.tokens, math.ceil(share * sizes.tokens * parts) + sizes.rows * parts)
    if taken != "late":
        units, by_domain = 1, 0
    return Path(taken, units, chunk, most, extra[taken], by_domain)


def chunk_of(tokens: int, chunks: int) -> int:
    """Return how many tokens a chunk has at most, of a batch cut into `chunks` of a good size."""
    return max(1, min(max(-(-tokens // chunks), MIN_CHUNK), MAX_CHUNK, tokens))


def _plain_bytes(sizes: Sizes, chunks: int) -> int:
    """Return what a chunk takes in the cross entropy of torch and torchtitan.

    Beside logits of 16 bits there is a copy in float32; then log probabilities and their gradient.
    """
    copies = 12 if sizes.itemsize == 4 else 12 + sizes.itemsize  # noqa: PLR2004 - float32
    return -(-sizes.tokens // chunks) * sizes.vocabulary * copies


LLAMA3_8B = Sizes(
    tokens=8192, rows=1, vocabulary=128256, width=4096, itemsize=2, budget=80 * 10**9 // SHARE
)
"""The output layer of Llama 3 8B for one sequence, in bfloat16 on a device of 80 GB."""


def matrix_products(memory: str, active_fraction: float = 1.0) -> float:
    """Return how many products of the output layer's size a path takes; an unweighted loss takes 3.

    Args:
        memory: late, keep or recompute.
        active_fraction: Share of the tokens that may weigh more than 0.
    """
    further = {"late": 2.0, "keep": 2 * active_fraction, "recompute": 3 * active_fraction}
    return 1 + further[memory]


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


class Gradients(NamedTuple):
    """Of the loss: with respect to hidden states [T, D], weight and bias; None where unwanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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
                _fold_([gradient], grads[0].view(1))
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
    if _compiles(labels.device) or torch.compiler.is_compiling():
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
    sums = _Sums(batch.head, hidden, wants, units, of_rows, ends=ends)
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
        bound = compiled(_bound) if _compiles(token.device) else _bound
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
    weigh = compiled(_weighed) if head.cut is None and _compiles(logits.device) else _weighed
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


def _compiles(device: torch.device) -> bool:
    """Tell whether all of the work on a chunk is compiled at once.

    On CPU it is not: blocks stay in the cache, and compiling takes seconds to gain little.
    """
    return device.type != "cpu" and not torch.compiler.is_compiling()


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
        sums = _Sums(head, hidden, wants, whole=path.most is None)
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
        sums = _Sums(head, hidden, wants, whole=path.most is None)
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


class _Sums:
    """Sums of the output layer's gradients, one of the weight's for each late unit.

    Units are rows.  Where `of_rows` tells the unit of each row, all of them are in one tensor, so
    that a captured graph finds that of a row wherever the row's unit is.  Unless it is the `whole`
    batch that is added, hidden states that are not have a gradient of 0.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        wants: tuple[bool, bool],
        units: int = 1,
        of_rows: Tensor | None = None,
        *,
        ends: Sequence[int] = (),
        whole: bool = True,
    ) -> None:
        self._head, self._hidden, self._of_rows, self._ends = head, hidden, of_rows, ends
        of_hidden, of_weight = wants
        begun = torch.empty_like if whole else torch.zeros_like
        self._d_hidden = begun(hidden) if of_hidden else None
        # Apart, so that the first can outlive the others as the parameter's gradient.
        apart = 1 if of_rows is not None else units
        self._d_weight = [torch.empty_like(head.weight) for _ in range(apart if of_weight else 0)]
        many = of_weight and of_rows is not None
        self._of_units = head.weight.new_zeros(units, *head.weight.shape) if many else None
        no_bias = not of_weight or head.bias is None
        shape = units, len(head.weight)
        self._d_bias = None if no_bias else head.weight.new_zeros(shape, dtype=torch.float32)
        self._empty = [True] * units

    def add(self, d_logits: Tensor, scale: Tensor | None, rows: slice | Tensor) -> None:
        """Add what some tokens contribute.

        Args:
            d_logits: The gradient of their logits, [T, V]; with `scale`, up to that.
            scale: [T], for each token; None if the gradient is whole.
            rows: Which tokens they are.
        """
        if self._d_hidden is not None:  # which is scaled in the end
            if isinstance(rows, slice):
                torch.mm(d_logits, self._head.weight, out=self._d_hidden[rows])
            else:
                self._d_hidden[rows] = d_logits @ self._head.weight
        if not self._d_weight and self._d_bias is None:
            return
        hidden = self._hidden[rows]
        if scale is not None:
            hidden = torch.mul(hidden, scale[:, None], out=torch.empty_like(hidden))
        for row, part in self._by_row(rows):
            self._add_weight(row, d_logits[part], hidden[part])
            if self._d_bias is not None:
                ones = torch.ones_like(hidden[part, 0]) if scale is None else scale[part]
                column = ones.to(d_logits.dtype)[:, None]
                of_bias = (d_logits[part].t() @ column).squeeze(1)
                if self._of_rows is None:
                    self._d_bias[row] += of_bias
                else:
                    self._d_bias.index_add_(0, self._of_rows[row : row + 1], of_bias[None].float())

    def _add_weight(self, row: int, d_logits: Tensor, hidden: Tensor) -> None:
        """Add what some tokens of a row contribute to the gradient of the weight."""
        if not self._d_weight:
            return
        if self._of_units is not None:
            assert self._of_rows is not None
            unit, room = self._of_rows[row : row + 1], self._d_weight[0][None]
            torch.index_select(self._of_units, 0, unit, out=room)
            room[0].addmm_(d_logits.t(), hidden)
            self._of_units.index_copy_(0, unit, room)
        elif self._empty[row]:
            torch.mm(d_logits.t(), hidden, out=self._d_weight[row])
            self._empty[row] = False
        else:
            self._d_weight[row].addmm_(d_logits.t(), hidden)

    def _by_row(self, rows: slice | Tensor) -> list[tuple[int, slice]]:
        """Return the rows of some tokens, and which of these are of each."""
        if len(self._ends) <= 1:
            return [(0, slice(None))]
        assert isinstance(rows, slice), "only one unit is walked in another order"
        found = zip([0, *self._ends], self._ends, strict=False)
        return [
            (row, slice(max(start - rows.start, 0), end - rows.start))
            for row, (start, end) in enumerate(found)
            if max(start, rows.start) < min(end, rows.stop)
        ]

    def scaled(self, scale: Tensor | None, late: Tensor | None = None) -> Gradients:
        """Return the gradients.

        Args:
            scale: [T], what `add` was given for each token, times the late part of its weight.
            late: [units], the late part of each unit's weights; None if there is none.
        """
        if self._d_hidden is not None and scale is not None:
            # In float32, as the factor has a dimension.
            torch.mul(self._d_hidden, scale[:, None], out=self._d_hidden)
        if self._d_weight and late is not None:
            if self._of_units is None:
                for part, empty in zip(self._d_weight, self._empty, strict=True):
                    if empty:  # no token of the row counts
                        part.zero_()
                _fold_(self._d_weight, late)
            else:
                of_units = [*self._of_units.unbind()]
                _fold_(of_units, late)
                self._d_weight[0].copy_(of_units[0])
        if self._d_bias is not None and late is not None:
            self._d_bias[0] = late @ self._d_bias
        d_weight = self._d_weight[0] if self._d_weight else None
        d_bias = None if self._d_bias is None else self._d_bias[0].to(self._head.weight.dtype)
        return Gradients(self._d_hidden, d_weight, d_bias)


def _fold_(of_units: list[Tensor], late: Tensor) -> None:
    """Replace the first of some tensors of a shape by sum_u late_u * x_u, summed in float32."""
    first, compiling = of_units[0], torch.compiler.is_compiling()
    if not compiling and not _compiles(late.device):
        if len(of_units) == 1 and _is_one(late):
            return
        # Piece by piece, in memory that stays in the cache.
        rows = min(len(first), max(1, _PIECE * len(first) // max(1, first.numel())))
        shape = 2, rows, *first.shape[1:]
        total, other = first.new_empty(shape, dtype=torch.float32)
        for pieces in zip(*(x.split(rows) for x in of_units), strict=True):
            _fold_pieces_([*pieces], late, (total, other))
    elif len(of_units) == 1:
        torch.mul(first, late, out=first)  # in float32, as the factor has a dimension
    else:
        fold = _fold_pieces_ if compiling else compiled(_fold_pieces_)
        fold(of_units, late, (None, None))


def _is_one(factor: Tensor) -> bool:
    return bool(factor == 1)


def _fold_pieces_(
    of_units: list[Tensor], late: Tensor, scratch: tuple[Tensor | None, Tensor | None]
) -> None:
    first, *others = of_units
    total = _wide(first, scratch[0]).mul_(late[0])
    for other, factor in zip(others, late[1:], strict=True):
        total.addcmul_(_wide(other, scratch[1]), factor)
    if total is not first:
        first.copy_(total)


def _wide(x: Tensor, scratch: Tensor | None) -> Tensor:
    """Return x in float32, or as it is if it is no narrower."""
    if x.element_size() >= 4:  # noqa: PLR2004 - float32
        return x
    return x.float() if scratch is None else scratch[: len(x)].copy_(x)


_PIECE = 2**16
"""Elements in a piece in which gradients are folded on CPU: 256 KiB of float32."""

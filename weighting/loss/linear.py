"""Weighted cross entropy straight from hidden states, without the logits of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from weighting.build import Weights
from weighting.columns import HIDDEN, signal_of
from weighting.compiled import compiled, compiles
from weighting.loss.cross_entropy import (
    signals_of,
    still_without_grad,
    warn_of_no_step,
    weighted_cross_entropy,
)
from weighting.loss.late_bound import Batch, late_bound
from weighting.loss.logits import IGNORE_INDEX, check_labels
from weighting.loss.path import CHUNKS, Memory, Sizes, path_of
from weighting.loss.sums import Head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weighting.build import Weighting


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
    Under `torch.no_grad()`, as in validation, no state of `fn` moves.

    Args:
        hidden: [B, L, D] or [T, D], the input of the output layer.
        weight: [V, D], that layer's weight; tied to the embedding or not.
        labels: [B, L] or [T] int; -100 is ignored.
        fn: A built spec.
        bias: [V], the layer's bias, if it has one.
        step: Optimizer step, from 1.  A spec that depends on it warns where it is 0.
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
    read = compiled(_read) if compiles(labels.device) else _read
    labels, valid, scale = read(labels, len(weight))
    warn_of_no_step(fn, step)
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
    with still_without_grad(fn):
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

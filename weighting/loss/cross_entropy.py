"""Signals from logits, and the weighted cross entropy."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from weighting.columns import HIDDEN, column_of, plain_name, signal_of
from weighting.contract import Signals
from weighting.loss.logits import IGNORE_INDEX, OF_LOGITS, check_labels, statistics
from weighting.pipeline import has_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from weighting.build import Weighting, Weights


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    fn: Weighting,
    *,
    step: int | Tensor = 0,
    domain_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    ref_loss: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    sequence_ids: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """Return the weighted mean cross entropy of a batch, and the weights.

        loss = sum_t u_t * nll_t / number of valid labels

    A spec whose weights are one by construction gives torch's mean cross entropy bitwise.
    Under `torch.no_grad()`, as in validation, no state of `fn` moves.

    Args:
        logits: [B, L, V] or [T, V], any float type; gradient flows through them alone.
        labels: [B, L] or [T] int; -100 is ignored.
        fn: A built spec.
        step: Optimizer step, from 1.  A spec that depends on it warns where it is 0.
        domain_ids: Domain of each token, in the order given to `build`.
        segment_ids: Document of each token, from 0 in each row.
        ref_loss: Loss of a reference model for each token, nats.
        columns: Dataset columns for each token, by name.
        sequence_ids: Sequence of each token: equal ids in one row are one, counted from 0 in each
            row or on from row to row.  None: each row of [B, L] is a sequence, and in [T] each
            document.  A padding-free batch needs them, see `Signals`.
        hidden: [B, L, D] or [T, D], what the logits were made of, for a source that reads it; no
            gradient flows through it.

    Returns:
        The loss, nats, 0 for a batch without valid labels; and the weights.  Call
        `fn.check(weights)` now and then: a non-finite signal is not looked for here, since
        looking waits for the device.

    Raises:
        ValueError: Shapes differ, or a signal the spec needs is missing.
        IndexError: A label is outside the vocabulary.  On CUDA, and in compiled code, an assertion
            for which nothing waits says so.
    """
    if logits.shape[:-1] != labels.shape:
        msg = f"logits {[*logits.shape]} and labels {[*labels.shape]} do not belong together"
        raise ValueError(msg)
    check_labels(labels, logits.shape[-1])
    labels = labels.long()
    valid = labels != IGNORE_INDEX
    count = valid.sum().clamp(min=1)
    nll = token_loss(logits, labels)
    found = {"loss": nll.detach(), **signals_from(logits, labels, fn.needs)}
    ids = {"domain_ids": domain_ids, "segment_ids": segment_ids, "sequence_ids": sequence_ids}
    given = {signal_of(name): value for name, value in (columns or {}).items()}
    given |= {"ref_loss": ref_loss, HIDDEN: hidden}
    signals = signals_of({**found, "valid": valid, **ids, **given})
    warn_of_no_step(fn, step)
    with still_without_grad(fn):
        out = fn(signals, step)
    fn.warn_of_one_unit(out, rows_are_sequences=sequence_ids is None)
    if fn.plan.identity:
        flat = logits.flatten(0, -2).float()
        total = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / count, out
    return weighted_sum(nll, out.token) / count, out


def warn_of_no_step(fn: Weighting, step: int | Tensor) -> None:
    """Warn where a spec depends on the step, which counts from 1, and the step is 0."""
    if torch.compiler.is_compiling() or isinstance(step, Tensor) or step:
        return
    if fn.spec.start > 1 or any(map(has_schedule, fn.plan.factors.values())):
        text = (
            f"{fn.spec.name} depends on the optimizer step, which counts from 1, and it is 0; pass "
            "step=, or the spec stays where it begins"
        )
        warnings.warn(text, stacklevel=3)


@contextlib.contextmanager
def still_without_grad(fn: Weighting) -> Iterator[None]:
    """Have no state move where no gradient is taken, as in validation."""
    if torch.is_grad_enabled() or not (fn.training and fn.plan.has_state):
        yield
        return
    fn.eval()
    try:
        yield
    finally:
        fn.train()


def signals_of(found: Mapping[str, Tensor | None]) -> Signals:
    """Return signals from tensors by name, columns under "columns.name" as `needs` names them."""
    columns: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, value in found.items():
        if value is not None:
            (columns if column_of(name) else fields)[plain_name(name)] = value
    return Signals(columns=columns, **fields)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label, nats, float32, 0 where ignored."""
    nll = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return nll.reshape(labels.shape)


def signals_from(logits: Tensor, labels: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return what else than the loss of `needs` logits [..., V] tell, in the shape of labels."""
    rows = logits.detach().flatten(0, -2)
    found: dict[str, Tensor] = {}
    if needs.intersection({"entropy", "error_norm"}) or any(x.startswith(OF_LOGITS) for x in needs):
        found = statistics(rows, labels.flatten(), needs)
    return {
        name: value.reshape(labels.shape)
        for name, value in found.items()
        if name not in {"loss", "lse"}
    }


def weighted_sum(nll: Tensor, weight: Tensor) -> Tensor:
    """Return sum(weight * nll); a weight of 0 hides even a non-finite loss."""
    return torch.where(weight != 0, weight * nll, 0).sum()

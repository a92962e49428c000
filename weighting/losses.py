"""Signals from logits, and the weighted cross entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from weighting.contract import Signals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weighting.build import Weighting, Weights

IGNORE_INDEX = -100
TOPK = "columns.topk_entropy_"
"""How the name of a top-k entropy begins; its k follows."""
_CHUNK = 1024
"""Tokens whose distributions are in memory at once while statistics are taken."""


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
) -> tuple[Tensor, Weights]:
    """Return the weighted mean cross entropy of a batch, and the weights.

        loss = sum_t u_t * nll_t / number of valid labels

    A spec whose weights are one by construction gives torch's mean cross entropy bitwise.

    Args:
        logits: [B, L, V] or [T, V], any float type; gradient flows through them alone.
        labels: [B, L] or [T] int; -100 is ignored.
        fn: A built spec.
        step: Optimizer step.
        domain_ids: Domain of each token, in the order given to `build`.
        segment_ids: Document of each token, from 0 in each row.
        ref_loss: Loss of a reference model for each token, nats.
        columns: Dataset columns for each token, by name.

    Returns:
        The loss, nats, 0 for a batch without valid labels; and the weights.  Call
        `fn.check(weights)` now and then: a non-finite signal is not looked for here, since
        looking waits for the device.

    Raises:
        ValueError: Shapes differ, or a signal the spec needs is missing.
    """
    if logits.shape[:-1] != labels.shape:
        msg = f"logits {[*logits.shape]} and labels {[*labels.shape]} do not belong together"
        raise ValueError(msg)
    valid = labels != IGNORE_INDEX
    count = valid.sum().clamp(min=1)
    nll = token_loss(logits, labels)
    found = {"loss": nll.detach(), **distribution_signals(logits, labels, fn.needs)}
    ids = {"valid": valid, "domain_ids": domain_ids, "segment_ids": segment_ids}
    given = {f"columns.{name}": value for name, value in (columns or {}).items()}
    signals = signals_of({**found, **ids, **given, "ref_loss": ref_loss})
    out = fn(signals, step)
    if fn.identity:
        flat = logits.flatten(0, -2).float()
        total = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / count, out
    return weighted_sum(nll, out.token) / count, out


def signals_of(found: Mapping[str, Tensor | None]) -> Signals:
    """Return signals from tensors by name, columns under "columns.name" as `needs` names them."""
    columns: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, value in found.items():
        _, is_column, column = name.partition("columns.")
        if value is not None:
            (columns if is_column else fields)[column or name] = value
    return Signals(columns=columns, **fields)


def topk_entropy(logits: Tensor, k: int) -> Tensor:
    """Return the entropy of the softmax of the k largest logits, nats, [..., V] -> [...]."""
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).values
    return torch.special.entr(top.softmax(-1)).sum(-1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label, nats, float32, 0 where ignored."""
    nll = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return nll.reshape(labels.shape)


def weighted_sum(nll: Tensor, weight: Tensor) -> Tensor:
    """Return sum(weight * nll); a weight of 0 hides even a non-finite loss."""
    return torch.where(weight > 0, weight * nll, 0).sum()


@torch.no_grad()
def distribution_signals(
    logits: Tensor, labels: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Return the signals in `needs` that take the whole predicted distribution.

        entropy    = -sum_v p_v log p_v                          nats
        error_norm = sqrt(1 - 2 p_label + sum_v p_v^2)

        columns.topk_entropy_k = entropy of the softmax of the k largest logits     nats

    `target_prob` is exp(-loss) and is left to the stage that reads it.

    Args:
        logits: [..., V].
        labels: [...] int; values at ignored labels are meaningless.
        needs: Names of signals.
    """
    topk = {name: int(name.removeprefix(TOPK)) for name in needs if name.startswith(TOPK)}
    wanted = (needs & {"entropy", "error_norm"}) | topk.keys()
    if not wanted:
        return {}
    rows, targets = logits.flatten(0, -2), labels.flatten().clamp(min=0)
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for chunk, target in zip(rows.split(_CHUNK), targets.split(_CHUNK), strict=True):
        p = chunk.float().softmax(-1)
        if "entropy" in wanted:
            parts["entropy"].append(torch.special.entr(p).sum(-1))
        if "error_norm" in wanted:
            hit = p.gather(-1, target[:, None]).squeeze(-1)
            parts["error_norm"].append((1 - 2 * hit + (p * p).sum(-1)).clamp(min=0).sqrt())
        for name, k in topk.items():
            parts[name].append(topk_entropy(chunk.float(), k))
    return {name: torch.cat(part).reshape(labels.shape) for name, part in parts.items()}

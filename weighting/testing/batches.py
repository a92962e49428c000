"""The batches the checks use: ordinary ones, and ones that break careless arithmetic."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weighting.contract import Signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH = 3
"""Of the hidden states of a batch."""
DOMAINS = ("code", "news", "web")
"""The domains of a batch for whatever does not name its own."""


def batch(
    rows: int = 4,
    length: int = 6,
    *,
    seed: int = 0,
    keep: float = 0.7,
    domains: int = len(DOMAINS),
    columns: Sequence[str] = (),
) -> Signals:
    """Return random signals, [rows, length], of several documents, some tokens ignored.

    The first token counts; every domain occurs if there are tokens enough.

    Args:
        rows: Number of sequences.
        length: Tokens of each.
        seed: Another seed gives other values.
        keep: Share of the tokens that count.
        domains: Number of domains.
        columns: Names of the columns.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    loss = torch.rand(shape, generator=g) * 5 + 0.01
    valid = torch.rand(shape, generator=g) < keep
    valid[0, 0] = True
    starts = torch.rand(shape, generator=g) < 0.3  # noqa: PLR2004 - a few documents a row
    starts[:, 0] = False
    order = torch.randperm(rows * length, generator=g)
    return Signals(
        loss=loss,
        valid=valid,
        entropy=torch.rand(shape, generator=g) * 4,
        target_prob=(-loss).exp(),
        error_norm=torch.rand(shape, generator=g),
        ref_loss=torch.rand(shape, generator=g) * 5,
        domain_ids=(order % domains).view(shape),
        segment_ids=starts.long().cumsum(1),
        columns={name: torch.rand(shape, generator=g) for name in columns},
        hidden=torch.randn(*shape, WIDTH, generator=g),
    )


def mapped(signals: Signals, change: Callable[[Tensor], Tensor]) -> Signals:
    """Return signals with `change(x)` in place of every x, a tensor of a number for each token."""
    given = {field.name: getattr(signals, field.name) for field in fields(signals)}
    if signals.hidden is not None:
        given["hidden"] = None
        parts = [change(x) for x in signals.hidden.unbind(-1)]
        signals = replace(signals, hidden=torch.stack(parts, -1))
    new = {name: change(x) for name, x in given.items() if isinstance(x, Tensor)}
    columns = {name: change(x) for name, x in signals.columns.items()}
    return replace(signals, **new, columns=columns)


def mapped_floats(signals: Signals, change: Callable[[Tensor], Tensor]) -> Signals:
    """Return signals with `change(x)` in place of every tensor of numbers, ids and mask kept."""
    return mapped(signals, lambda x: change(x) if x.is_floating_point() else x)


def flat(signals: Signals) -> Signals:
    """Return the signals [B, L] as [T], with ids that keep rows and documents apart."""
    rows, length = signals.loss.shape
    row = torch.arange(rows)[:, None].expand(rows, length)
    segments = row * 0 if signals.segment_ids is None else signals.segment_ids
    ids = {"segment_ids": segments + length * row, "sequence_ids": row}
    return mapped(replace(signals, **ids), lambda x: x.reshape(-1))


def valid_of(signals: Signals) -> Tensor:
    """Return which tokens count."""
    return (
        torch.ones_like(signals.loss, dtype=torch.bool) if signals.valid is None else signals.valid
    )


def hard_batches(domains: int, columns: Sequence[str]) -> dict[str, Signals]:
    """Return batches of extreme, equal and missing values, named for what they hold."""

    def drawn(rows: int = 4, length: int = 6) -> Signals:
        return batch(rows, length, seed=1, domains=domains, columns=columns)

    def losses(loss: Tensor) -> Signals:
        told = {"entropy": loss.abs(), "target_prob": (-loss).exp()}
        return replace(plain, loss=loss, hidden=loss[..., None].expand(-1, -1, WIDTH), **told)

    def masked(ignored: Tensor) -> Signals:
        return replace(plain, valid=valid_of(plain) & ~ignored)

    plain = drawn()
    zero = torch.zeros_like(plain.loss)
    first = torch.arange(zero.numel()).view_as(zero) == 0
    extremes = torch.tensor([0.0, 1e-12, 1e-6, 1.0, 50.0, 104.0, 1e4])
    order = torch.randperm(zero.numel(), generator=torch.Generator().manual_seed(3))
    return {
        "ordinary values": plain,
        "equal values": losses(zero + 2.5),
        "zeros": losses(zero),
        "extreme values": losses(extremes[order.view_as(zero) % len(extremes)]),
        "one huge value": losses(torch.where(first, 1e6, zero)),
        "hardly different values": losses(3 + plain.loss * 1e-7),
        "tied values": losses((plain.loss / 2).round()),
        "huge values": losses(1e15 + plain.loss * 1e14),
        "negative zeros": losses(-zero),
        "certain predictions": losses(plain.loss * 1e-40),
        "hopeless predictions": losses(95 + plain.loss),
        "a single row": drawn(1, 5),
        "a single unit": drawn(1, 1),
        "a row ignored": masked(torch.arange(4)[:, None].eq(1).expand_as(zero)),
        "a single valid unit": masked(~first),
        "all units ignored": masked(~zero.bool()),
    }

"""Hypothesis strategies of what a pipeline may meet: losses, and whole batches of signals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from weighting.contract import Signals
from weighting.testing.batches import DOMAINS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

EXTREMES = (0.0, 1e-12, 1e-6, 1.0, 50.0, 104.0, 1e4, 1e9)
"""Losses at which careless arithmetic breaks, nats."""


def losses(
    min_size: int = 1, max_size: int = 32, *, high: float = 20.0
) -> st.SearchStrategy[list[float]]:
    """Return lists of losses for `wt.simulate`: ordinary, extreme, tied or all equal.

    Args:
        min_size: Fewest losses of a list.
        max_size: Most losses of a list.
        high: Largest ordinary loss, nats; extreme ones go up to 1e9.
    """
    ordinary = _float32s(0, high)

    def lists(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(values, min_size=min_size, max_size=max_size)

    equal = st.tuples(ordinary, st.integers(min_size, max_size)).map(lambda got: [got[0]] * got[1])
    tied = lists(st.sampled_from([0.5, 1.0, 2.0]))
    return st.one_of(lists(ordinary), lists(st.sampled_from(EXTREMES)), tied, equal)


@st.composite
def signals(
    draw: st.DrawFn,
    *,
    domains: Sequence[str] = DOMAINS,
    columns: Sequence[str] = (),
    max_rows: int = 4,
    max_length: int = 6,
) -> Signals:
    """Return batches of signals, [B, L], each of which a built spec must weigh.

    Among them: a single token, extreme, tied and equal values, everything ignored, one token
    left, bfloat16, a domain that does not occur, one or several documents in a row.

    Args:
        draw: Given by hypothesis.
        domains: Names of the domains that `build` is given.
        columns: Names of the columns that the spec reads.
        max_rows: Most sequences of a batch.
        max_length: Most tokens of a sequence.
    """
    rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))
    number = rows * length
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def filled(values: st.SearchStrategy[Any], kind: torch.dtype = dtype) -> Tensor:
        drawn = draw(st.lists(values, min_size=number, max_size=number))
        return torch.tensor(drawn, dtype=kind).view(rows, length)

    def of(kind: st.SearchStrategy[float]) -> Callable[[], Tensor]:
        return lambda: filled(kind)

    loss = draw(
        st.sampled_from(
            [
                of(_float32s(0, 20)),
                of(st.sampled_from(EXTREMES)),
                of(st.sampled_from([0.5, 1.0, 2.0])),
                lambda: torch.full((rows, length), draw(_float32s(0, 20)), dtype=dtype),
            ]
        )
    )()
    valid = draw(
        st.sampled_from(
            [
                lambda: filled(st.booleans(), torch.bool),
                lambda: torch.ones(rows, length, dtype=torch.bool),
                lambda: torch.zeros(rows, length, dtype=torch.bool),
                lambda: torch.arange(number).view(rows, length) == draw(st.integers(0, number - 1)),
            ]
        )
    )()
    present = draw(st.sets(st.integers(0, max(len(domains), 1) - 1), min_size=1))
    starts = filled(st.booleans(), torch.bool) & (torch.arange(length) > 0)
    return Signals(
        loss=loss,
        valid=valid,
        entropy=filled(_float32s(0, 12)),
        target_prob=(-loss.float()).exp().to(dtype),
        error_norm=filled(_float32s(0, 1.5)),
        ref_loss=filled(_float32s(0, 20)),
        domain_ids=filled(st.sampled_from(sorted(present)), torch.int64),
        segment_ids=starts.long().cumsum(1),
        columns={name: filled(_float32s(-100, 100)) for name in columns},
        hidden=torch.stack([loss, 1 - loss, loss / 2], -1),
    )


def _float32s(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_nan=False, allow_infinity=False)

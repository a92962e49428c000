"""The losses of whole documents: cut into windows, packed into rows, put back in their order."""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_integration.commands.score_data import Record, Source
from titan_integration.data.records import text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from titan_integration.data.packing import Cut, Encode


def scored_blocks(
    source: Source, encode: Encode, losses_of: Callable[[Tensor, Tensor, Tensor], Tensor], cut: Cut
) -> Iterator[tuple[list[Record], list[np.ndarray]]]:
    """Yield records, and on the first rank the losses of their tokens; every rank must iterate.

    The losses of a document are float32, in nats, one for each of its tokens but the first.

    Args:
        source: What to score.
        encode: Text -> token ids, with begin and end of text.
        losses_of: Inputs, positions and labels -> losses in nats, float32, each [B, L].
        cut: Which part is this rank's.
    """
    done = 0
    for records in _blocks(source, cut.num_ranks):
        texts = [text_of(record, source.columns, place) for place, record in records]
        # Dealt by length, so that all ranks get much the same to do.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        mine = order[cut.rank :: cut.num_ranks]
        tokens = [encode(texts[i]) for i in mine]
        # All documents in a line, and one place more for padding.
        inputs = torch.tensor([*chain.from_iterable(x[:-1] for x in tokens), 0])
        labels = torch.tensor([*chain.from_iterable(x[1:] for x in tokens), IGNORE_INDEX])
        losses = torch.zeros(len(inputs))
        lengths = [len(x[1:]) for x in tokens]
        rows = packed(windows(lengths, cut.seq_len), cut.seq_len)
        # A sharded model is gathered by all ranks or none: those that are done run on padding.
        for n in range(_most(-(-len(rows) // cut.local_batch))):
            some = rows[n * cut.local_batch : (n + 1) * cut.local_batch]
            index, positions = laid_out(some, cut, padding=len(inputs) - 1)
            losses[index] = losses_of(inputs[index], positions, labels[index])
        found = [x.numpy() for x in losses[:-1].split(lengths)]
        yield records, _in_order(dict(zip(mine, found, strict=True)))
        done += len(records)
        logger.info(f"Scored {done:,} of {source.total:,} documents")


def windows(lengths: Sequence[int], seq_len: int) -> list[range]:
    """Cut documents of so many inputs each, in a line, into windows of at most `seq_len`."""
    ends = np.cumsum(lengths, dtype=int).tolist()
    return [
        range(start, min(start + seq_len, end))
        for end, length in zip(ends, lengths, strict=True)
        for start in range(end - length, end, seq_len)
    ]


def packed(pieces: Sequence[range], seq_len: int) -> list[list[range]]:
    """Fill rows with windows: in each the longest that fits, then the longest that still fits."""
    left = sorted(pieces, key=len)
    rows: list[list[range]] = []
    while left:
        row: list[range] = []
        room = seq_len
        while at := bisect_right(left, room, key=len):
            row.append(left.pop(at - 1))
            room -= len(row[-1])
        rows.append(row)
    return rows


def laid_out(rows: list[list[range]], cut: Cut, padding: int) -> tuple[Tensor, Tensor]:
    """Return which input is at each place of a batch, and its position, both int64 [B, L].

    Positions start at 0 in every window and at the padding, so that each sees itself alone.
    """
    index = torch.full((cut.local_batch, cut.seq_len), padding)
    positions = torch.arange(cut.seq_len).repeat(cut.local_batch, 1)
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            index[row, at : at + len(piece)] = torch.arange(piece.start, piece.stop)
            at += len(piece)
            positions[row, at:] = torch.arange(cut.seq_len - at)
    return index, positions


_BLOCK = 1_024, 4_000_000
"""Documents, and characters, that each rank scores before what they have found is written."""


def _blocks(source: Source, ranks: int) -> Iterator[list[Record]]:
    """Yield records in parts that keep all ranks busy for a while."""
    most, most_characters = (limit * ranks for limit in _BLOCK)
    block, characters = list[Record](), 0
    for place, record in source.records():
        block.append((place, record))
        characters += len(text_of(record, source.columns, place))
        if len(block) == most or characters >= most_characters:
            yield block
            block, characters = list[Record](), 0
    if block:
        yield block


def _most(count: int) -> int:
    """Return the largest of all ranks' numbers."""
    counts = torch.tensor(count, device=utils.device_type)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def _in_order(share: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Return, on the first rank, what all ranks have found for the documents of a block."""
    shares: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(share, shares)
    found = {i: losses for share in shares or [] for i, losses in share.items()}
    return [found[i] for i in range(len(found))]

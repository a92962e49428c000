"""Documents packed into rows: the same global rows for any number of data-parallel ranks.

The stream of rows is defined without ranks. Documents, shuffled anew every epoch, are dealt to
virtual shards, each shard packs its own documents, and global row ``g`` is the next row of shard
``g mod shards``. With ``W`` ranks of ``b`` rows each, step ``t`` of rank ``r`` takes the ``b``
global rows from ``(t*W + r)*b`` on.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from titan_integration.documents import Documents

# A rank tokenizes only its own shards when its rows always fall on them: when the global batch
# divides the number of shards, as 1, 2, 3, 4, 6, 8, ..., 64, 96 and 192 do. Otherwise ranks share
# shards and tokenize some text twice. A change of this number changes every stream of rows and
# refuses older states.
NUM_SHARDS = 192

Encode = Callable[[str], list[int]]
# Inputs by name and labels, each [b, L], and the entries of the saved state that this batch moved.
Batch = tuple[dict[str, Tensor], Tensor, dict[str, Any]]


class Cut(NamedTuple):
    """How the global stream of rows is cut: tokens of a row, rows of a local batch, this rank."""

    seq_len: int
    local_batch: int
    rank: int
    num_ranks: int


class Cursor(NamedTuple):
    """Where a shard is: rows packed, epoch, document within the shard, tokens of it used."""

    rows: int = 0
    epoch: int = 0
    document: int = 0
    offset: int = 0


class Piece(NamedTuple):
    """A stretch of one document: its inputs and one more token, the last label.

    And what all of its tokens share: the document's domain and the values of its columns.
    """

    tokens: Tensor
    domain_id: int
    numbers: tuple[float, ...] = ()


class PackedRows(IterableDataset[Batch]):
    """The local batches of one data-parallel rank.

    An endless stream reads from ``NUM_SHARDS`` shards. A finite one reads from a single shard, on
    every rank: only so does each rank know where the text ends, stop at the same step as the
    others, and leave out less than a batch.

    Args:
        documents: The texts.
        encode: Text -> token ids, with begin and end of text.
        cut: Which part of the rows this rank yields.
        seed: Seed of the shuffles.
        infinite: Whether to start the next epoch when the text ends.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Encode,
        cut: Cut,
        *,
        seed: int,
        infinite: bool,
    ) -> None:
        """Deal the documents to shards; nothing is tokenized yet."""
        self.domains = documents.names
        self.num_shards = min(NUM_SHARDS, len(documents)) if infinite else 1
        self._documents = documents
        self._encode = encode
        self._seq_len = cut.seq_len
        self._local_batch = cut.local_batch
        self._global_batch = cut.local_batch * cut.num_ranks
        self._first_row = cut.local_batch * cut.rank
        self._seed = seed
        self._infinite = infinite
        self.state: dict[str, Any] = {"row": 0}
        self.state |= {shard_key(shard): list(Cursor()) for shard in range(self.num_shards)}

    def own_state(self) -> dict[str, Any]:
        """Return the part of the starting state that this rank saves: the shards it reads."""
        return {"row": self.state["row"]} | {
            shard_key(s): self.state[shard_key(s)] for s in self._own_shards()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Start from a saved state.

        Raises:
            ValueError: If entries are missing or impossible.
        """
        loaded = {key: state.get(key) for key in self.state}
        row = loaded["row"]
        if type(row) is not int or row < 0:
            msg = f"data loader state: 'row' is {row!r}, not a count; the checkpoint is damaged"
            raise ValueError(msg)
        for shard in range(self.num_shards):
            cursor: Any = loaded[shard_key(shard)]
            # A shard never is ahead of the rows that all ranks together have taken from it.
            taken = (row - shard + self.num_shards - 1) // self.num_shards
            if not _is_cursor(cursor) or cursor[0] > max(taken, 0):
                msg = (
                    f"data loader state: {shard_key(shard)!r} is {cursor!r} at row {row}, which "
                    "cannot be; the checkpoint is damaged or not of this loader"
                )
                raise ValueError(msg)
        self.state = loaded

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches; worker process ``w`` of ``n`` makes every ``n``-th one."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        cursors = {s: Cursor(*self.state[shard_key(s)]) for s in range(self.num_shards)}
        # A document that goes on in the shard's next row is found here, not tokenized again.
        encode = functools.lru_cache(maxsize=2 * self.num_shards)(self._whole)
        order = functools.lru_cache(maxsize=8)(self._order)
        row = self.state["row"] + first * self._global_batch
        while True:
            pieces: list[list[Piece]] = []
            touched: set[int] = set()
            for g in range(row + self._first_row, row + self._first_row + self._local_batch):
                shard, nth = g % self.num_shards, g // self.num_shards
                packed = None
                while cursors[shard].rows <= nth:  # rows of other ranks are packed and thrown away
                    packed, cursors[shard] = self._pack(shard, cursors[shard], encode, order)
                    if packed is None:
                        return
                assert packed is not None, f"shard {shard} is beyond row {nth}"
                pieces.append(packed)
                touched.add(shard)
            row += self._global_batch
            # Is there text for the other ranks too? If not, all of them stop here.
            while not self._infinite and cursors[0].rows < row:
                packed, cursors[0] = self._pack(0, cursors[0], encode, order)
                if packed is None:
                    return
            moved = {shard_key(s): list(cursors[s]) for s in touched}
            yield *batch_of(pieces, self._documents.columns), {"row": row, **moved}
            row += (stride - 1) * self._global_batch

    def check_size(self, where: str) -> None:
        """Check that there is text for one row, or, if finite, for one batch of all ranks.

        Raises:
            ValueError: If there is less.
        """
        rows = 1 if self._infinite else self._global_batch
        need, have = rows * self._seq_len, 0
        for i in range(len(self._documents)):
            have += max(len(self._whole(i).tokens) - 1, 0)
            if have >= need:
                return
        what = "one row needs" if rows == 1 else f"one batch of {rows} rows needs"
        msg = (
            f"{where}: too little text: {have} tokens, but {what} {need}; add text or lower "
            "--training.seq_len"
        )
        raise ValueError(msg)

    def _own_shards(self) -> list[int]:
        # Steps move a rank's rows by the global batch, so modulo this number they never move.
        period = math.gcd(self._global_batch, self.num_shards)
        start = self.state["row"] + self._first_row
        residues = {(start + i) % period for i in range(self._local_batch)}
        return [s for s in range(self.num_shards) if s % period in residues]

    def _whole(self, index: int) -> Piece:
        documents = self._documents
        tokens = torch.tensor(self._encode(documents.texts[index]), dtype=torch.int64)
        numbers = () if documents.numbers is None else tuple(documents.numbers[index].tolist())
        return Piece(tokens, documents.domain_ids[index], numbers)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))

    def _pack(
        self,
        shard: int,
        cursor: Cursor,
        encode: Callable[[int], Piece],
        order: Callable[[int], np.ndarray],
    ) -> tuple[list[Piece] | None, Cursor]:
        """Return a shard's next row (None if a finite stream ends in it) and the next cursor."""
        rows, epoch, document, offset = cursor
        pieces: list[Piece] = []
        room = self._seq_len
        while room:
            mine = order(epoch)[shard :: self.num_shards]
            if document >= len(mine):
                if not self._infinite:
                    return None, cursor
                epoch, document, offset = epoch + 1, 0, 0
                continue
            whole = encode(int(mine[document]))
            left = len(whole.tokens) - 1 - offset
            take = min(left, room)
            if take > 0:
                pieces.append(cut_piece(whole, offset, take))
                room -= take
            document, offset = (document, offset + take) if take < left else (document + 1, 0)
        return pieces, Cursor(rows + 1, epoch, document, offset)


def cut_piece(whole: Piece, offset: int, take: int) -> Piece:
    """Return a stretch of ``take`` inputs of a document, and the label after them."""
    return whole._replace(tokens=whole.tokens[offset : offset + take + 1])


def batch_of(
    rows: list[list[Piece]], columns: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """Lay out rows as tensors ``[B, L]``; positions start at 0 in every piece, even a later one.

    The columns are float32 under ``columns.<name>``.
    """

    def stack(part: Callable[[Piece], Tensor]) -> Tensor:
        return torch.stack([torch.cat([part(piece) for piece in row]) for row in rows])

    inputs = {
        "input": stack(lambda p: p.tokens[:-1]),
        "positions": stack(lambda p: torch.arange(len(p.tokens) - 1)),
        "domain_ids": stack(lambda p: torch.full((len(p.tokens) - 1,), p.domain_id)),
    }
    for i, name in enumerate(columns):
        inputs[f"columns.{name}"] = stack(
            lambda p, i=i: torch.full((len(p.tokens) - 1,), p.numbers[i], dtype=torch.float32)
        )
    return inputs, stack(lambda p: p.tokens[1:])


def shard_key(shard: int) -> str:
    """Name a shard's entry in the saved state."""
    return f"shard_{shard:03d}"


def is_count(value: object) -> bool:
    """Tell whether a value from a saved state is a whole number from 0 on."""
    return type(value) is int and value >= 0


def _is_cursor(value: Any) -> bool:  # noqa: ANN401
    is_list = type(value) in {list, tuple} and len(value) == len(Cursor._fields)
    return is_list and all(map(is_count, value))

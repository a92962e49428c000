"""Documents packed into rows: the same global rows for any number of data-parallel ranks.

The stream of rows is defined without ranks. A row is packed from one pool of documents: all of
them, or those of one domain. A pool's documents, shuffled anew every epoch, are dealt to virtual
shards, each shard packs its own documents, and global row ``g`` is the next row of its pool's shard
``g mod shards``. With ``W`` ranks of ``b`` rows each, step ``t`` of rank ``r`` takes the ``b``
global rows from ``(t*W + r)*b`` on.

A rank packs every row of a global batch that falls on a shard it reads, and throws away those of
other ranks. So after each batch all that it reads stands where the stream of rows does, and what
was drawn before need not be known to go on.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from titan_integration.data.contents import Encoded, encoded
from titan_integration.data.documents import Documents
from titan_integration.data.records import IGNORED, Values
from weighting.columns import signal_of

if TYPE_CHECKING:
    from titan_integration.data.told import Told

# The fewest shards of an endless stream. A rank tokenizes only its own shards when its rows always
# fall on them: when the global batch divides the number of shards, so the number is a multiple of
# the batch, `shards_for`. A state has its number; one of version 0.1.0 has this, and goes on with
# it.
NUM_SHARDS = 192

RowMode = Literal["mixed", "drawn", "turns"]
Encode = Callable[[str], list[int]]
# Inputs by name and labels, each [b, L], and what this batch moved: the next row, and cursors.
Batch = tuple[dict[str, Tensor], Tensor, dict[str, Any]]


# The next row, and the cursors that have moved, by pool and shard.
State = dict[Any, Any]


class Cut(NamedTuple):
    """How the global stream of rows is cut: tokens of a row, rows of a local batch, this rank."""

    seq_len: int
    local_batch: int
    rank: int
    num_ranks: int


class Cursor(NamedTuple):
    """Where a shard is: epoch, document within the shard, tokens of it used."""

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Piece(NamedTuple):
    """A stretch of one document: its inputs and one more token, the last label.

    Its domain, and the values of its columns, float32: 0-D for one that all its tokens share, or
    one for each input, which belongs to the label after it. Which of the labels are predicted, if
    not all.
    """

    tokens: Tensor
    domain_id: int
    numbers: tuple[Tensor, ...] = ()
    predicted: Tensor | None = None


class RowPools:
    """From which pool of documents each row is packed.

    ``mixed``: there is one pool. ``drawn`` and ``turns``: every domain is a pool. In turns, batch
    ``i`` has rows of pool ``i mod K`` only. Drawn, row ``g`` is of the first pool whose cumulative
    proportion is above the ``g``-th number, uniform on [0, 1), of a generator that the seed alone
    determines, so that no draw depends on an earlier one.

    Attributes:
        proportions: Of the batches from the next on.
        told: Gives those of each step, if they are told step by step.
    """

    def __init__(self, rows: RowMode, num_domains: int, seed: int) -> None:
        """Start with uniform proportions."""
        self.count = 1 if rows == "mixed" else num_domains
        self.proportions = (1 / self.count,) * self.count
        self.stages: list[tuple[int, tuple[float, ...]]] = []
        self.told: Told | None = None
        self._rows = rows
        self._seed = seed

    def begin(self, batch: int) -> bool:
        """Begin a batch of this iteration, from 0; False if there is none."""
        if self.told is None or not self.told.begins(batch):
            return True
        proportions = self.told.of_next()
        if proportions is not None:
            self.proportions = proportions
        return proportions is not None

    def of_batch(self, row: int, size: int, seq_len: int) -> tuple[list[int], int]:
        """Return each row's pool, and the number that deals the first row, ``row``, to a shard.

        Usually that is the row's own number. But in turns, rows are counted within their pool:
        otherwise a pool would visit some of its shards again and again and never the others.
        """
        if self._rows == "mixed":
            return [0] * size, row
        if self._rows == "turns":
            cycle, pool = divmod(row // size, self.count)
            return [pool] * size, cycle * size
        # Philox counts in blocks of four numbers, so any row's is found without those before it.
        blocks = np.random.Philox(self._seed).advance(row // 4)
        uniform = np.random.Generator(blocks).random(row % 4 + size)[row % 4 :]
        proportions = self.proportions
        for tokens, shares in self.stages:  # in place of those, from so many tokens on
            proportions = shares if tokens <= row * seq_len else proportions
        cumulative = np.cumsum(proportions)
        pools = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
        return pools.tolist(), row


class PackedRows(IterableDataset[Batch]):
    """The local batches of one data-parallel rank.

    An endless stream reads from ``num_shards`` shards of each pool; a pool with fewer documents has
    fewer shards, so that its text too is read once before any of it is read again. A finite one
    reads from a single shard, on every rank: only so does each rank know where the text ends, stop
    at the same step as the others, and leave out less than a batch.

    Args:
        documents: The texts.
        encode: Text -> token ids, with begin and end of text.
        cut: Which part of the rows this rank yields.
        rows: Of which domains a row is made.
        seed: Seed of the shuffles and the draws.
        infinite: Whether to start the next epoch when the text ends.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Encode,
        cut: Cut,
        *,
        rows: RowMode,
        seed: int,
        infinite: bool,
    ) -> None:
        """Deal the documents to shards; nothing is tokenized yet."""
        self.domains = documents.names
        self.pools = RowPools(rows, len(documents.names), seed)
        self._documents = documents
        self._members = [np.arange(len(documents))]
        if rows != "mixed":
            ids = np.asarray(documents.domain_ids)
            ends = np.bincount(ids, minlength=len(documents.names)).cumsum()
            self._members = np.split(np.argsort(ids, kind="stable"), ends[:-1])
        self._encode = encode
        self._seq_len = cut.seq_len
        self._local_batch = cut.local_batch
        self._global_batch = cut.local_batch * cut.num_ranks
        self._first_row = cut.local_batch * cut.rank
        self._rows = rows
        self._seed = seed
        self._infinite = infinite
        self.start: State = {"row": 0}
        self.deal(shards_for(self._global_batch))

    def deal(self, num_shards: int) -> None:
        """Deal the documents to so many shards, or fewer if there are fewer documents."""
        self.num_shards = min(num_shards, len(self._documents)) if self._infinite else 1
        self._shards = [_most_shards(len(members), self.num_shards) for members in self._members]

    def saved(self, state: State, *, own: bool) -> dict[str, Any]:
        """Return a state as it is saved, an entry for each lane: of all, or those this rank reads.

        A lane's entry is the cursor of its shard. If there are several pools, it has the cursors
        that have moved, each after its pool's number, of the shards that have the lane's number.
        """
        lanes = self._own(self.num_shards) if own else range(self.num_shards)
        if len(self._shards) == 1:
            entries = {lane: [[*state.get((0, lane), Cursor())]] for lane in lanes}
        else:
            entries = {lane: list[list[int]]() for lane in lanes}
            for key in sorted(key for key in state if isinstance(key, tuple)):
                if key[1] in entries:
                    entries[key[1]].append([key[0], *state[key]])
        return {"row": state["row"]} | {shard_key(lane): entry for lane, entry in entries.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Start from a saved state.

        Raises:
            ValueError: If entries are missing or impossible.
        """
        row = state.get("row")
        if not is_count(row):
            msg = f"data loader state: 'row' is {row!r}, not a count; the checkpoint is damaged"
            raise ValueError(msg)
        entries = [state.get(shard_key(lane)) for lane in range(self.num_shards)]
        found: State = {"row": row}
        for lane, entry in enumerate(entries):
            cursors = self._loaded(lane, entries)
            if cursors is None:
                msg = (
                    f"data loader state: {shard_key(lane)!r} is {entry!r} at row {row}, which "
                    "cannot be; the checkpoint is damaged or not of this loader"
                )
                raise ValueError(msg)
            found |= cursors
        self.start = found

    def _loaded(self, lane: int, entries: list[Any]) -> dict[tuple[int, int], Cursor] | None:
        """Return the cursors of a lane's entry by pool and shard; None if it cannot be."""
        entry = entries[lane]
        if type(entry) not in {list, tuple}:
            return None
        size = len(Cursor._fields)
        if len(self._shards) > 1 and all(_is_list(moved, size + 1) for moved in entry):
            sound = all(
                all(map(is_count, moved))
                and moved[0] < len(self._shards)
                and lane < self._shards[moved[0]]
                for moved in entry
            )
            return {(m[0], lane): Cursor(*m[1:]) for m in entry} if sound else None
        # One pool; or as version 0.1.0 saved it, the cursors of all pools.
        sound = _is_list(entry, len(self._shards)) and all(
            _is_list(cursor, size)
            and all(map(is_count, cursor))
            # Lanes that share a shard of a small pool say the same about it.
            and _is_list(first := entries[lane % shards], len(self._shards))
            and list(cursor) == list(first[pool])
            for pool, (cursor, shards) in enumerate(zip(entry, self._shards, strict=True))
        )
        if not sound:
            return None
        return {
            (pool, lane): Cursor(*cursor)
            for pool, (cursor, shards) in enumerate(zip(entry, self._shards, strict=True))
            if lane < shards and any(cursor)
        }

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches; worker process ``w`` of ``n`` yields every ``n``-th one."""
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = {shards: set(self._own(shards)) for shards in set(self._shards)}
        cursors = {key: cursor for key, cursor in self.start.items() if isinstance(key, tuple)}
        # The document each shard is in, so that it is not tokenized again for the next row.
        opened: dict[tuple[int, int], tuple[int, Piece]] = {}
        order = functools.lru_cache(maxsize=8 * len(self._shards))(self._order)
        row = self.start["row"]
        moved: State = {}
        for batch in itertools.takewhile(self.pools.begin, itertools.count()):
            mine: list[list[Piece]] = []
            pools, number = self.pools.of_batch(row, self._global_batch, self._seq_len)
            for i, pool in enumerate(pools):
                shard = (number + i) % self._shards[pool]
                if shard not in own[self._shards[pool]]:
                    continue
                packed, cursor = self._pack(
                    pool, shard, cursors.get((pool, shard), Cursor()), opened, order
                )
                cursors[pool, shard] = moved[pool, shard] = cursor
                if packed is None:  # for whichever rank: all of them stop here
                    return
                if 0 <= i - self._first_row < self._local_batch:
                    mine.append(packed)
            row += self._global_batch
            if batch % workers == turn:
                yield *batch_of(mine, self._documents.columns), {"row": row, **moved}
                moved = {}

    def check_size(self, where: str) -> None:
        """Check that there is text for one row, or, if finite, for one batch of all ranks.

        And something to predict in every domain that rows are packed from.

        Raises:
            ValueError: If there is less.
        """
        rows = 1 if self._infinite else self._global_batch
        need, have = rows * self._seq_len, 0
        for i in range(len(self._documents)):
            have += predicted(self._whole(i))
            if have >= need:
                break
        if have < need:
            what = "one row needs" if rows == 1 else f"one batch of {rows} rows needs"
            msg = (
                f"{where}: too little text: {have} tokens, but {what} {need}; add text or lower "
                "--training.seq_len"
            )
            raise ValueError(msg)
        if self._rows == "mixed":
            return
        for name, members in zip(self.domains, self._members, strict=True):
            if not any(predicted(self._whole(int(i))) for i in members):
                msg = (
                    f"{where}: domain {name!r} has no token to predict, so no row can be packed "
                    "from it; add text to it, or set --dataloader.rows mixed"
                )
                raise ValueError(msg)

    def _own(self, num_shards: int) -> list[int]:
        # Steps move a rank's rows by the global batch, so modulo this number they never move.
        period = math.gcd(self._global_batch, num_shards)
        _, number = self.pools.of_batch(self.start["row"], self._global_batch, self._seq_len)
        start = number + self._first_row
        residues = {(start + i) % period for i in range(self._local_batch)}
        return [s for s in range(num_shards) if s % period in residues]

    def _whole(self, index: int) -> Piece:
        documents = self._documents
        place = functools.partial(documents.place_of, index)
        return whole_piece(
            encoded(self._encode, documents.texts[index], place),
            int(documents.domain_ids[index]),
            documents.columns,
            [column[index] for column in documents.numbers],
            place,
        )

    def _order(self, pool: int, epoch: int) -> np.ndarray:
        # Domains of as many documents, say one text in two languages, are not shuffled alike.
        key = (epoch,) if self._rows == "mixed" else (epoch, pool + 1)
        return np.random.default_rng([self._seed, *key]).permutation(self._members[pool])

    def _pack(
        self,
        pool: int,
        shard: int,
        cursor: Cursor,
        opened: dict[tuple[int, int], tuple[int, Piece]],
        order: Callable[[int, int], np.ndarray],
    ) -> tuple[list[Piece] | None, Cursor]:
        """Return a shard's next row (None if a finite stream ends in it) and the next cursor."""
        epoch, document, offset = cursor
        pieces: list[Piece] = []
        room = self._seq_len
        while room:
            mine = order(pool, epoch)[shard :: self._shards[pool]]
            if document >= len(mine):
                if not self._infinite:
                    return None, cursor
                epoch, document, offset = epoch + 1, 0, 0
                continue
            index = int(mine[document])
            before, whole = opened.get((pool, shard), (-1, None))
            if whole is None or before != index:
                whole = self._whole(index)
                opened[pool, shard] = index, whole
            left = len(whole.tokens) - 1 - offset
            take = min(left, room)
            if take > 0:
                pieces.append(cut_piece(whole, offset, take))
                room -= take
            document, offset = (document, offset + take) if take < left else (document + 1, 0)
        return pieces, Cursor(epoch, document, offset)


def whole_piece(
    whole: Encoded,
    domain_id: int,
    columns: Sequence[str],
    numbers: Sequence[Values],
    place: Callable[[], str],
) -> Piece:
    """Return a whole document as a piece; ``numbers`` are the values of ``columns``.

    Raises:
        ValueError: If there is one number for each token, but of another number of tokens.
    """
    predicted = max(len(whole.ids) - 1, 0)
    for name, values in zip(columns, numbers, strict=True):
        if np.ndim(values) and np.size(values) != predicted:
            msg = (
                f"{place()}: column {name!r} has {np.size(values)} numbers, but the text has "
                f"{predicted} tokens to predict; score the data again with this tokenizer: "
                "weighting score"
            )
            raise ValueError(msg)
    return Piece(
        torch.from_numpy(np.array(whole.ids, np.int64)),  # a long list quicker than torch does
        domain_id,
        tuple(torch.tensor(values, dtype=torch.float32) for values in numbers),
        None if whole.predicted is None else torch.tensor(whole.predicted),
    )


def cut_piece(whole: Piece, offset: int, take: int) -> Piece:
    """Return a stretch of ``take`` inputs of a document, the label after them, and its numbers."""
    numbers = tuple(x[offset : offset + take] if x.ndim else x for x in whole.numbers)
    predicted = None if whole.predicted is None else whole.predicted[offset : offset + take]
    tokens = whole.tokens[offset : offset + take + 1]
    return whole._replace(tokens=tokens, numbers=numbers, predicted=predicted)


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
        inputs[signal_of(name)] = stack(lambda p, i=i: p.numbers[i].expand(len(p.tokens) - 1))
    return inputs, stack(_labels)


def predicted(piece: Piece) -> int:
    """Return how many of a piece's labels are predicted."""
    if piece.predicted is not None:
        return int(piece.predicted.sum())
    return max(len(piece.tokens) - 1, 0)


def _labels(piece: Piece) -> Tensor:
    labels = piece.tokens[1:]
    return labels if piece.predicted is None else labels.where(piece.predicted, IGNORED)


def shards_for(global_batch: int) -> int:
    """Return the number of shards: the least multiple of a batch from ``NUM_SHARDS`` on."""
    return global_batch * -(-NUM_SHARDS // global_batch)


def shard_key(lane: int) -> str:
    """Name the saved state's entry of the rows ``g`` with ``g mod num_shards == lane``."""
    return f"shard_{lane:03d}"


def is_count(value: object) -> bool:
    """Tell whether a value from a saved state is a whole number from 0 on."""
    return type(value) is int and value >= 0


def _most_shards(documents: int, lanes: int) -> int:
    # A divisor, so that a row's lane tells its shard in every pool.
    return max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= max(documents, 1))


def _is_list(value: Any, length: int) -> bool:  # noqa: ANN401
    return type(value) in {list, tuple} and len(value) == length

"""Rows of a stream of records, for text that does not fit in memory."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, cast

from torch.utils.data import IterableDataset

from titan_integration.data.bad_records import BadRecords
from titan_integration.data.contents import Content, content_of, encoded
from titan_integration.data.one_reading import Item, OneReading
from titan_integration.data.packing import (
    Batch,
    Cut,
    Encode,
    Piece,
    RowMode,
    RowPools,
    batch_of,
    cut_piece,
    is_count,
    predicted,
    whole_piece,
)
from titan_integration.data.records import (
    ONLY_DOMAIN,
    Columns,
    Values,
    check_encodable,
    domain_of,
    numbers_of,
)
from titan_integration.data.spots import Spots
from titan_integration.data.stream_sources import Position, Source

BAD_RECORDS = "bad_records"
"""Under which a batch tells how many bad records came before it; not a part of the state."""


# Epoch, position before the last document, and tokens of it used.
_START: tuple[int, Position | None, int] = (0, None, 0)


class _Held(NamedTuple):
    """What a record holds."""

    content: Content
    domain: str
    numbers: tuple[Values, ...]


class StreamedRows(IterableDataset[Batch]):
    """The local batches of one rank from a stream, in the stream's own order.

    Differs from ``PackedRows``: the records are split among the ranks, so here the rows do depend
    on the number of ranks, and a saved state only fits the same number. Where rows are of one
    domain each, every domain has its own place in the stream, which is read once for all
    (``OneReading``). Records without text are passed over.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        cut: Cut,
        columns: Columns,
        domains: tuple[str, ...],
        *,
        rows: RowMode,
        seed: int,
        infinite: bool,
        bad: BadRecords | None = None,
    ) -> None:
        """Take this rank's part of a stream."""
        self.bad = bad or BadRecords()
        self.domains = domains
        self._ids = {name: i for i, name in enumerate(domains)}
        self.pools = RowPools(rows, len(domains), seed)
        self._only = (None,) if rows == "mixed" else domains
        self._source = source
        self._spots: Spots[_Held] | None = None
        self._readings: dict[tuple[int, frozenset[str]], OneReading[_Held]] = {}
        self._cursors: dict[str, tuple[int, Position | None]] = {}
        self._encode = encode
        self._columns = columns
        self._seq_len = cut.seq_len
        self._local_batch = cut.local_batch
        self._global_batch = cut.local_batch * cut.num_ranks
        self._first_row = cut.local_batch * cut.rank
        self._infinite = infinite
        self._key = f"dp_rank_{cut.rank}"
        self.start: dict[Any, Any] = {"world_size": cut.num_ranks, "row": 0}

    def saved(self, state: Mapping[Any, Any], *, own: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return a state as it is saved, which is this rank's own.

        Where rows are of one domain each, those that have begun, each after its number.
        """
        if self._only == (None,):
            positions = [state.get(0, _START)]
        else:
            positions = [[i, *state[i]] for i in range(len(self._only)) if i in state]
        # Text, because Hugging Face's nested state has no fixed shape and a checkpoint entry must
        # have one.
        told = {key: state[key] for key in ("world_size", "row")}
        return told | {self._key: json.dumps(positions)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Start from a saved state.

        Raises:
            ValueError: If it was saved by another number of ranks or with other files, or is
                damaged.
        """
        if state.get("world_size") != self.start["world_size"]:
            msg = (
                f"data loader state: saved with {state.get('world_size')} data-parallel ranks, "
                f"now there are {self.start['world_size']}; a streamed data set can only resume "
                "with the same number"
            )
            raise ValueError(msg)
        positions = self._loaded(state.get(self._key))
        for key, fine in (("row", is_count(state.get("row"))), (self._key, positions is not None)):
            if not fine:
                msg = f"data loader state: {key!r} is {state.get(key)!r}; the checkpoint is damaged"
                raise ValueError(msg)
        self.start = {key: state[key] for key in ("world_size", "row")}
        for i, (epoch, position, offset) in (positions or {}).items():
            at = position and self._source.checked(epoch, position)
            self.start[i] = epoch, at, offset

    def _loaded(self, saved: object) -> dict[int, Any] | None:
        """Return where each domain goes on that has begun; None if that cannot be."""
        mixed = self._only == (None,)
        try:
            entries = json.loads(cast("str", saved))
            of_all = mixed or (entries and all(len(entry) == len(_START) for entry in entries))
            if of_all:  # in their order, as version 0.1.0 saved it of many domains too
                entries = [[i, *entry] for i, entry in enumerate(entries)]
            sound = (not of_all or len(entries) == len(self._only)) and all(
                is_count(i)
                and i < len(self._only)
                and is_count(epoch)
                and is_count(offset)
                and (position is None or type(position) is dict)
                for i, epoch, position, offset in entries
            )
        except (TypeError, ValueError):
            return None
        found = {i: tuple(moved) for i, *moved in entries} if sound else {}
        return found if sound and len(found) == len(entries) else None

    def check_first(self) -> None:
        """Read the records up to the first one with something to predict.

        Raises:
            ValueError: If there is none, or one cannot be read, or has not the columns or a domain.
        """
        for place, record, _ in self._source.read(0, None):
            held = self._held(record, place)
            whole = None if held is None else self._whole(held, place)
            if whole is not None and predicted(whole):
                return
        self._raise_empty(None, ())

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        positions = [self.start.get(i, _START) for i in range(len(self._only))]
        cursors = {only: at[:2] for only, at in zip(self._only, positions, strict=True) if only}
        self._spots = None
        if cursors and self._source.files(0) is not None:
            self._spots = Spots(self._source, self._held, _measured, cursors)
        self._readings.clear()
        self._cursors = cursors
        packed: dict[int, Iterator[tuple[list[Piece], tuple[int, Position | None, int]]]] = {}
        row = self.start["row"]
        for _batch in itertools.takewhile(self.pools.begin, itertools.count()):
            pools, _ = self.pools.of_batch(row, self._global_batch, self._seq_len)
            rows: list[list[Piece]] = []
            moved: dict[Any, Any] = {}
            for pool in pools[self._first_row : self._first_row + self._local_batch]:
                if pool not in packed:
                    packed[pool] = self._rows(self._only[pool], *positions[pool])
                pieces, position = next(packed[pool], (None, None))
                if pieces is None:
                    return
                rows.append(pieces)
                moved[pool] = position
            row += self._global_batch
            moved |= {"row": row, BAD_RECORDS: self.bad.count}
            yield *batch_of(rows, self._columns.numbers), moved

    def _rows(
        self, only: str | None, epoch: int, position: Position | None, skip: int
    ) -> Iterator[tuple[list[Piece], tuple[int, Any, int]]]:
        """Yield rows with (epoch, position before the last document, tokens of it used).

        Of one domain only, unless it is None.
        """
        pieces: list[Piece] = []
        room = self._seq_len
        while True:
            empty = position is None and not skip  # until there is something in a whole epoch
            found: set[str] = set()
            for place, held, after in self._records(only, epoch, position, found):
                if (whole := self._whole(held, place)) is None:
                    continue
                offset, skip = skip, 0
                while (take := min(len(whole.tokens) - 1 - offset, room)) > 0:
                    pieces.append(cut_piece(whole, offset, take))
                    empty = empty and not predicted(pieces[-1])
                    offset += take
                    room -= take
                    if not room:
                        yield pieces, (epoch, position, offset)
                        pieces, room = list[Piece](), self._seq_len
                position = after
            if not self._infinite:
                return
            if empty:
                self._raise_empty(only, found)
            epoch, position, skip = epoch + 1, None, 0

    def _read(self, epoch: int, position: Position | None) -> Iterator[Item[_Held]]:
        for place, record, after in self._source.read(epoch, position):
            if (held := self._held(record, place)) is not None:
                yield place, held, after

    def _records(
        self, only: str | None, epoch: int, position: Position | None, found: set[str]
    ) -> Iterator[Item[_Held]]:
        """Yield what records hold, of one domain or all; and note in `found` which there are."""
        if only is None:
            for item in self._read(epoch, position):
                found.add(item[1].domain)
                yield item
            return
        together = self._cursors
        if (spots := self._spots) is not None:
            for item in spots.of(only, epoch, position):
                position = item[2]
                yield item
            found |= spots.found
            if only not in spots.long:
                return
            together = spots.long[only]
        key = epoch, frozenset(together)
        if key not in self._readings:
            self._readings[key] = OneReading(
                functools.partial(self._read, epoch),
                _measured,
                self._source.order,
                _starts(together).get(epoch) or dict.fromkeys(together),
            )
        yield from self._readings[key].of(only, position)
        found |= self._readings[key].found

    def _raise_empty(self, only: str | None, found: Iterable[str]) -> NoReturn:
        there = f" of domain {only!r}" if only else ""
        instead = (
            "; give every rank's files some of each domain, or leave out --dataloader.streaming"
            if only and self.start["world_size"] > 1
            else ""
        )
        msg = (
            f"{self._source.where}: this rank's part of the stream has no text{there} to predict "
            f"(domains found: {', '.join(sorted(found)) or 'none'}){instead}"
        )
        raise ValueError(msg)

    def _domain(self, record: Mapping[str, Any], place: str) -> str:
        name = domain_of(record, self._columns, place)
        if name is None and self.domains == (ONLY_DOMAIN,):
            return ONLY_DOMAIN
        if name not in self._ids:
            what = (
                f"domain {name!r}" if name else f"no column {self._columns.domain!r}, whose value"
            )
            msg = f"{place}: {what} must be one of 'domains' ({', '.join(self.domains)})"
            raise ValueError(msg)
        return name

    def _held(self, record: Mapping[str, Any], place: str) -> _Held | None:
        """Return what a record holds; None if that is nothing, or it is passed over."""
        try:
            content = content_of(record, self._columns, place)
            if not content:
                return None
            check_encodable(content, self._columns.text, place)
            numbers = numbers_of(record, self._columns, place)
        except ValueError as error:
            self.bad.found(error)
            return None
        return _Held(content, self._domain(record, place), numbers)

    def _whole(self, held: _Held, place: str) -> Piece | None:
        """Return a document with its tokens; None if it is passed over."""
        try:
            return whole_piece(
                encoded(self._encode, held.content, lambda: place),
                self._ids[held.domain],
                self._columns.numbers,
                held.numbers,
                lambda: place,
            )
        except ValueError as error:
            self.bad.found(error)
            return None


def _measured(held: _Held) -> tuple[str, int]:
    """Return the domain of what a record holds, and its size."""
    return held.domain, len(held.content)


def _starts(
    cursors: Mapping[str, tuple[int, Position | None]],
) -> dict[int, dict[str, Position | None]]:
    """Return by epoch where its reading begins for each domain that takes part."""
    starts: dict[int, dict[str, Position | None]] = {}
    for domain, (epoch, position) in cursors.items():
        starts.setdefault(epoch, {})[domain] = position
    for epoch, found in starts.items():  # domains of earlier epochs come to it later
        if None in found.values():
            late = [x for e, others in starts.items() if e < epoch for x in others]
            found.update(dict.fromkeys(late))
    return starts

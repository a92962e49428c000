"""Where a streamed run's records come from: local files, or a data set of Hugging Face.

A source gives one rank its part of the records, epoch by epoch, each with its place for messages
and with the position after it, a dict from which reading goes on.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torchtitan.tools.logging import logger, warn_once

from titan_integration.data.bad_records import BadRecords
from titan_integration.data.data_files import DataFile, local_files
from titan_integration.data.formats import Spot, read_records, scan
from titan_integration.data.packing import Cut, is_count
from titan_integration.data.records import Columns

Position = dict[str, Any]
Record = Mapping[str, Any]
_After = TypeVar("_After")

# Epochs that domains are in at a time, usually.
_FEW_EPOCHS = 32


class Source(Protocol):
    """Records of one rank, to be read again and again."""

    where: str
    """Names the source in messages."""

    def read(self, epoch: int, position: Position | None) -> Iterator[tuple[str, Record, Position]]:
        """Yield place, record and the position after it, from a position in an epoch on.

        Raises:
            ValueError: If something cannot be read; names the place.
        """
        ...

    def order(self, position: Position | None) -> tuple[int, ...]:
        """Return what tells which of two positions in an epoch comes first; None is the start."""
        ...

    def checked(self, epoch: int, position: Position) -> Position:
        """Return a position that was saved, in today's form.

        Raises:
            ValueError: If reading cannot go on there.
        """
        ...

    def files(self, epoch: int) -> list[int] | None:
        """Return the numbers of this rank's files, in an epoch's order.

        None where an epoch's order decides which records of a file are this rank's, or is not told.
        """
        ...

    def read_file(
        self, number: int, start: Spot, *, again: bool = False
    ) -> Iterator[tuple[str, Record, Spot]]:
        """Yield this rank's records of one of its files from a spot on, each with the spot after.

        Bad records are neither refused nor counted ``again``.
        """
        ...

    def is_here(self, number: int) -> bool:
        """Tell whether a file can be opened without asking where it comes from."""
        ...

    def position(self, epoch: int, number: int, spot: Spot) -> Position:
        """Return a spot of an epoch's file of this number as a position."""
        ...

    def spot(self, position: Position) -> tuple[int, Spot]:
        """Return which of an epoch's files a position is in, and where."""
        ...


class LocalStream:
    """Local files in the order of their paths; from the second epoch on in one that it determines.

    If the number of ranks divides that of the files, each rank reads files of its own. Otherwise
    all read all files, and of every ``num_ranks`` records each rank keeps one.
    """

    def __init__(
        self, path: DataFile, split: str, columns: Columns, cut: Cut, bad: BadRecords
    ) -> None:
        """List the files; raises ValueError if there are none."""
        self.where = str(path)
        self._files = local_files(path, split)
        self._columns = columns
        self._cut = cut
        self._bad = bad

    def read(self, epoch: int, position: Position | None) -> Iterator[tuple[str, Record, Position]]:
        """Yield this rank's records; a position is the number of a file and a spot in it."""
        order, step, offset = self._part(epoch)
        first, start = self.spot(position) if position else (0, Spot())
        each = ((i, start if i == first else Spot()) for i in range(first, len(order)))
        records = (
            (found.place, found.record, (i, found.after))
            for i, begin in each
            for found in scan(self._files[order[i]], self._columns, self._bad, begin)
        )
        for place, record, (i, after) in _dealt(records, step, offset):
            yield place, record, self.position(epoch, i, after)

    def files(self, epoch: int) -> list[int] | None:
        """Return the numbers of this rank's files, in an epoch's order."""
        order, step, _ = self._part(epoch)
        return order if step == 1 or len(order) == 1 else None

    def read_file(
        self, number: int, start: Spot, *, again: bool = False
    ) -> Iterator[tuple[str, Record, Spot]]:
        """Yield this rank's records of a file from a spot on, each with the spot after."""
        _, step, offset = self._part(0)
        bad = BadRecords("skip", quiet=True) if again else self._bad
        found = scan(self._files[number], self._columns, bad, start)
        return _dealt(((x.place, x.record, x.after) for x in found), step, offset)

    def is_here(self, number: int) -> bool:
        """Tell whether a file can be opened without asking where it comes from."""
        return isinstance(self._files[number], Path)

    def position(self, epoch: int, number: int, spot: Spot) -> Position:
        """Return a spot of an epoch's file of this number as a position."""
        name = self._files[self._part(epoch)[0][number]].name
        at: Position = {"file": number, "name": name, "record": spot.record}
        if spot.byte is not None:  # so that nothing before it is read again
            at |= {"byte": spot.byte, "line": spot.line}
        return at

    def spot(self, position: Position) -> tuple[int, Spot]:
        """Return which of an epoch's files a position is in, and where."""
        at = Spot(position["record"], position.get("byte"), position.get("line", 0))
        return position["file"], at

    def order(self, position: Position | None) -> tuple[int, ...]:
        """Return file and record."""
        return (position["file"], position["record"]) if position else ()

    def checked(self, epoch: int, position: Position) -> Position:
        """Return a position, also one that an older version saved in Hugging Face's form."""
        files = [self._files[i] for i in self._part(epoch)[0]]
        found, name = position, position.get("name")
        if "examples_iterable" in position:
            found, name = _of_hugging_face(position), None
            warn_once(
                logger,
                f"{self.where}: an older version saved where the stream was, without the names of "
                "its files; if there are other files now than it read (it passed over .ndjson, "
                "and suffixes in capitals), the stream goes on elsewhere",
            )
        file, record = found.get("file", -1), found.get("record", -1)
        if not (is_count(file) and is_count(record) and file <= len(files)):
            msg = (
                f"data loader state: the stream of {self.where} is at {position!r}, which cannot "
                "be; the checkpoint is damaged or of other files. To start the data afresh: "
                "--checkpoint.exclude_from_loading dataloader"
            )
            raise ValueError(msg)
        if found is not position:  # it may count on from one file into the next
            while file < len(files) and record > (held := self._count(files[file])):
                file, record = file + 1, record - held
        now = files[file].name if file < len(files) else None
        if name not in {None, now}:
            msg = (
                f"data loader state: the stream is in {name!r}, file {file} of epoch {epoch} on "
                f"this rank, but now that is {now!r}: files of {self.where} were added, removed "
                "or renamed. Restore them, or start the data afresh: "
                "--checkpoint.exclude_from_loading dataloader"
            )
            raise ValueError(msg)
        spot = {key: found[key] for key in ("byte", "line") if is_count(found.get(key))}
        return {"file": file, "name": now, "record": record, **spot}

    def _count(self, file: DataFile) -> int:
        return sum(1 for _ in read_records(file, self._columns))

    def _part(self, epoch: int) -> tuple[list[int], int, int]:
        return _part(len(self._files), self._cut, epoch)


@functools.lru_cache(maxsize=_FEW_EPOCHS)
def _part(num_files: int, cut: Cut, epoch: int) -> tuple[list[int], int, int]:
    """Return the files a rank reads, and of how many records in turn it keeps which.

    As Hugging Face splits a stream, and orders its files from the second epoch on.
    """
    order = list(range(num_files))
    if epoch:
        np.random.default_rng(epoch).shuffle(order)
    if num_files % cut.num_ranks:
        return order, cut.num_ranks, cut.rank
    return order[cut.rank :: cut.num_ranks], 1, 0


def _dealt(
    records: Iterator[tuple[str, Record, _After]], step: int, offset: int
) -> Iterator[tuple[str, Record, _After]]:
    """Yield the record ``offset`` of every ``step``, with what is after all of these."""
    while len(some := list(islice(records, step))) > offset:
        yield *some[offset][:2], some[-1][2]


class HubStream:
    """A streaming data set of Hugging Face, whose files are read one by one, as it would itself.

    States of earlier versions, and files that are dealt to ranks record by record, are left to it.
    """

    def __init__(self, dataset: datasets.IterableDataset, where: str, cut: Cut) -> None:
        """Take a data set, of which this rank reads a part."""
        self.where = where
        self._dataset = dataset
        self._cut = cut
        self._is_old = False

    def read(self, epoch: int, position: Position | None) -> Iterator[tuple[str, Record, Position]]:
        """Yield this rank's records; a position is the number of a file and a spot in it."""
        if (files := self.files(epoch)) is None:
            yield from self._read_whole(epoch, position)
            return
        first, start = self.spot(position) if position else (0, Spot())
        for number, file in enumerate(files[first:], start=first):
            begin = start if number == first else Spot()
            for place, record, after in self.read_file(file, begin):
                yield place, record, self.position(epoch, number, after)

    def order(self, position: Position | None) -> tuple[int, ...]:
        """Return file and record, or how many records were read."""
        if not position:
            return ()
        if "records_read" in position or self._is_old:
            return (position.get("records_read", 0),)
        return position["file"], position["record"]

    def checked(self, epoch: int, position: Position) -> Position:
        """Return a position, also one that an earlier version saved, as Hugging Face has it."""
        if "examples_iterable" in position:
            self._is_old = True
            return position
        file, record, of = (position.get(key, -1) for key in ("file", "record", "of"))
        if of != self._dataset.num_shards or not (
            is_count(file)
            and is_count(record)
            and file < len(self._part(epoch)[0])
            and isinstance(position.get("state"), dict)
        ):
            msg = (
                f"data loader state: the stream of {self.where} is at {position!r}, and has "
                f"{self._dataset.num_shards} files; it has changed, or the checkpoint is damaged. "
                "To start the data afresh: --checkpoint.exclude_from_loading dataloader"
            )
            raise ValueError(msg)
        return position

    def files(self, epoch: int) -> list[int] | None:
        """Return the numbers of this rank's files, in an epoch's order; None if left to the hub."""
        order, step, _ = self._part(epoch)
        return order if not self._is_old and (step == 1 or len(order) == 1) else None

    def read_file(
        self,
        number: int,
        start: Spot,
        *,
        again: bool = False,  # noqa: ARG002 -- nothing is refused here
    ) -> Iterator[tuple[str, Record, Spot]]:
        """Yield this rank's records of a file from a spot on, each with the spot after."""
        file = self._dataset.shard(num_shards=self._dataset.num_shards, index=number)
        _, step, offset = self._part(0)
        of = f"of file {number}" if self._dataset.num_shards > 1 else "of the stream"
        return _dealt(self._records(file, 0, start, of), step, offset)

    def is_here(self, number: int) -> bool:  # noqa: ARG002
        """Tell that no record can be read again without those before it."""
        return False

    def position(self, epoch: int, number: int, spot: Spot) -> Position:  # noqa: ARG002
        """Return a spot of an epoch's file of this number as a position."""
        at = {"file": number, "of": self._dataset.num_shards, "record": spot.record}
        return {**at, "state": json.loads(spot.state)}

    def spot(self, position: Position) -> tuple[int, Spot]:
        """Return which of an epoch's files a position is in, and where."""
        return position["file"], Spot(position["record"], state=json.dumps(position["state"]))

    def _part(self, epoch: int) -> tuple[list[int], int, int]:
        return _part(self._dataset.num_shards, self._cut, epoch)

    def _read_whole(
        self, epoch: int, position: Position | None
    ) -> Iterator[tuple[str, Record, Position]]:
        """Yield records with a position of Hugging Face's, and how many were read."""
        anew = self._dataset.shard(num_shards=1, index=0)  # so that reading again starts over
        whole = split_dataset_by_node(anew, self._cut.rank, self._cut.num_ranks)
        state = dict(position or {})
        start = Spot(state.pop("records_read", 0), state=json.dumps(state) if state else "")
        of = "of this rank's part of the stream"
        for place, record, after in self._records(whole, epoch, start, of):
            yield place, record, {**json.loads(after.state), "records_read": after.record}

    def _records(
        self, stream: datasets.IterableDataset, epoch: int, start: Spot, of: str
    ) -> Iterator[tuple[str, Record, Spot]]:
        records: Iterator[Record] | None = None
        for number in itertools.count(start.record):
            place = f"{self.where}: record {number} {of}"
            try:
                if records is None:
                    # Hugging Face reorders the files by the epoch, and resumes only within one.
                    stream.set_epoch(epoch)
                    if start.state:
                        stream.load_state_dict(json.loads(start.state))
                    records = iter(stream)
                record = next(records)
                after = json.dumps(stream.state_dict())
            except StopIteration:
                return
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                msg = f"{place}: cannot be read: {type(error).__name__}: {reason}"
                raise ValueError(msg) from error
            yield place, record, Spot(number + 1, state=after)


def _of_hugging_face(position: Position) -> Position:
    """Return a position that an older version saved, when Hugging Face read local files too."""
    try:
        inner = position["examples_iterable"]
        # Either where reading is, or where its present chunk of records began, and how far on.
        began = inner.get("previous_state")
        passed = inner["num_chunks_since_previous_state"] if began else 0
        at = began or inner.get("examples_iterable", inner)
        return {"file": at["shard_idx"], "record": at["shard_example_idx"] + passed}
    except (AttributeError, KeyError, TypeError):
        return {}

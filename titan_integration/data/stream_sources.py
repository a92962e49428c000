"""Where a streamed run's records come from: local files, or a data set of Hugging Face.

A source gives one rank its part of the records, epoch by epoch, each with its place for messages
and with the position after it, a dict from which reading goes on.
"""

import copy
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
        self._orders: dict[int, list[int]] = {}

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
        """Return the files this rank reads, and of how many records in turn it keeps which."""
        cut = self._cut
        if epoch not in self._orders:
            order = list(range(len(self._files)))
            if epoch:
                np.random.default_rng(epoch).shuffle(order)
            self._orders[epoch] = order
            if len(self._orders) > _FEW_EPOCHS:
                del self._orders[next(iter(self._orders))]
        order = self._orders[epoch]
        if len(order) % cut.num_ranks:
            return order, cut.num_ranks, cut.rank
        return order[cut.rank :: cut.num_ranks], 1, 0


def _dealt(
    records: Iterator[tuple[str, Record, _After]], step: int, offset: int
) -> Iterator[tuple[str, Record, _After]]:
    """Yield the record ``offset`` of every ``step``, with what is after all of these."""
    while len(some := list(islice(records, step))) > offset:
        yield *some[offset][:2], some[-1][2]


class HubStream:
    """An iterable data set of Hugging Face, which splits it among the ranks."""

    def __init__(self, dataset: datasets.IterableDataset, where: str, cut: Cut) -> None:
        """Take this rank's part."""
        self.where = where
        self._dataset = split_dataset_by_node(dataset, cut.rank, cut.num_ranks)
        # Of several files, Hugging Face has another order in each epoch.
        self._is_one_file = dataset.num_shards == 1

    def read(self, epoch: int, position: Position | None) -> Iterator[tuple[str, Record, Position]]:
        """Yield this rank's records; a position is Hugging Face's, and how many were read."""
        stream = copy.deepcopy(self._dataset)  # so that reading again starts over
        before = dict(position or {})
        number = before.pop("records_read", 0)
        records: Iterator[Record] | None = None
        while True:
            place = f"{self.where}: record {number} of this rank's part of the stream"
            try:
                if records is None:
                    # Hugging Face reorders the files by the epoch, and resumes only within one.
                    stream.set_epoch(epoch)
                    if before:
                        stream.load_state_dict(before)
                    records = iter(stream)
                record = next(records)
                after = copy.deepcopy(stream.state_dict())
            except StopIteration:
                return
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                msg = f"{place}: cannot be read: {type(error).__name__}: {reason}"
                raise ValueError(msg) from error
            number += 1
            yield place, record, {**after, "records_read": number}

    def order(self, position: Position | None) -> tuple[int, ...]:
        """Return how many records were read."""
        return (position.get("records_read", 0),) if position else ()

    def checked(self, epoch: int, position: Position) -> Position:  # noqa: ARG002
        """Return a position as it is: only Hugging Face knows what it means."""
        if "records_read" not in position:  # as version 0.1.0 saved it
            self._is_one_file = False
        return position

    def files(self, epoch: int) -> list[int] | None:  # noqa: ARG002
        """Return the number of the only file; None if there are more, or none was counted."""
        return [0] if self._is_one_file else None

    def read_file(
        self,
        number: int,  # noqa: ARG002
        start: Spot,
        *,
        again: bool = False,  # noqa: ARG002
    ) -> Iterator[tuple[str, Record, Spot]]:
        """Yield this rank's records from a spot on, each with the spot after."""
        for place, record, after in self.read(0, self.position(0, 0, start)):
            count = after.pop("records_read")
            yield place, record, Spot(count, state=json.dumps(after))

    def is_here(self, number: int) -> bool:  # noqa: ARG002
        """Tell that no record can be read again without those before it."""
        return False

    def position(self, epoch: int, number: int, spot: Spot) -> Position:  # noqa: ARG002
        """Return a spot in an epoch as a position."""
        if not spot.state:
            return {}
        return {**json.loads(spot.state), "epoch": epoch, "records_read": spot.record}

    def spot(self, position: Position) -> tuple[int, Spot]:
        """Return where in the only file a position is."""
        state = {**position, "epoch": 0}
        return 0, Spot(state.pop("records_read"), state=json.dumps(state))


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

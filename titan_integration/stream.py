"""Rows from a streamed Hugging Face data set, for text that does not fit in memory."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from titan_integration.packing import (
    Batch,
    Cut,
    Encode,
    Piece,
    RowMode,
    RowPools,
    batch_of,
    cut_piece,
    is_count,
    whole_piece,
)
from titan_integration.records import Columns, domain_of, local_files, numbers_of, text_of


class StreamedRows(IterableDataset[Batch]):
    """The local batches of one rank from a streamed Hugging Face data set, in its own order.

    Differs from ``PackedRows``: the data set is split among the ranks by Hugging Face, so here the
    rows do depend on the number of ranks, and a saved state only fits the same number. Where rows
    are of one domain each, every domain has a stream of its own, which passes over the others: the
    source is read once for each domain, which takes as many times the reading.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        encode: Encode,
        cut: Cut,
        columns: Columns,
        domains: tuple[str, ...],
        *,
        rows: RowMode,
        seed: int,
        infinite: bool,
        where: str,
    ) -> None:
        """Take this rank's part of a stream; ``where`` names the stream in messages."""
        self.domains = domains
        self.pools = RowPools(rows, len(domains), seed)
        self._only = (None,) if rows == "mixed" else domains
        self._stream = split_dataset_by_node(stream, cut.rank, cut.num_ranks)
        self._encode = encode
        self._columns = columns
        self._seq_len = cut.seq_len
        self._local_batch = cut.local_batch
        self._global_batch = cut.local_batch * cut.num_ranks
        self._first_row = cut.local_batch * cut.rank
        self._infinite = infinite
        self._where = where
        self._place = f"{where}: a streamed record"
        self._key = f"dp_rank_{cut.rank}"
        # Text, because Hugging Face's nested state has no fixed shape and a checkpoint entry must
        # have one.
        self.state: dict[str, Any] = {
            "world_size": cut.num_ranks,
            "row": 0,
            self._key: json.dumps([[0, None, 0]] * len(self._only)),
        }

    def own_state(self) -> dict[str, Any]:
        """Return the starting state."""
        return dict(self.state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Start from a saved state.

        Raises:
            ValueError: If it was saved by another number of ranks, or is damaged.
        """
        if state.get("world_size") != self.state["world_size"]:
            msg = (
                f"data loader state: saved with {state.get('world_size')} data-parallel ranks, "
                f"now there are {self.state['world_size']}; a streamed data set can only resume "
                "with the same number"
            )
            raise ValueError(msg)
        try:
            positions = json.loads(state[self._key])
            sound = len(positions) == len(self._only) and all(
                is_count(epoch) and is_count(offset) and (source is None or type(source) is dict)
                for epoch, source, offset in positions
            )
        except (KeyError, TypeError, ValueError):
            sound = False
        for key, fine in (("row", is_count(state.get("row"))), (self._key, sound)):
            if not fine:
                msg = f"data loader state: {key!r} is {state.get(key)!r}; the checkpoint is damaged"
                raise ValueError(msg)
        self.state = {key: state[key] for key in self.state}

    def check_first(self) -> None:
        """Read one record.

        Raises:
            ValueError: If there is none, or it cannot be read, or has not the columns or a domain.
        """
        try:
            record = next(iter(copy.deepcopy(self._stream)), None)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            msg = f"{self._where}: cannot read the stream: {type(error).__name__}: {reason}"
            raise ValueError(msg) from error
        if record is None:
            self._raise_empty(None, ())
        self._whole(record, self._domain(record))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        positions = json.loads(self.state[self._key])
        packed = [
            self._rows(only, *position)
            for only, position in zip(self._only, positions, strict=True)
        ]
        row = self.state["row"]
        while True:
            pools, _ = self.pools.of_batch(row, self._global_batch)
            rows: list[list[Piece]] = []
            for pool in pools[self._first_row : self._first_row + self._local_batch]:
                pieces, positions[pool] = next(packed[pool], (None, None))
                if pieces is None:
                    return
                rows.append(pieces)
            row += self._global_batch
            moved = {"row": row, self._key: json.dumps(positions)}
            yield *batch_of(rows, self._columns.numbers), moved

    def _rows(
        self, only: str | None, epoch: int, source: dict[str, Any] | None, skip: int
    ) -> Iterator[tuple[list[Piece], tuple[int, Any, int]]]:
        """Yield rows with (epoch, source state before the last document, tokens of it used).

        Of one domain only, unless it is None.
        """
        stream = copy.deepcopy(self._stream)  # so that iterating again starts over
        pieces: list[Piece] = []
        room = self._seq_len
        while True:
            # Hugging Face reorders the files by the epoch, and resumes only within one.
            stream.set_epoch(epoch)
            if source is not None:
                stream.load_state_dict(source)
            empty = source is None and not skip  # until there is something in a whole epoch
            found: set[str] = set()
            for record in stream:
                domain = self._domain(record)
                found.add(domain)
                if only not in {None, domain}:
                    continue
                whole = self._whole(record, domain)
                offset, skip = skip, 0
                while (take := min(len(whole.tokens) - 1 - offset, room)) > 0:
                    pieces.append(cut_piece(whole, offset, take))
                    empty = False
                    offset += take
                    room -= take
                    if not room:
                        yield pieces, (epoch, source, offset)
                        pieces, room = list[Piece](), self._seq_len
                source = copy.deepcopy(stream.state_dict())
            if not self._infinite:
                return
            if empty:
                self._raise_empty(only, found)
            epoch, source, skip = epoch + 1, None, 0

    def _raise_empty(self, only: str | None, found: Iterable[str]) -> NoReturn:
        there = f" of domain {only!r}" if only else ""
        msg = (
            f"{self._where}: this rank's part of the stream has no text{there} to predict "
            f"(domains found: {', '.join(sorted(found)) or 'none'})"
        )
        raise ValueError(msg)

    def _domain(self, record: Mapping[str, Any]) -> str:
        name = domain_of(record, self._columns, self._place)
        if name not in self.domains:
            what = (
                f"domain {name!r}" if name else f"no column {self._columns.domain!r}, whose value"
            )
            msg = f"{self._place}: {what} must be one of 'domains' ({', '.join(self.domains)})"
            raise ValueError(msg)
        return name

    def _whole(self, record: Mapping[str, Any], domain: str) -> Piece:
        return whole_piece(
            self._encode(text_of(record, self._columns, self._place)),
            self.domains.index(domain),
            self._columns.numbers,
            numbers_of(record, self._columns, self._place),
            lambda: self._place,
        )


def open_local_stream(path: Path, split: str) -> datasets.IterableDataset:
    """Open local files of one kind as a Hugging Face ``IterableDataset``.

    Raises:
        ValueError: If files are missing, or of two kinds.
    """
    files = local_files(path, split)
    builders = {"parquet" if f.suffix == ".parquet" else "json" for f in files}
    if len(builders) > 1:
        msg = (
            f"{path}: JSON and Parquet files cannot be streamed together; keep one kind in the "
            "directory"
        )
        raise ValueError(msg)
    return datasets.load_dataset(
        builders.pop(), data_files=[str(f) for f in files], split="train", streaming=True
    )

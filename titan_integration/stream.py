"""Rows from a streamed Hugging Face data set, for text that neither fits in memory nor has an index."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from titan_integration.packing import Batch, Encode, Piece, batch_of, is_count
from titan_integration.records import Columns, domain_of, local_files, text_of

if TYPE_CHECKING:
    import datasets


class StreamedRows(IterableDataset[Batch]):
    """The local batches of one rank from a streamed Hugging Face data set, in its own order.

    Differs from ``PackedRows``: the data set is split among the ranks by Hugging Face, so here the rows do depend on
    the number of ranks, and a saved state only fits the same number.
    """

    def __init__(
        self,
        stream: "datasets.IterableDataset",
        encode: Encode,
        columns: Columns,
        domains: tuple[str, ...],
        *,
        seq_len: int,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        infinite: bool,
        where: str,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.domains = domains
        self._stream = split_dataset_by_node(stream, dp_rank, dp_world_size)
        self._encode = encode
        self._columns = columns
        self._seq_len = seq_len
        self._local_batch = local_batch_size
        self._infinite = infinite
        self._where = where
        self._key = f"dp_rank_{dp_rank}"
        # Text, because Hugging Face's nested state has no fixed shape and a checkpoint entry must have one.
        self.state: dict[str, Any] = {
            "world_size": dp_world_size,
            self._key: json.dumps([0, None, 0]),
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
            raise ValueError(
                f"data loader state: saved with {state.get('world_size')} data-parallel ranks, now there are "
                f"{self.state['world_size']}; a streamed data set can only resume with the same number"
            )
        try:
            epoch, source, offset = json.loads(state[self._key])
            sound = is_count(epoch) and is_count(offset) and isinstance(source, dict | None)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(
                f"data loader state: {self._key!r} is {state.get(self._key)!r}; the checkpoint is damaged"
            )
        self.state = {key: state[key] for key in self.state}

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches."""
        rows: list[list[Piece]] = []
        for row, position in self._rows():
            rows.append(row)
            if len(rows) == self._local_batch:
                yield *batch_of(rows), {self._key: json.dumps(position)}
                rows = []

    def _rows(self) -> Iterator[tuple[list[Piece], tuple[int, Any, int]]]:
        """Yield rows with (epoch, Hugging Face's state before the row's last document, token pairs used of that)."""
        epoch, source, skip = json.loads(self.state[self._key])
        stream = copy.deepcopy(self._stream)  # so that iterating again starts over
        pieces: list[Piece] = []
        room = self._seq_len
        while True:
            stream.set_epoch(
                epoch
            )  # Hugging Face reorders the files by it, and resumes only within it
            if source is not None:
                stream.load_state_dict(source)
            seen = 0
            for seen, record in enumerate(stream, start=1):
                tokens, domain_id = self._tokens(record)
                offset, skip = skip, 0
                while (take := min(len(tokens) - 1 - offset, room)) > 0:
                    pieces.append(Piece(tokens[offset : offset + take + 1], domain_id))
                    offset += take
                    room -= take
                    if not room:
                        yield pieces, (epoch, source, offset)
                        pieces, room = [], self._seq_len
                source = copy.deepcopy(stream.state_dict())
            if not self._infinite:
                return
            if not seen and source is None:
                raise ValueError(f"{self._where}: this rank's part of the stream has no records")
            epoch, source, skip = epoch + 1, None, 0

    def _tokens(self, record: Mapping[str, Any]) -> tuple[Tensor, int]:
        place = f"{self._where}: a streamed record"
        text = text_of(record, self._columns, place)
        name = domain_of(record, self._columns, place)
        if name not in self.domains:
            raise ValueError(
                f"{place}: domain {name!r} is not in 'domains' ({', '.join(self.domains)})"
            )
        return torch.tensor(self._encode(text)), self.domains.index(name)


def open_local_stream(path: Path, split: str) -> "datasets.IterableDataset":
    """Open local files of one kind as a Hugging Face ``IterableDataset``.

    Raises:
        ValueError: If files are missing, or of two kinds.
    """
    import datasets

    files = local_files(path, split)
    builders = {"parquet" if f.suffix == ".parquet" else "json" for f in files}
    if len(builders) > 1:
        raise ValueError(
            f"{path}: JSON and Parquet files cannot be streamed together; keep one kind in the directory"
        )
    return datasets.load_dataset(
        builders.pop(), data_files=[str(f) for f in files], split="train", streaming=True
    )

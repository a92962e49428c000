"""What `weighting score` reads and writes: records with all their columns, and a loss for each."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torchtitan.tools.logging import logger

from titan_integration.data.data_files import (
    ARROW,
    PARQUET,
    DataFile,
    folder_columns,
    local_files,
    saved_dataset,
    suffix_of,
)
from titan_integration.data.documents import open_hub, open_saved
from titan_integration.data.formats import read_records, schema_of
from titan_integration.data.loader import EMBEDDED, DomainTextDataLoader, load_documents, local_path
from titan_integration.data.records import REF_LOSS, Columns, domain_of, text_of
from weighting.errors import printable
from weighting.runs.files import json_text, writing_whole

if TYPE_CHECKING:
    from pathlib import Path

PROVENANCE = "weighting.score"
"""Key in the file's metadata of what made it, as JSON."""

Record = tuple[str, Mapping[str, Any]]
"""A record with its place, for messages."""


class Source(NamedTuple):
    """Records to score, in order, and what of them a Parquet file can hold."""

    where: str
    columns: Columns
    schema: pa.Schema
    total: int
    records: Callable[[], Iterator[Record]]


def open_source(
    config: DomainTextDataLoader.Config, *, replaces: bool = False, column: str = REF_LOSS
) -> Source:
    """Open what a loader's configuration names, and look at every record's text and domain.

    Args:
        config: What to read, as in training; columns of numbers are kept like all others.
        replaces: Whether a column of that name that is there already may be replaced.
        column: What the losses will be called.

    Raises:
        ValueError: For anything wrong with the data or its description; names the place.
    """
    columns = Columns(config.text_column, config.domain_column, tuple(config.columns))
    where = config.dataset_path or config.dataset
    parts = _parts(config, columns)
    kinds: dict[str, dict[pa.DataType, None]] = {}
    total, has_text = 0, False
    for part in parts:
        records = part.records()
        while some := list(islice(records, 1_000)):
            for place, record in some:
                has_text |= text_of(record, columns, place) != ""
                domain_of(record, columns, place)
            total += len(some)
            for field in part.schema or _inferred(some):
                kinds.setdefault(field.name, {})[field.type] = None
    if not has_text:
        msg = f"{where}: no text in any record of split {config.split!r}"
        raise ValueError(msg)
    if kinds.pop(column, None) and not replaces:
        msg = f"{where}: has a column {column!r} already; --overwrite replaces it"
        raise ValueError(msg)
    schema = _schema(kinds, columns, where)
    read = [part.records for part in parts]
    return Source(where, columns, schema, total, lambda: chain.from_iterable(x() for x in read))


def write(
    out: Path,
    schema: pa.Schema,
    blocks: Iterator[tuple[list[Record], list[np.ndarray]]],
    made: dict[str, Any],
) -> None:
    """Write records with their losses as a Parquet file, which appears whole or not at all.

    Args:
        out: The file.
        schema: Of the records' own columns.
        blocks: Records, and for each the losses of its tokens in nats, float32.
        made: What to write about how it was made; `column` is the losses' name, and `per` decides
            what they are.

    Raises:
        ValueError: The disk is full or the like, or a loss is not finite.
    """
    kind = pa.list_(pa.float32()) if made["per"] == "token" else pa.float32()
    schema = schema.append(pa.field(made["column"], kind))
    documents, tokens, total = 0, 0, 0.0
    try:
        with (
            writing_whole(out) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for records, losses in blocks:
                rows = [_row(*record, x, made) for record, x in zip(records, losses, strict=True)]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                documents += len(losses)
                tokens += sum(map(len, losses))
                total += sum(float(x.sum(dtype=np.float64)) for x in losses)
            counts = {"documents": documents, "tokens": tokens, "mean_loss": total / max(tokens, 1)}
            writer.add_key_value_metadata({PROVENANCE: json_text(made | counts)})
    except OSError as error:
        msg = f"--out {out}: cannot write it: {error.strerror or error}"
        raise ValueError(msg) from error


def provenance(path: Path) -> dict[str, Any]:
    """Return what a scored file says about how it was made."""
    return json.loads((pq.read_metadata(path).metadata or {})[PROVENANCE.encode()])


class _Part(NamedTuple):
    """Records of one kind; without a schema they must be looked at."""

    records: Callable[[], Iterator[Record]]
    schema: pa.Schema | None = None


def _parts(config: DomainTextDataLoader.Config, columns: Columns) -> list[_Part]:
    where = config.dataset_path or config.dataset
    if where == EMBEDDED and config.dataset_path is None:
        documents = load_documents(config)
        pairs = (documents[i] for i in range(len(documents)))
        records = [(where, {"text": text, "domain": domain}) for text, domain in pairs]
        return [_Part(lambda: iter(records))]
    if path := local_path(config):
        if folder := saved_dataset(path, config.split):
            return [_dataset(open_saved(folder), str(folder))]
        return [_file(file, columns) for file in local_files(path, config.split)]
    if config.streaming:
        msg = (
            f"{where} is streamed, and has no end that scoring could reach; give --data a file, or "
            "set --dataloader.no-streaming to download the whole"
        )
        raise ValueError(msg)
    dataset = open_hub(where, config.hf_name, config.split, streaming=False)
    return [_dataset(dataset, where)]


def _file(path: DataFile, columns: Columns) -> _Part:
    schema = None
    if suffix_of(path) in {ARROW, PARQUET}:
        # What is wrong with a broken file is said when its records are read.
        with contextlib.suppress(pa.ArrowException, OSError):
            schema = schema_of(path)
            for name in folder_columns(path).keys() - set(schema.names):
                kind = pa.float64() if name in columns.numbers else pa.string()
                schema = schema.append(pa.field(name, kind))
            columns = replace(columns, numbers=(*columns.numbers, *schema.names))
    return _Part(partial(read_records, path, columns), schema)


def _dataset(dataset: Any, where: str) -> _Part:  # noqa: ANN401
    return _Part(partial(_hub_records, dataset, where), dataset.features.arrow_schema)


def _hub_records(dataset: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
    batches = dataset.with_format("arrow").iter(batch_size=1_000)
    records = (record for batch in batches for record in batch.to_pylist())
    return ((f"{where}: record {i}", record) for i, record in enumerate(records))


_MIXED = pa.dense_union([])
"""Stands for values of several types: Parquet has no such type, nor can it be made one with any."""


def _inferred(records: Sequence[Record]) -> pa.Schema:
    """Return what pyarrow takes every column for."""
    kinds = dict.fromkeys((name for _, record in records for name in record), _MIXED)
    for name in kinds:
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
            kinds[name] = pa.array([record.get(name) for _, record in records]).type
    return pa.schema(kinds)


def _schema(kinds: Mapping[str, Iterable[pa.DataType]], columns: Columns, where: str) -> pa.Schema:
    """Return the columns that a Parquet file can hold, given the types of each; name the others.

    Raises:
        ValueError: Training needs one of the others.
    """
    fields = {name: _field(name, seen) for name, seen in kinds.items()}
    lost = [name for name, field in fields.items() if field is None]
    for column in (columns.text, columns.domain, *columns.numbers):
        name = column if column in fields else column.partition(".")[0]
        if name in lost:
            msg = f"{where}: column {name!r} holds values of several types; Parquet wants one"
            raise ValueError(msg)
    if lost:
        names = printable(", ".join(lost))
        logger.warning(printable(f"Left out, as Parquet cannot hold such columns: {names}"))
    return pa.schema([field for field in fields.values() if field is not None])


def _field(name: str, seen: Iterable[pa.DataType]) -> pa.Field | None:
    """Return a column that holds values of all these types; None if Parquet has no such type."""
    each = [pa.schema([(name, kind)]) for kind in seen]
    with contextlib.suppress(pa.ArrowException):
        schema = pa.unify_schemas(each, promote_options="permissive")
        pq.write_table(schema.empty_table(), pa.BufferOutputStream())
        return schema.field(0)
    return None


def _row(
    place: str, record: Mapping[str, Any], losses: np.ndarray, made: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a record with its losses or, per document, their mean."""
    # With nothing to predict the mean is 0, which training accepts.
    mean = float(losses.sum(dtype=np.float64)) / max(len(losses), 1)
    if not math.isfinite(mean):
        checkpoint = made["checkpoint"]
        msg = f"{place}: a loss is NaN or infinite under {checkpoint}; use a sound checkpoint"
        raise ValueError(msg)
    return {**record, made["column"]: losses if made["per"] == "token" else mean}

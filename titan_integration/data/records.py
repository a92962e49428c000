"""Records of local files, each with its place for messages, and what their columns hold."""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from titan_integration.data.data_files import PARQUET, folder_columns, near, suffix_of

DEFAULT_DOMAIN_COLUMN = "domain"
ONLY_DOMAIN = "all"

# A column that a model can stand in for.
REF_LOSS = "ref_loss"

# The largest finite float32, which is what a batch carries.
_LARGEST = 3.4028234663852886e38

# Bytes read at once; lines of text are often longer than the default.
_BUFFER = 1 << 20

# Rows of Parquet that are in memory at a time.
_BATCH = 2_000

# What a column holds: a number for all of a document's tokens, or a float32 array of one for each
# token that is predicted.
Values = float | np.ndarray


@dataclass(frozen=True)
class Columns:
    """Where in a record things are; dotted paths reach into nested records."""

    text: str = "text"
    domain: str = DEFAULT_DOMAIN_COLUMN
    numbers: tuple[str, ...] = ()


def text_of(record: Mapping[str, Any], columns: Columns, place: str) -> str:
    """Return a record's text.

    Raises:
        ValueError: If the column is missing or holds something else; names the place.
    """
    try:
        text = _lookup(record, columns.text)
    except KeyError:
        raise _missing_column(record, columns.text, "text_column", place) from None
    if not isinstance(text, str):
        msg = f"{place}: text column {columns.text!r} holds {type(text).__name__}, not a string"
        raise ValueError(msg)  # noqa: TRY004 -- it is the data that is wrong
    return text


def domain_of(record: Mapping[str, Any], columns: Columns, place: str) -> str | None:
    """Return a record's domain; None if it has none and the column's name is the default one.

    Raises:
        ValueError: If a column that the user named is missing, or the domain is not a name; names
            the place.
    """
    if not columns.domain:
        return ONLY_DOMAIN
    try:
        domain = _lookup(record, columns.domain)
    except KeyError:
        if columns.domain == DEFAULT_DOMAIN_COLUMN:
            return None
        raise _missing_column(record, columns.domain, "domain_column", place) from None
    if isinstance(domain, bool) or not isinstance(domain, str | int) or domain == "":
        msg = f"{place}: domain column {columns.domain!r} holds {domain!r}, not a name"
        raise ValueError(msg)
    return str(domain)


def numbers_of(record: Mapping[str, Any], columns: Columns, place: str) -> tuple[Values, ...]:
    """Return a record's numbers, in the order of their columns.

    Raises:
        ValueError: If a column is missing or does not hold a finite number or a list of them; names
            the place.
    """
    return tuple([_values(record, name, place) for name in columns.numbers])


def check_encodable(value: object, name: str, place: str) -> None:
    """Check that text can become UTF-8, as tokenizers need it; values of other types pass.

    Raises:
        ValueError: If it holds half a surrogate pair, which JSON can spell; names the place.
    """
    if not isinstance(value, str) or value.isascii():
        return
    try:
        value.encode("utf-16-le")  # refuses what UTF-8 does, and is quicker
    except UnicodeEncodeError as error:
        msg = (
            f"{place}: column {name!r} holds half a surrogate pair, {value[error.start]!a} "
            f"at character {error.start}, which no UTF-8 text can hold; repair or drop the record"
        )
        raise ValueError(msg) from error


def read_records(
    file: Path, columns: Columns, start: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of a file with their places, for messages.

    The parts ``key=value`` of the file's path are columns of every record. JSON is read line by
    line, and Parquet in small batches, of which only the columns in use.

    Args:
        file: A data file; see ``data_files.SUFFIXES``.
        columns: The columns in use.
        start: How many records to pass over.

    Raises:
        ValueError: If the file or a record cannot be read, or a folder's name contradicts a record;
            names the place.
    """
    folder = _folder_values(file, columns)
    is_json = suffix_of(file) != PARQUET
    records = _json(file, start) if is_json else _parquet(file, columns, start, set(folder))
    for place, record in records:
        if not isinstance(record, Mapping):
            msg = f"{place}: a record must be a JSON object, not {type(record).__name__}"
            raise ValueError(msg)  # noqa: TRY004 -- likewise
        if is_json:  # Parquet's text is UTF-8, so it can be encoded
            _check_all_encodable(record, columns, place)
        yield place, _with_folder(record, folder, columns, place) if folder else record


def _check_all_encodable(record: Mapping[str, Any], columns: Columns, place: str) -> None:
    for name in (columns.text, columns.domain):
        try:
            value = _lookup(record, name)
        except KeyError:  # said later, if it matters
            continue
        check_encodable(value, name, place)


def _folder_values(file: Path, columns: Columns) -> dict[str, Any]:
    """Return the columns that the file's folders name; those of numbers as numbers."""
    values: dict[str, Any] = folder_columns(file)
    for name in columns.numbers:
        with contextlib.suppress(KeyError, ValueError):  # what is no number is said of the record
            values[name] = float(values[name])
    return values


def _with_folder(
    record: Mapping[str, Any], folder: Mapping[str, Any], columns: Columns, place: str
) -> Mapping[str, Any]:
    for name in (columns.text, columns.domain, *columns.numbers):
        if name in folder and name in record and str(record[name]) != str(folder[name]):
            msg = (
                f"{place}: column {name!r} holds {record[name]!r}, but the file is in a folder "
                f"{name}={folder[name]}; rename the folder, or drop the column from the file"
            )
            raise ValueError(msg)
    return {**folder, **record}


def _json(file: Path, start: int) -> Iterator[tuple[str, Any]]:
    first, name = True, str(file)  # once, as each takes as long as hashing a short text
    with contextlib.closing(_lines(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                records = _decode(b"".join([line, *lines]), name, first_line=number)
                places = (f"{name}: record {i}" for i in count())
                yield from islice(zip(places, records, strict=False), start, None)
                return
            first = False
            if start:
                start -= 1
                continue
            yield f"{name}:{number}", _decode(line, name, first_line=number)


def _lines(file: Path) -> Generator[bytes]:
    """Yield the lines of a file that may be compressed, without a byte order mark."""
    try:
        with _opened(file) as opened:
            for i, line in enumerate(opened):
                yield line if i else line.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        msg = f"{file}: cannot be read: {reason}"
        raise ValueError(msg) from error


def _opened(file: Path) -> Any:  # noqa: ANN401
    suffix = suffix_of(file)
    if suffix.endswith(".gz"):
        return gzip.open(file)
    if suffix.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
    return file.open("rb", buffering=_BUFFER)


def _decode(content: bytes, file: str, first_line: int) -> Any:  # noqa: ANN401
    line = first_line
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        damaged = "it has NUL bytes, so it is damaged or not UTF-8 text"
        reason = f"invalid JSON: {damaged if 0 in content else error.msg}"
        cause = error
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        reason = f"not UTF-8 text{' but UTF-16; save it as UTF-8' if is_utf16 else ''}"
        cause = error
    except RecursionError as error:
        reason = "brackets are nested too deeply; drop the record, or the column that holds them"
        cause = error
    except ValueError as error:  # Python refuses whole numbers of thousands of digits, at length
        reason = f"invalid JSON: {str(error).partition(' for integer')[0]}"
        cause = error
    msg = f"{file}:{line}: {reason}"
    raise ValueError(msg) from cause


def _parquet(
    file: Path, columns: Columns, start: int, elsewhere: set[str]
) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = {
                c if c in names else c.partition(".")[0]
                for c in (columns.text, columns.domain, *columns.numbers)
                if c
            }
            # With a column missing everything is read, so that the message can list what there is.
            complete = wanted - elsewhere - {DEFAULT_DOMAIN_COLUMN} <= set(names)
            groups = list(range(parquet.num_row_groups))
            while groups and start >= (rows := parquet.metadata.row_group(groups[0]).num_rows):
                number, start = number + rows, start - rows
                del groups[0]
            for batch in parquet.iter_batches(
                batch_size=_BATCH,
                row_groups=groups,
                columns=sorted(wanted.intersection(names)) if complete else None,
            ):
                passed = min(start, len(batch))
                number, start = number + passed, start - passed
                for record in _rows(batch.slice(passed), file, number):
                    yield f"{file}: row {number}", record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"{file}: not a readable Parquet file: {reason}"
        raise ValueError(msg) from error


def _rows(batch: pa.RecordBatch, file: Path, first: int) -> list[dict[str, Any]]:
    """Return the rows of a batch.

    Raises:
        ValueError: Python cannot hold one, such as text that is not UTF-8; names it.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            for i in range(len(batch)):
                _rows(batch.slice(i, 1), file, first + i)
        what = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        msg = f"{file}: row {first}: cannot be read: {what}"
        raise ValueError(msg) from error


def _lookup(record: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401
    if path in record:
        return record[path]
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(path)
        value = value[key]
    return value


def _values(record: Mapping[str, Any], name: str, place: str) -> Values:
    try:
        held = _lookup(record, name)
    except KeyError:
        msg = f"{_no_column(record, name, place)}. {number_wanted(name)}"
        raise ValueError(msg) from None
    if isinstance(held, list):
        wrong = next((i for i, value in enumerate(held) if not _is_finite(value)), None)
        if wrong is None:
            return np.array(held, np.float32)
        name, held = f"{name}[{wrong}]", held[wrong]
    if _is_finite(held):
        return float(held)
    if isinstance(held, bool) or not isinstance(held, int | float):
        what = "no value" if held is None else type(held).__name__
        msg = (
            f"{place}: column {name!r} holds {what}, not a number; a column has one number for "
            "each document, or a list of one for each token to predict"
        )
    else:
        msg = (
            f"{place}: column {name!r} holds {held}, which is not a finite 32-bit number; repair "
            "the value or drop the record"
        )
    raise ValueError(msg)


def _is_finite(value: object) -> bool:
    # A comparison, as an int may be too large to become a float; NaN fails it.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST


def number_wanted(name: str) -> str:
    """Say what to do about a missing column of numbers."""
    instead = ", or give a model in its place: --weighting.reference CHECKPOINT"
    return (
        f"The spec or --dataloader.columns asks for it: give every record a number "
        f"{name!r}{instead if name == REF_LOSS else ''}"
    )


def _missing_column(record: Mapping[str, Any], name: str, setting: str, place: str) -> ValueError:
    return ValueError(f"{_no_column(record, name, place)}. Set --dataloader.{setting}")


def _no_column(record: Mapping[str, Any], name: str, place: str) -> str:
    there = list(_column_names(record))
    return f"{place}: no column {name!r}{near(name, there)}; there are: {', '.join(there)}"


def _column_names(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _column_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key

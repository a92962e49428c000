"""Records of files of any format, each with its place for messages and where to go on after it."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Generator, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from titan_integration.data.bad_records import BadRecordError, BadRecords
from titan_integration.data.data_files import ARROW, CSV, PARQUET, DataFile, on_disk, suffix_of
from titan_integration.data.records import (
    Columns,
    check_all_encodable,
    folder_values,
    is_complete,
    with_folder,
)

# Bytes read at once; lines of text are often longer than the default.
_BUFFER = 1 << 20

# Rows of Parquet that are in memory at a time.
_BATCH = 2_000


class Spot(NamedTuple):
    """A place between two records of a file.

    The number of records before it and, in a file of plain lines, of bytes and of lines; in a
    stream of Hugging Face, the state it goes on from, as JSON.
    """

    record: int = 0
    byte: int | None = None
    line: int = 0
    state: str = ""


_BEGIN = Spot()


class Scanned(NamedTuple):
    """A record, or what is wrong with it; its place for messages, and the spots around it."""

    place: str
    record: Any
    before: Spot
    after: Spot


def read_records(
    file: DataFile, columns: Columns, start: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of a file with their places, for messages.

    Args:
        file: A data file; see ``data_files.SUFFIXES``.
        columns: The columns in use.
        start: How many records to pass over.

    Raises:
        ValueError: As ``scan``, or a record cannot be used.
    """
    for found in scan(file, columns, BadRecords(), Spot(start)):
        yield found.place, found.record


def scan(
    file: DataFile, columns: Columns, bad: BadRecords, start: Spot = _BEGIN
) -> Iterator[Scanned]:
    """Yield the records of a file that can be read, from a spot on.

    The parts ``key=value`` of the file's path are columns of every record. JSON and CSV are read
    line by line, Parquet and Arrow in small batches, of which only the columns in use.

    Raises:
        ValueError: If the file cannot be read, or ``bad`` refuses a record; names the place.
    """
    folder = folder_values(file, columns)
    suffix = suffix_of(file)
    is_json = False
    if suffix == PARQUET:
        records = _parquet(file, columns, start, set(folder))
    elif suffix == ARROW:
        records = _arrow(file, columns, start, set(folder))
    elif suffix.startswith(CSV):
        records = _csv(file, columns, start)
    else:
        records, is_json = _json(file, start), True
    with contextlib.closing(records):
        for found in records:
            try:
                yield _checked(found, folder, columns, is_json=is_json)
            except BadRecordError as error:
                bad.found(error)


def _checked(
    found: Scanned, folder: Mapping[str, Any], columns: Columns, *, is_json: bool
) -> Scanned:
    record, place = found.record, found.place
    if isinstance(record, BadRecordError):
        raise record
    if not isinstance(record, Mapping):
        msg = f"{place}: a record must be a JSON object, not {type(record).__name__}"
        raise BadRecordError(msg)
    if is_json:  # the others' text is UTF-8, so it can be encoded
        check_all_encodable(record, columns, place)
    if folder:
        return found._replace(record=with_folder(record, folder, columns, place))
    return found


def record_at(file: DataFile, content: bytes, columns: Columns, place: str) -> Mapping[str, Any]:
    """Return the record of a line, the first of what was read at its spot.

    Raises:
        ValueError: It is none, as the file has changed.
    """
    record = _decode(content.partition(b"\n")[0].removeprefix(codecs.BOM_UTF8), str(file), 0)
    if not isinstance(record, Mapping):
        msg = f"{place}: no longer the record that was there: the file has changed; restart the run"
        raise ValueError(msg)  # noqa: TRY004 -- it is the data that is wrong
    folder = folder_values(file, columns)
    return with_folder(record, folder, columns, place) if folder else record


def schema_of(file: DataFile) -> pa.Schema:
    """Return the schema of a Parquet or Arrow file."""
    if suffix_of(file) == PARQUET:
        return pq.read_schema(on_disk(file))
    with pa.memory_map(str(on_disk(file))) as mapped:
        return _arrow_batches(mapped)[0]


def is_plain_lines(file: DataFile) -> bool:
    """Tell whether a file's records may be lines that can be read again one by one."""
    suffix = suffix_of(file)
    return suffix not in {PARQUET, ARROW} and not suffix.startswith(CSV) and suffix.count(".") == 1


def _json(file: DataFile, start: Spot) -> Generator[Scanned]:
    name = str(file)  # once, as each takes as long as hashing a short text
    plain = is_plain_lines(file)
    passed, number, at = 0, 0, 0  # records, lines and bytes so far
    if plain and start.byte:
        passed, at, number = start.record, start.byte, start.line
    with contextlib.closing(_lines(file, at)) as lines:
        for line in lines:
            number += 1
            before = Spot(passed, at if plain else None, number - 1)
            at += len(line)
            # At the beginning of a file, and of each that `cat` has put behind another.
            line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
            if not line.strip():
                continue
            if not passed and line.lstrip().startswith(b"["):
                yield from _array(b"".join([line, *lines]), name, number, start.record)
                return
            passed += 1
            if passed <= start.record:
                continue
            place = f"{name}:{number}"
            after = Spot(passed, at if plain else None, number)
            yield Scanned(place, _decoded(line, name, number), before, after)


def _array(content: bytes, name: str, line: int, start: int) -> Iterator[Scanned]:
    records = _decoded(content, name, line)
    if isinstance(records, BadRecordError):  # of which record, nobody can tell
        raise ValueError(str(records)) from records  # noqa: TRY004 -- likewise
    for i, record in enumerate(records):
        if i >= start:
            yield Scanned(f"{name}: record {i}", record, Spot(i), Spot(i + 1))


def _csv(file: DataFile, columns: Columns, start: Spot) -> Generator[Scanned]:
    """Yield the rows of a CSV file, whose first line names the columns; text, but for numbers."""
    name, began = str(file), 0
    csv.field_size_limit(sys.maxsize)  # a text is a field
    with contextlib.closing(_lines(file, 0)) as lines:
        rows = csv.reader(_as_text(lines, name), strict=True)
        names: list[str] | None = None
        for i in count(-1):
            place = f"{name}:{began + 1}"
            before, after = Spot(i), Spot(i + 1)
            try:
                row = next(rows)
                while not row:  # an empty line
                    row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # the reader does not know where the next row begins
                msg = f"{place}: invalid CSV: {error}"
                raise ValueError(msg) from error
            began = rows.line_num
            if names is None:
                names = row
                if len(names) == 1 and (marks := [x for x in (";", "\t", "|") if x in names[0]]):
                    msg = f"{place}: fields are parted by {marks[0]!r}; save it with commas"
                    raise ValueError(msg)
                if len(set(names)) < len(names):
                    msg = f"{place}: two columns have one name; there are: {', '.join(names)}"
                    raise ValueError(msg)
                continue
            if i < start.record:
                continue
            record: Any = dict(zip(names, row, strict=False))
            if len(row) != len(names):
                record = BadRecordError(
                    f"{place}: {len(row)} fields, but the first line names {len(names)}"
                )
            else:
                for column in columns.numbers:
                    with contextlib.suppress(KeyError, ValueError):  # said of the record
                        record[column] = float(record[column])
            yield Scanned(place, record, before, after)


def _as_text(lines: Iterator[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(line, name, number)) from error


def _lines(file: DataFile, at: int) -> Generator[bytes]:
    """Yield the lines of a file that may be compressed, from a byte of a plain one on."""
    try:
        with _opened(file) as opened:
            if at:
                opened.seek(at)
            yield from opened
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        msg = f"{file}: cannot be read: {reason}"
        raise ValueError(msg) from error


def _opened(file: DataFile) -> Any:  # noqa: ANN401
    suffix = suffix_of(file)
    if suffix.endswith(".gz"):
        return gzip.open(on_disk(file))
    if suffix.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(on_disk(file))), "zstd"))
    return on_disk(file).open("rb", buffering=_BUFFER)


def _decoded(line: bytes, file: str, number: int) -> Any:  # noqa: ANN401
    """Return a line's value, or what is wrong with it."""
    try:
        return _decode(line, file, number)
    except BadRecordError as error:
        return error


def _decode(content: bytes, file: str, first_line: int) -> Any:  # noqa: ANN401
    line = first_line
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        damaged = "it has NUL bytes, so it is damaged or not UTF-8 text"
        reason = f"invalid JSON: {damaged if 0 in content else error.msg}"
        if content.strip() == b"{":
            reason += "; a record is one line, or they are all in one array"
        cause = error
    except UnicodeDecodeError as error:
        raise BadRecordError(_not_utf8(content, file, line, error.start)) from error
    except RecursionError as error:
        reason = "brackets are nested too deeply; drop the record, or the column that holds them"
        cause = error
    except ValueError as error:  # Python refuses whole numbers of thousands of digits, at length
        reason = f"invalid JSON: {str(error).partition(' for integer')[0]}"
        cause = error
    msg = f"{file}:{line}: {reason}"
    raise BadRecordError(msg) from cause


def _not_utf8(content: bytes, file: str, line: int, at: int = 0) -> str:
    line += content[:at].count(b"\n")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return f"{file}:{line}: not UTF-8 text{' but UTF-16; save it as UTF-8' if is_utf16 else ''}"


def _parquet(
    file: DataFile, columns: Columns, start: Spot, elsewhere: set[str]
) -> Generator[Scanned]:
    passed = 0

    def batches(parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        nonlocal passed
        groups = list(range(parquet.num_row_groups))
        while groups:
            rows = parquet.metadata.row_group(groups[0]).num_rows
            if passed + rows > start.record:
                break
            passed += rows
            del groups[0]
        return parquet.iter_batches(
            batch_size=_BATCH,
            row_groups=groups,
            columns=_wanted(parquet.schema_arrow.names, columns, elsewhere),
        )

    try:
        with pq.ParquetFile(on_disk(file)) as parquet:
            some = batches(parquet)
            yield from _of_batches(some, file, passed, start.record)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"{file}: not a readable Parquet file: {reason}"
        raise ValueError(msg) from error


def _arrow(
    file: DataFile, columns: Columns, start: Spot, elsewhere: set[str]
) -> Generator[Scanned]:
    """Yield the rows of an Arrow file, or of a stream of batches that was written to one."""
    try:
        with pa.memory_map(str(on_disk(file))) as mapped:
            schema, batches = _arrow_batches(mapped)
            wanted = _wanted(schema.names, columns, elsewhere)
            small = (
                batch.slice(i, _BATCH)
                for whole in batches
                for batch in [whole if wanted is None else whole.select(wanted)]
                for i in range(0, len(batch), _BATCH)
            )
            yield from _of_batches(small, file, 0, start.record)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"{file}: not a readable Arrow file: {reason}"
        raise ValueError(msg) from error


def _arrow_batches(mapped: pa.MemoryMappedFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    try:
        opened = pa.ipc.open_file(mapped)
        return opened.schema, map(opened.get_batch, range(opened.num_record_batches))
    except pa.ArrowInvalid:
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, iter(stream)


def _wanted(names: list[str], columns: Columns, elsewhere: set[str]) -> list[str] | None:
    """Return the columns to read; all if one is missing, so that the message can list them."""
    wanted = {c if c in names else c.partition(".")[0] for c in columns.used_of(names)}
    if not is_complete(wanted, names, elsewhere):
        return None
    return sorted(wanted.intersection(names))


def _of_batches(
    batches: Iterator[pa.RecordBatch], file: DataFile, number: int, start: int
) -> Iterator[Scanned]:
    name = str(file)
    for batch in batches:
        passed = min(max(start - number, 0), len(batch))
        number += passed
        for record in _rows(batch.slice(passed), name, number):
            yield Scanned(f"{name}: row {number}", record, Spot(number), Spot(number + 1))
            number += 1


def _rows(batch: pa.RecordBatch, name: str, first: int) -> list[Any]:
    """Return the rows of a batch; of one that Python cannot hold, what is wrong with it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            each = (_rows(batch.slice(i, 1), name, first + i) for i in range(len(batch)))
            return [row for rows in each for row in rows]
        what = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        found = BadRecordError(f"{name}: row {first}: cannot be read: {what}")
        found.__cause__ = error
        return [found]

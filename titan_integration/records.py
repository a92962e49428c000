"""Records of local files, each with its place for messages, and what their columns hold."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEFAULT_DOMAIN_COLUMN = "domain"
ONLY_DOMAIN = "all"
SUFFIXES = (".jsonl", ".json", ".parquet")

# What a split's directory may be called.
_SPLIT_DIRS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


# A column that a model can stand in for.
REF_LOSS = "ref_loss"

# The largest finite float32, which is what a batch carries.
_LARGEST = 3.4028234663852886e38

# What a column holds: a number for all of a document's tokens, or a float32 array of one for each
# token that is predicted.
Values = float | np.ndarray


@dataclass(frozen=True)
class Columns:
    """Where in a record things are; dotted paths reach into nested records."""

    text: str = "text"
    domain: str = DEFAULT_DOMAIN_COLUMN
    numbers: tuple[str, ...] = ()


def local_files(path: Path, split: str) -> list[Path]:
    """List the data files of one split, sorted by path.

    Raises:
        ValueError: If the path does not exist, or nothing in it fits; names what there is.
    """
    if not path.exists():
        msg = f"{path}: no such file or directory{near(path.name, siblings(str(path)))}"
        raise ValueError(msg)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            msg = (
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; use "
                f"{', '.join(SUFFIXES)}"
            )
            raise ValueError(msg)
        return [path]
    known = {name for names in _SPLIT_DIRS.values() for name in names}
    there = [d.name for d in sorted(path.iterdir()) if d.is_dir()]
    folder = next(
        (path / name for name in (*_SPLIT_DIRS.get(split, ()), split) if name in there), path
    )
    if folder is path and known.intersection(there):
        # Falling back to the whole directory would validate on the training text.
        msg = f"{path}: no sub-directory for split {split!r}; there are {', '.join(there)}"
        raise ValueError(msg)
    files = [
        f
        for f in sorted(folder.rglob("*"))
        if f.suffix in SUFFIXES and f.is_file() and f.name[0] != "."
    ]
    if not files:
        msg = f"{folder}: no {', '.join(SUFFIXES)} file in this directory"
        raise ValueError(msg)
    return files


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


def read_records(file: Path, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every record of a file with its place, for messages."""
    records = _parquet(file, columns) if file.suffix == ".parquet" else _json(file)
    for place, record in records:
        if not isinstance(record, Mapping):
            msg = f"{place}: a record must be a JSON object, not {type(record).__name__}"
            raise ValueError(msg)  # noqa: TRY004 -- likewise
        yield place, record


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    content = file.read_bytes()
    if content.lstrip().startswith(b"["):
        records = _decode(content, str(file), first_line=1)
        yield from ((f"{file}: record {i}", record) for i, record in enumerate(records))
        return
    name = str(file)  # once, as each takes as long as hashing a short text
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", _decode(line, name, first_line=number)


def _decode(content: bytes, file: str, first_line: int) -> Any:  # noqa: ANN401
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        msg = f"{file}:{first_line + error.lineno - 1}: invalid JSON: {error.msg}"
        raise ValueError(msg) from error
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        msg = f"{file}:{line}: not UTF-8 text"
        raise ValueError(msg) from error


def _parquet(file: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
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
            for batch in parquet.iter_batches(
                columns=sorted(wanted) if wanted <= set(names) else None
            ):
                for record in batch.to_pylist():
                    yield f"{file}: row {number}", record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"{file}: not a readable Parquet file: {reason}"
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


def near(name: str, there: Iterable[str]) -> str:
    """Return a question with the names that are close, or nothing."""
    close = difflib.get_close_matches(name, list(there), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def siblings(path: str) -> list[str]:
    """List the names beside a path."""
    folder = Path(path).parent
    return [p.name for p in islice(folder.iterdir(), 10_000)] if folder.is_dir() else []

"""What the columns of a record hold: its text, its domain, its numbers."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_integration.data.bad_records import BadRecordError
from titan_integration.data.data_files import DataFile, folder_columns, near
from titan_integration.data.signals import reference_flag

DEFAULT_TEXT_COLUMN = "text"
DEFAULT_DOMAIN_COLUMN = "domain"
TOKEN_IDS, LABELS, LOSS_MASK = "input_ids", "labels", "loss_mask"
MESSAGES = "messages"
ONLY_DOMAIN = "all"

# A column that a model can stand in for.
REF_LOSS = "ref_loss"
LABEL_COUNT = "label_count"

# The label of a token that is not predicted.
IGNORED = -100

# The largest finite float32, which is what a batch carries.
_LARGEST = 3.4028234663852886e38

# What a column holds: a number for all of a document's tokens, or a float32 array of one for each
# token that is predicted.
Values = float | np.ndarray


@dataclass(frozen=True)
class Columns:
    """Where in a record things are; dotted paths reach into nested records."""

    text: str = DEFAULT_TEXT_COLUMN
    domain: str = DEFAULT_DOMAIN_COLUMN
    numbers: tuple[str, ...] = ()

    def used_of(self, names: Collection[str]) -> list[str]:
        """Return the columns in use of records with these names."""
        texts = [self.text]
        if self.text == DEFAULT_TEXT_COLUMN and self.text not in names:
            texts = [x for x in (TOKEN_IDS, MESSAGES) if x in names][:1] or texts
        if texts != [DEFAULT_TEXT_COLUMN]:
            texts += [x for x in (LABELS, LOSS_MASK) if x in names]
        return [c for c in (*texts, self.domain, *self.numbers) if c]


def is_complete(wanted: set[str], names: Collection[str], elsewhere: set[str]) -> bool:
    """Tell whether records with these names, and what comes from elsewhere, have all wanted."""
    return wanted - elsewhere - {DEFAULT_DOMAIN_COLUMN} <= set(names)


def text_of(record: Mapping[str, Any], columns: Columns, place: str) -> str:
    """Return a record's text.

    Raises:
        ValueError: If the column is missing or holds something else; names the place.
    """
    try:
        text = lookup(record, columns.text)
    except KeyError:
        raise missing_column(record, columns.text, "text_column", place) from None
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
        domain = lookup(record, columns.domain)
    except KeyError:
        if columns.domain == DEFAULT_DOMAIN_COLUMN:
            return None
        raise missing_column(record, columns.domain, "domain_column", place) from None
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
        raise BadRecordError(msg) from error


def check_all_encodable(record: Mapping[str, Any], columns: Columns, place: str) -> None:
    """Check text and domain of a record: ``check_encodable``."""
    for name in (columns.text, columns.domain):
        try:
            value = lookup(record, name)
        except KeyError:  # said later, if it matters
            continue
        check_encodable(value, name, place)


def folder_values(file: DataFile, columns: Columns) -> dict[str, Any]:
    """Return the columns that the file's folders name; those of numbers as numbers."""
    values: dict[str, Any] = folder_columns(file)
    for name in columns.numbers:
        with contextlib.suppress(KeyError, ValueError):  # what is no number is said of the record
            values[name] = float(values[name])
    return values


def with_folder(
    record: Mapping[str, Any], folder: Mapping[str, Any], columns: Columns, place: str
) -> Mapping[str, Any]:
    """Return a record with the columns of its folder.

    Raises:
        ValueError: If they contradict the record's own; names the place.
    """
    for name in (columns.text, columns.domain, *columns.numbers):
        if name in folder and name in record and str(record[name]) != str(folder[name]):
            msg = (
                f"{place}: column {name!r} holds {record[name]!r}, but the file is in a folder "
                f"{name}={folder[name]}; rename the folder, or drop the column from the file"
            )
            raise BadRecordError(msg)
    return {**folder, **record}


def lookup(record: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401
    """Return what a record holds at a dotted path; KeyError if nothing."""
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
        held = lookup(record, name)
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
    model = reference_flag(name)
    instead = f", or give a model in its place: --weighting.reference {model}" if model else ""
    if name == LABEL_COUNT:
        instead = (
            ", or count the labels of the data: weighting count --out COUNTS.json, then "
            "--dataloader.label_counts COUNTS.json"
        )
    return (
        f"The spec or --dataloader.columns asks for it: give every record a number "
        f"{name!r}{instead}"
    )


def missing_column(record: Mapping[str, Any], name: str, setting: str, place: str) -> ValueError:
    """Return an error that lists the columns a record has."""
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

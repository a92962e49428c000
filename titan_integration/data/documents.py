"""Where texts come from: the standard library, local files or Hugging Face.

Everything that a user can get wrong about data is found here, when the documents are opened and not
while training.
"""

import contextlib
import functools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from titan_integration.data.bad_records import BadRecords
from titan_integration.data.builtin_text import DOMAINS, stdlib_text
from titan_integration.data.contents import Content, content_of, hash_of, largest_id
from titan_integration.data.data_files import DataFile, local_files, near, siblings
from titan_integration.data.formats import scan
from titan_integration.data.identity import content_of as content_digests
from titan_integration.data.identity import joined, name_in
from titan_integration.data.records import (
    ONLY_DOMAIN,
    Columns,
    Values,
    domain_of,
    number_wanted,
    numbers_of,
    text_of,
)
from titan_integration.data.stored import Storing


@dataclass(frozen=True)
class Documents:
    """Texts by index, each with the number of its domain in ``names``, and its columns' values.

    ``numbers`` has one sequence per column, with a float32 number for each document, or an array of
    one for each of its predicted tokens. ``place_of`` names a document's record, for messages.
    ``files`` has the name of each file they come from, with the number of its first document.
    ``stored`` has the files of texts that are not in memory. ``largest_id`` is of token ids, with
    its place; ``bad_records`` were passed over.
    """

    texts: Sequence[Content]
    domain_ids: Sequence[int] | np.ndarray
    names: tuple[str, ...]
    columns: tuple[str, ...] = ()
    numbers: tuple[Sequence[Values] | np.ndarray, ...] = ()
    place_of: Callable[[int], str] = "document {}".format
    files: tuple[tuple[str, int], ...] = ()
    stored: tuple[Path, ...] = ()
    largest_id: tuple[int, str] = (-1, "")
    bad_records: int = 0
    digests: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Content, str]:
        """Return text and domain name of one document."""
        return self.texts[index], self.names[self.domain_ids[index]]

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """Digests of what the documents hold: ``identity.content_of``."""
        if self.digests is not None:
            return self.digests
        hashes = None if self.stored else joined(hash_of(text) for text in self.texts)
        columns = dict(zip(self.columns, self.numbers, strict=True))
        return content_digests(hashes, self.domain_ids, columns, self.files)


def embedded_documents(
    split: str, domains: Sequence[str] | None = None, columns: Sequence[str] = ()
) -> Documents:
    """Return the documents of the running Python's standard library (see ``stdlib_text``).

    Raises:
        ValueError: For an unknown split, declared domains that differ from the ones there are, or
            any column, as there is none.
    """
    if columns:
        msg = (
            f"'stdlib': no column {columns[0]!r}; the built-in text has none. "
            f"{number_wanted(columns[0])}, in a file: --dataloader.dataset_path"
        )
        raise ValueError(msg)
    texts = stdlib_text(split)
    present = {t.domain for other in ("train", "validation") for t in stdlib_text(other)}
    names = _names(
        present,
        domains if domains is not None else [d for d in DOMAINS if d in present],
        "'stdlib'",
    )
    return Documents([t.text for t in texts], [names.index(t.domain) for t in texts], names)


def local_documents(
    path: DataFile,
    split: str,
    columns: Columns,
    domains: Sequence[str] | None = None,
    bad: BadRecords | None = None,
    sources: Sequence[tuple[str, DataFile, str | None]] = (),
) -> Documents:
    """Read files once, and keep where their documents are.

    Args:
        path: A data file (see ``data_files.SUFFIXES``), or a directory of them (with a
            sub-directory per split, or without).
        split: ``train``, ``validation``, ``test`` or a sub-directory's name.
        columns: Names of the columns of text, domain and numbers.
        domains: Names in the order of their ids; sorted names from the data by default.
        bad: What becomes of records that cannot be used; they are refused by default.
        sources: In place of the path, names, places and domains of several, which it names.

    Raises:
        ValueError: If a file is missing, unreadable or lacks a column, or the domains do not match;
            names the place.
    """
    bad = bad or BadRecords()
    storing = Storing(columns)
    found = _Domains()
    numbers: list[tuple[Values, ...]] = []
    files: list[tuple[str, int]] = []
    largest = (-1, "")
    each = sources or [("", path, None)]
    with contextlib.closing(storing):
        for own, file, name in [
            (own, file, f"{prefix}/{name_in(place, file)}" if prefix else name_in(place, file))
            for prefix, place, own in each
            for file in local_files(place, split)
        ]:
            files.append((name, len(storing)))
            storing.begin(file)
            for record in scan(file, columns, bad):
                try:
                    content = content_of(record.record, columns, record.place)
                    if not content:
                        continue
                    domain = own or domain_of(record.record, columns, record.place)
                    values = numbers_of(record.record, columns, record.place)
                except ValueError as error:
                    bad.found(error)
                    continue
                storing.add(content, record)
                found.add(domain, record.place)
                largest = max(largest, (largest_id(content), record.place))
                if columns.numbers:  # else no time and memory for what is never asked
                    numbers.append(values)
        if not len(storing):
            passed = f"; {bad.count} bad records were passed over" if bad.count else ""
            msg = f"{path}: no text in any record of split {split!r}{passed}"
            raise ValueError(msg)
        ids, names = _number(found, columns, domains, str(path))
        by_column = _by_column(numbers, columns)
        texts = storing.done()
    hashes = np.frombuffer(storing.hashes, np.uint64)
    by_name = dict(zip(columns.numbers, by_column, strict=True))
    return Documents(
        texts,
        ids,
        names,
        columns.numbers,
        by_column,
        texts.place_of,
        tuple(files),
        largest_id=largest,
        bad_records=bad.count,
        digests=content_digests(hashes, ids, by_name, files),
    )


def hub_documents(
    dataset: datasets.Dataset, columns: Columns, domains: Sequence[str] | None, where: str
) -> Documents:
    """Wrap a map-style Hugging Face data set; its texts stay on disk until they are read.

    Records without text are left out.

    Raises:
        ValueError: If a column is missing or does not hold what it must, or there is no text, or
            the domains do not match.
    """
    if not len(dataset):
        msg = f"{where}: the data set has no records"
        raise ValueError(msg)
    first = f"{where}: record 0"
    content_of(dataset[0], columns, first)
    kept = _with_text(dataset, columns, where)
    if len(kept) < len(dataset):
        dataset = cast("datasets.Dataset", dataset.select(kept, keep_in_memory=True))
    first = f"{where}: record {kept[0]}"
    numbers_of(dataset[0], columns, first)
    there = dataset.column_names
    tops = [c if c in there else c.partition(".")[0] for c in (columns.domain, *columns.numbers)]
    found = _Domains()
    numbers: list[tuple[Values, ...]] = []
    if wanted := sorted({top for top in tops if top in there}):
        picked = dataset.select_columns(wanted).with_format("arrow")
        batches = picked.iter(batch_size=10_000)  # pyrefly: ignore[missing-attribute]
        records = (record for batch in batches for record in batch.to_pylist())
        for i, record in enumerate(records):
            place = f"{where}: record {kept[i]}"
            found.add(domain_of(record, columns, place), place)
            numbers.append(numbers_of(record, columns, place))
    else:
        only = domain_of(dataset[0], columns, first)
        for _ in range(len(dataset)):
            found.add(only, first)
    ids, names = _number(found, columns, domains, where)
    by_column = _by_column(numbers, columns)

    def place_of(index: int) -> str:
        return f"{where}: record {kept[index]}"

    texts = _HubTexts(dataset, columns, place_of)
    stored = tuple(Path(file["filename"]) for file in dataset.cache_files)
    return Documents(texts, ids, names, columns.numbers, by_column, place_of, stored=stored)


def _with_text(dataset: datasets.Dataset, columns: Columns, where: str) -> Sequence[int]:
    """Return which records have text; all, where only reading them would tell.

    Raises:
        ValueError: If none has, or one holds no value.
    """
    schema = dataset.features.arrow_schema
    if columns.text not in schema.names or not pa.types.is_string(schema.field(columns.text).type):
        return range(len(dataset))
    picked = dataset.select_columns([columns.text]).with_format("arrow")
    batches = picked.iter(batch_size=10_000)  # pyrefly: ignore[missing-attribute]
    texts = (batch[columns.text] for batch in batches)
    lengths = np.concatenate(
        [pc.call_function("binary_length", [some]).fill_null(-1).to_numpy() for some in texts]
    )
    if (lengths < 0).any():
        text_of({columns.text: None}, columns, f"{where}: record {(lengths < 0).argmax()}")
    if (lengths > 0).all():
        return range(len(dataset))
    if not (lengths > 0).any():
        msg = f"{where}: no text in any record"
        raise ValueError(msg)
    return np.flatnonzero(lengths).tolist()


def open_hub(name: str, hf_name: str | None, split: str, *, streaming: bool) -> Any:  # noqa: ANN401
    """Open a Hugging Face data set by name, as ``Dataset`` or ``IterableDataset`` (streaming).

    Raises:
        ValueError: If it cannot be opened, with the first line of the reason.
    """
    try:
        return datasets.load_dataset(name, hf_name, split=split, streaming=streaming)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        msg = (
            f"dataset {name!r} is not 'stdlib', not a file or directory here"
            f"{near(name, ['stdlib', *siblings(name)])}, and Hugging Face could not open it with "
            f"split {split!r}: {type(error).__name__}: {reason}"
        )
        raise ValueError(msg) from error


def open_saved(folder: Path) -> datasets.Dataset:
    """Open a data set that ``save_to_disk`` wrote.

    Raises:
        ValueError: If it cannot be opened, with the first line of the reason.
    """
    try:
        return cast("datasets.Dataset", datasets.load_from_disk(folder))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        msg = (
            f"{folder}: looks like a data set that save_to_disk wrote, but cannot be opened: "
            f"{type(error).__name__}: {reason}; save it again"
        )
        raise ValueError(msg) from error


def _by_column(
    numbers: Sequence[tuple[Values, ...]], columns: Columns
) -> tuple[Sequence[Values] | np.ndarray, ...]:
    """Return what every document has, column by column; plain numbers as one float32 array."""
    by_column = [[values[i] for values in numbers] for i in range(len(columns.numbers))]
    return tuple(
        column if np.ndarray in set(map(type, column)) else np.array(column, np.float32)
        for column in by_column
    )


class _Domains:
    """The domains of documents, in their order."""

    def __init__(self) -> None:
        self.names: dict[str | None, int] = {}
        self.ids = array("i")
        self.unnamed = ""

    def add(self, name: str | None, place: str) -> None:
        """Add a document's; None if it has none."""
        self.ids.append(self.names.setdefault(name, len(self.names)))
        if name is None:
            self.unnamed = self.unnamed or place


def _number(
    found: _Domains, columns: Columns, declared: Sequence[str] | None, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return ids and names."""
    if found.unnamed and len(found.names) > 1:
        msg = f"{found.unnamed}: no {columns.domain!r} here, but other records of {where} have one"
        raise ValueError(msg)
    present = [ONLY_DOMAIN if name is None else name for name in found.names]
    names = _names(set(present), declared, where)
    to_id = {name: i for i, name in enumerate(names)}
    ids = np.array([to_id[name] for name in present], np.int32)
    return ids[np.frombuffer(found.ids, np.int32)], names


def _names(present: set[str], declared: Sequence[str] | None, where: str) -> tuple[str, ...]:
    if declared is None:
        return tuple(sorted(present))
    both = f"declared: {', '.join(declared)}; in the data: {', '.join(sorted(present))}"
    if len(set(declared)) != len(declared):
        msg = f"{where}: a domain is declared twice ({', '.join(declared)})"
        raise ValueError(msg)
    if empty := [d for d in declared if d not in present]:
        msg = f"{where}: empty domain {empty[0]!r}: no document belongs to it ({both})"
        raise ValueError(msg)
    if undeclared := sorted(present - set(declared)):
        msg = f"{where}: domain {undeclared[0]!r} is in the data but not in 'domains' ({both})"
        raise ValueError(msg)
    return tuple(declared)


class _HubTexts(Sequence[Content]):
    """The text column of a Hugging Face data set, read one record at a time."""

    def __init__(
        self, dataset: datasets.Dataset, columns: Columns, place_of: Callable[[int], str]
    ) -> None:
        self._dataset, self._columns, self._place_of = dataset, columns, place_of

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return content_of(self._dataset[index], self._columns, self._place_of(index))

"""What a run recorded, read from the files that `--weighting.record` makes it write."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weighting.runs import layout
from weighting.runs.files import numbers_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from torch import Tensor

    from weighting.contract import Level

FOLDER = layout.RECORD
SEQUENCES, DOCUMENTS, TOKENS = layout.SEQUENCES, layout.DOCUMENTS, layout.TOKENS
STEP, ROW, DOMAIN, VALID, WEIGHT = "step", "row", "domain", "tokens", "mean_weight"
"""Columns that every file has; all others are signals.

`row` is the sequence's place in the step's batch, `domain` that of most of its tokens, `tokens`
how many labels count.
"""
DOCUMENT = "document"
"""Column of the files of documents: its place in its sequence, from 0.

A column named as the files says how many its sequence has, recorded or not.
"""
ABOUT = "weighting.record"
"""Key in a file's metadata of what is said of the run, as JSON."""


@dataclass(frozen=True)
class Record:
    """What a run recorded: its sequences, or documents, step after step, in the order of the data.

    Attributes:
        about: What is said of the run by its last file: `name` and `spec` of its weighting, and
            its `domains`.
        domains: Names of the domains, in the order of their indices.
        numbers: Its recorded steps, ascending, [s].
        sizes: How many units each of them has, [s].
        told: What is said of the run by the file of each of them.
        row: Place in the step's batch of each unit, or of its sequence, [n].
        document: Its place in its sequence, [n]; 0 for sequences.
        documents: How many its sequence has, [n]; 1 for sequences.
        domain: Index of the domain of most of its tokens, [n].
        tokens: Its valid tokens, float, [n].
        weight: Mean weight of these, [n].
        signals: Their mean signals by name, nats or as the signal is, [n] each; those that the
            files of all steps have.
        level: What a unit is, "sequence" or "document".
    """

    about: dict[str, Any]
    domains: tuple[str, ...]
    numbers: Tensor
    sizes: Tensor
    told: Sequence[dict[str, Any]]
    row: Tensor
    document: Tensor
    documents: Tensor
    domain: Tensor
    tokens: Tensor
    weight: Tensor
    signals: dict[str, Tensor]
    level: Level = "sequence"

    @cached_property
    def known(self) -> frozenset[str]:
        """The signals that were recorded, at every step."""
        of = self.each(torch.arange(len(self.sizes)))
        counts = {
            name: torch.zeros_like(self.sizes).index_add(0, of, (~x.isnan()).long())
            for name, x in self.signals.items()
        }
        return frozenset(name for name, count in counts.items() if (count > 0).all())

    def each(self, of_steps: Tensor) -> Tensor:
        """Return of each unit what its step has, [n]."""
        return of_steps.repeat_interleave(self.sizes)

    def batches(self, scope: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return which units a scope weighs together.

        Returns:
            Places of units, batch by batch, [n]; how many units each batch has, and its step, [b].
        """
        batch = of = self.each(torch.arange(len(self.sizes)))
        if scope != "step":
            keys = "ranks", "rank_rows", "batch_rows"
            counts = torch.tensor([[told[key] for key in keys] for told in self.told])
            ranks, rank_rows, batch_rows = map(self.each, counts.T)
            call = self.row // batch_rows
            if scope == "rank":
                call = call * ranks + self.row // rank_rows % ranks
            batch = of * (call.max() + 1) + call
        in_order = bool((batch.diff() >= 0).all())  # rows of ranks may alternate
        places = torch.arange(len(batch)) if in_order else batch.argsort(stable=True)
        sizes = batch[places].unique_consecutive(return_counts=True)[1]
        return places, sizes, self.numbers[of[places[sizes.cumsum(0) - sizes]]]


def read_record(run: Path, level: Level = "sequence") -> Record:
    """Return what a run recorded; of a step that was trained twice, the later record.

    Args:
        run: Its dump folder.
        level: What of, "sequence" or "document"; without recorded documents there are no steps.

    Raises:
        ValueError: There is no record, or a file of it cannot be read.
    """
    files = sorted((run / FOLDER).glob(f"{SEQUENCES}-*.parquet"))
    if not files:
        what = "no such folder"
        if os.path.exists(run):  # noqa: PTH110 - Path.exists raises on a name that is too long
            what = f"no record in {FOLDER}" if run.is_dir() else "is a file"
        msg = f"{run}: {what}; give the --dump_folder of a run with --weighting.record every=10"
        raise ValueError(msg)
    return _recorded(files, level)


def _recorded(files: Sequence[Path], level: Level) -> Record:
    """Return what some files hold, in the order of their names."""
    parts = [_read(file) for file in files]
    about = parts[-1].about
    named = (name for part in [parts[-1], *parts] for name in part.about["domains"])
    domains = tuple(dict.fromkeys(named))
    if level == "document":
        each = zip(files, parts, strict=True)
        parts = [own for file, part in each for own in _of_documents(file, part)]
    for part in parts:
        if domains and part.names:
            index = torch.tensor([domains.index(name) for name in part.names])
            part.columns[DOMAIN] = index[part.columns[DOMAIN]]
    steps, sizes = (torch.cat(x) for x in zip(*((x.steps, x.sizes) for x in parts), strict=True))
    order = steps.argsort(stable=True)
    kept = order[steps[order].diff(append=torch.tensor([-1])) != 0]  # the last of each step
    kept = kept[sizes[kept] > 0]
    starts, counts = (sizes.cumsum(0) - sizes)[kept], sizes[kept]
    places: Tensor | slice = slice(None)
    if not torch.equal(kept, torch.arange(len(sizes))):
        shift = (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
        places = shift + torch.arange(len(shift))
    of = [part for part in parts for _ in range(len(part.steps))]
    told = [of[i] for i in kept.tolist()]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    lacking = {name for name in names for part in told if name not in part.columns}
    columns = {
        name: torch.cat([part.column(name) for part in parts])[places]
        for name in names
        if name not in lacking
    }
    return Record(
        about=about,
        domains=domains,
        numbers=steps[kept],
        sizes=counts,
        told=[part.about for part in told],
        row=columns.pop(ROW),
        document=columns.pop(DOCUMENT),
        documents=columns.pop(DOCUMENTS),
        domain=columns.pop(DOMAIN),
        tokens=columns.pop(VALID),
        weight=columns.pop(WEIGHT),
        signals=columns,
        level=level,
    )


def _of_documents(file: Path, part: _Part) -> Iterator[_Part]:
    """Yield that sequences of a file are no documents, and the documents written beside them."""
    nothing = {name: x[:0] for name, x in part.columns.items()}
    yield part._replace(sizes=torch.zeros_like(part.sizes), columns=nothing)
    beside = file.with_name(file.name.replace(SEQUENCES, DOCUMENTS))
    if beside.exists():
        yield _read(beside, DOCUMENT, DOCUMENTS)


class _Part(NamedTuple):
    """A file: its steps and how many units each has, columns of these, and what is said of them."""

    steps: Tensor
    sizes: Tensor
    columns: dict[str, Tensor]
    names: list[str]
    about: dict[str, Any]

    def column(self, name: str) -> Tensor:
        """Return a column; NaN where the file has none."""
        gaps = torch.full(self.columns[ROW].shape, torch.nan)
        return self.columns.get(name, gaps)


def _read(file: Path, *further: str) -> _Part:
    """Return a file that has some further columns of whole numbers."""
    try:
        import numpy as np  # noqa: PLC0415 - the core does without all three
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        msg = "records are Parquet files, which need pyarrow: pip install pyarrow"
        raise ValueError(msg) from None
    try:
        # Read as words, the domains would take longer than all else.
        named = [DOMAIN] if DOMAIN in pq.read_schema(file).names else []
        with pq.ParquetFile(file, read_dictionary=named) as parquet:
            about = json.loads((parquet.metadata.metadata or {}).get(ABOUT.encode(), "null"))
            table = parquet.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error).partition("\n")[0].partition(". ")[0]) from error
    if wrong := _wrong_about(about) or _wrong_columns(table, about["domains"], further):
        raise _damaged(file, wrong)
    domain = table[DOMAIN].unify_dictionaries().combine_chunks().dictionary_encode()
    columns = {name: table[name] for name in table.column_names if name != DOMAIN}
    columns[DOMAIN] = pa.chunked_array([domain.indices])
    whole = {STEP, ROW, DOMAIN, DOCUMENT, DOCUMENTS}
    found: dict[str, Tensor] = {}
    for name, x in columns.items():
        numbers, _ = numbers_of(x, x.type)
        if name == DOMAIN:  # all gaps where there are no domains
            numbers = np.nan_to_num(numbers)
        found[name] = torch.from_numpy(numbers.astype(np.int64 if name in whole else np.float32))
    steps, sizes = found.pop(STEP).unique_consecutive(return_counts=True)
    found.setdefault(DOCUMENT, torch.zeros_like(found[ROW]))
    found.setdefault(DOCUMENTS, torch.ones_like(found[ROW]))
    return _Part(steps, sizes, found, domain.dictionary.to_pylist(), about)


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: no file of a record, or a damaged one ({reason}); take it away")


def _wrong_about(about: object) -> str | None:
    """Return what is wrong with what a file says of its run, or None."""
    texts, counts = ("name", "hash", "spec"), ("ranks", "rank_rows", "batch_rows")
    if not isinstance(about, dict):
        return "it does not say of which run it is"
    said = {str(key): value for key, value in about.items()}
    names = said.get("domains")
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sound = sound and all(isinstance(said.get(key), str) for key in texts)
    sound = sound and all(isinstance(x := said.get(key), int) and x > 0 for key in counts)
    return None if sound else "what it says of its run is not complete"


def _wrong_columns(table: pa.Table, domains: list[str], further: Sequence[str]) -> str | None:
    """Return what is wrong with a file's columns, or None."""
    import pyarrow as pa  # noqa: PLC0415 - the core does without it

    counts = (STEP, ROW, VALID, *further)
    columns = (*counts, DOMAIN, WEIGHT)
    if lacking := [name for name in columns if name not in table.column_names]:
        return f"no column {lacking[0]}"
    if not table.num_rows:
        return "no rows"
    for name in table.column_names:
        if name == DOMAIN:
            continue
        kind, whole = table.schema.field(name).type, name in counts
        if not pa.types.is_integer(kind) and (whole or not pa.types.is_floating(kind)):
            return f"column {name} has no {'whole ' * whole}numbers"
        if table[name].null_count:
            return f"column {name} has gaps"
    named = set(table[DOMAIN].unique().to_pylist()) - ({None} if not domains else set())
    if unknown := sorted(map(str, named - {*domains})):
        return f"a domain {unknown[0]} that its run did not have"
    return None

"""What `weighting replay` prints: what other specs would have done to what a run recorded."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import torch

from weighting.build import plan_of
from weighting.cli.common import WIDTH, give_up, wrapped
from weighting.cli.named import Named, cut, read_named
from weighting.cli.simulation import number, say
from weighting.errors import SpecError
from weighting.language.read import loads
from weighting.runs.record_reader import Record, read_record
from weighting.runs.replay import Replayed, Summary, left_out, obstacle, replay, summary, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Begins = Mapping[tuple[int, int], Sequence[str]]
    Texts = Callable[[Sequence[tuple[int, int]]], Begins]
    """The texts of the documents of sequences, by step and row."""

_LABEL, _CELL, _LONGEST = 26, 9, 20
"""Columns of the terminal: what a row is, a number, and at most a name."""
_ELSEWHERE = (
    "nothing is left to replay; weighting simulate reads the tokens that "
    "--weighting.record every=10,tokens=64 writes"
)
_ROUNDING = 1e-3
"""A change of a weight that is none."""
_SHOWN = 3
"""Units that are shown of those most raised, and of those most lowered."""
_INDENT = " " * 10
"""Before how one begins."""


class _Column(NamedTuple):
    """A spec's name, a record, what it made of that, and what that comes to."""

    label: str
    record: Record
    found: Replayed
    total: Summary


def report(run: Path, specs: Sequence[str], *, plugins: bool, texts: Texts | None = None) -> None:
    """Print what the command does; on an error print it and exit with status 2.

    Args:
        run: The dump folder of a run.
        specs: What to replay.
        plugins: Whether to import the modules that specs name.
        texts: Finds the texts of documents; without it they are not shown.
    """
    named = read_named(specs, plugins=plugins)
    try:
        record = read_record(run)
        per_document = any(unit_of(spec.plan) == "document" for spec in named)
        documents = read_record(run, "document") if per_document else record
    except ValueError as error:
        give_up(str(error))
    records = {"sequence": record, "document": documents if len(documents.row) else record}
    done = [(spec, _column(spec, records[unit_of(spec.plan)])) for spec in named]
    refused = [_refusal(spec, found) for spec, found in done if isinstance(found, str)]
    if refused and len(refused) == len(done):
        give_up("\n".join([*refused, _ELSEWHERE]))
    say([*_report(run, record, done, plugins=plugins, texts=texts)])


def _refusal(spec: Named, why: str) -> str:
    return f"{cut(spec.label, _LONGEST)} is not replayed: {why}"


def _report(
    run: Path,
    record: Record,
    done: list[tuple[Named, _Column | str]],
    *,
    plugins: bool,
    texts: Texts | None,
) -> Iterator[str]:
    """Yield what is printed: the run, what was recorded as other specs have it, and remarks."""
    yield f"{run}"
    yield f"{_extent(record)},"
    yield f"recorded under {record.about['name']} ({record.about['hash']})"
    columns, remarks = list[_Column](), list[str]()
    for spec, found in done:
        if isinstance(found, str):
            remarks.append(_refusal(spec, found))
            continue
        columns.append(found)
        if spec.plan.has_state:
            remarks.append(f"{found.label} remembers: its state saw the recorded steps alone")
        if spec.plan.sampling:
            remarks.append(f"{found.label} draws data, which is as it was: only weights are shown")
    remarks.append("row is the sequence's place in the step's batch")
    levels = {column.record.level: column.record for column in columns} or {record.level: record}
    for level in sorted(levels, reverse=True):
        if level == "document":
            yield ""
            yield f"documents: {_extent(levels[level])}"
            left, of = left_out(levels[level])
            remarks.append(
                "document is its place in its sequence, which it may have begun before or may not "
                f"end in; {left} of {of} were left out, as documents=N records the first N of a "
                "sequence"
            )
        own = [column for column in columns if column.record.level == level]
        yield from _replays(levels[level], own, plugins=plugins, texts=texts)
    told = "read again" if texts else "not recorded; --text reads the data again"
    remarks.append(f"domain is that of most tokens; the text is {told}")
    yield ""
    for remark in remarks:
        yield from wrapped(remark)


def _extent(record: Record) -> str:
    steps = record.numbers.tolist()
    low, high = (int(x) for x in record.sizes.aminmax())
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}, {each} {record.level}s each"


def _replays(
    record: Record, specs: list[_Column], *, plugins: bool, texts: Texts | None
) -> Iterator[str]:
    """Yield the numbers of what specs make of a record, and what they move most."""
    own = Replayed(record.weight, _own_cap(record, plugins=plugins))
    recorded = _Column("recorded", record, own, summary(record, own.weight))
    for block in _blocks([recorded, *specs]):
        yield ""
        yield from _numbers(block)
        if record.domains:
            yield ""
            yield from _domains(record, block)
    moved = [_most_moved(own.weight, column) for column in specs]
    places = _places(record)
    listed = [i for most in moved for found in most.values() for i in found]
    begins = texts([(step, row) for step, row, _ in places[listed].tolist()]) if texts else {}
    for column, most in zip(specs, moved, strict=True):
        yield ""
        yield from _moved(column, own.weight, places, most, begins)


def _column(named: Named, record: Record) -> _Column | str:
    """Return what a spec makes of a record, or why nothing."""
    if reason := obstacle(named.plan, record):
        return reason
    try:
        found = replay(named.spec, record)
    except SpecError as error:
        return str(error).partition(";")[0]
    return _Column(cut(named.label, _LONGEST), record, found, summary(record, found.weight))


def _own_cap(record: Record, *, plugins: bool) -> float | None:
    """Return the share of units at a cap of the run's own spec, as far as a replay can tell."""
    try:
        spec = loads(record.about["spec"], allow_plugins=plugins)
        return None if obstacle(plan_of(spec), record) else replay(spec, record).capped
    except SpecError:  # plugins that may not be imported, or are not there
        return None


def _blocks(columns: Sequence[_Column]) -> Iterator[list[_Column]]:
    """Yield columns as many as fit side by side, the first always among them."""
    first, *rest = columns
    block, room = [first], WIDTH - _LABEL - _width(first)
    for column in rest:
        if _width(column) > room:
            yield block
            block, room = [first], WIDTH - _LABEL - _width(first)
        block.append(column)
        room -= _width(column)
    yield block


def _width(column: _Column) -> int:
    return 2 + max(_CELL, len(column.label))


def _line(label: str, block: Sequence[_Column], cells: Sequence[str]) -> str:
    return f"{label:{_LABEL}}" + "".join(
        f"{cell:>{_width(column)}}" for column, cell in zip(block, cells, strict=True)
    )


def _numbers(block: list[_Column]) -> Iterator[str]:
    yield _line("", block, [column.label for column in block])
    yield _line("ESS / n, mean over steps", block, [number(x.total.ess) for x in block])
    yield _line("largest weight", block, [number(x.total.largest) for x in block])
    capped = ["-" if x.found.capped is None else number(x.found.capped) for x in block]
    yield _line("share at the cap", block, capped)
    yield _line("top tenth in common", block, [number(x.total.top) for x in block])


def _domains(record: Record, block: list[_Column]) -> Iterator[str]:
    tokens = torch.zeros(len(record.domains)).double()
    tokens.index_add_(0, record.domain, record.tokens.double())
    shares = (tokens / tokens.sum().clamp(min=1)).tolist()
    yield _line(f"{'share of weight':16} {'of tokens':>9}", block, ["" for _ in block]).rstrip()
    for i, name in enumerate(record.domains):
        label = f"{cut(name, 16):16} {number(shares[i])}"
        yield _line(label, block, [number(x.total.shares[i]) for x in block])


def _most_moved(recorded: Tensor, column: _Column) -> dict[str, list[int]]:
    """Return the units whose weights a spec would have raised, and lowered, most."""
    change = column.found.weight - recorded
    found: dict[str, list[int]] = {}
    for what, sign in (("raised", 1), ("lowered", -1)):
        most = (sign * change).topk(min(_SHOWN, len(change)))
        found[what] = most.indices[most.values > _ROUNDING].tolist()
    return found


def _places(record: Record) -> Tensor:
    """Return step, row and document of every unit, [n, 3]."""
    return torch.stack([record.each(record.numbers), record.row, record.document], dim=1)


def _moved(
    column: _Column,
    recorded: Tensor,
    places: Tensor,
    most: Mapping[str, list[int]],
    begins: Begins,
) -> Iterator[str]:
    """Yield the units that a spec moves most, and below each how it begins, where known."""
    record = column.record
    losses = record.signals["loss"]
    domains, of_documents = record.domain, record.level == "document"
    heading = f"{'step':>8} {'row':>7} {'document' if of_documents else ''} {'domain':16}"
    heading += f" {'loss':>9} {'recorded':>9} {'now':>9}"
    for what, found in most.items():
        yield f"most {what} by {column.label}" if found else f"none {what} by {column.label}"
        yield from [heading] if found else []
        for i in found:
            step, row, document = places[i].tolist()
            domain = record.domains[domains[i]] if record.domains else "-"
            numbers = (losses[i], recorded[i], column.found.weight[i])
            cells = " ".join(number(x.item()) for x in numbers)
            place = f"{document:8}" if of_documents else ""
            yield f"{step:8} {row:7} {place} {cut(domain, 16):16} {cells}"
            if texts := begins.get((step, row)):
                text = texts[document] if of_documents else " ".join(texts)
                yield f'{_INDENT}"{_beginning(text)}"'


def _beginning(text: str) -> str:
    """Return as much of a text as fits a line, white space collapsed; wide letters take two."""
    room = WIDTH - len(_INDENT) - len('""')
    shown = cut(" ".join(text.split()), room)
    while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in shown) > room:
        shown = cut(shown, len(shown) - 1)
    return shown

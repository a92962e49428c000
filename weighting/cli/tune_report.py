"""What `weighting tune` prints of recorded weights: a line for each value, and which to take."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weighting.build import plan_of
from weighting.cli.common import echo, give_up, reason, wrapped
from weighting.cli.named import Named, cut
from weighting.cli.panels import Line, Panel
from weighting.cli.simulation import number as shown
from weighting.cli.simulation import read_losses, remarks, say
from weighting.errors import nearest
from weighting.runs.files import write_whole
from weighting.runs.record_reader import read_record
from weighting.runs.replay import obstacle, unit_of
from weighting.runs.tune import Wish, of_losses, of_record, scan, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weighting.runs.tune import Measured, Scan
    from weighting.runs.vary import Number, Values
    from weighting.spec import Spec

    Ends = tuple[float, float]

_NAMES = {"ess": "ESS/n", "capped": "at cap"}
_COLUMN = 24
"""Columns of the terminal for a value and its number's name."""
_TOKENS = "; files of tokens (--weighting.record every=10,tokens=64) are read with --losses"


def report(
    spec: Spec,
    number: Number,
    values: Values,
    source: Path | str,
    asked: Mapping[str, Ends],
    mass: Mapping[str, Ends],
    *,
    per: str,
    plot: str | None,
) -> None:
    """Print what the command does; on an error exit with status 2, with 1 where no value will do.

    Args:
        spec: The spec.
        number: Its number that is changed.
        values: To what.
        source: The folder of a run that recorded sequences, or a file of losses.
        asked: Ranges by quantity.
        mass: Ranges of shares by domain.
        per: What a unit of such a file is, "sequence" or "token".
        plot: A picture's file.
    """
    try:
        measure, notes, domains = _measure(spec, source, per)
        wishes = [Wish(name, *ends) for name, ends in asked.items()]
        wishes += [Wish(name, *ends, name) for name, ends in mass.items()]
        for name in mass:
            if name not in domains:
                hint = nearest(name, domains) if domains else "; it knows no domains"
                msg = f"{source} has no domain {name!r}{hint}"
                raise ValueError(msg)  # noqa: TRY301 - told as those from below
        found = scan(spec, number, values, wishes, measure)
    except ValueError as error:
        give_up(str(error))
    say([*_lines(spec, number, values, source, wishes, found), *notes])
    if plot is not None:
        _draw(Path(plot), spec, number, values, wishes, found)
    if not found.spans:
        sys.exit(1)


def _measure(
    spec: Spec, source: Path | str, per: str
) -> tuple[Callable[[Spec], Measured], list[str], Sequence[str]]:
    """Return what measures a spec, what one must know to read that, and the names of domains.

    Raises:
        ValueError: What was recorded cannot tell.
    """
    plan = plan_of(spec)
    if isinstance(source, str):
        named = Named(spec.name, spec, plan)
        losses = read_losses(source, [named])
        domains = sorted({*losses.words("domain")}) if "domain" in losses.has else []
        measure = partial(of_losses, losses=losses, one_sequence=per == "token")
        return measure, _wrapped(remarks(named, per)), domains
    record = read_record(source)
    if unit_of(plan) == "document":
        documents = read_record(source, "document")
        record = documents if len(documents.row) else record
    if why := obstacle(plan, record):
        msg = f"{spec.name} cannot be tuned over {source}: {why}"
        raise ValueError(msg + (_TOKENS if "token" in why else ""))
    notes = ["losses stay what they were: another value would soon have had others"]
    if plan.has_state:
        notes.append("what the spec remembers saw the recorded steps alone")
    return partial(of_record, record=record), _wrapped(notes), record.domains


def _wrapped(notes: Iterator[str] | Sequence[str]) -> list[str]:
    lines = [line for note in notes for line in wrapped(note)]
    return ["", *lines] if lines else []


def _lines(
    spec: Spec,
    number: Number,
    values: Values,
    source: Path | str,
    wishes: Sequence[Wish],
    scanned: Scan,
) -> Iterator[str]:
    """Yield the table of all values, and which keep what is asked for."""
    yield f"{number.label} of {cut(spec.name, 32)}, over {source}"
    yield ""
    extra = [wish for wish in wishes if wish.domain is not None]
    heads = ["ESS/n", "at cap", "largest", *(cut(wish.label, 9) for wish in extra)]
    label = cut(number.label, _COLUMN - 4)
    yield f"  {label:>{_COLUMN - 2}}" + "".join(f"  {head:>9}" for head in heads)
    for value, found, met in scanned.points:
        capped = "-" if found.capped is None else shown(found.capped)
        cells = [shown(found.ess), capped, shown(found.largest)]
        cells += [shown(wish.of(found)) for wish in extra]
        row = f"{'*' if met else ' '} {value:>{_COLUMN - 2}.6g}"
        yield row + "".join(f"  {cell:>9}" for cell in cells)
    yield ""
    ends = [f"{_name(wish)} from {wish.low:g} to {wish.high:g}" for wish in wishes]
    kept = " and ".join(ends)
    inward = not (values.listed or number.whole)
    if scanned.spans:
        texts = ", ".join(told(scanned.spans, inward=inward))
        yield from wrapped(f"* {number.label} {texts} keeps {kept}")
    else:
        yield from wrapped(f"no value keeps {kept}")
    if number.value is not None:
        yield f"as it is written, {number.label} is {number.value:g}"


def _name(wish: Wish) -> str:
    return (
        _NAMES.get(wish.label, wish.label) if wish.domain is None else f"the share of {wish.label}"
    )


def _draw(
    path: Path,
    spec: Spec,
    number: Number,
    values: Values,
    wishes: Sequence[Wish],
    scanned: Scan,
) -> None:
    """Write a panel for each wish: its quantity against the number, and the bounds."""
    from weighting.cli.figures import picture  # noqa: PLC0415 - the core needs no matplotlib

    panels: list[Panel] = []
    x = [point.value for point in scanned.points]
    for wish in wishes:
        y = [wish.of(point.found) for point in scanned.points]
        lines = [Line(cut(spec.name, 32), x, y, 1, 0)]
        bounds = [end for end, is_free in ((wish.low, 0), (wish.high, 1)) if end != is_free]
        lines += [Line("asked for", [x[0], x[-1]], [end, end], 4, 1) for end in bounds]
        panels.append(Panel(_name(wish), number.label, _name(wish), lines, log=values.by_ratio))
    title = f"{spec.name} over {number.label}"
    try:
        write_whole(path, picture(title, panels, path.suffix.lower()))
    except OSError as error:
        give_up(f"--plot {reason(error)}; choose another place")
    echo(f"wrote {path}")

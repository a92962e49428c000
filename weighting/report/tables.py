"""The tables of a report: rows of text, numbers told as differences where runs are paired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

from weighting.report.charts import Chart, Line, bar_chart, line_chart
from weighting.report.figures import domain_mass, paired, speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.report.read import Point, Run

_UNKNOWN = "unknown"
_LONG = 120
"""Characters shown of a setting."""


@dataclass(frozen=True)
class Table:
    """A table; the first `words` columns are words, the others numbers."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1


def overview(runs: Sequence[Run]) -> Table:
    """Return a line for each run."""
    rows = [
        (
            run.name,
            f"{run.about['spec']['name']} {run.about['spec']['hash']}" if run.about else _UNKNOWN,
            f"{run.lines[-1]['step']:,.0f}",
            _or_dash(speed(run), ",.0f"),
            _or_dash(run.lines[-1].get("unweighted_loss", math.nan)),
            _or_dash(_late(run)),
            _or_dash(run.lines[-1].get("weighted_loss", math.nan)),
        )
        for run in runs
    ]
    head = ("run", "spec", "steps", "tokens/s, median", "last unweighted loss (nats)")
    head += ("mean of its last tenth (nats)", "last weighted loss (nats)")
    return Table("What every run came to", head, rows, words=2)


def differences(runs: Sequence[Run]) -> Table | None:
    """Return how far the runs' unweighted losses are from the first one's, late in training."""
    rows: list[tuple[str, ...]] = []
    for run in runs[1:]:
        told = [y for _, y in paired(run, runs[0])]
        late = told[-max(len(told) // 4, 1) :]
        if len(late) < 2:  # noqa: PLR2004 - of one there are no quartiles
            rows.append((run.name, f"{len(told):,}", *["–"] * 4))
            continue
        low, _, high = quantiles(late, n=4, method="inclusive")
        below = sum(y < 0 for y in late) / len(late)
        numbers = [f"{x:+.4f}" for x in (fmean(late), low, high)]
        rows.append((run.name, f"{len(told):,}", *numbers, f"{below:.0%}"))
    head = ("run", "steps of both", "mean (nats)", "lower quartile", "upper quartile")
    caption = f"Unweighted loss minus that of {runs[0].name}, last quarter of the steps of both"
    return Table(caption, (*head, "steps below"), rows) if rows else None


def masses(run: Run) -> Table | None:
    """Return the domains of a run: share of the tokens, share x weight, and what was drawn."""
    last = run.lines[-1]
    rows: list[tuple[str, ...]] = []
    drawn = run.domains("drawn")
    for name in run.domains():
        share, mass = domain_mass(run, name)
        told = (share, mass, mass / share if share else math.nan)
        told += (last.get(f"domain/{name}/drawn", math.nan),) if drawn else ()
        rows.append((name, *map(_or_dash, told)))
    head = ("domain", "tokens", "tokens × weight", "mean weight")
    head += ("drawn, last step",) if drawn else ()
    return Table(f"Domain mass, {run.name}: means over steps", head, rows) if rows else None


def validation(runs: Sequence[Run]) -> tuple[Table, list[Chart]] | None:
    """Return the perplexities of every domain, differences to the first run, and their charts.

    Runs are compared at the last step that all of them were validated at, and where the text of
    a domain has as many tokens; the difference is that of the losses, in nats.
    """
    told = [run for run in runs if run.validations]
    if not told:
        return None
    by_step = [{int(line["step"]): line for line in run.validations} for run in told]
    common = set(by_step[0]).intersection(*by_step)
    lines = [lines[max(common or lines)] for lines in by_step]
    names = dict.fromkeys(
        key.removesuffix("/tokens") for line in lines for key in line if key.endswith("/tokens")
    )
    rows, bars = list[tuple[str, ...]](), list[tuple[str, list[float]]]()
    for name in names:
        counts = {line.get(f"{name}/tokens") for line in lines}
        alike = len(counts) == 1 and bool(common)
        losses = [line.get(f"{name}/loss", math.nan) for line in lines]
        tokens = f"{lines[0][f'{name}/tokens']:,.0f}" if len(counts) == 1 else "differ"
        rows.append((name, tokens, *_compared(losses, alike=alike)))
        bars.append((name, [_perplexity(x) for x in losses]))
    same = {tuple(line.get(f"{name}/tokens") for name in names) for line in lines}
    for label, key in {"all tokens": "loss", "mean over domains": "domain_mean_loss"}.items():
        losses = [line.get(key, math.nan) for line in lines]
        rows.append((label, "", *_compared(losses, alike=bool(common) and len(same) == 1)))
    at = f"step {max(common):,}" if common else "the last step of each, which differ"
    caption = f"Perplexity by domain at {at}; in brackets the loss minus that of {told[0].name}"
    caption += ", in nats"
    caption = caption if len(told) > 1 else f"Perplexity by domain at {at}"
    table = Table(caption, ("domain", "tokens", *(run.name for run in told)), rows)
    charts = [bar_chart("Validation", "perplexity", bars, [run.name for run in told])]
    if any(len(run.validations) > 1 for run in told):
        over = [Line(run.name, _means(run), i) for i, run in enumerate(runs)]
        charts.append(line_chart("Validation, mean over domains", "log-perplexity (nats)", over))
    return table, [chart for chart in charts if chart]


def settings(run: Run) -> list[Table]:
    """Return when, where and with which versions a run was started, and its configuration."""
    if not run.about:
        return []
    rows = [
        (
            str(start.get("time", _UNKNOWN)).removesuffix("+00:00").replace("T", " "),
            str(start.get("host") or _UNKNOWN),
            str(start.get("command") or _UNKNOWN),
            str(start.get("spec", _UNKNOWN)),
            str(start.get("device", _UNKNOWN)),
            ", ".join(f"{k} {v}" for k, v in dict(start.get("versions") or {}).items()),
            str(start.get("ranks", _UNKNOWN)),
            str(start.get("step", _UNKNOWN)),
        )
        for start in run.about["starts"]
    ]
    head = ("time (UTC)", "host", "command of the first rank", "spec", "device", "versions")
    head += ("ranks", "first step")
    found = [Table(f"Starts of {run.name}", head, rows, words=6)]
    flat = list(_flat(run.about.get("config") or {}))
    if flat:
        found.append(Table(f"Configuration of {run.name}", ("setting", "value"), flat, words=2))
    return found


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested maps by their dotted names."""
    if isinstance(value, dict) and value:
        pairs: dict[str, Any] = value
        return [
            x for key, v in pairs.items() for x in _flat(v, f"{name}.{key}" if name else str(key))
        ]
    text = str(value)
    return [(name, text if len(text) <= _LONG else f"{text[:_LONG]}…")]


def _compared(losses: Sequence[float], *, alike: bool) -> list[str]:
    """Return perplexities, and how far the losses are from the first."""
    cells = [_or_dash(_perplexity(x), ",.2f") for x in losses]
    if not alike:
        return cells
    first, *others = losses
    told = [f" ({x - first:+.3f})" if math.isfinite(x - first) else "" for x in others]
    return [cells[0], *(f"{cell}{more}" for cell, more in zip(cells[1:], told, strict=True))]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.nan  # noqa: PLR2004 - beyond, floats end


def _late(run: Run) -> float:
    told = [y for _, y in run.series("unweighted_loss")]
    return fmean(told[-max(len(told) // 10, 1) :]) if told else math.nan


def _means(run: Run) -> list[Point]:
    """Return the mean over domains of the validation loss by step, nats."""
    return [*run.validations.series("domain_mean_loss")]


def _or_dash(x: float, form: str = ".4f") -> str:
    """Return a number with as many digits as its column, so that points stand below each other."""
    return f"{x:{form}}" if math.isfinite(x) else "–"

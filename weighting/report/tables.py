"""The tables of a report: rows of text, with differences where runs are paired."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev
from typing import TYPE_CHECKING, Any

from weighting.report.figures import domain_mass, paired, speed
from weighting.runs import evaluated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weighting.report.read import Run

_UNKNOWN = "unknown"
_LONG = 120
"""Characters shown of a setting."""
_MEANS = {"all tokens": "loss", "mean over domains": "domain_mean_loss"}
_TRAINING = "training, last quarter, unweighted"
_PLACES = {"dump_folder", "checkpoint.initial_load_path", "weighting.spec"}
"""Settings in which repeats may differ: where files are, and the spec, which has a hash."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In the names of functions; another one in every process."""
_MOVED = 5
"""Sequences that are shown of those most raised, and of those most lowered."""
_ROUNDING = 1e-3
"""A weight that is no further from one is one."""
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's t, from one degree of freedom on."""


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
        gaps = paired(run, runs[0]).values.tolist()
        late = gaps[-max(len(gaps) // 4, 1) :]
        if len(late) < 2:  # noqa: PLR2004 - of one there are no quartiles
            rows.append((run.name, f"{len(gaps):,}", *["–"] * 4))
            continue
        low, _, high = quantiles(late, n=4, method="inclusive")
        below = sum(y < 0 for y in late) / len(late)
        numbers = [f"{x:+.4f}" for x in (fmean(late), low, high)]
        rows.append((run.name, f"{len(gaps):,}", *numbers, f"{below:.0%}"))
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
        numbers = (share, mass, mass / share if share else math.nan)
        numbers += (last.get(f"domain/{name}/drawn", math.nan),) if drawn else ()
        rows.append((name, *map(_or_dash, numbers)))
    head = ("domain", "tokens", "tokens × weight", "mean weight")
    head += ("drawn, last step",) if drawn else ()
    return Table(f"Domain mass, {run.name}: means over steps", head, rows) if rows else None


def most_moved(run: Run) -> list[Table]:
    """Return the recorded sequences whose mean weights were largest, and smallest."""
    record = run.record
    if record is None:
        return []
    weight, loss, steps = record.weight, record.signals.get("loss"), record.each(record.numbers)
    rows, tokens, domains = record.row, record.tokens, record.domain
    found = list[Table]()
    for what, sign in (("raised", 1), ("lowered", -1)):
        moved = (sign * (weight - 1)).where(tokens > 0, -math.inf)
        most = moved.topk(min(_MOVED, len(moved)))
        lines = [
            (
                record.domains[domains[i]] if record.domains else "–",
                f"{steps[i]:,}",
                f"{rows[i]:,}",
                f"{tokens[i]:,.0f}",
                _or_dash(loss[i].item() if loss is not None else math.nan),
                _or_dash(weight[i].item()),
            )
            for i in most.indices[most.values > _ROUNDING].tolist()
        ]
        head = ("domain of most tokens", "step", "row of its batch", "tokens", "loss (nats)")
        caption = f"Sequences most {what}, {run.name}, of {len(weight):,} recorded"
        found += [Table(caption, (*head, "mean weight"), lines)] if lines else []
    return found


def validation(runs: Sequence[Run]) -> Table | None:
    """Return loss and perplexity of every domain, and differences to the first run.

    Runs are compared at the last step that all of them were validated at, and where the text of
    a domain has as many tokens; the difference is that of the losses, in nats.
    """
    validated = [run for run in runs if run.validations]
    if not validated:
        return None
    common = _common_step(validated)
    lines = [_validation_at(run, common) for run in validated]
    names = _validated_domains(lines)
    rows = list[tuple[str, ...]]()
    for name in names:
        alike = len({line.get(f"{name}/tokens") for line in lines}) == 1
        losses = [line.get(f"{name}/loss", math.nan) for line in lines]
        tokens = f"{lines[0][f'{name}/tokens']:,.0f}" if alike else "differ"
        rows.append((name, tokens, *_compared(losses, alike=alike and common is not None)))
    same = {tuple(line.get(f"{name}/tokens") for name in names) for line in lines}
    for label, key in _MEANS.items():
        losses = [line.get(key, math.nan) for line in lines]
        alike = len(same) == 1 and common is not None
        rows.append((label, "", *_compared(losses, alike=alike)))
    at = f"step {common:,}" if common is not None else "the last step of each, which differ"
    caption = f"Validation loss (nats) and perplexity by domain at {at}"
    more = f"; difference: loss minus that of {validated[0].name}, nats"
    head = ["domain", "tokens"]
    for i, run in enumerate(validated):
        head += [f"{run.name}: loss", "perplexity", *(["difference"] if i else [])]
    return Table(caption + more * (len(validated) > 1), tuple(head), rows)


def benchmarks(runs: Sequence[Run]) -> Table | None:
    """Return the scores of the runs that were evaluated, and differences to the first of them."""
    asked = [run for run in runs if run.scores]
    rows = evaluated.rows([(run.name, run.scores) for run in asked]) if asked else []
    caption = "Benchmarks, per cent"
    caption += "; difference: 95 % interval over questions" if len(asked) > 1 else ""
    return Table(caption, evaluated.head([x.name for x in asked]), rows) if rows else None


def over_seeds(runs: Sequence[Run]) -> Table | None:
    """Return mean differences to the first run's repeats, paired by seed, with their intervals.

    Repeats have the same spec and configuration but for the seeds; None if there are none.
    """
    if not runs[0].about:
        return None
    groups: dict[tuple[str, ...], dict[tuple[str, ...], Run]] = {}
    for run in runs:
        if run.about:
            settings, seeds = _settings_and_seeds(run)
            groups.setdefault(settings, {}).setdefault(seeds, run)
    first, *others = groups.values()
    rows = list[tuple[str, ...]]()
    for group in others:
        pairs = [(run, first[seeds]) for seeds, run in group.items() if seeds in first]
        if len(pairs) < 2:  # noqa: PLR2004 - one difference has no interval
            continue
        name = ", ".join(run.name for run, _ in pairs)
        for label, gaps in _gaps(pairs).items():
            numbers = [f"{x:+.4f}" for x in (fmean(gaps), *interval(gaps))]
            rows.append((name, label, f"{len(gaps)}", *numbers))
    base = ", ".join(run.name for run in first.values())
    caption = f"Loss minus that of the same seed among {base}: mean over seeds, 95 % t interval"
    head = ("runs", "loss", "n seeds", "mean (nats)", "from", "to")
    return Table(caption, head, rows, words=2) if rows else None


def by_seed(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Return the losses of each group over its seeds, and differences to the first, by pairs.

    Args:
        groups: Runs by what weighs, in the same order of seeds; two seeds or more.
    """
    (base, _), *_ = groups.items()
    count = len(groups[base])
    measured = _measured([run for group in groups.values() for run in group])
    rows = list[tuple[str, ...]]()
    for label, losses in measured.items():
        first = losses[:count]
        for i, name in enumerate(groups):
            own = losses[i * count : (i + 1) * count]
            gaps = [x - y for x, y in zip(own, first, strict=True)]
            apart = [f"{x:+.4f}" for x in (fmean(gaps), *interval(gaps))] if i else [""] * 3
            levels = [f"{x:.4f}" for x in (fmean(own), *interval(own))]
            rows.append((label if not i else "", name, *levels, *apart))
    caption = f"Losses in nats over {count} seeds, and minus those of {base} by seed"
    caption += ": means and 95 % t intervals"
    head = ("loss", "spec", "mean", "from", "to", "difference", "from", "to")
    return Table(caption, head, rows, words=2)


def as_text(table: Table) -> str:
    """Return a table as lines of text, its caption last."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = list[str]()
    for line in lines:
        cells = [
            f"{cell:{'<' if i < table.words else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return "\n".join([*out, "", table.caption])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean of two values or more."""
    half = _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


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


def _flat(value: object, name: str = "", *, long: bool = False) -> list[tuple[str, str]]:
    """Return the leaves of nested maps by their dotted names."""
    if isinstance(value, dict) and value:
        pairs: dict[str, Any] = value
        return [
            x
            for key, v in pairs.items()
            for x in _flat(v, f"{name}.{key}" if name else str(key), long=long)
        ]
    text = str(value)
    return [(name, text if long or len(text) <= _LONG else f"{text[:_LONG]}…")]


def _common_step(runs: Sequence[Run]) -> int | None:
    """Return the last step at which all runs were validated; None if there is none."""
    steps = [{int(line["step"]) for line in run.validations} for run in runs]
    return max(set[int].intersection(*steps), default=None)


def _validation_at(run: Run, step: int | None) -> dict[str, float]:
    """Return what was measured at a step, the last one if it is None."""
    found = [line for line in run.validations if step is None or line["step"] == step]
    return found[-1]


def _validated_domains(lines: Sequence[dict[str, float]]) -> list[str]:
    keys = dict.fromkeys(key for line in lines for key in line)
    return [key.removesuffix("/tokens") for key in keys if key.endswith("/tokens")]


def _settings_and_seeds(run: Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what repeats share, and what tells them apart."""
    leaves = _flat(run.about.get("config") or {}, long=True)
    kept = {name: _ADDRESS.sub("", value) for name, value in leaves if name not in _PLACES}
    seeds = tuple(f"{k}={v}" for k, v in kept.items() if k.split(".")[-1] == "seed")
    others = (f"{k}={v}" for k, v in kept.items() if k.split(".")[-1] != "seed")
    return (run.about["spec"]["hash"], *others), seeds


def _gaps(pairs: Sequence[tuple[Run, Run]]) -> dict[str, list[float]]:
    """Return the differences of all pairs by what was measured, where all have it alike."""
    found: dict[str, list[float]] = {}
    late = [paired(*pair).values.tolist() for pair in pairs]
    if all(late):
        found[_TRAINING] = [fmean(gaps[-max(len(gaps) // 4, 1) :]) for gaps in late]
    validated = _validated([run for pair in pairs for run in pair])
    return found | {
        label: [a - b for a, b in zip(losses[::2], losses[1::2], strict=True)]
        for label, losses in validated.items()
    }


def _measured(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return what was measured of all runs, by its name."""
    found: dict[str, list[float]] = {}
    losses = [run.series("unweighted_loss").values.tolist() for run in runs]
    found[_TRAINING] = [fmean(own[-max(len(own) // 4, 1) :]) for own in losses]
    return _validated(runs) | found


def _validated(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return the validation losses of all runs by domain and their means, if all have them alike.

    They are those of the last step at which all were validated, on as many tokens of each domain.
    """
    step = _common_step(runs)
    if step is None:
        return {}
    lines = [_validation_at(run, step) for run in runs]
    names = _validated_domains(lines)
    if any(len({line.get(f"{name}/tokens") for line in lines}) > 1 for name in names):
        return {}
    keys = {f"validation, {name}": f"{name}/loss" for name in names}
    keys |= {f"validation, {label}": key for label, key in _MEANS.items()}
    found = {label: [line.get(key, math.nan) for line in lines] for label, key in keys.items()}
    return {label: x for label, x in found.items() if all(map(math.isfinite, x))}


def _t_quantile(df: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table by its expansion in 1/df."""
    if df <= len(_T):
        return _T[df - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def _compared(losses: Sequence[float], *, alike: bool) -> list[str]:
    """Return loss and perplexity of each run, and from the second on how far it is off."""
    cells = list[str]()
    for i, loss in enumerate(losses):
        cells += [_or_dash(loss), _or_dash(_perplexity(loss), ",.2f")]
        cells += [_or_dash(loss - losses[0] if alike else math.nan, "+.4f")] if i else []
    return cells


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.nan  # noqa: PLR2004 - beyond, floats end


def _late(run: Run) -> float:
    losses = run.series("unweighted_loss").values.tolist()
    return fmean(losses[-max(len(losses) // 10, 1) :]) if losses else math.nan


def _or_dash(x: float, form: str = ".4f") -> str:
    """Return a number with as many digits as its column, so that points stand below each other."""
    return f"{x:{form}}" if math.isfinite(x) else "–"

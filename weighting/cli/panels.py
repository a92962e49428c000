"""What `weighting plot` draws, as numbers: lines of weights, of schedules, and histograms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from weighting.columns import plain_name
from weighting.simulate import (
    DOMAIN,
    changing,
    columns_of,
    simulate_recorded,
    simulate_units,
    turns,
    written_domains,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weighting.cli.named import Named
    from weighting.runs.loss_files import Recorded
    from weighting.simulate import Changing

    Xs = Sequence[float] | Sequence[str]
    """Where points are on an x axis: numbers, or names."""
    _Values = Callable[[Named, int], tuple[Xs, list[float]]]
    """From a spec and a step to the points of a line."""

UNITS = 129
"""Over how many units a signal is spread."""
_BINS = 40
_POINTS = 400
_Kind = Literal["line", "points", "stairs"]


class Line(NamedTuple):
    """A line of a panel: points, what to call it, and which colour and dashes it has."""

    label: str
    x: Xs
    y: list[float]
    colour: int
    dash: int


class Panel(NamedTuple):
    """Lines against the same axes.

    Attributes:
        title: Shown above it where there are several panels.
        x: Label of the x axis, with its unit.
        y: Label of the y axis, with its unit.
        lines: What is drawn.
        kind: `line` joins the points, `points` does not; `stairs` has one x more than y, edges.
        at: A height to mark with a thin line.
        log: Whether the x axis is logarithmic.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    kind: _Kind = "line"
    at: float | None = None
    log: bool = False


class _Signal(NamedTuple):
    """How a signal is called on an axis, and over what it is spread."""

    name: str
    unit: str = ""
    low: float = 0.0
    high: float = 4.0

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def spread(self) -> Tensor:
        return torch.linspace(self.low, self.high, UNITS)


_SIGNALS = {
    "loss": _Signal("loss", "nats", 1, 5),
    "entropy": _Signal("entropy", "nats", 1, 5),
    "ref_loss": _Signal("reference loss", "nats", 1, 5),
    "error_norm": _Signal("norm of prediction minus label", "", 0, 1.4),
    "domain_ids": _Signal(DOMAIN),
}
_IN_NATS = ("short_loss_", "topk_entropy_", "ref_loss_", "ref_entropy", "kl")
"""How the columns begin that models make of their losses and entropies."""
_THIRDS = ("a", "b", "c")
"""Domains of the lower, middle and upper third of the units, where a spec names none."""


def against_signals(named: Sequence[Named], steps: Sequence[int], *, one: bool) -> list[Panel]:
    """Return a panel for each signal that is read: weights of evenly spread units.

    The other signals are held in the middle; the label's probability follows from the loss.
    All units are of one domain where the spec names them, and else of three, one after the other.

    Args:
        named: Specs that weigh.
        steps: Optimizer steps.
        one: Take the units as the tokens of one sequence.

    Raises:
        ValueError: A spec cannot weigh them.
    """
    panels: list[Panel] = []
    for signal in _all_read(named):
        kind: _Kind = "points" if signal == "domain_ids" else "line"
        values = partial(_spread, signal=signal, one=one)
        panels.append(_against(signal, named, steps, values, kind))
    return panels


def against_recorded(
    named: Sequence[Named], steps: Sequence[int], losses: Recorded, *, one: bool
) -> list[Panel]:
    """Return a panel for each signal that is read: weights of recorded units.

    Args:
        named: Specs that weigh.
        steps: Optimizer steps.
        losses: The units.
        one: Take them as the tokens of one sequence.

    Raises:
        ValueError: A spec cannot weigh them.
    """
    panels: list[Panel] = []
    for signal in _all_read(named):
        values = partial(_of_recorded, signal=signal, losses=losses, one=one)
        panels.append(_against(signal, named, steps, values, "points"))
    return panels


def histogram(
    named: Sequence[Named], steps: Sequence[int], losses: Recorded, *, one: bool
) -> list[Panel]:
    """Return one panel: how many recorded units have which weight.

    Args:
        named: Specs that weigh.
        steps: Optimizer steps.
        losses: The units.
        one: Take them as the tokens of one sequence.

    Raises:
        ValueError: A spec cannot weigh them.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for each in named:
        for step in steps:
            simulated = simulate_recorded(each.spec, each.plan, losses, step, one_sequence=one)
            found[each.label, step] = simulated.weight
    highest = max(weight.max().item() for weight in found.values()) or 1.0
    edges = torch.linspace(0, highest, _BINS + 1)

    def values(each: Named, step: int) -> tuple[Xs, list[float]]:
        counts = torch.histc(found[each.label, step], _BINS, 0, highest)
        return edges.tolist(), counts.tolist()

    lines = _lines(named, named, steps, values)
    return [Panel("", _weight(named), "number of units", lines, "stairs")]


def schedules(named: Sequence[Named], steps: Sequence[int]) -> list[Panel]:
    """Return a panel for each measure of the numbers that change: their values over the run.

    Args:
        named: Specs.
        steps: The run goes from the first to the last of these; past the last change when empty.

    Raises:
        ValueError: No number changes.
    """
    moving = [(each, number) for each in named for number in changing(each.plan)]
    if not moving:
        names = ", ".join(each.label for each in named)
        msg = f"{names}: every number is constant, there is no schedule to draw"
        raise ValueError(msg)
    turned = {turn for _, number in moving for turn in turns(number.schedule)}
    last = max(max(steps, default=0), 1) if steps else max(2 * max(turned), 10)
    first = min(steps) if len(steps) > 1 else 1
    even = {first + round((last - first) * i / _POINTS) for i in range(_POINTS + 1)}
    at = sorted(even | {turn for turn in turned if first <= turn <= last})
    panels: dict[str, list[Line]] = {}
    for each, number in moving:
        lines = panels.setdefault(_measure(number), [])
        y = number.schedule(torch.tensor(at)).tolist()
        label = number.label if len(named) == 1 else f"{each.label}: {number.label}"
        index = sum(map(len, panels.values()))
        lines.append(Line(label, at, y, index, index))
    return [
        Panel("", "optimizer step (steps)", measure, lines) for measure, lines in panels.items()
    ]


def _against(
    signal: str, named: Sequence[Named], steps: Sequence[int], values: _Values, kind: _Kind
) -> Panel:
    """Return the panel of a signal, with the specs that read it or nothing."""
    shown = [each for each in named if signal in _read(each) or not _read(each)]
    what = _signal(signal)
    lines = _lines(shown, named, steps, values)
    return Panel(f"against {what.name}", what.label, _weight(shown), lines, kind, at=1)


def _lines(
    shown: Sequence[Named],
    named: Sequence[Named],
    steps: Sequence[int],
    values: _Values,
) -> list[Line]:
    """Return a line for each spec and step, or one where all steps are alike.

    Colours tell specs apart and dashes steps, if there are several.
    """
    lines: list[Line] = []
    for each in shown:
        i = named.index(each)  # the same look in every panel
        points = [values(each, step) for step in steps]
        alike = all(found == points[0] for found in points)
        for j, step in enumerate(steps[:1] if alike else steps):
            label = each.label if alike else f"{each.label}, step {step}"
            colour = i if len(named) > 1 else j
            dash = j if len(steps) > 1 else i
            lines.append(Line(label, *points[j], colour, dash))
    return lines


def _all_read(named: Sequence[Named]) -> list[str]:
    """Return the signals that some of the specs read, the loss when there are none."""
    read = {signal for each in named for signal in _read(each)} or {"loss"}
    return sorted(read, key=lambda signal: ([*_SIGNALS, signal].index(signal), signal))


def _read(each: Named) -> set[str]:
    """Return the signals that a spec's weights are drawn against."""
    read = {"loss" if name == "target_prob" else name for name in columns_of(each.plan)}
    # Without names, domains are made up, and there is nothing to draw them against.
    return read if written_domains(each.spec) else read - {"domain_ids"}


def _signal(name: str) -> _Signal:
    if name in _SIGNALS:
        return _SIGNALS[name]
    column = plain_name(name)
    return _Signal(f"column {column}", "nats" if column.startswith(_IN_NATS) else "")


def _of_recorded(
    each: Named, step: int, *, signal: str, losses: Recorded, one: bool
) -> tuple[Xs, list[float]]:
    """Return the recorded values of a signal, and the weights of these units."""
    here = losses.at(step)
    by_domain = signal == "domain_ids"
    x = here.words(DOMAIN) if by_domain else here.numbers(plain_name(signal))
    found = simulate_recorded(each.spec, each.plan, losses, step, one_sequence=one)
    return x, found.weight.tolist()


def _spread(each: Named, step: int, *, signal: str, one: bool) -> tuple[Xs, list[float]]:
    """Return the values of a spread signal, and the weights of these units."""
    names = [*written_domains(each.spec)]
    by_domain = signal == "domain_ids"
    count = len(names) if by_domain else UNITS
    read = {name for name in columns_of(each.plan) if name not in {"domain_ids", "target_prob"}}
    spreads = {name: _signal(name) for name in read | {"loss"}}
    given = {
        name: torch.full((count,), (spread.low + spread.high) / 2)
        for name, spread in spreads.items()
    }
    domain = names if by_domain else [names[0] if names else third for third in _dealt(count)]
    if not by_domain:
        given[signal] = _signal(signal).spread()
    found = simulate_units(
        each.spec, given, step, domain=domain, domains=names or _THIRDS, one_sequence=one
    )
    return names if by_domain else given[signal].tolist(), found.weight.tolist()


def _dealt(count: int) -> list[str]:
    """Return domains of so many units, a third each, one after the other."""
    return [_THIRDS[i * len(_THIRDS) // count] for i in range(count)]


def _weight(named: Sequence[Named]) -> str:
    """Return the label of an axis of weights."""
    scaled = all(each.spec.normalize == "mean_one" for each in named)
    return "weight (mean one)" if scaled else "weight (as each spec scales it)"


def _measure(number: Changing) -> str:
    """Return in what a number is measured, as its type says; its own name where that says not."""
    fields = type(number.stage).model_json_schema()["properties"]
    ways = fields.get(number.argument, {}).get("anyOf", [])
    if any("/" in way.get("pattern", "") for way in ways):  # k/n, a share of the total weight
        return "weight (mean one)"
    if any(way.get("maximum") == 1 and way["minimum"] >= 0 for way in ways):
        return "share (from 0 to 1)"
    return f"{number.stage.name}.{number.argument}"

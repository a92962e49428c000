"""Lines over steps as SVG, in the page's colours.

Our own, since matplotlib's SVG is as large, takes ten times as long and cannot follow a page's
light and dark colours or hand values to a script without being rewritten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weighting.language.html import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weighting.report.points import Point, Points

POINTS = 400
"""The most points of a line."""
_WIDTH, _HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 374, 12, 216
_EXP = 70
"""Width of the axis on the right, if there is one."""
_HOVERS = 60
_COLOURS, _DASHES = 8, 4
_MOST_EXP = 700
"""Beyond, exponentials are no floats."""


@dataclass(frozen=True)
class Line:
    """A line of a chart; `style` numbers its colour and dash."""

    label: str
    points: Points
    style: int


@dataclass(frozen=True)
class Chart:
    """A chart: what it is, the drawing, its legend as pairs of swatch and name, and a remark."""

    title: str
    svg: str
    legend: list[tuple[str, str]]
    note: str = ""


def line_chart(
    title: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    level: tuple[float, str] | None = None,
    zero: bool = False,
    exp_label: str = "",
) -> Chart | None:
    """Return lines over steps; None if there is no point to draw.

    Args:
        title: What is drawn.
        y_label: What the height means, with its unit.
        lines: The lines; those without points are left out.
        note: What helps to read it.
        level: A height to mark, and its name.
        zero: Whether the heights begin at zero.
        exp_label: What the exponential of the height means: an axis on the right; none if empty.
    """
    lines = [line for line in lines if len(line.points)]
    if not lines:
        return None
    drawn = [[*thinned(line.points)] for line in lines]
    heights = [y for points in drawn for _, y in points]
    heights += [level[0]] if level else []
    low, high = _widened(min([0.0, *heights] if zero else heights), max(heights))
    first = min(points[0][0] for points in drawn)
    last = max(points[-1][0] for points in drawn)
    last = last if last > first else first + 1

    def x_of(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_RIGHT - _LEFT)

    def y_of(y: float) -> float:
        return _BOTTOM - (y - low) / (high - low) * (_BOTTOM - _TOP)

    parts = [_text(y_label, 12, (_TOP + _BOTTOM) / 2, "middle", turned=True)]
    parts.append(_text("step", (_LEFT + _RIGHT) / 2, _HEIGHT - 8, "middle"))
    if exp_label:
        middle = (_TOP + _BOTTOM) / 2
        parts.append(_text(exp_label, _RIGHT + _EXP - 8, middle, "middle", turned=True))
    for y in ticks(low, high):
        if exp_label and y < _MOST_EXP:
            parts.append(_text(number(math.exp(y)), _RIGHT + 5, y_of(y) + 4, "start"))
        parts.append(f"<path class='grid' d='M{_LEFT} {y_of(y):.1f}H{_RIGHT}'/>")
        parts.append(_text(number(y), _LEFT - 5, y_of(y) + 4, "end"))
    times = ticks(first, last, 4)
    parts += [_text(f"{x:,.10g}", x_of(x), _BOTTOM + 16, "middle") for x in times]
    legend = [(_swatch(line.style), line.label) for line in lines]
    if level:
        parts.append(f"<path class='level' d='M{_LEFT} {y_of(level[0]):.1f}H{_RIGHT}'/>")
        legend.append((_swatch(None), level[1]))
    for line, points in zip(lines, drawn, strict=True):
        parts.append(_path(line, points, [(x_of(x), y_of(y)) for x, y in points]))
    parts += _hovers(lines, x_of)
    name = escaped(f"{title}: {y_label} over steps")
    width = _RIGHT + _EXP if exp_label else _WIDTH
    steps = f"data-steps='{first:.10g} {last:.10g}'"
    box = f"viewBox='0 0 {width} {_HEIGHT}' role='img' aria-label='{name}'"
    return Chart(title, f"<svg class='chart' {steps} {box}>{''.join(parts)}</svg>", legend, note)


def thinned(points: Points) -> Points:
    """Return at most `POINTS` of the points: both ends, and of each stretch its extremes."""
    if len(points) <= POINTS:
        return points
    count, last = POINTS // 2 - 1, len(points) - 1
    bounds = 1 + torch.arange(count + 1) * (last - 1) // count
    begins, ends = bounds[:-1, None], bounds[1:, None]
    # One row for each stretch; the shorter ones have their last point twice.
    places = (begins + torch.arange(int((ends - begins).max()))).minimum(ends - 1)
    values = points.values[places]
    found = [places.gather(1, x) for x in (values.argmin(1, True), values.argmax(1, True))]
    return points[torch.cat([torch.tensor([0, last]), *map(torch.flatten, found)]).unique()]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from low to high, about `count` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    begin, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(begin, end + 1)]


def number(x: float) -> str:
    """Return a number with four digits that count."""
    if x and not 1e-4 <= abs(x) < 1e6:  # noqa: PLR2004 - beyond, powers of ten are shorter
        return f"{x:.3g}"
    digits = 3 - math.floor(math.log10(abs(x))) if x else 0
    text = f"{x:,.{min(max(digits, 0), 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range with some room, never empty."""
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return (0.0 if low == 0 else low - room), high + room


def _path(line: Line, points: Sequence[Point], places: Sequence[Point]) -> str:
    """Return a line, or a dot for a single point, with its values as data for the script."""
    steps = " ".join(f"{x:.10g}" for x, _ in points)
    values = " ".join(f"{y:.5g}" for _, y in points)
    data = f"data-label='{escaped(line.label)}' data-x='{steps}' data-y='{values}'"
    if len(places) == 1:
        ((x, y),) = places
        place = f"cx='{x:.1f}' cy='{y:.1f}' r='3'"
        return f"<circle class='dot {_look(line.style)}' {place} {data}/>"
    way = " ".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f"<path class='line {_look(line.style)}' d='M{way}' {data}/>"


def _hovers(lines: Sequence[Line], x_of: Callable[[float], float]) -> list[str]:
    """Return unseen strips over the whole chart whose titles say step and value of each line."""
    first, *others = [line.points.steps for line in lines]
    # As they are where runs log alike.
    alike = bool((first.diff() > 0).all()) and all(torch.equal(first, x) for x in others)
    steps = first if alike else torch.cat([first, *others]).unique()
    count = min(len(steps), _HOVERS)
    places = {round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)}
    picked = steps[sorted(places)]
    known = [[x.tolist() for x in line.points.at(picked)] for line in lines]
    width, out = (_RIGHT - _LEFT) / max(count - 1, 1), list[str]()
    for i, step in enumerate(picked.tolist()):
        texts = [f"step {step:,.0f}"]
        texts += [
            f"{line.label}: {number(values[i])}"
            for line, (values, there) in zip(lines, known, strict=True)
            if there[i]
        ]
        place = f"x='{x_of(step) - width / 2:.1f}' y='{_TOP}'"
        size = f"width='{width:.1f}' height='{_BOTTOM - _TOP}'"
        title = escaped("\n".join(texts))
        out.append(f"<rect class='h' {place} {size}><title>{title}</title></rect>")
    return out


def _look(style: int) -> str:
    return f"c{style % _COLOURS} d{(style + style // _COLOURS) % _DASHES}"


def _swatch(style: int | None) -> str:
    """Return a piece of a line for the legend."""
    look = "level" if style is None else f"line {_look(style)}"
    path = f"<path class='{look}' d='M0 5H28'/>"
    return f"<svg width='28' height='10' aria-hidden='true'>{path}</svg>"


def _text(text: str, x: float, y: float, anchor: str, *, turned: bool = False) -> str:
    turn = f" transform='rotate(-90 {x:g} {y:g})'" if turned else ""
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {place}{turn}>{escaped(text)}</text>"

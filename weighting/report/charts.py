"""Lines and bars as SVG: no script, the values are told on hover, colours are the page's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weighting.language.html import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weighting.report.read import Point

POINTS = 400
"""The most points of a line."""
_WIDTH, _HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 374, 12, 216
_LABEL, _NAME, _BAR, _ROW = 112, 14, 8, 6
"""Beside bars: width of names, and characters that fit; height of a bar, gap between rows."""
_HOVERS = 60
_COLOURS, _DASHES = 8, 4


@dataclass(frozen=True)
class Line:
    """A line of a chart; `style` numbers its colour and dash."""

    label: str
    points: list[Point]
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
) -> Chart | None:
    """Return lines over steps; None if there is no point to draw.

    Args:
        title: What is drawn.
        y_label: What the height means, with its unit.
        lines: The lines; those without points are left out.
        note: What helps to read it.
        level: A height to mark, and its name.
        zero: Whether the heights begin at zero.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    drawn = [thinned(line.points) for line in lines]
    heights = [y for points in drawn for _, y in points]
    heights += [level[0]] if level else []
    low, high = _widened(min([0.0, *heights] if zero else heights), max(heights))
    first = min(line.points[0][0] for line in lines)
    last = max(line.points[-1][0] for line in lines)
    last = last if last > first else first + 1

    def x_of(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_RIGHT - _LEFT)

    def y_of(y: float) -> float:
        return _BOTTOM - (y - low) / (high - low) * (_BOTTOM - _TOP)

    parts = [_text(y_label, 12, (_TOP + _BOTTOM) / 2, "middle", turned=True)]
    parts.append(_text("step", (_LEFT + _RIGHT) / 2, _HEIGHT - 8, "middle"))
    for y in ticks(low, high):
        parts.append(f"<path class='grid' d='M{_LEFT} {y_of(y):.1f}H{_RIGHT}'/>")
        parts.append(_text(number(y), _LEFT - 5, y_of(y) + 4, "end"))
    times = ticks(first, last, 4)
    parts += [_text(f"{x:,.10g}", x_of(x), _BOTTOM + 16, "middle") for x in times]
    legend = [(_swatch(line.style), line.label) for line in lines]
    if level:
        parts.append(f"<path class='level' d='M{_LEFT} {y_of(level[0]):.1f}H{_RIGHT}'/>")
        legend.append((_swatch(None), level[1]))
    for line, points in zip(lines, drawn, strict=True):
        parts.append(_path([(x_of(x), y_of(y)) for x, y in points], line.style))
    parts += _hovers(lines, x_of)
    return Chart(title, _svg(f"{title}: {y_label} over steps", _HEIGHT, parts), legend, note)


def bar_chart(
    title: str, x_label: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]
) -> Chart | None:
    """Return a group of bars for each row, from zero; None if there is none.

    Args:
        title: What is drawn.
        x_label: What the length means, with its unit.
        rows: Name, and a value for each of `names`; NaN draws no bar.
        names: What the bars of a row are.
    """
    values = [v for _, row in rows for v in row if math.isfinite(v)]
    if not values:
        return None
    top, tall = _widened(0.0, max(values))[1], len(names) * _BAR
    bottom = _TOP + len(rows) * (tall + _ROW)

    def x_of(x: float) -> float:
        return _LABEL + x / top * (_RIGHT - _LABEL)

    parts = [_text(x_label, (_LABEL + _RIGHT) / 2, bottom + 34, "middle")]
    for x in ticks(0, top, 4):
        parts.append(f"<path class='grid' d='M{x_of(x):.1f} {_TOP}V{bottom}'/>")
        parts.append(_text(number(x), x_of(x), bottom + 16, "middle"))
    for i, (label, row) in enumerate(rows):
        y = _TOP + i * (tall + _ROW)
        short = label if len(label) <= _NAME else f"{label[: _NAME - 1]}…"
        parts.append(_text(short, _LABEL - 5, y + tall / 2 + 4, "end", hover=label))
        for j, (name, value) in enumerate(zip(names, row, strict=True)):
            if math.isfinite(value):
                size = f"width='{x_of(value) - _LABEL:.1f}' height='{_BAR - 1}'"
                told = f"<title>{escaped(f'{label}, {name}: {number(value)}')}</title>"
                place = f"x='{_LABEL}' y='{y + j * _BAR}'"
                parts.append(f"<rect class='bar {_look(j)}' {place} {size}>{told}</rect>")
    legend = [(_swatch(i, bar=True), name) for i, name in enumerate(names)]
    return Chart(title, _svg(f"{title}: {x_label}", bottom + 44, parts), legend)


def thinned(points: list[Point]) -> list[Point]:
    """Return at most `POINTS` of the points: both ends, and of each stretch its extremes."""
    if len(points) <= POINTS:
        return points
    count = POINTS // 2 - 1
    inner, kept = points[1:-1], [points[0]]
    for i in range(count):
        part = inner[i * len(inner) // count : (i + 1) * len(inner) // count]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


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


def _path(points: Iterable[Point], style: int) -> str:
    points = list(points)
    if len(points) == 1:
        (x, y) = points[0]
        return f"<circle class='dot {_look(style)}' cx='{x:.1f}' cy='{y:.1f}' r='3'/>"
    way = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"<path class='line {_look(style)}' d='M{way}'/>"


def _hovers(lines: Sequence[Line], x_of: Callable[[float], float]) -> list[str]:
    """Return unseen strips over the whole chart that tell what all lines are at a step."""
    known = [dict(line.points) for line in lines]
    steps = sorted({x for points in known for x in points})
    count = min(len(steps), _HOVERS)
    picked = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
    width, out = (_RIGHT - _LEFT) / max(count - 1, 1), list[str]()
    for step in picked:
        told = [f"step {step:,.0f}"]
        told += [
            f"{line.label}: {number(points[step])}"
            for line, points in zip(lines, known, strict=True)
            if step in points
        ]
        place = f"x='{x_of(step) - width / 2:.1f}' y='{_TOP}'"
        size = f"width='{width:.1f}' height='{_BOTTOM - _TOP}'"
        title = escaped("\n".join(told))
        out.append(f"<rect class='h' {place} {size}><title>{title}</title></rect>")
    return out


def _look(style: int) -> str:
    return f"c{style % _COLOURS} d{(style + style // _COLOURS) % _DASHES}"


def _swatch(style: int | None, *, bar: bool = False) -> str:
    """Return a piece of a line, or of a bar, for the legend."""
    look = "level" if style is None else f"{'bar' if bar else 'line'} {_look(style)}"
    shape = "<rect class='{}' width='28' height='10'/>" if bar else "<path class='{}' d='M0 5H28'/>"
    return f"<svg width='28' height='10' aria-hidden='true'>{shape.format(look)}</svg>"


def _svg(name: str, height: float, parts: Iterable[str]) -> str:
    box = f"viewBox='0 0 {_WIDTH} {height:g}' role='img' aria-label='{escaped(name)}'"
    return f"<svg class='chart' {box}>{''.join(parts)}</svg>"


def _text(
    text: str, x: float, y: float, anchor: str, *, turned: bool = False, hover: str = ""
) -> str:
    turn = f" transform='rotate(-90 {x:g} {y:g})'" if turned else ""
    title = f"<title>{escaped(hover)}</title>" if hover else ""
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {place}{turn}>{title}{escaped(text)}</text>"

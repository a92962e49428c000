"""Panels of lines as a picture, by matplotlib; imported only where one is drawn."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import style
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from weighting.cli.panels import Panel

# Okabe and Ito's colours, told apart by colour-blind readers, but for the yellow, which is too
# pale on white; dashes help in print.
COLOURS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^Dv<>"
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "weighting",  # the same bytes at every run
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}


def picture(title: str, panels: Sequence[Panel], suffix: str) -> bytes:
    """Return panels as a picture, in the format of a suffix; the same bytes for the same panels."""
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = (7.5, 4.2) if len(panels) == 1 else (4.6 * columns, 3.7 * rows)
    lines = [line for panel in panels for line in panel.lines]
    lines.sort(key=lambda line: (line.colour, line.dash))
    labels = [*dict.fromkeys(line.label for line in lines)]
    beside = max(1, int(width * 10 / (max(map(len, labels)) + 8)))
    height += 0.19 * math.ceil(len(labels) / beside)
    with mpl.rc_context(), style.context(["default", _SETTINGS]):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title)
        handles: dict[str, Artist] = {}
        for index, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, index)
            if len(panels) > 1:
                axes.set_title(panel.title, fontsize="medium")
            handles = {**_draw(axes, panel), **handles}
        # Below the panels it hides no line.
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=min(beside, len(labels)),
            fontsize="small",
            frameon=False,
        )
        out = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(out, format=suffix.removeprefix("."), metadata=metadata)
    return out.getvalue()


def _draw(axes: Axes, panel: Panel) -> dict[str, Artist]:
    """Draw a panel; return what stands for each label in a legend."""
    if panel.at is not None:
        axes.axhline(panel.at, color="#bbbbbb", linewidth=0.8)
    handles: dict[str, Artist] = {}
    widths = (2.8 - 1.2 * i / max(1, len(panel.lines) - 1) for i in range(len(panel.lines)))
    # A line over another that is the same is thinner, and leaves that to be seen.
    for line, width in zip(panel.lines, widths, strict=True):
        colour = COLOURS[line.colour % len(COLOURS)]
        # Past the last colour the dashes move on, so that no two lines look alike.
        dash = DASHES[(line.dash + line.colour // len(COLOURS)) % len(DASHES)]
        look: dict[str, Any] = {"color": colour, "linewidth": width}
        if panel.kind == "stairs":
            handles[line.label] = axes.stairs(line.y, line.x, linestyle=dash, **look)
        elif panel.kind == "points":
            marker = MARKERS[line.dash % len(MARKERS)]
            look = {"color": colour, "markersize": 4, "markerfacecolor": "none"}
            [handles[line.label]] = axes.plot(line.x, line.y, marker, **look)
        else:
            [handles[line.label]] = axes.plot(line.x, line.y, linestyle=dash, **look)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.log:
        axes.set_xscale("log")
    if all(y >= 0 for line in panel.lines for y in line.y):
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # a line at 0 is seen whole
    return handles

"""What `weighting plot` draws: weights and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weighting.cli.common import check_matplotlib, echo, give_up, reason, wrapped
from weighting.cli.named import LONGEST, Named, cut
from weighting.cli.panels import (
    UNITS,
    against_recorded,
    against_signals,
    histogram,
    schedules,
)
from weighting.cli.simulation import (
    chosen_step,
    only_draws,
    read_losses,
    remarks,
)
from weighting.runs.files import write_whole
from weighting.simulate import changing

if TYPE_CHECKING:
    from weighting.cli.panels import Panel


def draw(
    named: list[Named],
    out: str,
    kind: str,
    steps: list[int],
    losses: str | None,
    per: str,
) -> None:
    """Write the picture that the command asks for; on an error print it and exit with status 2."""
    check_matplotlib()
    from weighting.cli.figures import picture  # noqa: PLC0415 - the core needs no matplotlib

    path = Path(out)
    named = [each._replace(label=cut(each.label, LONGEST)) for each in named]
    try:
        if kind == "schedules":
            title, panels = _schedules(named, steps, losses)
        else:
            title, panels = _weights(named, steps, losses, kind=kind, per=per)
        write_whole(path, picture(title, panels, path.suffix.lower()))
    except ValueError as error:
        give_up(str(error))
    except OSError as error:
        give_up(f"--out {reason(error)}; choose another place")
    echo(f"wrote {out}")
    for each in named if kind != "schedules" else ():
        for note in remarks(each, per):
            echo("\n".join(wrapped(note)))


def _schedules(named: list[Named], steps: list[int], losses: str | None) -> tuple[str, list[Panel]]:
    """Return title and panels of schedules.

    Raises:
        ValueError: There are none.
    """
    if losses is not None:
        msg = "schedules do not depend on losses; leave --losses out"
        raise ValueError(msg)
    return "Numbers that change over the run", schedules(named, steps)


def _weights(
    named: list[Named], steps: list[int], losses: str | None, *, kind: str, per: str
) -> tuple[str, list[Panel]]:
    """Return title and panels of weights: of recorded losses, or against signals.

    Raises:
        ValueError: There is nothing to draw, or the losses cannot be used.
    """
    for each in named:
        if only_draws(each.plan):
            msg = f"{each.label} only draws data: every loss weighs 1; leave it out"
            raise ValueError(msg)
    if losses is None and kind == "histogram":
        msg = "a histogram is one of recorded losses; give --losses batch.jsonl"
        raise ValueError(msg)
    given = read_losses(losses, named) if losses is not None else None
    shown = steps or [chosen_step(named, given, None)[0]]
    timed = steps or (given and given.steps()) or any([*changing(each.plan)] for each in named)
    at = f", step{'s' * (len(shown) > 1)} {', '.join(map(str, shown))}" if timed else ""
    one = per == "token"
    if given is None:
        panels = against_signals(named, shown, one=one)
    else:
        draw = histogram if kind == "histogram" else against_recorded
        panels = draw(named, shown, given, one=one)
    against = f" {panels[0].title}" if len(panels) == 1 and panels[0].title else ""
    of = f"{len(given.at(shown[0]))} recorded" if given else f"{UNITS} evenly spread"
    return f"Weights of {of} units{against}{at}", panels

"""`weighting plot`: weights and schedules as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weighting.cli.common import (
    allow_plugins,
    check_out,
    echo,
    give_up,
    is_step,
    reason,
    specs_named,
    wrapped,
)
from weighting.cli.panels import (
    UNITS,
    against_recorded,
    against_signals,
    histogram,
    schedules,
)
from weighting.cli.simulate import (
    Named,
    chosen_step,
    cut,
    only_draws,
    per_option,
    read_losses,
    read_named,
    remarks,
)
from weighting.runs.files import write_whole
from weighting.simulate import changing

if TYPE_CHECKING:
    from weighting.cli.panels import Panel

SUFFIXES = (".png", ".svg")
_LONGEST = 48
"""So many characters of a spec's name are shown."""


def _steps(_: click.Context, __: click.Parameter, text: str | None) -> list[int]:
    """Return the steps of a text."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(map(is_step, parts)):
        message = f"{text!r} are no steps; write whole numbers, as in 1,500,2000"
        raise click.BadParameter(message)
    return sorted({int(part) for part in parts})


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True, shell_complete=specs_named)
@click.option("--out", required=True, metavar="FILE", help="A .png or .svg file; written over.")
@click.option(
    "--kind",
    type=click.Choice(["weights", "schedules", "histogram"]),
    default="weights",
    show_default=True,
    help="Weights against each signal, numbers over the run, or weights of --losses.",
)
@click.option(
    "--steps",
    metavar="STEP,...",
    callback=_steps,
    help="Optimizer steps; default the last at which a schedule changes. For schedules, "
    "first and last.",
)
@click.option(
    "--losses",
    metavar="FILE|NUMBERS",
    help="Recorded losses, as for simulate, in place of evenly spread ones.",
)
@per_option
@allow_plugins
def plot(
    specs: tuple[str, ...],
    out: str,
    kind: str,
    steps: list[int],
    losses: str | None,
    per: str,
    *,
    allow_plugins: bool,
) -> None:
    """Draw what SPECs do: weights against signals, schedules, or a batch's weights.

    Weights have a panel for each signal that a spec reads.  It is evenly spread
    over 129 units, while the others are held in the middle.

    \b
    Examples:
      weighting plot linupper prop1 upper --out weights.svg
      weighting plot linupper-gpt2 --out weights.png --steps 1000,1001
      weighting plot linupper-gpt2 toremi --out schedules.svg --kind schedules
      weighting plot mile --out mile.svg --kind histogram --losses batch.jsonl
    """  # noqa: D301
    check_out(out, SUFFIXES)
    path = Path(out)
    try:
        from weighting.cli.figures import picture  # noqa: PLC0415 - the core needs no matplotlib
    except ImportError:
        give_up("this needs matplotlib: pip install 'weighting-dsl[plot]'")
    named = read_named(specs, plugins=allow_plugins, shown=_LONGEST)
    named = [each._replace(label=cut(each.label, _LONGEST)) for each in named]
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

"""`weighting plot`: weights and schedules as a picture."""

from __future__ import annotations

import click

from weighting.cli.common import allow_plugins, check_out, is_step, specs_named
from weighting.cli.named import LONGEST, read_named
from weighting.cli.simulate import per_option

SUFFIXES = (".png", ".svg")


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
    named = read_named(specs, plugins=allow_plugins, shown=LONGEST)
    from weighting.cli.plots import draw  # noqa: PLC0415 - imports torch

    draw(named, out, kind, steps, losses, per)

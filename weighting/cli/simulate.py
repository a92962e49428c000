"""`weighting simulate`: what specs do to given losses, in the terminal."""

from __future__ import annotations

import click

from weighting.cli.common import allow_plugins, is_step, specs_named
from weighting.cli.named import read_named
from weighting.runs.loss_files import LAST_STEP

per_option = click.option(
    "--per",
    type=click.Choice(["sequence", "token"]),
    default="sequence",
    show_default=True,
    help="Take each loss as a sequence of one token, or all as the tokens of one.",
)


def _run(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Return first and last step of a run."""
    if text is None:
        return None
    first, _colon, last = text.partition(":")
    if not (is_step(first) and is_step(last) and int(first) < int(last)):
        message = f"{text!r} is no run; write its first and last step, as in 0:20000"
        raise click.BadParameter(message)
    return int(first), int(last)


@click.command()
@click.argument("spec", metavar="SPEC", shell_complete=specs_named)
@click.argument("more", metavar="", nargs=-1, shell_complete=specs_named)
@click.option(
    "--losses",
    metavar="FILE|NUMBERS",
    required=True,
    help="A .jsonl or .parquet file, a unit a line, or numbers such as 1,2,3,5.",
)
@click.option(
    "--compare",
    metavar="SPEC...",
    multiple=True,
    shell_complete=specs_named,
    help="Further specs, beside it: --compare prop1 upper.",
)
@click.option(
    "--step",
    type=click.IntRange(0, LAST_STEP),
    help="Optimizer step; default the last at which a schedule changes.",
)
@click.option(
    "--over", metavar="FIRST:LAST", callback=_run, help="Show some steps of a run as well."
)
@per_option
@allow_plugins
def simulate(
    spec: str,
    more: tuple[str, ...],
    losses: str,
    compare: tuple[str, ...],
    step: int | None,
    over: tuple[int, int] | None,
    per: str,
    *,
    allow_plugins: bool,
) -> None:
    """Print the weights that SPEC gives to losses, without a model.

    A file has a column loss, in nats, and what else the spec reads: entropy,
    ref_loss, domain, or a column of its own.  With a column step, the units of
    one step are one batch, and --step says of which.

    \b
    Examples:
      weighting simulate linupper --losses 1,2,3,5
      weighting simulate mile --losses batch.jsonl --over 0:20000
      weighting simulate linupper --losses 1,2,3,5 --compare prop1 upper
    """  # noqa: D301
    named = read_named([spec, *compare, *more], plugins=allow_plugins)
    from weighting.cli import simulation  # noqa: PLC0415 - imports torch

    simulation.simulate(named, losses, step, over, per)

"""`weighting explain`: what a spec means, in full."""

from __future__ import annotations

import click

from weighting.cli.common import allow_plugins, echo, read_or_exit, specs_named
from weighting.runs.loss_files import LAST_STEP


@click.command()
@click.argument("spec", metavar="SPEC", shell_complete=specs_named)
@click.option(
    "--steps",
    type=click.IntRange(1, LAST_STEP),
    help="Length of the run schedules are shown for.",
)
@allow_plugins
def explain(spec: str, steps: int | None, *, allow_plugins: bool) -> None:
    """Print what a spec means: sugar expanded, defaults filled in, scopes, schedules, signals.

    It ends with what the weights cost: their way through the output layer, and what ranks exchange.

    \b
    Examples:
      weighting explain specs/linupper.yaml
      weighting explain "temperature(step(100, 0.4, at=500))" --steps 2000
    """  # noqa: D301
    read_spec, plan = read_or_exit(spec, plugins=allow_plugins)
    from weighting.cli.explanation import explanation  # noqa: PLC0415 - imports torch

    echo("\n".join(explanation(read_spec, plan, steps)))

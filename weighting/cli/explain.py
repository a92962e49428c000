"""`weighting explain`: what a spec means, in full."""

from __future__ import annotations

import os

import click

from weighting.cli.common import allow_plugins, echo, give_up, read_or_exit, specs_and_words
from weighting.errors import closest
from weighting.language.find import is_file, shipped
from weighting.language.words import words
from weighting.runs.loss_files import LAST_STEP


@click.command()
@click.argument("spec", metavar="SPEC", shell_complete=specs_and_words)
@click.option(
    "--steps",
    type=click.IntRange(1, LAST_STEP),
    help="Length of the run schedules are shown for.",
)
@allow_plugins
def explain(spec: str, steps: int | None, *, allow_plugins: bool) -> None:
    """Print what a spec means: sugar expanded, defaults filled in, scopes, schedules, signals.

    It ends with what the weights cost: their way through the output layer, and what ranks exchange.
    Where SPEC is the name of a stage or schedule, print its arguments, levels, formula and source.

    \b
    Examples:
      weighting explain specs/linupper.yaml
      weighting explain temperature
      weighting explain "temperature(step(100, 0.4, at=500))" --steps 2000
    """  # noqa: D301
    word = next((x for x in words() if x.name == spec.strip() and not is_file(spec)), None)
    if word is not None:
        from weighting.cli.word import word_lines  # noqa: PLC0415 - imports torch

        echo("\n".join(word_lines(word)))
        if word.name not in shipped():
            return
        echo(f"\nThe shipped spec {word.name} is another thing than that stage, and means:\n")
    elif not os.path.exists(spec) and spec.strip() not in shipped():  # noqa: PTH110 - as is_file
        near = closest(spec.strip(), [*(x.name for x in words()), *shipped()], 1)
        if spec.strip().isidentifier() and near and near[0] not in shipped():
            give_up(f"nothing is called {spec.strip()!r}; did you mean {near[0]!r}?")
    read_spec, plan = read_or_exit(spec, plugins=allow_plugins)
    from weighting.cli.explanation import explanation  # noqa: PLC0415 - imports torch

    echo("\n".join(explanation(read_spec, plan, steps)))

"""`weighting replay`: what other specs would have done to what a run recorded of its data."""

from __future__ import annotations

from pathlib import Path

import click

from weighting.cli.common import allow_plugins, specs_named
from weighting.cli.host import from_host


@click.command("replay")
@click.argument("run", metavar="RUN_FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--spec",
    "specs",
    metavar="SPEC",
    multiple=True,
    help="What to replay; more may follow.",
    shell_complete=specs_named,
)
@click.argument("more", metavar="[SPEC]...", nargs=-1, shell_complete=specs_named)
@click.option(
    "--text", is_flag=True, help="Read the data again and show how what is listed begins."
)
@allow_plugins
def replay_command(
    run: Path, specs: tuple[str, ...], more: tuple[str, ...], *, text: bool, allow_plugins: bool
) -> None:
    """Print what other specs would have done to what a run recorded.

    RUN_FOLDER is the --dump_folder of a run with --weighting.record every=10,
    or every=10,documents=8 for specs that weigh per document.  The first column
    is what the run itself did.  Losses stay what they were: a run with another
    spec would soon have had others.  A spec that asks for more than was
    recorded is left out, which is said; exit 2 if every one is.

    \b
    Examples:
      weighting replay outputs/linupper
      weighting replay outputs/linupper --spec prop1 upper extremes
      weighting replay outputs/linupper --spec "temperature(0.5)"
      weighting replay outputs/linupper --spec prop1 --text
    """  # noqa: D301
    from weighting.cli.replay_report import report  # noqa: PLC0415 - imports torch

    texts = from_host("replay_text", "texts_of")(run, plugins=allow_plugins) if text else None
    report(run, [*specs, *more], plugins=allow_plugins, texts=texts)

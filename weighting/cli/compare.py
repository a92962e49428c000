"""`weighting compare`: train several specs alike, with the torchtitan integration."""

from __future__ import annotations

from itertools import takewhile

import click

from weighting.cli import common
from weighting.cli.common import (
    allow_plugins,
    check_data,
    check_out,
    read_or_exit,
    specs_named,
)
from weighting.cli.host import run_in_host
from weighting.cli.report import SUFFIXES


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument(
    "words",
    metavar="SPEC SPEC [SPEC]... [TORCHTITAN FLAGS]...",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    shell_complete=specs_named,
)
@click.option("--out", help="HTML file of the report; default report.html in --dump_folder.")
@common.data
@common.steps_of_runs
@common.seed
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Train each spec with so many seeds; ends in validation losses with intervals.",
)
@common.mixture
@common.reference
@common.config
@common.module
@common.ranks
@click.option(
    "--dump_folder",
    "--folder",
    "folder",
    default="outputs/compare",
    show_default=True,
    help="Where the runs go.",
)
@allow_plugins
def compare(
    words: tuple[str, ...], out: str | None, *, allow_plugins: bool, **options: object
) -> None:
    """Train each SPEC from the same weights on the same data.

    The runs follow one another, each in a folder of its spec's name below
    --dump_folder, with its output in NAME.log, and end in a report that compares
    them with the first.  Cut off, the same command goes on; with one more SPEC
    it trains that.  Further flags go to torchtitan, after the specs.

    \b
    Examples:
      weighting compare uniform linupper
      weighting compare uniform linupper --seeds 3
      weighting compare uniform linupper mile --data my.jsonl --steps 500
      weighting compare uniform mine.yaml --config llama3_8b \\
          --dump_folder outputs/8b --training.local_batch_size 2
    """  # noqa: D301
    if out is not None:
        check_out(out, SUFFIXES)
    check_data(options["data"])
    specs = [*takewhile(lambda word: not word.startswith("-"), words)]
    options |= {"out": out, "allow_plugins": allow_plugins}
    read = {text: read_or_exit(text, plugins=allow_plugins)[0] for text in specs}
    options["specs"] = [(text, read[text]) for text in specs]
    run_in_host("compare", flags=words[len(specs) :], **options)

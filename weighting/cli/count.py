"""`weighting count`: how often each token is a label, with the torchtitan integration."""

from __future__ import annotations

import click

from weighting.cli import common
from weighting.cli.common import check_data, check_out
from weighting.cli.host import run_in_host


@click.command(context_settings={"ignore_unknown_options": True})
@common.data
@click.option("--out", required=True, help="The .json file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@common.config
@common.module
@common.flags
def count(out: str, flags: tuple[str, ...], **options: object) -> None:
    """Count how often each token is a label of the data.

    Specs that read column(label_count), such as inverse-frequency, take the
    counts from the file.  Data and tokenizer are those of a run with --config
    and the same flags; one process reads all of it once.

    \b
    Examples:
      weighting count --data my.jsonl --out counts.json
      weighting train inverse-frequency --data my.jsonl \\
          --dataloader.label_counts counts.json
    """  # noqa: D301
    check_out(out, (".json",))
    check_data(options["data"])
    run_in_host("count", out=out, flags=flags, **options)

"""`weighting score`: losses under a model, with the torchtitan integration."""

from __future__ import annotations

import re

import click

from weighting.cli import common
from weighting.cli.common import check_data, check_out
from weighting.cli.host import run_in_host


def _checked(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    if name is not None and not re.fullmatch("[A-Za-z0-9_]+", name):
        msg = f"{name!r} is no name; write letters, digits and underscores"
        raise click.BadParameter(msg)
    return name


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoint", metavar="CHECKPOINT")
@common.data
@click.option("--out", required=True, help="The .parquet file to write.")
@click.option(
    "--per",
    type=click.Choice(["token", "document"]),
    default="token",
    show_default=True,
    help="A list of losses for each document, or their mean.",
)
@click.option(
    "--name",
    callback=_checked,
    help="Of one reference among several: the column is ref_loss_NAME.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file, and the column.")
@common.config
@common.module
@common.ranks
@common.flags
def score(checkpoint: str, out: str, flags: tuple[str, ...], **options: object) -> None:
    """Store each token's loss under CHECKPOINT as a column ref_loss of the data.

    Specs that read a reference loss then take it from the data, and need no
    reference model beside the one that trains.  CHECKPOINT is a folder step-N of
    torchtitan, or one of them, of which the latest is taken; --config is what it
    was trained with.  Further flags go to torchtitan, as for train; give
    --training.seq_len and the data's columns as in the run that follows.

    \b
    Examples:
      weighting score outputs/uniform/checkpoint --data my.jsonl --out s.parquet
      weighting score ckpt --data my.jsonl --out s.parquet --per document
      weighting score ckpt --config llama3_8b --data corpus/ --out s.parquet
      weighting score ckpt --name old --data my.jsonl --out s.parquet
      weighting train rho-1 --data s.parquet
    """  # noqa: D301
    check_out(out, (".parquet",))
    check_data(options["data"])
    run_in_host("score", checkpoint=checkpoint, out=out, flags=flags, **options)

"""`weighting train`: a run of torchtitan's trainer, weighted."""

from __future__ import annotations

import click

from weighting.cli.common import (
    allow_plugins,
    check_data,
    give_up,
    read_or_exit,
    specs_named,
)
from weighting.cli.host import run_in_host
from weighting.errors import SpecError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("spec", metavar="SPEC", shell_complete=specs_named)
@click.option("--config", default="llama3_debugmodel", show_default=True, help="Config function.")
@click.option(
    "--module", default="titan_integration", show_default=True, help="Module it is found in."
)
@click.option("--mixture", help="A spec by whose domain weights training data is drawn.")
@click.option("--data", help="A .jsonl/.parquet file or folder, or a Hugging Face name.")
@click.option("--ranks", type=click.IntRange(1), help="Processes; default one per accelerator.")
@allow_plugins
@click.argument("flags", metavar="[TORCHTITAN FLAGS]...", nargs=-1, type=click.UNPROCESSED)
def train(
    spec: str,
    mixture: str | None,
    flags: tuple[str, ...],
    *,
    allow_plugins: bool,
    **options: object,
) -> None:
    """Train with torchtitan, weighted by SPEC; further flags go to torchtitan.

    Without an accelerator it trains a small model on this machine's CPU for 60
    steps, on text that comes with Python.

    \b
    Examples:
      weighting train specs/linupper.yaml
      weighting train linupper --data my.jsonl --training.steps 500
      weighting train linupper --mixture mixture.yaml --data my.jsonl
      weighting train mile --config llama3_8b --training.local_batch_size 2
    """  # noqa: D301
    check_data(options["data"])
    weighting, _ = read_or_exit(spec, plugins=allow_plugins)
    if mixture is not None:
        from weighting.mixture import with_mixture  # noqa: PLC0415 - imports torch

        try:
            with_mixture(weighting, read_or_exit(mixture, plugins=allow_plugins)[0])
        except SpecError as error:
            give_up(str(error))
    options |= {"spec": spec, "mixture": mixture, "allow_plugins": allow_plugins}
    run_in_host("train", name=weighting.name, flags=flags, **options)

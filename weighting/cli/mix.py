"""`weighting mix`: search for a mixture of domains, with the torchtitan integration."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import click

from weighting.cli.common import allow_plugins, give_up


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("method", metavar="METHOD")
@click.option("--out", required=True, help="File to write the mixture to.")
@click.option("--data", help="A .jsonl/.parquet file or folder, or a Hugging Face name.")
@click.option(
    "--steps", type=click.IntRange(1), default=200, show_default=True, help="Proxy steps."
)
@click.option("--reference-steps", type=click.IntRange(1), help="Reference steps; default --steps.")
@click.option("--reference", help="Checkpoint to use as reference, or `column` for ref_loss.")
@click.option("--config", default="llama3_proxy", show_default=True, help="Config function.")
@click.option(
    "--module", default="titan_integration", show_default=True, help="Module it is found in."
)
@click.option("--ranks", type=click.IntRange(1), help="Processes; default one per accelerator.")
@click.option("--folder", help="Where the runs go; default outputs/mix-<spec>.")
@click.option("--overwrite", is_flag=True, help="Write over an existing --out.")
@allow_plugins
@click.argument("flags", metavar="[TORCHTITAN FLAGS]...", nargs=-1, type=click.UNPROCESSED)
def mix(
    method: str,
    *,
    out: str,
    data: str | None,
    steps: int,
    reference_steps: int | None,
    reference: str | None,
    config: str,
    module: str,
    ranks: int | None,
    folder: str | None,
    overwrite: bool,
    allow_plugins: bool,
    flags: tuple[str, ...],
) -> None:
    """Search for the proportions of domains by METHOD: doremi, doge, or a spec.

    It trains a small reference model if the method reads one, then the proxy
    that METHOD weighs, and writes the proportions found as a spec. Cut off, the
    same command goes on.

    \b
    Examples:
      weighting mix doremi --data my.jsonl --out mixture.yaml
      weighting mix doge --data my.jsonl --out doge.yaml --steps 500
      weighting train linupper --data my.jsonl --mixture mixture.yaml
    """  # noqa: D301
    if importlib.util.find_spec("torchtitan") is None:
        give_up("training needs torchtitan: pip install 'weighting-dsl[titan]'")
    options = {"out": out, "data": data, "steps": steps, "reference-steps": reference_steps}
    options |= {"reference": reference, "config": config, "module": module, "ranks": ranks}
    options["folder"] = folder
    command = [sys.executable, "-m", "titan_integration.mixing", f"--method={method}"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    command += ["--overwrite"] if overwrite else []
    command += ["--allow-plugins"] if allow_plugins else []
    try:
        code = subprocess.call([*command, "--", *flags])  # noqa: S603 - our own module
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)

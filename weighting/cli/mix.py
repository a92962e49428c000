"""`weighting mix`: search for a mixture of domains, with the torchtitan integration."""

from __future__ import annotations

import click

from weighting.cli import common
from weighting.cli.common import allow_plugins, check_data, check_out, give_up, read_or_exit
from weighting.cli.host import run_in_host
from weighting.errors import closest
from weighting.language.find import is_file, shipped

METHODS = {"doremi": "doremi-proxy", "doge": "doge-proxy"}
"""Specs that search for a mixture, by the name of the method."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("method", metavar="METHOD")
@click.option("--out", required=True, help="File to write the mixture to.")
@common.data
@click.option(
    "--steps", type=click.IntRange(1), default=200, show_default=True, help="Proxy steps."
)
@click.option("--reference-steps", type=click.IntRange(1), help="Reference steps; default --steps.")
@click.option("--reference", help="Checkpoint to use as reference, or `column` for ref_loss.")
@click.option("--config", default="llama3_proxy", show_default=True, help="Config function.")
@common.module
@common.ranks
@common.seed
@click.option(
    "--dump_folder", "--folder", "folder", help="Where the runs go; default outputs/mix-<spec>."
)
@click.option("--overwrite", is_flag=True, help="Write over an existing --out.")
@allow_plugins
@common.flags
def mix(
    method: str, out: str, flags: tuple[str, ...], *, allow_plugins: bool, **options: object
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
    check_out(out)
    check_data(options["data"])
    text = METHODS.get(method, method)
    if text not in shipped() and not is_file(text):
        for near in closest(text, METHODS, 1):
            give_up(f"no method {text!r}; did you mean {near!r}?")
    spec, _ = read_or_exit(text, plugins=allow_plugins)
    options |= {"out": out, "allow_plugins": allow_plugins}
    run_in_host("mix", text=text, spec=spec, methods=[*METHODS], flags=flags, **options)

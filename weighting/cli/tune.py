"""`weighting tune`: over which values of a number a spec weighs as it is wished to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weighting.cli import common
from weighting.cli.common import (
    allow_plugins,
    check_data,
    check_matplotlib,
    check_out,
    give_up,
    read_or_exit,
    specs_named,
)
from weighting.cli.groups import in_groups
from weighting.cli.host import run_in_host
from weighting.cli.plot import SUFFIXES
from weighting.cli.simulate import per_option

if TYPE_CHECKING:
    from collections.abc import Callable

_GROUPS = {
    "Over what a run recorded": ["run", "losses", "per", "ess", "capped", "mass"],
    "By short runs": ["train", "trials", "steps", "seed", "seeds", "folder"],
    "As in train": ["data", "mixture", "reference", "config", "module", "ranks"],
    "Other": ["plot", "allow_plugins", "help"],
}
_TRAINING = ("steps", "data", "mixture", "reference", "ranks")
"""Options that only runs have, and that are None where they are not given."""


def _range(bound: str) -> Callable[..., tuple[float, float] | None]:
    """Return what reads a range, or a single number as that bound of one."""

    def read(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, float] | None:
        return None if text is None else _ends(text, bound)

    return read


def _ends(text: str, bound: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon:
        low, high = (text, "") if bound == "low" else ("", text)
    try:
        ends = float(low or "0"), float(high or "1")
    except ValueError:
        ends = (1.0, 0.0)
    if not 0 <= ends[0] <= ends[1] <= 1:
        example = "0.7" if bound == "low" else "0.1"
        msg = f"{text!r} is no range within 0 and 1; write one end, {example}, or both, 0.2:0.8"
        raise click.BadParameter(msg)
    return ends


def _masses(
    _: click.Context, __: click.Parameter, texts: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, equals, ends = text.rpartition("=")
        if not (name and equals and ":" in ends):
            msg = f"{text!r} names no domain and range; write code=0.1:0.4"
            raise click.BadParameter(msg)
        found[name] = _ends(ends, "low")
    return found


@click.command(cls=in_groups(_GROUPS, {}), context_settings={"ignore_unknown_options": True})
@click.argument("spec", metavar="SPEC", shell_complete=specs_named)
@click.argument("number", metavar="NUMBER=VALUES")
@click.option("--run", metavar="FOLDER", help="A run with --weighting.record every=10.")
@click.option("--losses", metavar="FILE", help="A .jsonl or .parquet file, as for simulate.")
@per_option
@click.option("--ess", metavar="RANGE", callback=_range("low"), help="Of ESS/n; 0.7 is at least.")
@click.option(
    "--capped", metavar="RANGE", callback=_range("high"), help="Share at a cap; 0.1 is at most."
)
@click.option(
    "--mass",
    metavar="DOMAIN=RANGE",
    multiple=True,
    callback=_masses,
    help="Of a domain's share of all weight; several may be given.",
)
@click.option("--train", is_flag=True, help="Train with each value, and compare the losses.")
@click.option(
    "--trials", type=click.IntRange(1), default=8, show_default=True, help="Values of a range."
)
@common.steps_of_runs
@common.seed
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Train each value with so many seeds.",
)
@click.option(
    "--dump_folder", "--folder", "folder", help="Where runs go; default outputs/tune-<spec>."
)
@common.data
@common.mixture
@common.reference
@common.config
@common.module
@common.ranks
@click.option("--plot", metavar="FILE", help="A .png or .svg file for a picture.")
@allow_plugins
@common.flags
def tune(
    spec: str,
    number: str,
    run: str | None,
    losses: str | None,
    per: str,
    ess: tuple[float, float] | None,
    capped: tuple[float, float] | None,
    mass: dict[str, tuple[float, float]],
    train: bool,
    plot: str | None,
    flags: tuple[str, ...],
    *,
    allow_plugins: bool,
    **options: object,
) -> None:
    """Say over which VALUES of a NUMBER a SPEC weighs as it should.

    NUMBER is an argument of a stage, VALUES are a range, 0.1:10, or a list,
    0.1,0.4,1.  With --run or --losses nothing is trained: each value weighs what
    was recorded, and the values are told that keep effective sample size, share
    at the cap and domains' shares in the ranges asked for.  Exit 1 if none does.

    With --train each value is trained alike, and Optuna chooses the values of a
    range by the validation losses so far.  Cut off, the same command goes on.

    \b
    Examples:
      weighting tune linupper temperature.tau=0.05:5 --run run --ess 0.7
      weighting tune prop1 tau=0.1:2 --run run --ess 0.7 --capped 0.1 --plot t.svg
      weighting tune focal gamma=0:4 --losses units.jsonl --per token --ess 0.8
      weighting tune linupper tau=0.1:10 --train --trials 8 --steps 200
    """  # noqa: D301
    name, equals, text = number.partition("=")
    if not (name and equals):
        give_up(f"{number!r} says no values; write NUMBER=VALUES, as in temperature.tau=0.1:10")
    wishes = {"ess": ess, "capped": capped}
    asked = {what: ends for what, ends in wishes.items() if ends is not None}
    if (run is not None) + (losses is not None) + train != 1:
        give_up("give one of --run FOLDER, --losses FILE and --train: what to judge the values by")
    if train and (asked or mass):
        give_up("--ess, --capped and --mass judge recorded weights; give them with --run")
    if not train:
        others = [f"--{option}" for option in _TRAINING if options[option] is not None]
        if others := [*others, *flags]:
            give_up(f"{others[0]} is of a run, and nothing is trained without --train")
        if not (asked or mass):
            give_up("say what the values are to keep: --ess 0.7, --capped 0.1, --mass code=0.1:0.4")
    if plot is not None:
        check_out(plot, SUFFIXES)
        check_matplotlib()
    check_data(options["data"])
    if train and ":" in text and importlib.util.find_spec("optuna") is None:
        give_up(
            "choosing from a range needs Optuna: pip install 'weighting-dsl[tune]'; "
            "a list of values, as in 0.1,0.4,1, does without"
        )
    read, _ = read_or_exit(spec, plugins=allow_plugins)
    from weighting.runs.vary import number_named, values_of  # noqa: PLC0415 - imports torch

    try:
        found, values = number_named(read, name), values_of(text)
    except ValueError as error:
        give_up(str(error))
    if train:
        options |= {"spec": read, "number": found, "values": values, "plot": plot}
        options |= {"text": spec, "allow_plugins": allow_plugins}
        run_in_host("tune", flags=flags, **options)
    from weighting.cli.tune_report import report  # noqa: PLC0415 - imports torch

    source = Path(run) if run is not None else losses
    assert source is not None
    report(read, found, values, source, asked, mass, per=per, plot=plot)

"""`weighting train`: a run of torchtitan's trainer, weighted."""

from __future__ import annotations

import click

from weighting.cli import common
from weighting.cli.common import (
    allow_plugins,
    check_data,
    give_up,
    read_or_exit,
    specs_named,
)
from weighting.cli.groups import in_groups
from weighting.cli.host import from_host, run_in_host
from weighting.errors import SpecError

SHORT = {
    "steps": "--training.steps",
    "seed": "--debug.seed",
    "folder": "--dump_folder",
    "reference": "--weighting.reference",
}
"""Options that stand for a flag of torchtitan's."""
_GROUPS = {
    "What is trained": ["config", "module", "reference"],
    "On which data": ["data", "mixture"],
    "How": ["steps", "seed", "ranks"],
    "On several nodes": [
        "nnodes",
        "node_rank",
        "rdzv_endpoint",
        "rdzv_backend",
        "rdzv_id",
        "max_restarts",
    ],
    "Where results go": ["folder", "hf"],
    "Other": ["allow_plugins", "help_all", "help"],
}
_FLAGS = {
    "Torchtitan's flags, of weighting": [
        ("--weighting.record WHAT", "Write down single sequences, every=10; for replay."),
        ("--weighting.agree_every N", "Check every N steps that all ranks weigh alike."),
        ("--weighting.allow_changed_spec", "Resume with another spec, its state afresh."),
    ],
    "Torchtitan's flags, often used": [
        ("--checkpoint.enable", "Save, and go on from what was saved."),
        ("--validator.enable", "Validate as well, by domain."),
        ("--training.seq_len N", "Tokens of a sequence."),
        ("--training.local_batch_size N", "Sequences of a rank's batch."),
    ],
}


def _help_all(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the host's own help, and exit."""
    if value and not context.resilient_parsing:
        module = context.params.get("module", "titan_integration")
        config = context.params.get("config", "llama3_debugmodel")
        from_host("train", "print_help")(module, config)
        context.exit()


@click.command(cls=in_groups(_GROUPS, _FLAGS), context_settings={"ignore_unknown_options": True})
@click.argument("spec", metavar="SPEC", shell_complete=specs_named)
@common.config
@common.module
@common.reference
@common.data
@common.mixture
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, --training.steps.")
@click.option("--seed", type=click.IntRange(0), help="Of the first weights, --debug.seed.")
@common.ranks
@click.option("--nnodes", type=click.IntRange(1), help="Nodes; default SLURM's, or one.")
@click.option("--node-rank", type=click.IntRange(0), help="Which node this is, from 0 on.")
@click.option("--rdzv-endpoint", help="Where nodes meet, HOST:PORT of the first.")
@click.option("--rdzv-backend", help="How they meet; default c10d.")
@click.option("--rdzv-id", help="Tells runs apart that meet at one place.")
@click.option("--max-restarts", type=click.IntRange(0), help="After failed processes; default 0.")
@click.option("--dump_folder", "--out", "folder", help="Folder of the run; default outputs/<spec>.")
@click.option("--hf", is_flag=True, help="Export to Hugging Face at the end, to <out>/hf.")
@allow_plugins
@click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_help_all,
    help="Show all flags of torchtitan, for --config, and exit.",
)
@common.flags
def train(
    spec: str,
    mixture: str | None,
    flags: tuple[str, ...],
    *,
    allow_plugins: bool,
    hf: bool,
    **options: object,
) -> None:
    """Train with torchtitan, weighted by SPEC; further flags go to torchtitan.

    Without an accelerator it trains a small model on this machine's CPU for 60
    steps, on text that comes with Python.

    \b
    Examples:
      weighting train specs/linupper.yaml
      weighting train linupper --data my.jsonl --steps 500
      weighting train linupper --mixture mixture.yaml --data my.jsonl
      weighting train mile --config qwen3_0_6b --training.local_batch_size 2
    """  # noqa: D301
    check_data(options["data"])
    weighting, _ = read_or_exit(spec, plugins=allow_plugins)
    if mixture is not None:
        from weighting.mixture import with_mixture  # noqa: PLC0415 - imports torch

        try:
            with_mixture(weighting, read_or_exit(mixture, plugins=allow_plugins)[0])
        except SpecError as error:
            give_up(str(error))
    given = {flag: options.pop(name) for name, flag in SHORT.items()}
    short = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    options["nodes"] = {name: options.pop(name) for name in _GROUPS["On several nodes"]}
    options |= {"spec": spec, "mixture": mixture, "allow_plugins": allow_plugins}
    command = "train_and_export" if hf else "train"
    run_in_host(command, name=weighting.name, flags=[*short, *flags], **options)

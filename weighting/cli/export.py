"""`weighting export`: a checkpoint for Hugging Face, with the torchtitan integration."""

from __future__ import annotations

import click

from weighting.cli import common
from weighting.cli.host import run_in_host


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--out", required=True, help="The folder to make.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights.",
)
@common.config
@common.module
@common.flags
def export(checkpoint: str, out: str, flags: tuple[str, ...], **options: object) -> None:
    """Write CHECKPOINT as a folder that AutoModelForCausalLM loads.

    Weights as safetensors, config.json, generation_config.json, and a tokenizer
    that begins a text as training did.  CHECKPOINT is a folder step-N of
    torchtitan, or one of them, of which the latest is taken; it stays as it is.
    --config is what it was trained with, and so are further flags.

    \b
    Examples:
      weighting export outputs/linupper/checkpoint --out linupper-hf
      weighting export ckpt/step-500 --config qwen3_0_6b --out qwen-hf
    """  # noqa: D301
    run_in_host("export", checkpoint=checkpoint, out=out, flags=flags, **options)

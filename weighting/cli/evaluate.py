"""`weighting evaluate`: models on benchmarks, by lm-evaluation-harness."""

from __future__ import annotations

import importlib.util

import click

from weighting.cli import common
from weighting.cli.common import give_up
from weighting.cli.host import run_in_host


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", metavar="MODEL... [TORCHTITAN FLAGS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--tasks", required=True, help="Names, by commas; linupper-gpt2, mile-triviaqa.")
@click.option("--shots", type=click.IntRange(0), help="Examples before a question.")
@click.option(
    "--task-folder",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of task files of yours.",
)
@click.option("--limit", type=click.IntRange(1), help="Questions of a task; default all.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="At once.")
@common.config
@common.module
def evaluate(words: tuple[str, ...], tasks: str, **options: object) -> None:
    """Ask each MODEL the questions of benchmarks, with lm-evaluation-harness.

    MODEL is the folder of a run, a checkpoint as weighting score takes it, or a
    folder for Hugging Face.  Of a run it is the latest checkpoint, which is
    exported for the time being; --config is what it was trained with.  Scores
    are in per cent; those of the others are compared with the first MODEL's by
    question, with 95 % intervals.  They are kept in evaluation.json beside the
    run, and weighting report shows them.

    --tasks takes the harness's names and those of papers' lists, which say how
    many examples precede a question.  Its tasks are fetched from the hub; those
    in --task-folder may read local files.

    \b
    Examples:
      weighting evaluate outputs/uniform outputs/linupper --tasks linupper-gpt2
      weighting evaluate linupper-hf --tasks sciq,piqa --shots 5 --limit 100
      weighting evaluate outputs/mile --tasks mine --task-folder tasks/
    """  # noqa: D301
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    models, flags = words[:count], words[count:]
    if not models:
        give_up("which MODEL? Give the folder of a run, or of a checkpoint")
    if importlib.util.find_spec("lm_eval") is None:
        give_up("this needs lm-evaluation-harness: pip install 'weighting-dsl[evaluate]'")
    names = [name for x in tasks.split(",") if (name := x.strip())]
    run_in_host("evaluate", models=models, tasks=names, flags=flags, **options)

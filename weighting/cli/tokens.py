"""`weighting tokens`: weights of a text under a model, with the torchtitan integration."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import click

from weighting.cli import common
from weighting.cli.common import allow_plugins, give_up, read_or_exit
from weighting.cli.host import run_in_host
from weighting.columns import HIDDEN, plain_name
from weighting.errors import SpecError
from weighting.runs.loss_files import LAST_STEP

if TYPE_CHECKING:
    from weighting.build import Plan
    from weighting.spec import Spec

_MOST = 3
"""So many weights fit in a line of a terminal."""
_FROM_LOGITS = {"loss", "entropy", "target_prob", "error_norm", "domain_ids"}


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument(
    "words",
    metavar="SPEC [SPEC]... [TORCHTITAN FLAGS]...",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
)
@click.option("--checkpoint", required=True, help="A folder step-N of torchtitan, or of several.")
@click.option(
    "--text", required=True, type=click.Path(exists=True, dir_okay=False), help="A file in UTF-8."
)
@click.option("--out", "--html", "html", help="HTML file of a page with the numbers of each token.")
@click.option(
    "--step", type=click.IntRange(0, LAST_STEP), help="Optimizer step; default the checkpoint's."
)
@common.config
@common.module
@allow_plugins
def tokens(words: tuple[str, ...], *, allow_plugins: bool, **options: object) -> None:
    """Print a text with each token shaded by its weight under a checkpoint.

    With two or three SPECs, one view for each.  The text is encoded as in
    training and cut into windows of --training.seq_len, which are the sequences
    of one batch.  Without colours, in a pipe or with NO_COLOR, it is a table.
    CHECKPOINT is what weighting score takes, --config what it was trained with;
    further flags go to torchtitan, after the specs.

    \b
    Examples:
      weighting tokens mile --checkpoint outputs/mile/checkpoint --text a.txt
      weighting tokens mile focal --checkpoint ckpt --text a.txt --out a.html
      weighting tokens linupper --checkpoint ckpt --text a.txt \\
          --config llama3_8b --training.seq_len 512
    """  # noqa: D301
    specs = [*takewhile(lambda word: not word.startswith("-"), words)]
    if not 1 <= len(specs) <= _MOST:
        give_up(f"one to {_MOST} specs, before torchtitan's flags; there are {len(specs)}")
    read: list[tuple[str, Spec]] = []
    for text in specs:
        spec, plan = read_or_exit(text, plugins=allow_plugins)
        if why := refusal(spec, plan):
            give_up(f"{text}: {why}")
        read.append((text, spec))
    options |= {"allow_plugins": allow_plugins}
    run_in_host("tokens", specs=read, flags=words[len(specs) :], **options)


def refusal(spec: Spec, plan: Plan) -> str | None:
    """Return why a text and a model alone do not tell the weights of a spec, or None."""
    from weighting.build import build  # noqa: PLC0415 - imports torch
    from weighting.build.shares import share_problems  # noqa: PLC0415
    from weighting.loss.logits import OF_LOGITS  # noqa: PLC0415

    lacking = sorted(x for x in plan.needs - _FROM_LOGITS if not x.startswith(OF_LOGITS))
    if {*plan.targets.values()} == {"sampling"}:
        return "it draws data and leaves the loss alone: every token of a text weighs one"
    if "ref_loss" in lacking:
        return "it reads the loss of a reference model; weights here are from one model alone"
    if HIDDEN in lacking:
        return "it reads hidden states, and here logits are all there is of a model"
    if lacking:
        name = plain_name(lacking[0])
        return f"it reads the column {name!r}, which a plain text does not have"
    if plan.listens_to:
        return "it is told between batches how training goes, and here nothing trains"
    if problems := share_problems(spec):
        return str(SpecError(problems))
    try:
        build(spec, domains=["text"])
    except SpecError as error:
        return f"it weighs domains by name, and a text is of none of them: {error}"
    return None

"""What the commands share: reading a spec argument, and ending on an error."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from click.shell_completion import CompletionItem

from weighting.errors import SpecError, printable
from weighting.language.find import shipped
from weighting.language.open import open_argument
from weighting.language.words import is_stage, words
from weighting.runs.loss_files import LAST_STEP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.build import Plan
    from weighting.spec import Spec

WIDTH = 80
"""Columns of a terminal, and of what is written into a pipe."""

allow_plugins = click.option(
    "--allow-plugins",
    is_flag=True,
    help="Import the modules a spec names under plugins:, which runs their code.",
)


data = click.option("--data", help="A .jsonl/.parquet file or folder, or a Hugging Face name.")
mixture = click.option("--mixture", help="A spec by whose domain weights training data is drawn.")
reference = click.option(
    "--reference",
    help="Checkpoint whose loss is ref_loss, for specs that read it. Several: NAME=PATH,NAME=PATH.",
)
ranks = click.option(
    "--ranks", type=click.IntRange(1), help="Processes; default one per accelerator."
)
# Eager, so that --help-all of train knows them.
config = click.option(
    "--config",
    default="llama3_debugmodel",
    show_default=True,
    is_eager=True,
    help="Model: weighting list configs.",
)
module = click.option(
    "--module",
    default="titan_integration",
    show_default=True,
    is_eager=True,
    help="Module of a config of yours.",
)
steps_of_runs = click.option(
    "--steps", type=click.IntRange(1), help="Of each run; default as in train."
)
seed = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first weights."
)
flags = click.argument("flags", metavar="[TORCHTITAN FLAGS]...", nargs=-1, type=click.UNPROCESSED)


def read(argument: str, *, plugins: bool) -> tuple[Spec, Plan]:
    """Return the spec an argument means, and its plan.

    Raises:
        SpecError: It is wrong.
    """
    document = open_argument(argument, is_stage)
    from weighting.build import plan_of  # noqa: PLC0415 - imports torch, and there is a text now
    from weighting.language.read import spec_of  # noqa: PLC0415

    spec = spec_of(document, allow_plugins=plugins)
    return spec, plan_of(spec)


def read_or_exit(argument: str, *, plugins: bool) -> tuple[Spec, Plan]:
    """Return what `read` does; on an error print it and exit with status 2."""
    try:
        return read(argument, plugins=plugins)
    except SpecError as error:
        give_up(str(error))


def give_up(message: str) -> NoReturn:
    """Print an error and exit with status 2."""
    complain(message)
    sys.exit(2)


def complain(message: str) -> None:
    """Print an error, as `echo` prints."""
    click.echo(printable(message, keep="\n"), err=True)


def echo(text: str) -> None:
    """Print a text, question marks for what would move the cursor or change colours."""
    click.echo(printable(text, keep="\n"))


def check_out(out: str | Path, suffixes: Sequence[str] = ()) -> None:
    """Exit with status 2 if no file can be written under a name that was given as --out.

    Args:
        out: The name.
        suffixes: How it may end; in any way where there are none.
    """
    path = Path(out)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises on a name that is too long
        give_up(f"--out {out}: is a folder; give the name of a file")
    if suffixes and path.suffix.lower() not in suffixes:
        give_up(f"--out {out}: give it a name that ends in {' or '.join(suffixes)}")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        give_up(f"--out {out}: no folder {path.parent}; make it first")


def check_matplotlib() -> None:
    """Exit with status 2 if there is nothing to draw pictures with."""
    if importlib.util.find_spec("matplotlib") is None:
        give_up("this needs matplotlib: pip install 'weighting-dsl[plot]'")


def check_data(data: object) -> None:
    """Exit with status 2 if --data is the name of a file by its ending, and no such file is there.

    Any other name may be one of Hugging Face's.
    """
    name = str(data)
    elsewhere = "://" in name or any(c in name for c in "*?[")
    if name.endswith(_DATA) and not elsewhere and not os.path.exists(name):  # noqa: PTH110 - as above
        give_up(f"--data {name}: no such file; give one, or its folder")


_DATA = (".jsonl", ".json", ".parquet")


def reason(error: OSError) -> str:
    """Return where the system refused and why, without its number."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def is_step(text: str) -> bool:
    """Tell whether a text is an optimizer step."""
    return text.isdecimal() and len(text) <= len(str(LAST_STEP)) and int(text) <= LAST_STEP


def wrapped(note: str) -> list[str]:
    """Return a remark as lines that fit a terminal."""
    return textwrap.wrap(
        note, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def specs_and_words(
    context: click.Context, param: click.Parameter, start: str
) -> list[CompletionItem]:
    """Return what `specs_named` does, and stages and schedules that begin so."""
    names = [word.name for word in words() if word.name not in shipped()]
    found = [CompletionItem(name) for name in names if name.startswith(start)]
    return [*found, *specs_named(context, param, start)]


def specs_named(context: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    """Return the shipped specs that begin so, and have the shell offer files too."""
    del context, param
    names = [CompletionItem(name) for name in shipped() if name.startswith(start)]
    return [*names, CompletionItem(start, type="file")]

"""What the commands share: reading a spec argument, and ending on an error."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import click
from click.shell_completion import CompletionItem

from weighting.build import Weighting, sketch
from weighting.errors import SpecError
from weighting.spec import Spec, resolve, shipped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

allow_plugins = click.option(
    "--allow-plugins",
    is_flag=True,
    help="Import the modules a spec names under plugins:, which runs their code.",
)


def read(argument: str, *, plugins: bool) -> tuple[Spec, Weighting]:
    """Return the spec an argument means, and what it builds to.

    Raises:
        SpecError: It is wrong.
    """
    spec = resolve(argument, allow_plugins=plugins)
    return spec, sketch(spec)


def read_or_exit(argument: str, *, plugins: bool) -> tuple[Spec, Weighting]:
    """Return what `read` does; on an error print it and exit with status 2."""
    try:
        return read(argument, plugins=plugins)
    except SpecError as error:
        give_up(str(error))


def give_up(message: str) -> NoReturn:
    """Print an error and exit with status 2."""
    click.echo(message, err=True)
    sys.exit(2)


def hand_over(module: str, options: Mapping[str, object], flags: Iterable[str]) -> NoReturn:
    """Run a module of the torchtitan integration and exit with its status.

    Args:
        module: Its name.
        options: By name; one that is None or False is left out, True is given without a value.
        flags: The user's further flags for torchtitan.
    """
    if importlib.util.find_spec("torchtitan") is None:
        give_up("this needs torchtitan: pip install 'weighting-dsl[titan]'")
    command = [sys.executable, "-m", f"titan_integration.{module}"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(option)
        elif value is not None and value is not False:
            command.append(f"{option}={value}")
    try:
        code = subprocess.call([*command, "--", *flags])  # noqa: S603 - our own module
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def one_line(text: str | None) -> str:
    """Return the first line of a docstring, without its full stop."""
    return (text or "").strip().partition("\n")[0].rstrip(".")


def specs_named(context: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
    """Return the shipped specs that begin so, and have the shell offer files too."""
    del context, param
    names = [CompletionItem(name) for name in shipped() if name.startswith(start)]
    return [*names, CompletionItem(start, type="file")]

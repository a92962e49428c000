"""What the commands share: reading a spec argument, and ending on an error."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from weighting.build import Weighting, sketch
from weighting.errors import SpecError
from weighting.spec import Spec, resolve

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


def one_line(text: str | None) -> str:
    """Return the first line of a docstring, without its full stop."""
    return (text or "").strip().partition("\n")[0].rstrip(".")

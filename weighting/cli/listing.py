"""`weighting list`: the words of the language, and the specs that come with it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from weighting.cli.common import one_line
from weighting.language.find import shipped
from weighting.registry import stages
from weighting.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

_KINDS = {
    "source": "sources: read a signal, a score per token",
    "pool": "pools: score per token -> score per document, sequence or domain",
    "shape": "shapes: score -> score",
    "weigh": "weighers: score -> weight, mean one",
    "constrain": "constraints: weight -> weight, mean kept",
}


@click.command("list")
def list_words() -> None:
    """List the stages, schedules and shipped specs, a line each.

    \b
    Examples:
      weighting list
      weighting list | grep domain
    """  # noqa: D301
    for kind, title in _KINDS.items():
        click.echo(title)
        for name, cls in sorted(stages().items()):
            if cls.kind == kind:
                _line(f"{name}{_signature(cls)}", one_line(cls.__doc__))
        click.echo()
    click.echo("schedules: wherever a number may change over the steps of a run")
    for name, schedule in sorted(SCHEDULES.items()):
        _line(f"{name}{_signature(schedule)}", one_line(schedule.__doc__))
    click.echo("\nspecs: weighting check NAME, weighting train NAME")
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        _line(name, first.removeprefix("#").strip().rstrip("."))


def _line(left: str, right: str) -> None:
    first, *more = textwrap.wrap(right, 44) or [""]
    if len(left) > 32:  # noqa: PLR2004 - the column's width
        click.echo(f"  {left}")
        left = ""
    click.echo(f"  {left:32} {first}")
    for line in more:
        click.echo(f"  {'':32} {line}")


def _signature(cls: type[BaseModel]) -> str:
    if getattr(cls, "collects", None):
        return "({step: value, ...})" if cls.__name__ == "Piecewise" else "(name=value, ...)"
    return _arguments(cls) and f"({_arguments(cls)})"


def _arguments(cls: type[BaseModel]) -> str:
    return ", ".join(_argument(cls))


def _argument(cls: type[BaseModel]) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        if field.is_required() or field.default is None:
            yield name
        else:
            value = getattr(field.default, "value", field.default)
            yield f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"

"""`weighting list`: the words of the language, and the specs that come with it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from weighting.language.find import shipped
from weighting.language.words import words

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS = {
    "source": "sources: read a signal, a score per token",
    "pool": "pools: score per token -> score per document, sequence or domain",
    "shape": "shapes: score -> score",
    "weigh": "weighers: score -> weight, mean one",
    "constrain": "constraints: weight -> weight, mean kept",
    "schedule": "schedules: wherever a number may change over the steps of a run",
}


@click.command("list")
def list_words() -> None:
    """List the stages, schedules and shipped specs, a line each.

    \b
    Examples:
      weighting list
      weighting list | grep domain
    """  # noqa: D301
    known = words()
    for kind, title in _KINDS.items():
        click.echo(title)
        for word in known:
            if word.kind == kind:
                _line(word.call, word.line)
        click.echo()
    click.echo("specs: weighting check NAME, weighting train NAME")
    for name, line in _specs():
        _line(name, line)


def _specs() -> Iterator[tuple[str, str]]:
    """Yield the shipped specs and what their first line says."""
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield name, first.removeprefix("#").strip().rstrip(".")


def _line(left: str, right: str) -> None:
    first, *more = textwrap.wrap(right.rstrip("."), 44) or [""]
    if len(left) > 32:  # noqa: PLR2004 - the column's width
        click.echo(f"  {left}")
        left = ""
    click.echo(f"  {left:32} {first}")
    for line in more:
        click.echo(f"  {'':32} {line}")

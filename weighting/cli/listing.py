"""`weighting list`: the words of the language, and the specs that come with it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from weighting.cli.common import echo, give_up
from weighting.cli.host import from_host
from weighting.errors import nearest
from weighting.language.find import shipped
from weighting.language.words import words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weighting.language.words import Word

KINDS = {
    "source": "sources: read a signal, a score per token",
    "pool": "pools: score per token -> score per document, sequence or domain",
    "shape": "shapes: score -> score, at any level unless said",
    "weigh": "weighers: score -> weight, mean one, at any level unless said",
    "constrain": "constraints: weight -> weight, mean kept, at any level",
    "schedule": "schedules: wherever a number may change over the steps of a run",
}
_SPECS = "specs: weighting check NAME, weighting train NAME"
_ALL = ("stages", "specs", "schedules", "configs")
_LEVELS = 4


def _completed(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _ALL if name.startswith(start)]


@click.command("list")
@click.argument(
    "what", metavar="[stages|specs|schedules|configs|WORD]", default="", shell_complete=_completed
)
def list_words(what: str) -> None:
    """List the stages, schedules and shipped specs, a line each.

    With a WORD, those that have it in their name or in what they do. More of
    one of them: weighting explain NAME. With configs, the models to train.

    \b
    Examples:
      weighting list
      weighting list schedules
      weighting list domain
    """  # noqa: D301
    found = _configs() if what == "configs" else _sections(what.lower())
    sections = {title: rows for title, rows in found if rows}
    if not sections:
        known = [*_ALL, *(word.name for word in words()), *shipped()]
        give_up(f"nothing here has {what!r} in it{nearest(what, known)}")
    for i, (title, rows) in enumerate(sections.items()):
        echo(f"\n{title}" if i else title)
        for left, right in rows:
            _line(left, right)


def _sections(what: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield headings with what stands below them."""
    some = "" if what in _ALL else what
    for kind, title in KINDS.items():
        if what in _ALL and what != ("schedules" if kind == "schedule" else "stages"):
            continue
        rows = [(word.call, _told(word)) for word in words() if word.kind == kind]
        yield title, [row for row in rows if some in " ".join(row).lower()]
    if what not in {"stages", "schedules"}:
        yield _SPECS, [row for row in _specs() if some in " ".join(row).lower()]


def _configs() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield where configs come from, with what each is."""
    for family, names in from_host("configs", "configs")().items():
        title = "weighting's own" if family == "titan_integration" else f"torchtitan's {family}"
        yield f"{title}: weighting train SPEC --config NAME", [(*x,) for x in names]


def _told(word: Word) -> str:
    """Return what a word does, and where it can stand if that is not anywhere."""
    line = word.line.rstrip(".")
    one_of_some = word.kind in {"shape", "weigh", "constrain"} and len(word.levels) < _LEVELS
    return f"{line}; per {' or '.join(word.levels)}" if one_of_some else line


def _specs() -> Iterator[tuple[str, str]]:
    """Yield the shipped specs and what their first line says."""
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield name, first.removeprefix("#").strip().rstrip(".")


def _line(left: str, right: str) -> None:
    first, *more = textwrap.wrap(right, 44) or [""]
    if len(left) > 32:  # noqa: PLR2004 - the column's width
        echo(f"  {left}")
        left = ""
    echo(f"  {left:32} {first}")
    for line in more:
        echo(f"  {'':32} {line}")

"""What goes wrong with a spec, and where."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class SpecError(ValueError):
    """A weighting spec cannot be used; carries every problem found in it at once.

    Attributes:
        problems: All problems, in reading order.
        file: Where the first problem is: a path, or the name the text was given.
        line: Its line, from 1; 0 when the spec was not read from text.
        column: Its column, from 1; 0 when the spec was not read from text.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a SpecError needs a problem"
        self.problems = tuple(sorted(set(problems), key=_reading_order))
        place = self.problems[0].place
        self.file = place.source if place else ""
        self.line = place.line if place else 0
        self.column = place.column if place else 0
        told = [str(problem) for problem in self.problems[:_MOST_TOLD]]
        if more := len(self.problems) - len(told):
            told.append(f"and {more:,} more")
        super().__init__("\n".join(told))


_MOST_TOLD = 50
"""So many problems are written out."""


class NonFiniteSignalError(ValueError):
    """A signal was NaN or infinite and the spec says `on_nonfinite: error`."""


class OneUnitWarning(UserWarning):
    """A factor compares units with each other, a batch had one, and all tokens weigh alike."""


class LabelError(IndexError, ValueError):
    """A label is neither in the vocabulary nor ignored."""


@dataclass(frozen=True)
class Place:
    """A stretch of one line of a source text; line and column count from 1."""

    source: str
    line: int
    column: int
    width: int
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"

    def picture(self) -> str:
        """Return the source line with a caret under the place."""
        start = self.column - 1
        window = max(0, start - 60)
        shown = self.text[window : window + 100]
        width = max(1, min(self.width, len(shown) - (start - window)))
        return f"    {shown}\n    {' ' * (start - window)}{'^' * width}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong: what it is, how to mend it, and where it stands."""

    message: str
    place: Place | None = None

    def __str__(self) -> str:
        if self.place is None:
            return self.message
        picture = f"\n{self.place.picture()}" if self.place.text.strip() else ""
        return f"{self.place}: {self.message}{picture}"


@dataclass(frozen=True)
class Source:
    """A named text; turns character offsets into places."""

    name: str
    text: str

    def place(self, start: int, end: int) -> Place:
        """Return the place of `text[start:end]`, cut at the end of its first line."""
        start = min(start, len(self.text))
        number = bisect_right(self._starts, start)
        line_start, line = self._starts[number - 1], self._lines[number - 1]
        return Place(
            source=self.name,
            line=number,
            column=start - line_start + 1,
            width=max(1, min(end, line_start + len(line)) - start),
            text=line,
        )

    @cached_property
    def _lines(self) -> list[str]:
        """The lines, spaces for what would move the caret or the terminal's cursor."""
        shown = (c if c.isprintable() or c == "\n" else " " for c in self.text)
        return "".join(shown).split("\n")

    @cached_property
    def _starts(self) -> list[int]:
        """Where each line begins."""
        return [0, *accumulate(len(line) + 1 for line in self._lines)][:-1]

    def problem(self, message: str, span: Span) -> Problem:
        """Return a problem at a span of this text."""
        return Problem(message, self.place(*span))


Span = tuple[int, int]
"""Start and end of a stretch of a source text, as character offsets."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' for the closest known name, or what is known, or ''."""
    names = sorted(known)
    if close := closest(name.lower(), names, 1):
        return f"; did you mean {close[0]!r}?"
    if names and len(names) <= 12:  # noqa: PLR2004 - more would bury the message
        return f"; known: {', '.join(names)}"
    return ""


def closest(name: str, known: Iterable[str], count: int) -> list[str]:
    """Return the known names that are like a name, the closest first, so many at most."""
    return get_close_matches(name, list(known), n=count, cutoff=0.6)


def printable(text: str, keep: str = "") -> str:
    """Return a text with question marks for what would move a cursor or turn text around.

    Args:
        text: Any text of a user's: a name, a value, a message with such in it.
        keep: Characters that stay, such as the end of a line.
    """
    wrong = {ord(c): "?" for c in {*text} if not c.isprintable() and c not in keep}
    return text.translate(wrong) if wrong else text


def _reading_order(problem: Problem) -> tuple[int, int, str]:
    place = problem.place
    return (place.line, place.column, problem.message) if place else (0, 0, problem.message)

"""The specs of a command that shows several side by side, each with what to call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weighting.cli.common import give_up, read_or_exit
from weighting.errors import SpecError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.build import Plan
    from weighting.spec import Spec

SHORTEST, LONGEST = 12, 48
"""So many characters of a spec's name are always shown; and at most, in a picture."""


class Named(NamedTuple):
    """A spec as an argument, read and built to look at."""

    label: str
    spec: Spec
    plan: Plan


def read_named(arguments: Sequence[str], *, plugins: bool, shown: int = SHORTEST) -> list[Named]:
    """Return specs with what to call them; on an error print it and exit with status 2.

    Names that would look alike when cut to `shown` characters are numbered.
    """
    found: list[Named] = []
    for argument in arguments:
        spec, plan = read_or_exit(argument, plugins=plugins)
        from weighting.build.shares import share_problems  # noqa: PLC0415 - imports torch

        if problems := share_problems(spec):
            give_up(str(SpecError(problems)))
        unnamed = spec.name == type(spec).model_fields["name"].default
        label = argument if unnamed and "\n" not in argument else spec.name
        found.append(Named(label, spec, plan))
    heads = [cut(each.label, shown) for each in found]
    return [
        each._replace(label=f"{i}: {each.label}") if heads.count(head) > 1 else each
        for i, (each, head) in enumerate(zip(found, heads, strict=True), 1)
    ]


def cut(text: str, width: int) -> str:
    """Return a text as at most so many characters, with an ellipsis where some are left out.

    Those that would move the cursor are question marks.
    """
    shown = printable(text)
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"

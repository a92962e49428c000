"""The words of the language and what is known of each, without importing the stages.

The shipped JSON Schema, which tests hold to the classes, says it; only where installed packages
bring stages of their own is it made anew, from the classes.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from weighting.language.find import specs_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA_FILE = "weighting.schema.json"
"""Its name beside the specs."""


class Word(NamedTuple):
    """A stage or a schedule.

    Attributes:
        name: As it is written.
        kind: source, pool, shape, weigh or constrain; schedule.
        call: With its arguments and their defaults, as in "clip(min, max)".
        levels: Where a stage can stand; of a pool, what it makes units of.
        line: What it does.
    """

    name: str
    kind: str
    call: str
    levels: tuple[str, ...]
    line: str


def is_stage(name: str) -> bool:
    """Tell whether a stage has this name."""
    return any(word.name == name and word.kind != "schedule" for word in words())


def words() -> list[Word]:
    """Return the stages and the schedules, by name."""
    defined = reference()["$defs"]
    items = [*defined["stage"]["anyOf"], *defined["schedule"]["anyOf"]]
    return sorted(found for item in items for found in _word(item))


@cache
def reference() -> dict[str, Any]:
    """Return the JSON Schema of a spec file: the shipped one, or with the stages of packages."""
    if not entry_points(group="weighting.stages"):
        return json.loads((specs_folder() / SCHEMA_FILE).read_text(encoding="utf-8"))
    from weighting.language.schema import schema  # noqa: PLC0415 - imports torch

    return schema()


def _word(item: dict[str, Any]) -> Iterator[Word]:
    if (about := item.get("x-word")) is not None:
        (name,) = item["required"]
        line = item["properties"][name]["description"]
        yield Word(name, about["kind"], about["call"], tuple(about["levels"].split()), line)

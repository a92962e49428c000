"""What `weighting explain` prints of a stage or a schedule."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import TYPE_CHECKING, Any

from weighting.cli.common import WIDTH
from weighting.cli.listing import KINDS
from weighting.contract.stage import PIPELINE_HERE
from weighting.language.schema import default_of
from weighting.registry import stages
from weighting.schedules import SCHEDULE_HERE, SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

    from weighting.language.words import Word

_LARGEST = 1e30
"""Bounds of this size are none."""


def word_lines(word: Word) -> Iterator[str]:
    """Yield what a stage or schedule does, takes and comes from, at most 80 columns wide."""
    cls: type[BaseModel] = SCHEDULES[word.name] if word.kind == "schedule" else stages()[word.name]
    what = "a schedule" if word.kind == "schedule" else "a stage"
    yield f"{word.name}  ({what})"
    yield f"  written    {word.call}"
    yield f"  one of the {KINDS[word.kind]}"
    if word.levels:
        gives = "gives" if word.kind in {"source", "pool"} else "stands"
        yield f"  level      {gives} per {' or '.join(word.levels)}"
    yield from _arguments(cls)
    for paragraph in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        yield ""
        for part in re.split(r"\n(?=Differs: )", paragraph):
            lines = part.splitlines()
            if max(map(len, lines)) > WIDTH - 4:
                lines = textwrap.wrap(" ".join(lines), WIDTH - 4, break_on_hyphens=False)
            yield from (f"  {line}" for line in lines)


def _arguments(cls: type[BaseModel]) -> Iterator[str]:
    fields = cls.model_json_schema().get("properties", {})
    yield "  arguments" if fields else "  arguments  none"
    width = max(map(len, fields), default=0)
    for name, field in cls.model_fields.items():
        default = default_of(field)
        end = "required" if field.is_required() else f"default {default}" if default else "optional"
        yield from textwrap.wrap(
            f"{_type(fields[name])}; {end}",
            WIDTH,
            initial_indent=f"    {name:{width}}  ",
            subsequent_indent=" " * (width + 6),
        )


def _type(schema: dict[str, Any]) -> str:
    """Return in words what an argument can be."""
    ways = [_way(way) for way in schema.get("anyOf", [schema])]
    return " or ".join(dict.fromkeys(filter(None, ways)))


def _way(way: dict[str, Any]) -> str:
    if way == SCHEDULE_HERE:
        return "a schedule"
    if way.get("$comment") == PIPELINE_HERE["$comment"]:
        return "a pipeline that ends in a score"
    if "enum" in way:
        return " | ".join(map(str, way["enum"]))
    kind = way.get("type")
    if kind in {"number", "integer"}:
        noun = "a number" if kind == "number" else "a whole number"
        low = way.get("minimum", way.get("exclusiveMinimum", -_LARGEST))
        high = way.get("maximum", way.get("exclusiveMaximum", _LARGEST))
        above = "above" if "exclusiveMinimum" in way else "from"
        below = "below" if "exclusiveMaximum" in way else "to"
        text = f" {above} {low:g}" if low > -_LARGEST else ""
        return noun + text + (f" {below} {high:g}" if high < _LARGEST else "")
    texts = {"boolean": "true | false", "object": "a map of numbers", "null": ""}
    if kind == "string":
        if "%" in way.get("pattern", ""):
            return "a share of the run, 5%"
        if "median" in way.get("pattern", ""):
            return "a statistic (median, mean, std, mean+3*std)"
        return "k/n" if "pattern" in way and "n" in way["pattern"][-8:] else "a text"
    return texts.get(str(kind), str(kind))

"""YAML text to nodes with positions, and plain data to YAML text.

The only room that imports yaml.  Nothing is constructed from tags, aliases are refused, and
scalars follow YAML 1.2 (`1e-3` is a number, `no` is a word), so reading a file can neither run
code nor surprise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from weighting.errors import Problem, Source, Span, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")  # as in arrow text; a step has 64 bits
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True)
class Scalar:
    """A single value.

    `text` is what was written, without quotes, and `offsets` says where in the source each of its
    characters stands; with escapes in it, all stand where the scalar begins.
    """

    value: str | int | float | bool | None
    span: Span
    text: str
    offsets: Sequence[int]
    quoted: bool


@dataclass(frozen=True)
class Seq:
    """A list."""

    items: tuple[Node, ...]
    span: Span


@dataclass(frozen=True)
class Map:
    """A mapping, in order."""

    entries: tuple[tuple[Scalar, Node], ...]
    span: Span


Node = Scalar | Seq | Map


def too_long(size: str) -> str:
    """Return what is wrong with a text of that size."""
    return f"a spec is at most {MAX_CHARACTERS:,} characters; this has {size}"


def parse(source: Source) -> Node:
    """Return the tree of a YAML text.

    Raises:
        SpecError: The text is not YAML, holds tabs as indentation, tags, aliases or several
            documents, repeats a key or is nested too deeply.
    """
    try:
        _refuse_machinery(source)
        root = yaml.compose(source.text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        place = (error.position, error.position + 1)
        code = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"character {code:#06x} is not allowed in YAML; remove it"
        raise SpecError([source.problem(message, place)]) from None
    except yaml.MarkedYAMLError as error:
        raise SpecError([_syntax_problem(source, error)]) from None
    if root is None:
        raise SpecError(
            [source.problem("the file is empty; a spec starts with version: 1", (0, 1))]
        )
    problems: list[Problem] = []
    node = _convert(source, root, problems)
    if problems:
        raise SpecError(problems)
    return node


def dump(data: object, *, flow_leaves: bool) -> str:
    """Return plain data (dicts, lists, strings, numbers) as YAML text, keys in their order.

    Args:
        data: The data.
        flow_leaves: Write the innermost maps and lists on one line, {a: 1}.
    """
    style = None if flow_leaves else False
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
        default_flow_style=style,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `parse` would otherwise read as something else."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_resolve(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _write_text)


def _refuse_machinery(source: Source) -> None:
    """Walk the event stream, which builds nothing, and refuse what a spec has no use for."""
    depth, documents = 0, 0
    for event in yaml.parse(source.text, Loader=yaml.SafeLoader):
        span = (event.start_mark.index, event.end_mark.index)
        message = None
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            message = "a spec file holds one document; remove this '---'" if documents > 1 else None
        elif isinstance(event, yaml.AliasEvent):
            message = f"aliases are not allowed; write out what *{event.anchor} stands for"
        elif isinstance(event, yaml.NodeEvent) and event.anchor:
            message = f"anchors are not allowed; remove &{event.anchor}"
            span = (span[0], span[0] + 1 + len(event.anchor))
        elif getattr(event, "tag", None) not in {None, "!"}:
            message = f"tags are not allowed; remove {source.text[span[0] : span[1]].split()[0]}"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                message = f"nested more than {MAX_DEPTH} deep; a spec needs four levels"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if message:
            raise SpecError([source.problem(message, span)])


def _syntax_problem(source: Source, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    start = mark.index if mark else 0
    found = source.text[start : start + 1]
    message = f"this is not YAML: {error.problem or error.context}"
    if not found and error.context_mark:
        start = error.context_mark.index
        message = f"this {source.text[start : start + 1]!r} is never closed"
    elif found == "\t" or "\\t" in (error.problem or ""):
        message = "a tab cannot indent YAML; use spaces"
    elif "mapping values are not allowed" in (error.problem or ""):
        message += "; write clamp(max=3) with '=', and quotes around a pipeline with braces"
    elif "expected ',' or" in (error.problem or ""):
        message += "; put a stage with braces in quotes"
    elif found in "`@%":
        message = f"a YAML value cannot begin with {found!r}; put it in quotes"
    return source.problem(message, (start, start + 1))


def _convert(source: Source, node: yaml.Node, problems: list[Problem]) -> Node:
    span = (node.start_mark.index, node.end_mark.index)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(source, node, span)
    if isinstance(node, yaml.SequenceNode):
        return Seq(tuple(_convert(source, item, problems) for item in node.value), span)
    assert isinstance(node, yaml.MappingNode)
    entries: list[tuple[Scalar, Node]] = []
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = _convert(source, key_node, problems)
        if not isinstance(key, Scalar):
            problems.append(source.problem("a key must be a single name", key.span))
            continue
        line = key_node.start_mark.line + 1
        if key.text in lines:
            message = f"{key.text!r} is given twice (first on line {lines[key.text]}); keep one"
            problems.append(source.problem(message, key.span))
        lines.setdefault(key.text, line)
        entries.append((key, _convert(source, value_node, problems)))
    return Map(tuple(entries), span)


def _scalar(source: Source, node: yaml.ScalarNode, span: Span) -> Scalar:
    start, end = span
    if node.style in {"'", '"'}:
        exact = source.text[start + 1 : end - 1] == node.value
        offsets = range(start + 1, end - 1) if exact else [start] * len(node.value)
        return Scalar(node.value, span, node.value, offsets, quoted=True)
    if node.style in {"|", ">"}:  # the text begins on the line after the indicator
        body = source.text.find("\n", start, end) + 1 or end
        written = source.text[body:end]
        return Scalar(node.value.strip(), span, written, range(body, end), quoted=True)
    written = source.text[start:end]
    return Scalar(_resolve(node.value), span, written, range(start, end), quoted=False)


def _resolve(text: str) -> str | int | float | bool | None:
    if text.lower() in _WORDS and text in {text.lower(), text.capitalize(), text.upper()}:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)

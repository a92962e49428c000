"""From an argument to the text it means and its tree: what is refused before any stage is known.

Nothing here imports torch, so that a missing file or broken YAML is refused at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from weighting.errors import Problem, Source, SpecError
from weighting.language import yaml_nodes
from weighting.language.find import find, is_file, shipped
from weighting.language.yaml_nodes import Node, Scalar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MOST_BYTES = 4 * yaml_nodes.MAX_CHARACTERS
"""A character of UTF-8 takes no more than four."""


class Document(NamedTuple):
    """A text with a name for messages, and its tree; arrow text is a single scalar."""

    source: Source
    root: Node


def open_file(path: str | Path) -> Document:
    """Read a file, or a shipped spec by its name.

    Raises:
        SpecError: It is missing, unreadable, or no YAML.
    """
    found = find(path)
    try:
        with found.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            size = f"{found.stat().st_size:,} bytes"
            raise SpecError([Problem(f"{path}: {yaml_nodes.too_long(size)}")])
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start}); save the spec as UTF-8"
        raise SpecError([Problem(msg)]) from None
    except OSError as error:
        raise SpecError([Problem(f"{path}: {error.strerror or error}")]) from None
    return open_text(text, str(path))


def open_text(text: str, name: str) -> Document:
    """Parse YAML text, or arrow text of a single pipeline.

    Raises:
        SpecError: It is too long, or no YAML.
    """
    if len(text) > yaml_nodes.MAX_CHARACTERS:
        raise SpecError([Problem(f"{name}: {yaml_nodes.too_long(f'{len(text):,}')}")])
    source = Source(name, text.replace("\r\n", "\n"))
    if re.match(r"\s*[^\W\d]\w*\s*(\(|->|→|$)", text):  # no YAML map begins like this
        end = len(source.text)
        return Document(source, Scalar(source.text, (0, end), source.text, range(end), quoted=True))
    return Document(source, yaml_nodes.parse(source))


def open_argument(text: str, is_stage: Callable[[str], bool]) -> Document:
    """Read what an argument means: a file, a shipped name, arrow text, or (several lines) YAML.

    Args:
        text: The argument.
        is_stage: Tells whether a word that is no shipped spec is a stage; such a word is arrow
            text.

    Raises:
        SpecError: It is none of them, or cannot be read.
    """
    if "\n" in text:
        return open_text(text, "<spec>")
    word = text.strip()
    looks_like_file = text.endswith((".yaml", ".yml")) or is_file(text)
    if not looks_like_file and (
        re.search(r"->|→|\(", text) or (word not in shipped() and is_stage(word))
    ):
        return open_text(text, "<arrow>")
    return open_file(text)

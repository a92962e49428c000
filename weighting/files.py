"""Files that are there whole or not at all, and lines of numbers that a run leaves."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


_WRONG = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What a line that is no map of numbers raises when it is read."""


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file in a folder that exists, so that nobody ever finds a part of it.

    Raises:
        OSError: It cannot be written; an older file of that name is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(data.encode() if isinstance(data, str) else data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:  # nobody asked for a file of the name above
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return the lines of a file of metrics, the last one of each step, in step order.

    Raises:
        ValueError: The file holds something else; a torn last line is left out.
    """
    lines: dict[int, dict[str, float]] = {}
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            for value in line.values():
                math.isfinite(value)  # a TypeError where it is no number
            lines[int(line["step"])] = line
        except _WRONG as error:
            if number == len(texts):
                break
            msg = f"{path}:{number}: not a line of metrics; take it out"
            raise ValueError(msg) from error
    return [lines[step] for step in sorted(lines)]

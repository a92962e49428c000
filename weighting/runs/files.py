"""Files that are there whole or not at all, and lines of numbers that a run leaves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from array import array
from collections.abc import Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NamedTuple, overload

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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
    with writing_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the place of `path` at the end; none is left on an error.

    Until then it has a name beside `path` that nobody can guess, and is made anew: a link that
    waits there is not followed.

    Raises:
        OSError: It cannot be written; an older file of that name is as it was.
    """
    part = path.with_name(f".{path.name[:32]}.{secrets.token_hex(8)}.part")
    try:
        try:
            new = os.O_CREAT | os.O_EXCL
            with open(part, "wb", opener=partial(_open_itself, more=new)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        # Nobody asked for a file of the name above.
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_lock(path: Path) -> IO[str]:
    """Open a file to read and append, made if it is not there; a link is not followed.

    Raises:
        OSError: It cannot be written, or is a link.
    """
    return open(path, "a+", encoding="utf-8", opener=_open_itself)


def _open_itself(path: str, flags: int, more: int = 0) -> int:
    """Open a file and not what a link of its name points to; the umask decides who may read it."""
    return os.open(path, flags | os.O_NOFOLLOW | more, 0o666)


def json_text(value: object, **options: Any) -> str:  # noqa: ANN401 - json's own
    """Return a value as JSON, in which a number that is not finite is null.

    Args:
        value: What `json.dumps` takes.
        options: Of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


class Lines(Sequence[dict[str, float]]):
    """Lines of numbers, each made a dictionary when it is asked for; held in less than their text.

    A number that is null, or NaN, is NaN.
    """

    def __init__(self, rows: Iterable[_Row] = ()) -> None:
        self._rows = list(rows)

    @override
    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> Lines: ...

    @override
    def __getitem__(self, index: int | slice) -> dict[str, float] | Lines:
        if isinstance(index, slice):
            return Lines(self._rows[index])
        row = self._rows[index]
        return {"step": row.step, **dict(zip(row.places, row.values, strict=True))}

    def series(self, name: str) -> Iterator[tuple[int, float]]:
        """Yield the finite values of a number with their steps."""
        for row in self._rows:
            place = row.places.get(name)
            if place is not None and math.isfinite(row.values[place]):
                yield row.step, row.values[place]


def read_lines(path: Path) -> Lines:
    """Return the lines of a file of metrics, the last one of each step, in step order.

    Raises:
        ValueError: The file holds something else; a torn last line is left out.
    """
    found: dict[int, _Row] = {}
    known: dict[tuple[str, ...], dict[str, int]] = {}
    wrong: ValueError | None = None
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if wrong:
                raise wrong
            try:
                line = read_line(text)
                step = int(line.pop("step"))
            except _WRONG as error:
                wrong = ValueError(f"{path}:{number}: not a line of metrics; take it out")
                wrong.__cause__ = error
                continue
            names = tuple(line)
            places = known.setdefault(names, {name: i for i, name in enumerate(names)})
            found[step] = _Row(step, places, array("d", line.values()))
    return Lines(found[step] for step in sorted(found))


def read_line(text: bytes) -> dict[str, float]:
    """Return a line of metrics; null is NaN.

    Raises:
        Exception: Any of several where it is no map of numbers.
    """
    line = json.loads(text.decode(errors="replace"))
    return {name: math.nan if x is None else x + 0.0 for name, x in line.items()}


class _Row(NamedTuple):
    """The numbers of a step, and where each stands; lines of the same names share the latter."""

    step: int
    places: dict[str, int]
    values: array[float]


def _finite(value: object) -> object:
    """Return a value with None for the numbers in it that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(x) for x in value]
    return value

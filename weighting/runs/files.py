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
from typing import IO, TYPE_CHECKING, Any, overload

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import pyarrow as pa


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


def read_text(path: Path, name: str) -> str:
    """Return a text as it is, line ends included, but for a mark that it is UTF-8.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        ValueError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{name}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ValueError(msg) from None
    except OSError as error:
        msg = f"{name}: {error.strerror or error}"
        raise ValueError(msg) from None


def json_text(value: object, **options: Any) -> str:  # noqa: ANN401 - json's own
    """Return a value as JSON, in which a number that is not finite is null.

    Args:
        value: What `json.dumps` takes.
        options: Of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


class Lines(Sequence[dict[str, float]]):
    """Lines of numbers, held as columns; each is made a dictionary when it is asked for.

    A number that is null, or NaN, is NaN.

    Attributes:
        steps: The step of each line, ascending.
        columns: The numbers of all lines by name, NaN where a line has none.
        absent: Of the names that some lines lack, whether each line lacks it.
    """

    def __init__(
        self,
        steps: array[int] | None = None,
        columns: Mapping[str, array[float]] | None = None,
        absent: Mapping[str, bytes] | None = None,
    ) -> None:
        self.steps = array("q") if steps is None else steps
        self.columns, self.absent = columns or {}, absent or {}

    @override
    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...

    @override
    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        there = {
            name: values[index]
            for name, values in self.columns.items()
            if name not in self.absent or not self.absent[name][index]
        }
        return {"step": self.steps[index], **there}

    def column(self, name: str) -> array[float]:
        """Return a number of every line; NaN where a line has none."""
        known = self.columns.get(name)
        return array("d", [math.nan]) * len(self) if known is None else known

    def series(self, name: str) -> Iterator[tuple[int, float]]:
        """Yield the finite values of a number with their steps."""
        pairs = zip(self.steps, self.column(name), strict=True)
        return ((step, value) for step, value in pairs if math.isfinite(value))


def read_lines(path: Path) -> Lines:
    """Return the lines of a file of metrics, the last one of each step, in step order.

    Raises:
        ValueError: The file holds something else; a torn last line is left out.
    """
    return _read_plain(path) or _read_each(path)


def numbers_of(x: pa.ChunkedArray, kind: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as numbers of 64 bits, NaN where it has gaps, and where these are.

    Arrow's own way to numpy imports pandas, which takes as long as reading 80,000 lines.
    """
    import numpy as np  # noqa: PLC0415 - the core does without it

    one = x.cast(kind, safe=False).combine_chunks()
    there, data = one.buffers()
    count, offset = len(one), one.offset
    numbers = np.frombuffer(data, kind.to_pandas_dtype(), count, kind.bit_width // 8 * offset)
    if there is None or not one.null_count:
        return numbers, np.zeros(count, dtype=bool)
    bits = np.unpackbits(np.frombuffer(there, np.uint8), count=offset + count, bitorder="little")
    gaps = bits[offset:] == 0
    return np.where(gaps, np.nan, numbers), gaps


def _read_plain(path: Path) -> Lines | None:
    """Return the lines of a file by pyarrow; None where it is not there, or not sure of a line."""
    try:
        import numpy as np  # noqa: PLC0415 - the core does without both
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.json as pj  # noqa: PLC0415
    except ImportError:
        return None
    try:
        table = pj.read_json(path, pj.ReadOptions(use_threads=False))
    except pa.ArrowException:
        return None
    columns = dict(zip(table.column_names, table.columns, strict=True))
    at = columns.pop("step", None)
    plain = at is not None and at.type == pa.int64() and not at.null_count
    plain = plain and all(x.type in {pa.int64(), pa.float64()} for x in columns.values())
    # Several lines may make one object, and one line several.
    plain = plain and table.num_rows == _count_lines(path)
    # A whole number too large for a float is infinite here, and no number line by line.
    numbers = {name: numbers_of(x, pa.float64()) for name, x in columns.items()} if plain else {}
    plain = plain and not any(np.isinf(x).any() for x, _ in numbers.values())
    # What a line lacks and what it has as null are alike here.
    gaps = any(x.null_count for x in columns.values())
    if not plain or (gaps and b"null" in path.read_bytes()):
        return None
    steps, _ = numbers_of(at, pa.int64())
    order: np.ndarray | slice = slice(None)
    if not (np.diff(steps) > 0).all():
        order = steps.argsort(kind="stable")
        order = order[np.append(np.diff(steps[order]) != 0, True)]
    return Lines(
        array("q", steps[order].tobytes()),
        {name: array("d", x[order].tobytes()) for name, (x, _) in numbers.items()},
        {name: gaps[order].tobytes() for name, (_, gaps) in numbers.items() if gaps.any()},
    )


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            count, last = count + data.count(b"\n"), data[-1:]
    return count + (last != b"\n")


def _read_each(path: Path) -> Lines:
    """Return the lines of a file, read one by one.

    Raises:
        ValueError: As `read_lines`.
    """
    # Lines of the same names stand together, one after the other in one array.
    numbers: dict[tuple[str, ...], array[float]] = {}
    found: dict[int, tuple[array[float], int]] = {}
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
            rows = numbers.setdefault(tuple(line), array("d"))
            found[step] = rows, len(rows)
            rows.extend(line.values())
    steps = sorted(found)
    names = dict.fromkeys(name for some in numbers for name in some)
    columns = {name: array("d", [math.nan]) * len(steps) for name in names}
    absent = {name: bytearray(b"\1") * len(steps) for name in names}
    places = {id(rows): [*enumerate(some)] for some, rows in numbers.items()}
    for i, step in enumerate(steps):
        rows, start = found[step]
        for place, name in places[id(rows)]:
            columns[name][i] = rows[start + place]
            absent[name][i] = 0
    lacking = {name: bytes(mask) for name, mask in absent.items() if any(mask)}
    return Lines(array("q", steps), columns, lacking)


def read_line(text: bytes) -> dict[str, float]:
    """Return a line of metrics; null is NaN.

    Raises:
        Exception: Any of several where it is no map of numbers.
    """
    line = json.loads(text.decode(errors="replace"))
    return {name: math.nan if x is None else x + 0.0 for name, x in line.items()}


def _finite(value: object) -> object:
    """Return a value with None for the numbers in it that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(x) for x in value]
    return value

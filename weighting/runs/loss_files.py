"""Recorded losses: a few numbers as text, or a file with a column `loss` and others beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weighting.columns import plain_name
from weighting.errors import nearest
from weighting.runs.files import read_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

SUFFIXES = (".jsonl", ".parquet")
_LARGEST = 3.4028234663852886e38
"""The largest float32, which is what signals are."""
LAST_STEP = 10**9
"""No run is longer."""
_FEW = 8
"""More steps would bury a message."""


@dataclass(frozen=True)
class Recorded:
    """Units, and what was recorded of each.

    Attributes:
        name: The file, or what stands for it in messages.
        has: Names of all columns there are, in their order.
        columns: The values of those that were asked for, unchecked.
        places: Where each unit stands, for messages.
    """

    name: str
    has: tuple[str, ...]
    columns: Mapping[str, list[object]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def numbers(self, column: str) -> list[float]:
        """Return a column of finite numbers.

        Raises:
            ValueError: A value is no such number; says where.
        """
        return [self._number(column, *at) for at in self._values(column)]

    def words(self, column: str) -> list[str]:
        """Return a column of names.

        Raises:
            ValueError: A value is no name; says where.
        """
        found: list[str] = []
        for value, place in self._values(column):
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                msg = f"{place}: {column} is {_shown(value)}; it must be a name"
                raise ValueError(msg)
            found.append(str(value))
        return found

    def steps(self) -> list[int]:
        """Return the steps at which batches were recorded, ascending; none without the column.

        Raises:
            ValueError: A step is no whole number; says where.
        """
        if "step" not in self.has:
            return []
        return sorted({self._step(*at) for at in self._values("step")})

    def at(self, step: int) -> Recorded:
        """Return the units recorded at a step; all of them when steps were not recorded.

        Raises:
            ValueError: None was; says at which steps some were.
        """
        steps = self.steps()
        if not steps:
            return self
        if step not in steps:
            few = len(steps) <= _FEW
            there = ", ".join(map(str, steps)) if few else f"{len(steps)} from {steps[0]} on"
            close = min(steps, key=lambda other: abs(other - step))
            near = "" if few else f", of which {close} is the nearest"
            msg = f"{self.name}: nothing was recorded at step {step}, but at {there}{near}"
            raise ValueError(msg)
        kept = [i for i, value in enumerate(self.columns["step"]) if value == step]
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        return replace(self, columns=columns, places=[self.places[i] for i in kept])

    def _values(self, column: str) -> Iterator[tuple[object, str]]:
        if column not in self.has:
            msg = f"{self.name}: no column {column}{nearest(column, self.has)}"
            raise ValueError(msg)
        for value, place in zip(self.columns[column], self.places, strict=True):
            if value is None:
                msg = f"{place}: {column} is missing here, and other lines have it"
                raise ValueError(msg)
            yield value, place

    def _number(self, column: str, value: object, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            msg = f"{place}: {column} is {_shown(value)}; it must be one number"
            raise ValueError(msg)  # noqa: TRY004 - it is the data that is wrong
        if not abs(value) <= _LARGEST:
            msg = f"{place}: {column} is {_shown(value)}; it must be finite, within float32"
            raise ValueError(msg)
        return float(value)

    def _step(self, value: object, place: str) -> int:
        is_step = isinstance(value, int) and not isinstance(value, bool)
        if not is_step or not 0 <= value <= LAST_STEP:
            msg = f"{place}: step is {_shown(value)}; it must be a whole number from 0 to 1e9"
            raise ValueError(msg)
        return value


def recorded(text: str, columns: Collection[str] = ()) -> Recorded:
    """Return recorded losses: of a .jsonl or .parquet file, or written as "1,2,3,5".

    Every line or row is a unit; its column `loss` is in nats.

    Args:
        text: The file's path, or numbers with commas between them.
        columns: Names of further columns to read where they are there; `step` always is.

    Raises:
        ValueError: There is no such file, it cannot be read, or it has no losses.
    """
    wanted = [*dict.fromkeys(["loss", "step", *columns])]
    path = Path(text)
    kind = path.suffix.lower()
    if kind not in SUFFIXES and _is_number(text.partition(",")[0]):
        found = _written(text)
    elif not os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        what = "is a directory" if os.path.isdir(text) else "no such file"  # noqa: PTH112
        msg = f'{text}: {what}; give a .jsonl or .parquet file, or numbers such as "1,2,3,5"'
        raise ValueError(msg)
    elif kind == ".jsonl":
        found = _lines(path, text, wanted)
    elif kind == ".parquet":
        found = _rows(path, text, wanted)
    else:
        suffix = path.suffix or "it, a name without suffix"
        msg = f"{text}: cannot read {suffix}; give a file that ends in {' or '.join(SUFFIXES)}"
        raise ValueError(msg)
    if not len(found):
        msg = f"{text}: no losses in it; every line is a unit, such as {_EXAMPLE}"
        raise ValueError(msg)
    empty = {
        name for name, values in found.columns.items() if not any(x is not None for x in values)
    }
    found = replace(found, has=tuple(name for name in found.has if name not in empty))
    if "loss" not in found.has:
        has = f"it has {', '.join(found.has)}" if found.has else "it has none"
        msg = f"{text}: no column loss, in nats; {has}"
        raise ValueError(msg)
    return found


_EXAMPLE = '{"loss": 2.5}'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _written(text: str) -> Recorded:
    """Return the units of numbers with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    for index, part in enumerate(parts, 1):
        if not _is_number(part):
            msg = f"{_cut(text)}: {part!r}, at place {index}, is no number"
            raise ValueError(msg)
    places = [f"{_cut(text)}: number {index}" for index in range(1, len(parts) + 1)]
    return Recorded(f'"{_cut(text)}"', ("loss",), {"loss": [float(x) for x in parts]}, places)


def _lines(path: Path, name: str, wanted: list[str]) -> Recorded:
    """Return the units of a .jsonl file, one a line; empty lines are none."""
    has: dict[str, None] = {}
    columns: dict[str, list[object]] = {column: [] for column in wanted}
    places: list[str] = []
    for number, line in enumerate(
        read_text(path, name).split("\n"), 1
    ):  # splitlines splits at more
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            unit: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Of numbers that are too long Python speaks at length.
            reason = str(error).partition(" for integer")[0]
            msg = f"{place}: not JSON ({reason}); write an object such as {_EXAMPLE}"
            raise ValueError(msg) from None
        if not isinstance(unit, dict):
            msg = f"{place}: {_shown(unit)} is no unit; write an object such as {_EXAMPLE}"
            raise ValueError(msg)  # noqa: TRY004 - it is the data that is wrong
        has.update(dict.fromkeys(unit))
        places.append(place)
        for column, values in columns.items():
            values.append(unit.get(column))
    return Recorded(name, tuple(has), columns, places)


def _rows(path: Path, name: str, wanted: list[str]) -> Recorded:
    """Return the units of a .parquet file, one a row."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - the core does without it
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        msg = f"{name}: parquet files need pyarrow: pip install pyarrow, or give a .jsonl file"
        raise ValueError(msg) from None
    try:
        file = pq.ParquetFile(path)
        # A run's own record says "columns.x" for a column x.
        has = {plain_name(name): name for name in file.schema_arrow.names}
        table = file.read([has[column] for column in wanted if column in has])
        columns = {column: table[has[column]].to_pylist() for column in wanted if column in has}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        msg = f"{name}: cannot be read as parquet ({reason}); write it anew"
        raise ValueError(msg) from None
    places = [f"{name}: row {row}" for row in range(1, file.metadata.num_rows + 1)]
    return Recorded(name, tuple(has), columns, places)


def _shown(value: object) -> str:
    return _cut(repr(value) if not isinstance(value, str) else json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."  # noqa: PLR2004 - enough to recognise

"""Documents of local files that stay on disk until they are asked for.

Of a file of plain JSON lines only is kept where each begins. What is packed, or in columns, cannot
be read from its middle: its texts are copied, up to 32 MiB into memory and else into a file of the
cache that is named after what it holds, so that all ranks of a machine share it.
"""

import bisect
import os
import re
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from xxhash import xxh3_128_hexdigest

from titan_integration.data.cache import cache_folder, failed, make_room
from titan_integration.data.contents import Content, content_of, hash_of, packed, unpacked
from titan_integration.data.data_files import DataFile, on_disk
from titan_integration.data.formats import Scanned, record_at
from titan_integration.data.records import Columns

# Copies up to so many bytes stay in memory.
_IN_MEMORY = 32 << 20

_NUMBER = re.compile(r"\d+$")

# Files that are open at a time.
_MOST_OPEN = 64


class _Part(NamedTuple):
    """The documents of one file: the first one's number, and how their places begin."""

    file: DataFile
    first: int
    place: str
    plain: bool
    end: int
    identity: tuple[int, int]


class StoredContents(Sequence[Content]):
    """Contents by index, read when they are asked for."""

    def __init__(
        self,
        parts: list[_Part],
        starts: np.ndarray,
        numbers: np.ndarray,
        columns: Columns,
        copies: bytes | Path,
    ) -> None:
        """Take what `Storing` has found."""
        self._parts, self._starts, self._numbers = parts, starts, numbers
        self._firsts = [part.first for part in parts]
        self._columns, self._copies = columns, copies
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors, by the number of the part
        if isinstance(copies, Path):
            self._open[-1] = os.open(copies, os.O_RDONLY)  # now, as the cache may be cleared

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        """Return a document.

        Raises:
            ValueError: Its file has changed or cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect.bisect_right(self._firsts, index) - 1
        part = self._parts[number]
        follows = index + 1 < len(self) and (
            number + 1 == len(self._parts) or index + 1 < self._firsts[number + 1]
        )
        start, end = int(self._starts[index]), part.end
        if follows:
            end = int(self._starts[index + 1])
        if not part.plain and isinstance(self._copies, bytes):
            return unpacked(self._copies[start:end])
        content = self._read(number if part.plain else -1, start, end)
        if not part.plain:
            return unpacked(content)
        place = self.place_of(index)
        return content_of(record_at(part.file, content, self._columns, place), self._columns, place)

    def place_of(self, index: int) -> str:
        """Return the place of a document, for messages."""
        part = self._parts[bisect.bisect_right(self._firsts, index) - 1]
        return f"{part.place}{self._numbers[index]}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files to this process."""
        return {**self.__dict__, "_open": OrderedDict()}

    def _read(self, number: int, start: int, end: int) -> bytes:
        """Return bytes of a file, or of the copies; without its position, which forks share."""
        part = self._parts[max(number, 0)]
        try:
            if number not in self._open:
                self._open_part(number)
            self._open.move_to_end(number)
            content = b""
            while len(content) < end - start:
                done = len(content)
                more = os.pread(self._open[number], end - start - done, start + done)
                if not more:
                    break
                content += more
        except OSError as error:
            msg = f"{part.file}: cannot be read: {error.strerror or error}"
            raise ValueError(msg) from error
        return content

    def _open_part(self, number: int) -> None:
        path = on_disk(self._parts[number].file) if number >= 0 else self._copies
        assert isinstance(path, Path)
        self._open[number] = os.open(path, os.O_RDONLY)
        if len(self._open) > _MOST_OPEN:
            os.close(self._open.pop(next(n for n in self._open if n >= 0)))
        if number >= 0 and _identity(self._open[number]) != self._parts[number].identity:
            msg = f"{self._parts[number].file}: has changed since it was opened; restart the run"
            raise ValueError(msg)

    def __del__(self) -> None:
        """Close what is open."""
        while getattr(self, "_open", None):
            os.close(self._open.popitem()[1])


class Storing:
    """Finds where documents are, one by one in their order, and copies what must be copied."""

    def __init__(self, columns: Columns) -> None:
        """Start with no document."""
        self.hashes = bytearray()
        self._columns = columns
        self._parts: list[_Part] = []
        self._starts, self._numbers = array("q"), array("L")
        self._memory = bytearray()
        self._copied = self._end = 0
        self._place = ""
        self._file: IO[bytes] | None = None

    def begin(self, file: DataFile) -> None:
        """Go on with the documents of another file."""
        self._finish()
        self._parts.append(_Part(file, len(self), "", False, 0, _identity(on_disk(file))))
        self._place = ""

    def add(self, content: Content, found: Scanned) -> None:
        """Keep a document of the present file."""
        start, end = found.before.byte, found.after.byte
        plain = start is not None
        self.hashes += hash_of(content)
        if start is None or end is None:
            start = self._copied
            self._copy(packed(content))
            end = self._copied
        self._starts.append(start)
        if not self._place:  # the first of its file tells how places begin, and all end in a number
            self._place = _NUMBER.sub("", found.place)
            self._parts[-1] = self._parts[-1]._replace(place=self._place, plain=plain)
        self._numbers.append(int(found.place[len(self._place) :]))
        self._end = end

    def __len__(self) -> int:
        return len(self._starts)

    def done(self) -> StoredContents:
        """Return the documents."""
        self._finish()
        parts = [
            part
            for part, after in zip(
                self._parts, [*(p.first for p in self._parts[1:]), len(self)], strict=True
            )
            if after > part.first
        ]
        copies = self._kept() if self._file else bytes(self._memory)
        self._memory = bytearray()
        starts = np.frombuffer(self._starts, np.int64)
        numbers = np.frombuffer(self._numbers, f"u{self._numbers.itemsize}").astype(np.uint32)
        return StoredContents(parts, starts, numbers, self._columns, copies)

    def _finish(self) -> None:
        if self._parts:
            self._parts[-1] = self._parts[-1]._replace(end=self._end)

    def _copy(self, content: bytes) -> None:
        self._memory += content
        self._copied += len(content)
        if len(self._memory) > _IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        folder = cache_folder("texts")
        make_room(folder, len(self._memory))
        try:
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)  # noqa: SIM115
            self._file.write(self._memory)
        except OSError as error:
            raise failed(folder, error) from error
        self._memory = bytearray()

    def _kept(self) -> Path:
        """Give the file of copies the name of what it holds."""
        self._flush()
        assert self._file is not None
        self._file.close()
        kind = xxh3_128_hexdigest(bytes(self.hashes) + self._starts.tobytes())
        kept = Path(self._file.name).parent / kind
        os.replace(self._file.name, kept)  # noqa: PTH105
        return kept

    def close(self) -> None:
        """Remove what was copied, unless it was kept."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)


def _identity(file: Path | int) -> tuple[int, int]:
    info = os.stat(file)  # noqa: PTH116 - a descriptor is no path
    return info.st_size, info.st_mtime_ns

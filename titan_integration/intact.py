"""Reading checkpoints with the checksums that are in them.

`torch.save`, which writes the items of the host's checkpoints, leaves a CRC-32 of every tensor in
its zip archives, and `torch.load` does not look at it.  Each rank checks what it reads.
"""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from typing_extensions import override


class IntactReader(FileSystemReader):
    """Torch's reader of a checkpoint's folder; refuses bytes that are not as they were written."""

    @override
    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """Return the bytes of one tensor or object, all of them in memory.

        Raises:
            ValueError: They are not intact.
        """
        found = io.BytesIO(super()._slice_file(file, sinfo).read())
        # What is no archive any more does not load.
        if zipfile.is_zipfile(found) and not _is_intact(found):
            end = sinfo.offset + sinfo.length
            msg = f"{sinfo.relative_path} is damaged between bytes {sinfo.offset:,} and {end:,}"
            raise ValueError(msg)
        found.seek(0)
        return found


def why(error: BaseException) -> str:
    """Return in one line why reading or writing a checkpoint failed, on the first such rank."""
    cause = cause_of(error)
    return f"{cause}" if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the first rank that had one, which torch wraps for all of them."""
    if isinstance(error, CheckpointException) and error.failures:
        cause, _ = error.failures[min(error.failures)]
        return cause
    return error


def _is_intact(found: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(found) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001 - a damaged archive raises anything
        return False

"""A run's dump folder: that it can be written, and is one run's alone; what is said if not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from typing import IO, TYPE_CHECKING

from weighting.runs.files import open_lock
from weighting.runs.layout import LOCK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Say what could not be written, why, and what to do.

    Raises:
        ValueError: An OSError came of what is done within.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(unwritten(path, error)) from error


def unwritten(path: Path | str, error: OSError) -> str:
    """Return what to say of what could not be written."""
    mend = "make room there" if error.errno in _FULL else "make it writable or take another folder"
    return f"cannot write {path}: {error.strerror or error}; {mend} and give the same command again"


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or not be made; writes nothing.

    Raises:
        ValueError: It cannot.
    """
    above = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
    with writing(folder):
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is no folder")
        if not os.access(above, os.W_OK):
            read_only = os.statvfs(above).f_flag & os.ST_RDONLY
            code = errno.EROFS if read_only else errno.EACCES
            raise OSError(code, os.strerror(code))


def claim(folder: Path) -> IO[str]:
    """Keep a folder to this process, until the returned file is closed or the process ends.

    However it ends, and also over NFS; a file system without locks keeps nobody out.

    Raises:
        ValueError: Another process has the folder, or it cannot be written.
    """
    path = folder / LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        # Children that outlive a killed process must not keep the lock.
        file = locked(path, inherited=False)
    except HeldError as held:
        msg = (
            f"{folder}: {held.holder or 'another process'} is training there; take another "
            "--dump_folder, or wait until it is done, or end it"
        )
        raise ValueError(msg) from None
    sign(file, f"process {os.getpid()} on {socket.gethostname()}\n")
    return file


class HeldError(Exception):
    """Another process has a lock; holds what it wrote there."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        super().__init__(holder)


def locked(path: Path, *, inherited: bool) -> IO[str]:
    """Open a file and lock it until it is closed; on a file system without locks it is but opened.

    Args:
        path: The file.
        inherited: Whether processes that get the open file keep the lock as well.

    Raises:
        HeldError: Another process has the lock.
        ValueError: The file cannot be written.
    """
    with writing(path):
        file = open_lock(path)
    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise HeldError(holder) from None
    except OSError:  # a file system without locks
        pass
    return file


def sign(file: IO[str], holder: str) -> None:
    """Write into a locked file who has it, for the message to others."""
    with writing(file.name):
        file.truncate(0)
        file.write(holder)
        file.flush()

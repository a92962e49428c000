"""Data files at addresses such as `s3://` or `https://`: listed, and fetched as they are reached.

A file is fetched whole into the cache, under a name that its address, size and version make, and
read from there as a local one. Ranks of one machine fetch it once. A fetch that breaks off goes on
at the byte where it was, if the store reads ranges.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from filelock import FileLock
from torchtitan.tools.logging import logger
from xxhash import xxh3_128_hexdigest

from titan_integration.data.cache import cache_folder, failed, make_room

_T = TypeVar("_T")

# Seconds to wait before each further try.
_WAITS = (0.5, 2.0, 8.0)

# Errors that another try does not mend.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)

# What tells versions of a file apart: of its content, else of when it was written.
_OF_CONTENT = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "blob_id", "lfs")
_OF_TIME = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True, order=True)
class Url:
    """The address of a file or folder, or a pattern of them."""

    address: str

    def __str__(self) -> str:
        """Return the address as it may be shown: what follows a ``?`` may be a signature."""
        place, asks, _ = self.address.partition("?")
        return f"{place}?..." if asks and self.is_http else self.address

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return self._path.name

    @property
    def parent(self) -> PurePosixPath:
        """Return the path it is in."""
        return self._path.parent

    @property
    def is_http(self) -> bool:
        """Tell whether what follows a ``?`` or a ``#`` is no part of the path."""
        return self.address.startswith("http")

    @property
    def is_cut(self) -> bool:
        """Tell whether a part of the address is not asked for."""
        return self.is_http and "#" in self.address

    @property
    def _path(self) -> PurePosixPath:
        whole = urlsplit(self.address).path if self.is_http else self.address.partition("://")[2]
        return PurePosixPath(whole)

    def told(self) -> tuple[int, str, str]:
        """Return the file's size, -1 if not told, and marks of its content and of its time.

        Raises:
            ValueError: It cannot be reached.
        """
        info = _tried(self, lambda files, path: files.info(path))
        marks = [
            next((str(info[key]) for key in keys if info.get(key)), "")
            for keys in (_OF_CONTENT, _OF_TIME)
        ]
        size = info.get("size")
        return -1 if size is None else int(size), marks[0], marks[1]

    def blocks(self, starts: Iterable[int], length: int) -> bytes:
        """Return some stretches of the file, which is not fetched for that.

        Raises:
            ValueError: They cannot be read.
        """
        each = [(start, start + length) for start in starts]
        return _tried(self, lambda files, path: b"".join(files.cat_file(path, *x) for x in each))

    def fetched(self) -> Path:
        """Return where in the cache the file is, once it is there.

        Raises:
            ValueError: It cannot be fetched.
        """
        told = self.told()
        folder = cache_folder("files")
        kept = folder / f"{xxh3_128_hexdigest(repr((self.address, told)).encode())}-{self.name}"
        try:
            with FileLock(f"{kept}.lock"):
                if not kept.exists():
                    self._fetch(kept, told[0])
                os.utime(kept, ns=(time.time_ns(), kept.stat().st_mtime_ns))  # used now
        except OSError as error:
            raise failed(folder, error) from error
        return kept

    def _fetch(self, kept: Path, size: int) -> None:
        part = kept.with_name(f"{kept.name}.part")
        make_room(kept.parent, max(size, 0))

        def get(files: Any, path: str) -> None:  # noqa: ANN401
            with part.open("ab") as target:
                try:
                    _rest(files.open(path, "rb"), target)
                except ValueError:
                    if not self.is_http:
                        raise
                    target.truncate(0)  # the server sends no ranges, but the whole
                    _rest(files.open(path, "rb", block_size=0), target)
            if size not in {-1, got := part.stat().st_size}:
                msg = f"{got} bytes came, of {size}"
                raise ConnectionError(msg)

        part.unlink(missing_ok=True)  # of a process that was killed
        try:
            _tried(self, get)
            part.replace(kept)
        finally:
            part.unlink(missing_ok=True)


def is_url(name: object) -> bool:
    """Tell whether a name is an address, such as ``s3://bucket/shards/``."""
    scheme, found, _ = str(name).partition("://")
    return bool(found) and scheme.replace("+", "").isalnum()


def files_at(url: Url, is_data: Callable[[str], bool]) -> dict[Url, str]:
    """Return the data files that an address names: itself, a folder's, or those of a pattern.

    Each with its path below that folder; empty if it is of none.

    Raises:
        ValueError: There is none, or it cannot be reached.
    """
    if _is_pattern(url, is_data):
        found = _tried(url, lambda files, path: _named(files, files.glob(path)))
        fixed = min(url.address.find(mark) for mark in _marks(url))
        if "/." not in url.address:  # nothing hidden is meant, as in folders here
            found = [x for x in found if "/." not in x[fixed:]]
    elif is_data(url.name):
        return {url: ""}
    else:
        found = _tried(url, lambda files, path: _named(files, files.find(path)))
    base = _tried(url, lambda files, path: _named(files, [path])[0]).rstrip("/") + "/"
    files = sorted(Url(address) for address in found if is_data(Url(address).name))
    is_below = {f: f.address.startswith(base) for f in files}
    return {f: f.address.removeprefix(base) if is_below[f] else "" for f in files}


def _is_pattern(url: Url, is_data: Callable[[str], bool]) -> bool:
    """Tell whether an address is a pattern, and no file of that name."""
    named = is_data(url.name) and bool(_marks(url))
    return bool(_marks(url)) and not (named and _tried(url, lambda fs, path: fs.exists(path)))


def _marks(url: Url) -> list[str]:
    """Return which characters of patterns an address has."""
    return [mark for mark in ("*[" if url.is_http else "*?[") if mark in url.address]


def _rest(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy what follows on what was copied by an earlier try."""
    with source:
        source.seek(target.seek(0, os.SEEK_END))
        shutil.copyfileobj(source, target, 1 << 20)


def _named(files: Any, paths: list[str]) -> list[str]:  # noqa: ANN401
    return [p if is_url(p) else files.unstrip_protocol(p) for p in paths]


def _tried(url: Url, do: Callable[[Any, str], _T]) -> _T:
    """Return what is done at an address, after up to three more tries.

    Raises:
        ValueError: It failed.
    """
    for wait in (*_WAITS, None):
        try:
            return do(*fsspec.core.url_to_fs(url.address))
        except Exception as raised:  # every store has errors of its own
            error = _of_http(raised) if url.is_http else raised
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if wait is None or isinstance(error, _FINAL):
                no_such = isinstance(error, FileNotFoundError)
                what = "no such file" if no_such else f"cannot be reached: {reason}"
                msg = f"{url}: {what}"
                raise ValueError(msg) from raised
            logger.warning(f"{url}: {reason}; trying again in {wait} s")
            time.sleep(wait)
    raise AssertionError


def _of_http(error: Exception) -> Exception:
    """Return why a file was not found on a server, of which fsspec only says that it was not.

    Anything but 404 and 410 may be: no connection, a server that fails, or one that forbids it.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = getattr(cause, "status", 0)
    if isinstance(cause, FileNotFoundError) or status in {404, 410}:
        return error
    return PermissionError(str(cause)) if status in {401, 403} else cause

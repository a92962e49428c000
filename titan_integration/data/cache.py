"""Files that can be made again: fetched data and copies of texts, below `WEIGHTING_CACHE`."""

import contextlib
import shutil
from pathlib import Path

from titan_integration.data.tokenizer import cache_dir

# Of the disk, so much stays free.
_FREE = 0.05


def cache_folder(name: str) -> Path:
    """Return a folder of the cache, which is there then.

    Raises:
        ValueError: It cannot be made.
    """
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(folder, error) from error
    return folder


def make_room(folder: Path, size: int) -> None:
    """Remove files that were not used for longest until a file of some bytes fits.

    A file that a process has open stays readable there.

    Raises:
        ValueError: It does not fit into the empty folder.
    """
    total, _, free = shutil.disk_usage(folder)
    if free - size > _FREE * total:
        return
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix not in {".lock", ".part"}]
    for file in sorted(files, key=_last_used):
        with contextlib.suppress(FileNotFoundError):  # another rank was first
            file.unlink()
        if shutil.disk_usage(folder).free - size > _FREE * total:
            return
    if shutil.disk_usage(folder).free <= size:
        msg = f"{folder}: no room for {size:,} bytes; set WEIGHTING_CACHE to a folder with more"
        raise ValueError(msg)


def failed(folder: Path, error: OSError) -> ValueError:
    """Return an error that says how to have the cache elsewhere."""
    msg = (
        f"cannot write the cache {folder} ({error.strerror or error}); set WEIGHTING_CACHE to a "
        "folder that you can write"
    )
    return ValueError(msg)


def _last_used(file: Path) -> float:
    try:
        return max(file.stat().st_atime, file.stat().st_mtime)
    except FileNotFoundError:
        return 0.0

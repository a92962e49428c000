"""Which local files hold the data of a split, and what the names of their folders say."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from torchtitan.tools.logging import logger, warn_once

from weighting.errors import closest, printable

_JSON = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
SUFFIXES = (*_JSON, *(s + packed for packed in (".gz", ".zst") for s in _JSON), PARQUET)
READABLE = f"{', '.join(_JSON)} (also .gz, .zst), {PARQUET}"
"""The suffixes, for messages."""

# What a split's directory may be called.
_SPLIT_DIRS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}

# More names of one kind would bury the message.
_FEW = 10

# What Hive calls the folder of records without a value.
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def suffix_of(path: Path) -> str:
    """Return the suffix of a data file in lower case, such as ``.jsonl.gz``; empty for others."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def local_files(path: Path, split: str) -> list[Path]:
    """List the data files of one split, sorted by path.

    Links are followed. A file or folder that several ways lead to is read once, under its own name
    if that is among them. What is not read is named in one warning on the first rank.

    Raises:
        ValueError: If the path does not exist or cannot be read, or nothing in it fits; names what
            there is.
    """
    try:
        folder = _split_folder(path, split)
        return [path] if folder is None else _files_in(folder, path)
    except OSError as error:
        msg = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise ValueError(msg) from error


def saved_dataset(path: Path, split: str) -> Path | None:
    """Return the folder of a split that ``datasets``' ``save_to_disk`` wrote; None for other data.

    Raises:
        ValueError: If the path does not exist or cannot be read, or has folders for other splits.
    """
    try:
        folder = _split_folder(path, split)
        return folder if folder and _is_saved(folder.iterdir()) else None
    except OSError as error:
        msg = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise ValueError(msg) from error


def folder_columns(file: Path) -> dict[str, str]:
    """Return the columns that the folders of a file's path name, as in ``domain=web/x.parquet``."""
    found: dict[str, str] = {}
    for part in file.parent.parts:
        key, is_pair, value = part.partition("=")
        if is_pair and key and value != _NO_VALUE:
            found[unquote(key)] = unquote(value)
    return found


def _split_folder(path: Path, split: str) -> Path | None:
    """Return the folder of a split, which may be the path itself; None if the path is a file."""
    if not path.exists():
        msg = f"{path}: no such file or directory{near(path.name, siblings(str(path)))}"
        raise ValueError(msg)
    if path.is_file():
        if not suffix_of(path):
            msg = f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {READABLE}"
            raise ValueError(msg)
        return None
    if not path.is_dir():
        msg = f"{path}: neither a file nor a directory; write the data to a file first"
        raise ValueError(msg)
    known = {name for names in _SPLIT_DIRS.values() for name in names}
    there = [d.name for d in sorted(path.iterdir()) if d.is_dir()]
    folder = next(
        (path / name for name in (*_SPLIT_DIRS.get(split, ()), split) if name in there), path
    )
    if folder is path and known.intersection(there):
        # Falling back to the whole directory would validate on the training text.
        msg = f"{path}: no sub-directory for split {split!r}; there are {', '.join(there)}"
        raise ValueError(msg)
    return folder


def _files_in(folder: Path, given: Path) -> list[Path]:
    """Return the data files in a folder and all below it; warn of what is there besides.

    Raises:
        ValueError: If there is none, or a folder is one that ``save_to_disk`` wrote.
    """
    files: list[Path] = []
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    if folder != given:
        beside = [f.name for f in sorted(given.iterdir()) if suffix_of(f) and f.is_file()]
        skipped[f"beside {folder.name}/, which has the split"] += beside
    seen: set[object] = {os.path.realpath(folder)}
    to_see, links = _entries(folder), list[Path]()
    while to_see or links:
        # Links come last, so that what they lead to is found under its own name first.
        path, is_link = (to_see.pop(), False) if to_see else (links.pop(0), True)
        name = str(path.relative_to(folder))
        if path.name.startswith("."):
            skipped["hidden"].append(name)
        elif path.is_symlink() and not is_link:
            links.append(path)
        elif is_link and not path.exists():
            skipped["links to nothing"].append(name)
        elif path.is_file() and not suffix_of(path):
            skipped[f"not {READABLE}"].append(name)
        elif not path.is_file() and not path.is_dir():
            skipped["neither a file nor a directory"].append(name)
        elif (itself := _identity(path)) in seen:
            skipped["read already under another name"].append(name)
        else:
            seen.add(itself)
            if path.is_file():
                files.append(path)
            else:
                to_see += _entries(path)
    _warn_of_skipped(folder, skipped)
    if not files:
        msg = f"{folder}: no {READABLE} file in this directory"
        raise ValueError(msg)
    return sorted(files)


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, last name first."""
    entries = sorted(folder.iterdir(), reverse=True)
    if _is_saved(entries):
        msg = (
            f"{folder}: a data set that datasets' save_to_disk wrote, which is read alone: give "
            f"this folder itself, --data {folder}"
        )
        raise ValueError(msg)
    return entries


def _is_saved(entries: Iterable[Path]) -> bool:
    return {"state.json", "dataset_info.json"} <= {path.name for path in entries}


def _identity(path: Path) -> object:
    """Return what two ways to the same file or folder have in common."""
    info = path.stat()
    if info.st_nlink > 1 and stat.S_ISREG(info.st_mode):
        return info.st_dev, info.st_ino  # it has names that no link tells
    return os.path.realpath(path)


def _warn_of_skipped(folder: Path, skipped: Mapping[str, Sequence[str]]) -> None:
    if any(skipped.values()) and os.environ.get("RANK", "0") == "0":
        each = [f"{_some(names)} ({reason})" for reason, names in skipped.items() if names]
        warn_once(logger, printable(f"{folder}: not read: {'; '.join(each)}"))


def _some(names: Sequence[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:_FEW]]
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(shown) + more


def near(name: str, there: Iterable[str]) -> str:
    """Return a question with the names that are close, or nothing."""
    close = closest(name, there, 3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def siblings(path: str) -> list[str]:
    """List the names beside a path."""
    folder = Path(path).parent
    return [p.name for p in islice(folder.iterdir(), 10_000)] if folder.is_dir() else []

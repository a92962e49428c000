"""Which local files hold the data of a split, and what the names of their folders say."""

import glob
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from torchtitan.tools.logging import logger, warn_once

from titan_integration.data.urls import Url, files_at, is_url
from weighting.errors import closest, printable

DataFile = Path | Url
"""A file of data, here or at an address."""

_JSON = (".jsonl", ".ndjson", ".json")
CSV = ".csv"
ARROW = ".arrow"
PARQUET = ".parquet"
_LINES = (*_JSON, CSV)
SUFFIXES = (*_LINES, *(s + packed for packed in (".gz", ".zst") for s in _LINES), ARROW, PARQUET)
READABLE = f"{', '.join(_LINES)} (also .gz, .zst), {ARROW}, {PARQUET}"
"""The suffixes, for messages."""

# What other trainers pack text into, by suffix, and why it is not read here.
_PACKED = (
    (
        (".bin", ".idx"),
        ".bin and .idx, as Megatron writes them, are not read: their reader is megatron-core's",
    ),
    (
        (".mds", ".mds.zstd", ".mds.zst", ".mds.gz"),
        "MosaicML's MDS is not read: its reader, mosaicml-streaming, asks for an older numpy",
    ),
)

# What a split's directory may be called.
_SPLIT_DIRS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}

# What save_to_disk writes beside Arrow files.
_OF_SAVED = {"state.json", "dataset_info.json"}

# More names of one kind would bury the message.
_FEW = 10

# What Hive calls the folder of records without a value.
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def data_at(name: str) -> DataFile:
    """Return the file, folder, pattern or address that a name stands for; ``~`` is one's home."""
    # Not Path's method, which raises for an unknown user.
    return Url(name) if is_url(name) else Path(os.path.expanduser(name))  # noqa: PTH111


def on_disk(file: DataFile) -> Path:
    """Return where a file can be opened; one at an address is fetched first."""
    return file.fetched() if isinstance(file, Url) else file


def suffix_of(path: DataFile) -> str:
    """Return the suffix of a data file in lower case, such as ``.jsonl.gz``; empty for others."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def local_files(path: DataFile, split: str) -> Sequence[DataFile]:
    """List the data files of one split, sorted by path; at an address, none is fetched yet.

    Links are followed. A file or folder that several ways lead to is read once, under its own name
    if that is among them. What is not read is named in one warning on the first rank, and so are
    files that may be packed copies of each other.

    Raises:
        ValueError: If the path does not exist or cannot be read, or nothing in it fits; names what
            there is.
    """
    files = _listed(path, split)
    _warn_of_copies(path, files)
    return files


def _listed(path: DataFile, split: str) -> Sequence[DataFile]:
    if isinstance(path, Url):
        _refuse_packed(path, [path.name])
        return _files_at(path, split)
    try:
        if is_pattern(path):
            found = [f for one in _matches(path) for f in _listed(one, split)]
            return sorted({os.path.realpath(str(f)): f for f in reversed(found)}.values(), key=str)
        folder = _split_folder(path, split)
        return [path] if folder is None else _files_in(folder, path)
    except OSError as error:
        msg = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise ValueError(msg) from error


def _files_at(url: Url, split: str) -> list[Url]:
    seen: list[str] = []

    def is_data(name: str) -> bool:
        seen.append(name)
        return bool(suffix_of(Path(name))) and not name.startswith(".")

    files = files_at(url, is_data)
    _refuse_packed(url, seen, [*files])
    files = {f: path for f, path in files.items() if "/." not in f"/{path}"}
    by_folder: defaultdict[object, set[str]] = defaultdict(set)
    for f in files:
        by_folder[f.parent].add(f.name)
    for f in [*files]:
        if f.name in _OF_SAVED and by_folder[f.parent] >= _OF_SAVED:
            del files[f]  # of what save_to_disk wrote, the rest are Arrow files
    tops = {f: path.partition("/")[0] for f, path in files.items() if "/" in path}
    there = set(tops.values())
    chosen = next((x for x in (*_SPLIT_DIRS.get(split, ()), split) if x in there), None)
    if chosen:
        return [f for f, top in tops.items() if top == chosen]
    if known := sorted(there & {name for names in _SPLIT_DIRS.values() for name in names}):
        msg = f"{url}: no folder for split {split!r}; there are {', '.join(known)}"
        raise ValueError(msg)
    if not files:
        cut = "; write # as %23, as what follows it is not asked for" if url.is_cut else ""
        msg = f"{url}: no {READABLE} file there{cut}"
        raise ValueError(msg)
    return [*files]


def is_pattern(path: Path) -> bool:
    """Tell whether a path is a pattern such as ``shards/*.jsonl``, and no file of that name."""
    return any(c in str(path) for c in "*?[") and not os.path.exists(path)  # noqa: PTH110


def _matches(pattern: Path) -> list[Path]:
    """Return the data files and folders that a pattern names; ``**`` goes down any folders.

    Raises:
        ValueError: If it names none.
    """
    named = [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    found = [p for p in named if p.is_dir() or suffix_of(p)]
    _refuse_packed(pattern, [p.name for p in named], found)
    if "**" in str(pattern):  # which names what is in a folder beside the folder
        found = [p for p in found if not p.is_dir()]
    if not found:
        others = f"; it names {_some([p.name for p in named])}" if named else ""
        msg = f"{pattern}: no {READABLE} file or folder matches this pattern{others}"
        raise ValueError(msg)
    return found


def saved_dataset(path: DataFile, split: str) -> Path | None:
    """Return the folder of a split that ``datasets``' ``save_to_disk`` wrote; None for other data.

    Raises:
        ValueError: If the path does not exist or cannot be read, or has folders for other splits.
    """
    if isinstance(path, Url) or is_pattern(path):
        return None
    try:
        folder = _split_folder(path, split)
        return folder if folder and _is_saved(folder.iterdir()) else None
    except OSError as error:
        msg = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise ValueError(msg) from error


def folder_columns(file: DataFile) -> dict[str, str]:
    """Return the columns that the folders of a file's path name, as in ``domain=web/x.parquet``."""
    found: dict[str, str] = {}
    for part in file.parent.parts:
        key, is_pair, value = part.partition("=")
        if is_pair and key and value != _NO_VALUE:
            found[unquote(key)] = unquote(value)
    return found


def _split_folder(path: Path, split: str) -> Path | None:
    """Return the folder of a split, which may be the path itself; None if the path is a file."""
    if path.is_symlink() and not path.exists():
        msg = f"{path}: a link that leads nowhere; mend it, or name the file itself"
        raise ValueError(msg)
    if not path.exists():
        _refuse_packed(path, [f.name for f in path.parent.glob(f"{glob.escape(path.name)}.idx")])
        msg = f"{path}: no such file or directory{near(path.name, siblings(str(path)))}"
        raise ValueError(msg)
    if path.is_file():
        if not suffix_of(path):
            _refuse_packed(path, [path.name])
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
    _refuse_packed(folder, skipped[f"not {READABLE}"], files)
    _warn_of_skipped(folder, skipped)
    if not files:
        msg = f"{folder}: no {READABLE} file in this directory"
        raise ValueError(msg)
    return sorted(files)


def _refuse_packed(path: DataFile, names: Iterable[str], readable: Sequence[DataFile] = ()) -> None:
    """Refuse files that other trainers pack text into, unless there are others that can be read.

    Beside MosaicML's shards lies an ``index.json``, which is none of those.

    Raises:
        ValueError: One is; names the kind, why it is not read, and what to do.
    """
    for name in () if any(f.name != "index.json" for f in readable) else names:
        for suffixes, why in _PACKED:
            if name.lower().endswith(suffixes):
                there = "" if path.name == name else f" ({name})"
                msg = (
                    f"{path}{there}: {why}. Convert it once, in an environment of its own, to "
                    "Parquet or JSON lines with a list 'input_ids' or a 'text' a record: "
                    "docs/data.md has the lines"
                )
                raise ValueError(msg)


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, last name first."""
    entries = sorted(folder.iterdir(), reverse=True)
    if _is_saved(entries):
        msg = (
            f"{folder}: a data set that datasets' save_to_disk wrote, which is read alone: give "
            f"this folder itself, --data {folder}; among several sources its files, "
            f"{folder}/*.arrow"
        )
        raise ValueError(msg)
    return entries


def _is_saved(entries: Iterable[Path]) -> bool:
    return {path.name for path in entries} >= _OF_SAVED


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


def _warn_of_copies(path: DataFile, files: Sequence[DataFile]) -> None:
    """Warn of files whose names differ only in how they are packed."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        by_name[str(file).removesuffix(".gz").removesuffix(".zst")].append(file.name)
    both = [" and ".join(names) for names in by_name.values() if len(names) > 1]
    if both and os.environ.get("RANK", "0") == "0":
        msg = (
            f"{path}: both are read of {_some(both)}; if one is a packed copy of the other, move "
            "it away, or its text is trained on twice"
        )
        warn_once(logger, printable(msg))


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

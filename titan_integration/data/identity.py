"""What rows are made from, as facts and digests, so that changed data is not taken for the same.

Texts that are in memory are hashed whole, 64 bits each, and so are the domains and the columns in
use.  Files that are read only as rows are made, or memory-mapped, are told by name, size and a
sample of their bytes.  Paths and times of change do not count: a copy is the same data.
"""

from __future__ import annotations

import functools
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64_digest, xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128_hexdigest

from titan_integration.data.urls import Url

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torchtitan.components.tokenizer import BaseTokenizer


_LATER = frozenset(
    {"tokenizer", "content", "files", "modified", "hf_name", "text_column", "domain_column"}
    | {"label_counts"}
)
"""Facts that states of version 0.1.0 do not have, or not all runs."""
_MOST_FILES = 1000
"""Of more files than these only one digest is kept, so that a saved state stays small."""
_BLOCK = 4096
"""Bytes of each of a file's three samples."""
_PROBE = (
    "The 1st naïve café isn't far.\n\n\tdef f(x_1):\r\n    return x**2 != 3.14159  # 100,000\n"
    "Привет, мир! 你好，世界。こんにちは 🙂 <|endoftext|></s>\u00a0  https://example.org/?q=a%20b"
)
"""Two tokenizers that encode this alike and have one vocabulary are taken for the same."""


def name_in(path: Path | Url, file: Path | Url) -> str:
    """Return what a file of a data set at this path is called, wherever that is copied to."""
    if isinstance(path, Url) or isinstance(file, Url):
        return str(file).removeprefix(str(path).rstrip("/") + "/") if file != path else file.name
    if "*" in str(path):
        return file.name if path.parent == file.parent else str(file)
    return os.path.relpath(file, path) if path.is_dir() else file.name


def content_of(
    hashes: np.ndarray | None,
    domain_ids: Sequence[int] | np.ndarray,
    columns: Mapping[str, Sequence[float | np.ndarray] | np.ndarray],
    files: Sequence[tuple[str, int]],
) -> dict[str, Any]:
    """Return digests of texts, of domains, and of each column.

    And where documents come from files, under `by_file`, one of each file's documents.

    Args:
        hashes: 64 bits of each document's text; None where they are not in memory, and not read.
        domain_ids: Domain of each document.
        columns: A number, or an array of them, for each document, by the column's name.
        files: The name of each file, with the number of its first document.
    """
    each: dict[str, np.ndarray] = {"domains": np.asarray(domain_ids, np.int64)}
    if hashes is not None:
        each["text"] = hashes
    hashed = {
        name: values
        if isinstance(values, np.ndarray)
        else joined(xxh3_64_digest(_bytes(x)) for x in values)
        for name, values in columns.items()
    }
    ends = [start for _, start in files[1:]] + [len(domain_ids)]
    parts = [*each.values(), *hashed.values()]
    by_file = {
        name: _digest(*(part[start:end] for part in parts))
        for (name, start), end in zip(files, ends, strict=False)
    }
    return {
        **{name: _digest(part) for name, part in each.items()},
        "columns": {name: _digest(part) for name, part in hashed.items()},
        "by_file": _few(by_file),
    }


def files_of(files: Mapping[str, Path | Url]) -> dict[str, Any]:
    """Return what tells files apart that are too large to be read now: `files` and `modified`.

    Raises:
        ValueError: One cannot be read.
    """
    told: dict[str, Any] = {}
    modified: list[int] = []
    for name, path in files.items():
        if isinstance(path, Url):
            size, content, time = path.told()
            if not content and size > 0:  # the store has no mark of it
                content = xxh3_64_hexdigest(path.blocks(_starts(size), _BLOCK))
            told[name] = [size, content]
            modified.append(xxh3_64_intdigest(time.encode()) >> 1)
            continue
        try:
            size, changed = path.stat().st_size, path.stat().st_mtime_ns
            with path.open("rb") as file:
                sample = b""
                for start in _starts(size):
                    file.seek(start)
                    sample += file.read(_BLOCK)
        except OSError as error:
            msg = f"{path}: cannot read it: {error.strerror or error}"
            raise ValueError(msg) from error
        told[name] = [size, xxh3_64_hexdigest(sample)]
        modified.append(changed)
    return {"files": _few(told), "modified": _digest(np.array(modified, np.int64))}


def _starts(size: int) -> tuple[int, int, int]:
    """Return where the samples of a file of some size begin."""
    return 0, size // 2, max(size - _BLOCK, 0)


@functools.lru_cache(maxsize=8)
def tokenizer_digest(tokenizer: BaseTokenizer) -> str:
    """Return 16 hexadecimal digits that differ for another vocabulary or way to encode."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    try:
        encoded = [*tokenizer.encode(_PROBE, add_bos=True, add_eos=True)]
    except Exception:  # noqa: BLE001 - one without bytes need not know these characters
        encoded = list[int]()
    facts = [tokenizer.get_vocab_size(), sorted(vocabulary.items()), encoded]
    return xxh3_64_hexdigest(json.dumps(facts).encode())


def differences(before: Mapping[str, Any], now: Mapping[str, Any], word: str = "now") -> list[str]:
    """Return in which facts two accounts of rows differ, in words.

    What an earlier version did not save, and columns that only one of them uses, are left.

    Args:
        before: An account.
        now: Another.
        word: When or where that one is so.
    """
    optional = {key for key in _LATER if key not in before or key not in now}
    special = {"text", "content", "files", "modified"} | optional
    if "files" not in optional:
        special.add("stream")  # a folder may be copied to another place
    if before.get("documents") != now.get("documents"):
        special.add("shards")  # their number may follow
    found = [
        f"{key} = {before.get(key)!r}, {word} it is {now[key]!r}"
        for key in sorted(now, key=lambda key: key != "documents")
        if key not in special and before.get(key) != now[key]
    ]
    return found + _changed_content(before, now) + _changed_files(before, now)


def unsure(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what could not be compared of two accounts that do not differ; empty if nothing."""
    missing = [key for key in ("tokenizer", "content", "files") if key in now and key not in before]
    if missing:
        return (
            "the checkpoint is of an earlier version, which did not save digests of the tokenizer, "
            "the whole text and the columns: what it did save is the same, the rest was not "
            "compared"
        )
    if "files" in now and before["modified"] != now["modified"]:
        return (
            "files of the data were written or copied since the checkpoint: their names, sizes and "
            "samples of their bytes are the same, the rest was not compared"
        )
    return ""


def _changed_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    then, here = before.get("content", {}), now.get("content", {})
    same_number = before.get("documents") == now.get("documents")
    texts = [(before.get("text"), now.get("text"))]
    if then and here:
        texts.append((then.get("text"), here.get("text")))
    changed: list[str] = []
    if same_number and any(a != b for a, b in texts):
        changed.append("texts of documents differ")
    if then and here and same_number:
        if before["domains"] == now["domains"] and then["domains"] != here["domains"]:
            changed.append("domains of documents differ")
        changed += [
            f"values of column {name!r} differ"
            for name, digest in here["columns"].items()
            if then["columns"].get(name, digest) != digest
        ]
    files = _where(then.get("by_file", {}), here.get("by_file", {}))
    if files and (changed or not same_number):
        changed.append(f"look at {files}")
    return changed


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    files = _where(before.get("files", {}), now.get("files", {}))
    return [f"files have another name, size or content: {files}"] if files else []


def _where(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first few files that differ, if both tell of files."""
    names = sorted(x for x in before.keys() | now.keys() if before.get(x) != now.get(x))
    if not names or not before or not now:
        return ""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004


def _few(files: dict[str, Any]) -> dict[str, Any]:
    if len(files) <= _MOST_FILES:
        return files
    return {f"some of {len(files)} files": xxh3_64_hexdigest(json.dumps(files).encode())}


def joined(hashes: Iterable[bytes]) -> np.ndarray:
    """Return 64-bit hashes as one array."""
    return np.frombuffer(b"".join(hashes), np.uint64)


def _bytes(values: float | np.ndarray) -> bytes:
    array = np.asarray(values, np.float32)
    return bytes([array.ndim]) + array.tobytes()


def _digest(*parts: np.ndarray) -> str:
    return xxh3_128_hexdigest(b"".join(part.tobytes() for part in parts))

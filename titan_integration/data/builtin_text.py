"""The embedded data set: the running Python's own standard library, as text in five domains.

It needs no network and no download, is real text, and its domains differ in how predictable they
are: ``code``, ``docs`` (reference prose), ``tests``, ``tables`` (generated code) and ``data`` (text
that is not code). Two installations of one Python version may differ (distributions leave parts
out), never two reads of one.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

logger = logging.getLogger(__name__)

DOMAINS = ("code", "data", "docs", "tables", "tests")
SPLITS = ("train", "validation")

# A document is at most this long (characters), so that a domain is many documents and not a few
# huge ones.
MAX_CHARS = 8_000
# A domain reads at most this much (bytes): the test suite alone is 20 MB where it is installed, and
# absent elsewhere.
MAX_DOMAIN_BYTES = 4_000_000
MAX_FILE_BYTES = 500_000
HELD_OUT_PERCENT = 5

_SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data"}
_TEST_DIRS = {"test", "tests", "idle_test"}
_TEST_SUFFIXES = {".py", ".decTest"}
_TABLE_NAMES = {
    "entities.py",
    "token.py",
    "opcode.py",
    "stringprep.py",
    "keyword.py",
    "mimetypes.py",
    "stat.py",
}
# Prose shorter than this (characters) is not worth a document of its own beside the code that it
# comes from.
_MIN_PROSE_CHARS = 1_500
# Every triple-quoted string in order; group 1 is set when nothing but white space stands before it:
# a docstring.
_TRIPLE_QUOTED = re.compile(r'(^[ \t]*[rR]?)?"""(.*?)"""', re.MULTILINE | re.DOTALL)


class Text(NamedTuple):
    """One document: its name (``file#piece``), its domain and its text."""

    name: str
    domain: str
    text: str


@functools.cache
def stdlib_text(split: str = "train") -> tuple[Text, ...]:
    """Return the documents of one split, in an order that is fixed for a given Python installation.

    Args:
        split: ``train`` or ``validation`` (about 5 % of the files of every domain; all pieces of a
            file go together).

    Raises:
        ValueError: For another split, or when this Python has no standard library on disk.
    """
    if split not in SPLITS:
        msg = f"dataset 'stdlib' has no split {split!r}; use one of {', '.join(SPLITS)}"
        raise ValueError(msg)
    texts = _all_texts()
    held_out = _held_out_files(texts)
    return tuple(
        t for t in texts if ((t.domain, _file(t.name)) in held_out) == (split == "validation")
    )


def read_stdlib(root: Path) -> list[Text]:
    """Read every document below a standard library directory; log the domains without text."""
    files: dict[str, list[Path]] = {domain: [] for domain in DOMAINS}
    for path in _walk(root):
        files[_domain(PurePosixPath(path.relative_to(root)))].append(path)
    texts: list[Text] = []
    for domain in ("code", "data", "tables", "tests"):
        for name, text in _read(files[domain], root):
            texts += _pieces(name, domain, text)
            if domain == "code":
                texts += _pieces(name, "docs", _prose(name, text))
    for topic, text in sorted(_reference_topics().items()):
        texts += _pieces(f"topics/{topic}", "docs", text)
    empty = set(DOMAINS) - {t.domain for t in texts}
    if empty:
        logger.info(
            "The standard library in %s has no text for: %s.", root, ", ".join(sorted(empty))
        )
    return sorted(texts)


@functools.cache
def _all_texts() -> tuple[Text, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    texts = tuple(read_stdlib(root))
    if not any(t.domain == "code" for t in texts):
        msg = (
            f"dataset 'stdlib': no Python source in {root} (this Python keeps its library "
            "elsewhere, perhaps in a zip "
            "file); name a file or directory of your own in --dataloader.dataset"
        )
        raise ValueError(msg)
    return texts


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_DIRS)
        yield from (Path(folder, name) for name in sorted(names))


def _domain(path: PurePosixPath) -> str:
    in_tests = not _TEST_DIRS.isdisjoint(path.parts[:-1])
    if in_tests and path.suffix in _TEST_SUFFIXES:
        return "tests"
    if path.suffix != ".py":
        return "data"
    # Distributions often leave the test suites out; the library's own testing tools are always
    # there.
    if path.parts[0] == "unittest" or path.name == "doctest.py":
        return "tests"
    if (
        path.parts[0] == "encodings"
        or path.name in _TABLE_NAMES
        or path.name.startswith("_sysconfigdata")
    ):
        return "tables"
    return "code"


def _read(paths: Iterable[Path], root: Path) -> Iterator[tuple[str, str]]:
    """Yield name and content of text files up to the cap, in a hash's order: a fair sample."""
    total = 0
    for path in sorted(paths, key=lambda p: _hash(p.relative_to(root).as_posix())):
        try:
            if not 0 < path.stat().st_size <= MAX_FILE_BYTES:
                continue
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):  # a dangling link, or not text
            continue
        if "\0" in text:
            continue
        total += len(text)
        if total > MAX_DOMAIN_BYTES:
            return
        yield path.relative_to(root).as_posix(), text


def _prose(name: str, source: str) -> str:
    found = [inspect.cleandoc(m[2]) for m in _TRIPLE_QUOTED.finditer(source) if m[1] is not None]
    prose = "\n\n".join([name, *found])
    return prose if len(prose) >= _MIN_PROSE_CHARS else ""


def _reference_topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # the language reference is left out of some minimal installations
        return {}


def _pieces(name: str, domain: str, text: str) -> list[Text]:
    """Cut a text into documents of at most ``MAX_CHARS``, at line ends where there are any."""
    pieces: list[str] = []
    current = ""
    for line in text.splitlines(keepends=True):
        if len(current) + len(line) > MAX_CHARS:
            pieces.append(current)
            current = ""
        *whole, rest = (line[i : i + MAX_CHARS] for i in range(0, len(line), MAX_CHARS))
        pieces += whole
        current += rest
    pieces.append(current)
    return [
        Text(f"{name}#{i:03d}", domain, piece) for i, piece in enumerate(pieces) if piece.strip()
    ]


def _held_out_files(texts: Iterable[Text]) -> set[tuple[str, str]]:
    # By file and not by piece: a module's docstrings are in both code and docs, and must not be in
    # both splits.
    by_domain: dict[str, set[str]] = {}
    for t in texts:
        by_domain.setdefault(t.domain, set()).add(_file(t.name))
    held_out: set[tuple[str, str]] = set()
    for domain, names in by_domain.items():
        chosen = {n for n in names if _hash("held out " + n) % 100 < HELD_OUT_PERCENT}
        if len(names) > 1 and not chosen:
            chosen = {min(names, key=lambda n: _hash("held out " + n))}
        held_out |= {(domain, name) for name in chosen}
    return held_out


def _file(name: str) -> str:
    return name.rpartition("#")[0]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

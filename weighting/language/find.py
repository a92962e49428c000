"""Spec files: those that come with the package, and the file that a path or a name means."""

from __future__ import annotations

import os
from pathlib import Path

from weighting.errors import Problem, SpecError, nearest


def shipped() -> dict[str, Path]:
    """Return the spec files that come with the package, by name."""
    return {file.stem: file for file in sorted(specs_folder().glob("*.yaml"))}


def specs_folder() -> Path:
    """Return the folder of the specs that come with the package, and of their schema."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "specs"
    return installed if installed.is_dir() else here.parent / "specs"  # a source checkout


def find(path: str | Path) -> Path:
    """Return the file a path means, looking among the shipped specs when it does not exist.

    Raises:
        SpecError: There is no such file.
    """
    file = Path(path)
    if is_file(str(path)):
        return file
    name = file.name.removesuffix(".yaml")
    known = shipped()
    is_bare = str(path) in {name, f"specs/{name}.yaml"}
    if is_bare and name in known:
        return known[name]
    what = "is a directory" if os.path.isdir(path) else "no such file"  # noqa: PTH112 - see is_file
    fix = nearest(name, known) or "; `weighting list` shows the specs there are"
    raise SpecError([Problem(f"{path}: {what}{fix}")])


def is_file(text: str) -> bool:
    """Tell whether a file has this name; a text too long or odd for one is no error here."""
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises on such texts

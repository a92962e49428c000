"""The lock holds what pyproject.toml asks for and what that asks for, each by version and hash."""

import importlib.util
import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from titan_integration.host.versions import TESTED

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / ".ci" / "requirements.txt"
ENTRY = re.compile(
    r"(?P<pin>\S+==\S+(?: ; [^\\\n]+)?)(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)"
)


def entries():
    """Return what the lock says of each package, comments left out."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return re.split(r"\n(?! )", "\n".join(x for x in lines if not x.lstrip().startswith("#")))


def pinned():
    """Return the locked version of each package that is for this platform."""
    pins = [Requirement(ENTRY.fullmatch(entry)["pin"]) for entry in entries()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len({pin.name for pin in here}) == len(here)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}


def installed(name):
    """Return the version of an installed package; None for one that is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def asked(requirements, extras):
    """Return the requirements that hold on this platform with any of some extras."""
    found = [Requirement(text) for text in requirements]
    extras = {"", *extras}
    return [
        x for x in found if not x.marker or any(x.marker.evaluate({"extra": e}) for e in extras)
    ]


def test_every_entry_is_a_version_with_hashes():
    """No entry is a range, an address, a folder or an option of pip."""
    assert len(entries()) > 100
    assert not [entry for entry in entries() if not ENTRY.fullmatch(entry)]


def test_the_lock_satisfies_the_project_and_everything_in_it():
    """Requirements of the project, its extras and its build, and theirs in turn, are in range."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project, build = (tomllib.loads(text)[name] for name in ("project", "build-system"))
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    todo = asked([*project["dependencies"], *build["requires"], *extras], ())
    overridden = tomllib.loads(text)["tool"]["uv"]["override-dependencies"]
    left_out = {canonicalize_name(Requirement(text).name) for text in overridden}
    pins = pinned()
    seen, wrong = set(), []
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in left_out:
            continue
        if name not in pins or not wanted.specifier.contains(pins[name], prereleases=True):
            wrong.append(f"{wanted}, locked {pins.get(name)}")
        elif (name, *wanted.extras) not in seen and pins[name] == installed(name):
            seen.add((name, *wanted.extras))
            todo += asked(metadata.requires(name) or [], wanted.extras)
    assert not wrong
    assert pins.keys() >= {"torch", "torchtitan", "hatchling", "pytest", "matplotlib"}


def test_what_is_locked_is_what_is_said_to_be_tested():
    """The versions that no warning is given for are the locked ones."""
    assert {name: pinned()[name] for name in TESTED} == TESTED


def test_the_page_counts_packages_and_tells_licences_as_they_are():
    """The lines on dependencies are what the installed packages say."""
    others = [name for name, version in pinned().items() if installed(name) != version]
    if (others or sys.platform != "linux") and "CI" not in os.environ:
        pytest.skip(f"needs what is locked for Linux; other or missing: {', '.join(others)}")
    path = ROOT / ".ci" / "dependencies.py"
    found = importlib.util.spec_from_file_location("dependencies", path)
    dependencies = importlib.util.module_from_spec(found)
    found.loader.exec_module(dependencies)
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")

    told = page.partition(dependencies.BEGIN)[2].partition(dependencies.END)[0]
    assert told == dependencies.lines()

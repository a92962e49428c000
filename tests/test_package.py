"""Sdist and wheel: whole, well formed, the same bytes wherever they are built, and they run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import weighting as wt

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUN = """
import runpy, sys, torch, weighting as wt
site = sys.argv[1]
assert wt.__file__.startswith(site), wt.__file__
signals = wt.Signals(loss=torch.tensor([[1.0], [4.0], [5.0]]), valid=torch.ones(3, 1).bool())
print(wt.build(wt.load("linupper"))(signals, 1).token.flatten().tolist())
print(wt.simulate("linupper", loss=[1.0, 4.0, 5.0], step=1).tolist())
sys.argv[1:] = ["check", "linupper"]
runpy.run_path(f"{site}/bin/weighting", run_name="__main__")
"""


def ran(*arguments, **keywords):
    """Return what Python prints when given arguments; it must succeed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **keywords)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Return two copies of what the sdist is made of, unlike in place, time and permissions."""
    first = tmp_path_factory.mktemp("tree")
    for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        source, target = ROOT / path[1:], first / path[1:]
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, first)
    second = tmp_path_factory.mktemp("another") / "with a space"
    shutil.copytree(first, second)
    for path in second.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1e9, 1e9))
    return first, second


@pytest.fixture(scope="module")
def built(trees):
    """Return sdist and wheel: the second copy's by way of the sdist, on another day and umask."""
    found = []
    ways = (["hatchling", "build", "-d"], 0o022), (["build", "--no-isolation", "--outdir"], 0o077)
    for tree, (command, umask) in zip(trees, ways, strict=True):
        ran("-m", *command, tree / "dist", cwd=tree, umask=umask)
        found.append(tuple(sorted((tree / "dist").iterdir())))
    return found


def files(folder):
    """Return the files of a folder by their paths in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in paths}


@pytest.mark.slow
def test_the_same_bytes_wherever_they_are_built(built):
    """Folder, time, permissions, umask and the way by the sdist change no byte."""
    (one, other), names = built, [path.name for path in built[0]]

    version = re.escape(wt.__version__)
    assert re.fullmatch(rf"weighting_dsl-{version}-py3-none-any\.whl", names[0])
    assert re.fullmatch(rf"weighting_dsl-{version}\.tar\.gz", names[1])
    assert [path.name for path in other] == names
    assert [path.read_bytes() for path in other] == [path.read_bytes() for path in one]


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_tells_of_itself(trees, built):
    """Both packages, typed, with templates, specs and schema; licence and entry points."""
    tree, wheel = trees[0], zipfile.ZipFile(built[0][0])
    wanted = {f"weighting/specs/{name}" for name in files(tree / "specs")}
    for package in ("weighting", "titan_integration"):
        wanted |= {f"{package}/{name}" for name in files(tree / package)}
        assert f"{package}/py.typed" in wanted
    assert wanted >= {"weighting/specs/weighting.schema.json", "weighting/report/page.html.j2"}
    info = f"weighting_dsl-{wt.__version__}.dist-info"
    about = {f"{info}/{x}" for x in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    assert {*wheel.namelist()} == wanted | about | {f"{info}/licenses/LICENSE"}

    told = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert told["Version"] == wt.__version__
    assert told["License-Expression"] == "BSD-3-Clause"
    assert told["Requires-Python"] == ">=3.11"
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "[console_scripts]\nweighting = weighting.cli:main\n" in points
    assert "[pytest11]\nweighting = weighting.testing.plugin\n" in points


@pytest.mark.slow
def test_the_sdist_holds_what_its_own_tests_need(trees, built):
    """An unpacked sdist is a checkout: tests, benchmarks, the lock and the Makefile are there."""
    with tarfile.open(built[0][1]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    there = {name for name in files(trees[0]) if not name.startswith("dist/")}
    assert there >= {
        "Makefile",
        ".ci/requirements.txt",
        "tests/conftest.py",
        "tests/test_package.py",
    }
    assert names == there | {"PKG-INFO"}


@pytest.mark.slow
def test_an_index_would_take_both(built):
    """The long description renders, and nothing is missing."""
    told = ran("-m", "twine", "--no-color", "check", "--strict", *built[0])

    assert re.findall(r": (\w+)$", told, re.MULTILINE) == ["PASSED", "PASSED"]


@pytest.mark.slow
def test_an_installed_copy_runs(built, tmp_path):
    """Away from the sources, the command checks a shipped spec and Python weighs by it."""
    wheel, _ = built[0]
    site = tmp_path / "site"
    ran(
        "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", f"--target={site}", wheel
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    told = ran("-c", RUN, site, cwd=tmp_path, env=environment)

    weights, simulated, checked = told.splitlines()
    low, middle, high = json.loads(weights)
    assert weights == simulated
    assert low < middle == high  # all above the middle of the range alike
    assert checked == "ok  linupper, weighs per sequence, reads loss"


def test_the_changelog_tells_of_this_version():
    """Its newest heading is the version, three numbers, and a day or that there is none yet."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.search(r"^## (\S+) — (\S+)$", text, re.MULTILINE).groups()

    assert version == wt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", day)

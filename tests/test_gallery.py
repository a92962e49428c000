"""The gallery is what the specs say now."""

import importlib.util
from pathlib import Path

import pytest

import weighting as wt

ROOT = Path(__file__).resolve().parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))


def load(name):
    """Return a script of benchmarks/ as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


gallery = load("gallery")


def test_there_are_specs():
    """The gallery shows the shipped specs, which are many."""
    assert len(SPECS) >= 34


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_has_its_entry_as_it_is_now(path):
    """Title, formula, paper, differences, level, signals and cost of a spec are in the gallery."""
    page = (ROOT / "specs" / "README.md").read_text(encoding="utf-8")
    spec = wt.load(path)

    assert spec.name == path.stem
    assert gallery.entry(path, spec) in page
    assert (ROOT / "specs" / "curves" / f"{spec.name}.svg").is_file()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_picture_shows_something(path):
    """A curve has finite weights, some of them positive."""
    loss, weight = gallery.curve(wt.load(path))

    assert weight.shape == loss.shape
    assert weight.isfinite().all()
    assert weight.max() > 0

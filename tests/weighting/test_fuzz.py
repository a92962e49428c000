"""A slice of the fuzz, and that it would find what it looks for."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weighting as wt

HERE = Path(__file__).resolve().parent


@pytest.fixture
def fuzz(monkeypatch):
    """Return the module that makes and tries texts."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(HERE.parents[1] / "benchmarks")
    return importlib.import_module("fuzz")


@pytest.mark.slow
def test_some_texts_are_refused_or_whole(fuzz):
    """A share of the right and the hostile ones first, then what is made from them."""
    right, hostile = fuzz.right()[::6], fuzz.hostile()[::20]
    found = fuzz.fuzz(right + hostile, 20260822, most=400)
    assert found.findings == {}
    assert found.tried == sum(found.counts.values()) == 400
    assert found.counts["built"] >= 0.8 * len(right)  # some have domains of their own
    assert found.counts["refused"] >= 200
    assert 10 < len(found.kept) < 200  # most reach no new line
    assert len(found.lines) > 800


def test_the_same_seed_tries_the_same_texts(fuzz):
    """A finding can be had again."""
    one, two = (fuzz.fuzz(["uniform"], 3, most=30) for _ in range(2))
    assert (one.kept, one.counts, one.lines) == (two.kept, two.counts, two.lines)
    assert fuzz.fuzz(["uniform"], 4, most=30).kept != one.kept


def crash(text):
    """Fail as a parser with a mistake would."""
    return {}[text]


def hang(_):
    """Never come to an end, and catch what can be caught."""
    while True:
        try:
            while True:
                pass
        except Exception:  # noqa: BLE001 - the mistake in question
            pass


def run(_):
    """Start a program."""
    subprocess.run([sys.executable, "-c", ""], check=True)


def read_otherwise(text):
    """Read every second text as another spec."""
    read_otherwise.calls += 1
    return LOADS(text if read_otherwise.calls % 2 else "uniform")


LOADS = wt.loads
read_otherwise.calls = 0


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (crash, "KeyError: 'temperature(2)'"),
        (hang, "HangError: more than"),
        (run, "RanError: subprocess.Popen"),
        (read_otherwise, "AssertionError: arrow reads back as another spec"),
    ],
)
def test_a_mistake_is_found(fuzz, monkeypatch, mistake, said):
    """With the text that shows it."""
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    found = fuzz.Outcome()
    with fuzz.watched():
        monkeypatch.setattr(wt, "loads", mistake)
        fuzz.attempt("temperature(2)", found)
    ((what, text),) = found.findings.items()
    assert what.startswith(said)
    assert text == "temperature(2)"
    assert "temperature(2)" in fuzz.report(found, 0)


def test_a_function_that_fails_is_found(fuzz, monkeypatch):
    """What is built must weigh every token of a batch."""
    monkeypatch.setattr(fuzz, "batch", lambda _: wt.Signals(loss=torch.ones(2, 2)))
    found = fuzz.Outcome()
    with fuzz.watched():
        fuzz.attempt("temperature(2)", found)
    ((what, _),) = found.findings.items()
    assert what.startswith("AssertionError: weights of another shape")

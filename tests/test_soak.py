"""The long run: a short one ends in the same form, and what would not stay as it began is told."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from warm import python

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "soak.json"


@pytest.fixture
def soak(monkeypatch):
    """Return the module that trains and judges."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("soak")


@pytest.fixture
def flat(soak):
    """Return the numbers of a run that stays as it began, but for noise of a megabyte."""
    step = np.arange(1, 201) * 100
    noise = np.random.default_rng(0).normal(size=200)
    samples = {"step": step, "rss": 1e9 + 1e6 * noise, "blocks": 5e5 + 3 * noise}
    samples |= {name: np.full(200, 7) for name in soak.KEPT}
    samples |= {"files": step // 100, "bytes": 50 * step}
    return {
        "steps": 20_000,
        "samples": {name: values.tolist() for name, values in samples.items()},
        "milliseconds": {"CPU, fastest tenth": [30.0, *[31.0] * 8, 32.0]},
    }


def changed(found, name, change):
    """Change a column of the samples by a function of steps and values."""
    step, values = (np.array(found["samples"][x]) for x in ("step", name))
    found["samples"][name] = change(step, values).tolist()
    return found


def test_a_flat_run_breaks_no_bound(soak, flat):
    """Noise does not count, nor files, nor memory that is taken once."""
    assert soak.broken(flat) == []
    once = changed(flat, "rss", lambda step, y: y + 3e7 * (step > 6_000))
    assert soak.slopes(once, "rss")["all"].low > soak.BYTES
    assert soak.broken(once) == []


def test_the_slope_is_that_of_the_leak_within_its_interval(soak, flat):
    """A kilobyte a step, under noise of a megabyte, in all and in both halves."""
    for found in soak.slopes(changed(flat, "rss", lambda step, y: y + 1024 * step), "rss").values():
        assert found.low < 1024 < found.high
        assert found.value == pytest.approx(1024, rel=0.1)  # six of its standard errors


LEAKS = {
    "rss": lambda step, y: y + 600 * step,  # a small tensor each step
    "blocks": lambda step, y: y + step // 10,  # an object each recorded step
    "files open": lambda step, y: y + step // 1_000,  # one each checkpoint
    "threads": lambda step, y: y + (step > 15_000),
    "children": lambda step, y: y + step // 2_000,
    "compiles": lambda step, y: y + (step > 10_000),  # when a schedule jumps
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_breaks_its_bound_alone(soak, flat, name):
    """The judge names what grows, and nothing else."""
    (said,) = soak.broken(changed(flat, name, LEAKS[name]))
    assert said.startswith(name)


def test_steps_that_slow_down_break_their_bound(soak, flat):
    """By a half from the first tenth to the last."""
    flat["milliseconds"]["CPU, fastest tenth"] = np.linspace(30, 45, 10).tolist()
    assert soak.broken(flat) == ["a step takes 1.50 times the first tenth's in the last"]


@pytest.mark.processes
def test_a_short_run_ends_in_the_form_of_a_long_one(soak, tmp_path):
    """Sixty steps of the same trainer: the report of its numbers, and one compilation."""
    out = tmp_path / "found.md"
    command = [ROOT / "benchmarks" / "soak.py", "--steps=60", f"--out={out}"]
    done = python(*command, "--", "--compile.backend=eager", timeout=600)
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert out.read_text(encoding="utf-8") == soak.report(found)
    assert out.with_suffix(".svg").exists()
    # So few steps cannot tell how memory and time go on; all else must hold already.
    said = soak.broken(found)
    assert done.returncode == bool(said)
    assert not [x for x in said if x.startswith(soak.KEPT)]

    samples = {name: found["samples"][name] for name in soak.COLUMNS}
    assert {len(values) for values in samples.values()} == {60}
    assert samples["step"] == [*range(1, 61)]
    assert {*samples["compiles"]} == {1}
    assert min(samples["rss"]) > 1e8
    assert min(min(samples[name]) for name in ("blocks", "files open", "threads", "files")) > 0
    assert samples["bytes"][-1] > samples["bytes"][0]  # checkpoints and records are written
    for values in found["milliseconds"].values():
        assert len(values) == soak.PARTS
        assert min(values) > 0


def test_the_report_is_that_of_the_stored_numbers(soak):
    """The heaviest spec over 20,000 steps, and no bound broken."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    assert STORED.with_suffix(".md").read_text(encoding="utf-8") == soak.report(found)
    assert found["steps"] == 20_000
    assert soak.broken(found) == []

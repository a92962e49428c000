"""The long evidence: the order of its runs, its texts, and what its page finds in known numbers."""

import importlib
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
BUCKETS = ("frequent", "medium", "rare")
ROWS, TOKENS = 24, (8, 4, 2)
"""Of the validation text, and of every row by how frequent they are."""


@pytest.fixture
def page(monkeypatch):
    """Return the module that makes the page."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("evidence_long_page")


@pytest.fixture
def study(monkeypatch):
    """Return the module that makes the runs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("evidence_long")


def stored(folder, shifts, seeds):
    """Write runs whose losses are so many nats a token from uniform's, in the hard rows alone.

    Args:
        folder: Where to.
        shifts: By text, method and step.
        seeds: How many.
    """
    level = np.random.default_rng(0).permutation(ROWS // 2)
    loss = 2 + np.concatenate([level, level]) / 10  # two domains, the same twelve levels
    hard = np.concatenate([level, level]) >= ROWS // 2 * 2 // 3
    runs = [("as it is", "reference", 1000, 0.0, step) for step in (1, 2)]
    for (text, method, step), shift in shifts.items():
        runs += [(text, method, seed, shift, step) for seed in range(seeds)]
    rows = [
        {
            "text": text,
            "method": method,
            "seed": seed,
            "step": step,
            "ess": 1 - abs(shift),
            "bound": shift**3,
            "domain_weights": [1 + shift, 1 - shift],
            **{
                name: ((loss + seed + shift * hard) * count).tolist()
                for name, count in zip(BUCKETS, TOKENS, strict=True)
            },
        }
        for text, method, seed, shift, step in runs
    ]
    text = {
        "domain": ["book"] * (ROWS // 2) + ["code"] * (ROWS // 2),
        "document": [i // 2 for i in range(ROWS)],
    }
    text |= {name: [count] * ROWS for name, count in zip(BUCKETS, TOKENS, strict=True)}
    about = {"steps": 2, "seq_len": 16, "rows": 4, "plain": 1, "machine": "one", "runs": 40}
    about |= {"epochs": 1.5, "versions": {"torch": "1"}, "buckets": [0.8, 0.95], "text": text}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"about": json.dumps(about)})
    pq.write_table(table, folder / "found.parquet")
    return folder / "found.parquet"


def test_a_known_gain_is_found_where_it_is(page, tmp_path):
    """In the hard third of the rows, which are told by a model of another seed, and turning."""
    runs = {
        ("as it is", "uniform", 1): 0.0,
        ("as it is", "uniform", 2): 0.0,
        ("as it is", "linupper-r0.4", 1): 0.3,
        ("as it is", "linupper-r0.4", 2): -0.3,
    }
    found = page.Study(stored(tmp_path, runs, seeds=3))
    easy, medium, hard = found.difference("as it is", "linupper-r0.4", 2, "difficulty")
    assert easy == pytest.approx((0, 0, 0), abs=1e-12)
    assert medium == pytest.approx((0, 0, 0), abs=1e-12)
    assert hard == pytest.approx((-0.3, -0.3, -0.3), abs=1e-12)
    (mean,) = found.difference("as it is", "linupper-r0.4", 2, "mean")
    assert mean.value == pytest.approx(-0.1)
    easy, medium, hard = found.difference("as it is", "linupper-r0.4", 2, "own difficulty")
    assert easy.value == pytest.approx(0)
    assert medium.value < -0.05, "what it gained on is of medium difficulty to itself"
    assert medium.value + hard.value == pytest.approx(-0.3)
    buckets = found.difference("as it is", "linupper-r0.4", 2, "bucket")
    assert [x.value for x in buckets] == pytest.approx([-0.1] * 3)

    text = page.write_page(tmp_path / "found").read_text()
    assert "7 of 40 runs are there" in text
    assert text.count("| uniform, another seed |") == 3  # in all tables but those of difficulty
    assert "1.5 epochs of the text as it is" in text
    assert "linupper-r0.4: better (-0.100 [" in text
    assert "its sign turned at step 2" in text
    assert "better on book, code, hard rows" in text
    assert "on 1 of 2." in text  # book is better in the paper too, code worse
    assert "make up 80 % of all tokens, the next 15 %" in text
    assert "**Does dropping redundancy help where there is redundancy?**\nNot run yet." in text
    assert "linupper-r0.4" in (tmp_path / "found.svg").read_text()


def test_one_seed_is_said_to_be_one(page, tmp_path):
    """On a text with copies, too; the judge is not needed for the mean."""
    runs = {("repeated", name, 2): shift for name, shift in (("uniform", 0), ("linupper-r1", 0.6))}
    found = page.Study(stored(tmp_path, runs, seeds=1))
    text = page.page(found, "it.svg")
    assert "repeated, linupper-r1: worse (+0.200 [" in text
    assert "with 1 of 3 seeds" in text


def test_what_goes_with_a_gain_is_told_of_four_methods(page, tmp_path):
    """Worse as the cube root of the term of the bound, and either way as domains shift."""
    shifts = {"linupper-r0.4": 0.4, "linupper-r1": -0.4, "mile": 0.1, "prop1": -0.1}
    runs = {("as it is", name, 2): x for name, x in shifts.items()}
    runs[("as it is", "uniform", 2)] = 0.0
    found = page.Study(stored(tmp_path, runs, seeds=2))
    text = page.gains(found)
    assert "over 8 runs of 4 methods" in text
    # r = sum s^4 / sqrt(sum s^2 sum s^6), between tanh(artanh r - 1.96 / sqrt(5)) and with +
    assert "term of the bound +0.974 [+0.858, +0.995]" in text
    assert "0.000 [-0.705, +0.705]" in text.partition("domain shift")[2]

    del runs[("as it is", "prop1", 2)]
    assert page.gains(page.Study(stored(tmp_path, runs, seeds=2))) == ""


def test_the_means_of_a_run_are_over_the_steps_between_two_checkpoints(study):
    """A step without documents of a domain says nothing of its weight."""
    lines = [
        {"step": 1, "weight/ess_frac": 0.1, "weighted_loss": 9.0, "unweighted_loss": 1.0},
        {"step": 2, "weight/ess_frac": 0.5, "weighted_loss": 3.0, "unweighted_loss": 2.0},
        {"step": 3, "weight/ess_frac": 0.7, "weighted_loss": 2.0, "unweighted_loss": 2.0},
    ]
    lines[1]["domain/book/weight"] = 1.5
    found = study.weights_in(lines, 1, 3, ["book", "code"])
    assert found.pop("domain_weights") == [1.5, None]
    assert found == pytest.approx({"ess": 0.6, "bound": 0.25})


def test_uniform_and_linupper_come_first_and_pairs_are_whole(study):
    """Each run is there once, and a method's baseline, text and seed before it."""
    runs = study.queue()
    assert [x[1:] for x in runs[:2]] == [("uniform", 0), ("linupper-r0.4", 0)]
    assert runs[5].method == "reference"  # the page tells difficulty by it
    assert len(runs) == len({*runs})
    for i, run in enumerate(runs):
        base = run._replace(method="uniform")
        assert run.method == "reference" or base in runs[: i + 1], run
    count = Counter((run.text, run.method) for run in runs)
    assert {count["as it is", x] for x in study.CURVE} == {3}
    assert {count["as it is", x] for x in study.OTHERS} == {1}
    assert {count[text, "linupper-r1"] for text in study.TEXTS} == {3}


def test_nothing_waits_for_the_reference_but_what_reads_it(study):
    """Runs of one batch are made at once; rho-1 scores with the reference."""
    runs = study.queue()
    first, then = study.by_need(runs)
    assert sorted(first + then, key=runs.index) == runs
    assert {x.method for x in then} == {"rho-1"}
    assert "reference" in {x.method for x in first}


@pytest.mark.slow
def test_a_run_whose_numbers_are_kept_is_not_made_again(study, tmp_path):
    """Not in another folder either; only rho-1 needs a model that is not kept: the reference."""
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "text.jsonl").write_text('{"text": "so it is", "domain": "book"}\n')

    def opened(folder, steps=20):
        (tmp_path / folder).mkdir(exist_ok=True)
        return study.Study(tmp_path / folder, tmp_path, None, steps, tmp_path / "found")

    first, *rest = study.queue()
    judge = next(run for run in rest if run.method == "reference")
    made = opened("here")
    assert made.missing() == study.queue()
    row = {"step": 20, "ess": 0.5, "bound": 0.1, "domain_weights": [1.0]}
    row |= {key: [2.0] for key in BUCKETS}
    made.keep(first, [first._asdict() | row])
    made.keep(first, [first._asdict() | row])  # in place of the one before
    assert pq.read_table(tmp_path / "found.parquet").num_rows == 1

    there = opened("there")
    assert there.missing() == rest
    there.keep(judge, [judge._asdict() | row])
    assert pq.read_table(tmp_path / "found.parquet").num_rows == 2
    assert opened("there").missing() == rest  # rho-1 reads its checkpoint, which is not there
    for run in rest:
        if run.method == "rho-1":
            there.keep(run, [run._asdict() | row])
    assert judge not in opened("there").missing()

    with pytest.raises(ValueError, match="numbers of another study: its 'steps' differs"):
        opened("elsewhere", steps=40)


def test_a_third_of_a_text_stands_eight_times_or_is_noise(study):
    """Copies are exact; noise has the same letters in another order; domains stay."""
    rows = [(f"the text of document {i}", "book") for i in range(300)]
    copies = Counter(study.of_text("repeated", rows))
    assert {*copies.values()} == {1, 8}
    assert {*copies} == {*rows}
    noisy = [*study.of_text("noisy", rows)]
    changed = [(a, b) for a, b in zip(noisy, rows, strict=True) if a != b]
    assert 70 < len(changed) < 130
    assert all(sorted(a[0]) == sorted(b[0]) for a, b in changed)


def test_weights_of_sequences_begin_after_the_plain_steps(study):
    """A twentieth of the run; those of tokens begin at once."""
    assert "interpolate(step(1, 0, at=1001))" in study.spec_text("linupper-r1", 20_000)
    assert "interpolate(step(1, 0, at=2))" in study.spec_text("dro-kl", 20)
    assert "interpolate" not in study.spec_text("mile", 20_000)


@pytest.mark.processes
def test_a_study_that_is_stopped_takes_its_run_with_it(study, monkeypatch, tmp_path):
    """No trainer goes on alone after Ctrl-C or SIGTERM."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    started = []
    popen = subprocess.Popen

    def start(*words, **options):
        started.append(popen(*words, **options))
        return started[-1]

    monkeypatch.setattr("subprocess.Popen", start)
    # A suite that was started in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        study.evidence.weighting(tmp_path / "run", "train", "uniform")
    signal.signal(signal.SIGINT, before)
    assert started[0].poll() == -signal.SIGTERM

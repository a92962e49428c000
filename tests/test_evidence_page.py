"""The evidence: what its tables compute, and that the committed ones are the stored numbers."""

import importlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "evidence.parquet"
DOMAINS = ("book", "code", "noise")
SIZES = (300, 500, 200)


@pytest.fixture
def page(monkeypatch):
    """Return the module that makes the tables."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("evidence_page")


@pytest.fixture
def evidence(monkeypatch):
    """Return the module that makes the numbers."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("evidence")


def stored(folder, shifts, seeds=3):
    """Write results of methods whose losses are so many nats a token from the baseline's."""
    random = np.random.default_rng(1)
    rows = []
    for seed in range(seeds):
        for number in range(12):
            kind = number % len(DOMAINS)
            tokens = [SIZES[kind] // share for share in (2, 4, 10)]
            losses = random.uniform(2, 5, 3)  # a method's text and seed, and so its pair's
            for method, shift in shifts.items():
                row = {"method": method, "seed": seed, "tokens_per_second": 100.0 + seed}
                row |= {"domain": DOMAINS[kind], "document": number, "bytes": 4 * sum(tokens)}
                for name, count, loss in zip(
                    ("frequent", "medium", "rare"), tokens, losses, strict=True
                ):
                    moved = shift[kind] if isinstance(shift, tuple) else shift
                    row |= {f"{name}_tokens": count, f"{name}_nats": count * (loss + moved)}
                rows.append(row)
    flags = ["--training.seq_len=8", "--training.local_batch_size=2"]
    plan = {"config": "llama3_proxy", "steps": 10, "seeds": seeds, "flags": flags}
    about = {"command": "python it", "machine": "one", "versions": {"torch": "1"}}
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"about": json.dumps(about | {"plan": plan})})
    pq.write_table(table, folder / "found.parquet")
    return folder / "found.parquet"


def test_a_known_difference_is_found_exactly(page, tmp_path):
    """A method a tenth of a nat better everywhere is that, whatever documents and seeds say."""
    found = page.Found(stored(tmp_path, {"uniform": 0.0, "same": 0.0, "better": -0.1}))
    _, same, better = page.differences(found)

    assert all(x.value == x.low == x.high == 0 for x in same)
    for i, x in enumerate(better):
        if i != 1:  # bits per byte are in another unit
            assert x == pytest.approx((-0.1, -0.1, -0.1), abs=1e-12)  # rounding
            assert x.verdict == "better"


def test_the_mean_is_over_domains_and_each_domain_is_its_own(page, tmp_path):
    """Domains count alike in the mean, however long they are."""
    found = page.Found(stored(tmp_path, {"uniform": 0.0, "mixed": (-0.3, 0.0, 0.6)}))
    diffs = page.differences(found)[1]

    assert diffs[0].value == pytest.approx(0.1, abs=1e-12)
    assert [x.value for x in diffs[5:]] == pytest.approx([-0.3, 0.0, 0.6], abs=1e-12)
    assert [x.verdict for x in diffs[5:]] == ["better", "neither", "worse"]


def test_numbers_are_those_of_a_loop(page, tmp_path):
    """Means, bits and buckets by the obvious sums over rows."""
    path = stored(tmp_path, {"uniform": 0.0, "other": (0.1, -0.2, 0.3)}, seeds=2)
    numbers = page.all_of(page.Found(path))
    rows = [x for x in pq.read_table(path).to_pylist() if (x["method"], x["seed"]) == ("other", 1)]
    nats = sum(x[f"{b}_nats"] for x in rows for b in page.BUCKETS)
    bits = nats / np.log(2) / sum(x["bytes"] for x in rows)
    rare = sum(x["rare_nats"] for x in rows) / sum(x["rare_tokens"] for x in rows)

    assert numbers[1, 1, 1] == pytest.approx(bits)
    assert numbers[1, 1, 4] == pytest.approx(rare)


def test_an_interval_covers_what_seeds_disagree_on(page):
    """Verdicts follow the interval, not the number."""
    assert page.Interval(-0.1, -0.2, 0.01).verdict == "neither"
    assert page.Interval(-0.1, -0.2, -0.01).verdict == "better"
    assert page.Interval(0.1, 0.01, 0.2).verdict == "worse"


def test_the_page_has_every_method_and_domain(page, tmp_path):
    """Each is in its tables, in Markdown that adds up, and in the figure with its axes named."""
    path = stored(tmp_path, {"uniform": 0.0, "better": -0.1, "worse": 0.2})
    text = page.write_page(path.with_suffix("")).read_text()
    rows = [x.strip("|").split("|") for x in text.splitlines() if x.startswith("|")]

    assert sum(row[0].strip() == "better" for row in rows) == 2
    assert {row[0].strip() for row in rows} >= set(DOMAINS)
    drawn = path.with_suffix(".svg").read_text()
    for word in ("better", "worse", *DOMAINS, "less that of uniform (nats)", "mean over domains"):
        assert word in drawn


def test_frequent_words_come_first(evidence):
    """80 % of the tokens, then up to 95 %, then the rest and what was never seen."""
    count = evidence.Counter({7: 50, 3: 20, 4: 20, 5: 6, 6: 4})

    assert evidence.buckets(count, 9).tolist() == [2, 2, 2, 0, 0, 1, 2, 0, 2]


@pytest.mark.parametrize("seconds", [600, 1_800, 36_000])
def test_a_budget_is_kept(evidence, seconds):
    """What is planned fits the budget by the times that were measured, and uses half of it."""
    steps, count = evidence.within(seconds, start=12.0, step=0.5, seeds=3, methods=11)
    runs = -(-(1 + 3 + 3 * count) // evidence.cores())
    planned = runs * (24 + steps * 0.5 * 1.1)

    assert steps >= evidence.ENOUGH
    assert planned <= seconds
    assert count == 11 or steps < 2 * evidence.ENOUGH
    assert steps == evidence.STEPS[-1] or planned > seconds / 2 or count < 11


def test_a_busy_machine_takes_fewer_steps_of_two_methods(evidence, monkeypatch):
    """Ten minutes do where starting takes twice as long, and a step too."""
    monkeypatch.setattr(evidence, "cores", lambda: 2)
    assert evidence.within(560, start=24.0, step=0.97, seeds=3, methods=11) == (48, 2)


def test_too_small_a_budget_is_said(evidence):
    """With no time for two methods nothing is started."""
    with pytest.raises(SystemExit, match="minutes are not enough"):
        evidence.within(60, start=12.0, step=0.5, seeds=3, methods=11)


def test_the_default_folder_is_told_to_the_host_whole(evidence, monkeypatch, tmp_path):
    """The host refuses relative paths of checkpoints."""
    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--steps=32"])
    monkeypatch.setattr(evidence, "train_all", lambda folder, _plan: folders.append(folder))
    monkeypatch.setattr(evidence, "look_at_all", lambda *_: sys.exit())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        evidence.main()
    assert evidence.seeded(folders[0], 0).is_absolute()


@pytest.mark.slow
def test_the_stored_page_is_that_of_the_stored_numbers(page, tmp_path):
    """The committed report is what the committed numbers give."""
    copy = tmp_path / STORED.name
    copy.write_bytes(STORED.read_bytes())

    assert (
        page.write_page(copy.with_suffix("")).read_text() == STORED.with_suffix(".md").read_text()
    )


@pytest.mark.slow
def test_the_page_of_results_says_what_the_stored_numbers_say(monkeypatch):
    """Its section on evidence is made anew from what the benchmarks have stored."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("results")

    assert results.section() in (ROOT / "docs" / "results.md").read_text()

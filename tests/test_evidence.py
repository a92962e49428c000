"""The evidence repeats: benchmarks run, twice the same, and reports say what their numbers say."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Return what imports a benchmark as a module, on one thread as its command runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "theory"])
def test_quick_runs_repeat_bit_for_bit(benchmark, monkeypatch, tmp_path, name):
    """Numbers, report and picture; the report says what the numbers say."""
    module = benchmark(name)
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        out = folder / f"{name}.md"
        monkeypatch.setattr("sys.argv", [f"{name}.py", "--quick", f"--out={out}"])
        module.main()
        written.append({x.name: x.read_bytes() for x in folder.iterdir()})
    assert written[0] == written[1]
    assert {*written[0]} == {f"{name}.md", f"{name}.json", f"{name}.svg"}
    found = json.loads(written[0][f"{name}.json"])
    assert module.report(found).encode() == written[0][f"{name}.md"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "theory"])
def test_report_is_made_of_the_stored_numbers(benchmark, name):
    """The report in the repository, byte for byte; a number changed by hand would show."""
    stored = (BENCHMARKS / f"{name}.json").read_text(encoding="utf-8")
    module = benchmark(name)
    assert module.as_json(json.loads(stored)) == stored
    report = module.report(json.loads(stored))
    assert report == (BENCHMARKS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_stored_numbers_are_those_of_the_specs(benchmark):
    """The first seed of the cell of Figure 7, run anew, but for the sums of another machine."""
    regression = benchmark("regression")
    found = json.loads((BENCHMARKS / "regression.json").read_text(encoding="utf-8"))
    cells = regression.Cells(found["cells"])
    chance = regression.draws(1, found["steps"])
    for spec in regression.SPECS:
        losses = regression.descend(spec, [regression.FIGURE_7], chance)[:, :, 0]
        again = regression.summary(spec, *regression.FIGURE_7, losses)
        there = cells.of(spec, *regression.FIGURE_7, "to_tenth")[0].item()
        assert again["to_tenth"][0] == pytest.approx(there, abs=1)
        # Kept with three digits; rounding of float32 weights moves the run by about as much.
        kept = cells.of(spec, *regression.FIGURE_7, "after_50")[0].item()
        assert again["after_50"][0] == pytest.approx(kept, rel=2e-2)


def test_regression_without_weights_is_known(benchmark):
    """Equal weights and new samples: E|off|^2 shrinks by 1 - 2 r + r^2 (1 + (d + 1) / n) a step."""
    regression = benchmark("regression")
    rate, steps = 0.2, 4
    chance = regression.draws(200, steps)
    data = regression.Data(0, 0, 0)
    losses = regression.descend("uniform", [(data, rate)], chance)[:, :, 0]
    d, n = regression.SIZE, regression.BATCH
    factor = 1 - 2 * rate + rate**2 * (1 + (d + 1) / n)
    ratio = losses.mean(1) / 0.5
    expected = factor ** torch.arange(steps + 1)
    # 200 seeds whose losses spread by a fifth after a step: 5 % is over three standard errors.
    torch.testing.assert_close(ratio, expected.double(), rtol=0.05, atol=0)


def test_a_stopped_run_counts_as_diverged(benchmark):
    """DRO-KL at a rate that is far too large; the numbers stay finite."""
    regression = benchmark("regression")
    chance = regression.draws(2, 60)
    losses = regression.descend("dro-kl", [(regression.DATA[0], 0.8)], chance)
    assert losses.isfinite().all()
    assert (losses[-1] > regression.TOO_LARGE).all()
    assert losses[-1].equal(losses[-2])


def test_an_interval_is_bold_where_it_excludes_zero(benchmark):
    """An interval is bold where it excludes no difference, and only there."""
    regression = benchmark("regression")
    one = regression.interval(torch.tensor([1.0, 2.0, 3.0]))
    assert one.mean == 2
    assert 1 <= one.low < 2 < one.high <= 3
    assert regression.words(one).startswith("**+2.0")
    none = regression.interval(torch.tensor([-1.0, 1.0, -2.0, 2.0]))
    assert not none.says
    assert regression.words(none).startswith("+0.0")


@pytest.fixture(scope="module")
def terms(benchmark):
    """Return the module, and the terms of all its specs on a few steps."""
    theory = benchmark("theory")
    chance = theory.draws(5, 10)
    found = {(s, r): theory.follow(s, r, chance) for s in theory.SPECS for r in theory.RATES}
    return theory, chance, found


@pytest.mark.slow
def test_bound_holds_at_every_step(terms):
    """(a) With the smoothness of the worst sample, and with that of the weighted loss."""
    theory, _, found = terms
    for run in found.values():
        assert run.live.sum() >= 40  # there is something to check
        assert (run.slack[run.live] >= -theory.ROUNDING).all()
        assert (run.slack_sharp[run.live] >= -theory.ROUNDING).all()
        # The other side of the same coin: weights below a cap keep smoothness below it.
        assert (run.smooth <= run.largest * (1 + theory.ROUNDING)).all()


def test_gain_is_not_negative_for_monotone_weights(terms):
    """(b) And is for others: extremes on these runs, quadratic where most losses are high."""
    theory, _, found = terms
    for (spec, _), run in found.items():
        gain = run.gain[run.live]
        if spec in theory.MONOTONE:
            assert (gain >= -theory.ROUNDING).all(), spec
        if spec in {"linupper", "prop1"}:
            assert (gain > 0.1).all()
        if spec == "extremes":
            assert (gain < 0).any()
    assert theory.gain_of("quadratic", theory.HIGH) < -0.05


def test_cap_holds_with_the_clamp_and_not_without(terms):
    """(c) Without one it holds for every batch from the temperature of the closed form on."""
    theory, chance, found = terms
    for (spec, _), run in found.items():
        if spec != "dro-kl":
            assert (run.largest <= theory.CAP * (1 + theory.ROUNDING)).all(), spec
    for tau in theory.TEMPERATURES:
        text = f"normalize -> linupper(alpha=1) -> temperature({tau:g})"
        cell = theory.capped(text, chance)
        assert cell["clamped"]["over"] == 0
        assert cell["clamped"]["worst"] <= 2.001
        # Kept with three digits.
        assert cell["free"]["worst"] == pytest.approx(theory.worst_case(tau), rel=5e-3)
        assert (cell["free"]["worst"] <= 2) == theory.guaranteed(tau) == (tau >= theory.threshold())
        assert bool(cell["free"]["over"]) <= (not theory.guaranteed(tau))
        if tau <= 0.4:
            assert cell["free"]["over"] > cell["free"]["followed"] / 2

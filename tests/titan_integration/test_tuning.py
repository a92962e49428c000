"""`weighting tune --train`: what it trains, chooses, goes on with and refuses."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import click.testing
import pytest
from warm import weighting

from titan_integration.commands import compare, tune
from weighting.cli import main
from weighting.language.read import resolve
from weighting.runs.vary import number_named, values_of

SPEC = "version: 1\nname: small\npipeline: normalize -> temperature(0.5)\n"
FLAGS = ("--training.seq_len=32", "--training.local_batch_size=4", "--metrics.log_freq=1")


@pytest.fixture
def bowl(monkeypatch, tmp_path):
    """Have runs be replaced by a loss that is least at 2; return the folder, and what was trained.

    A run that is in the second list ends the command, as one that is interrupted.
    """
    trained, cut = [], []
    losses = {}

    def fake(args):
        [(_, spec)] = args.specs
        value = number_named(spec, "tau").value
        if value in cut:
            cut.remove(value)
            raise KeyboardInterrupt
        losses[spec.name] = math.log(value / 2) ** 2
        trained.append(value)
        return [compare.Run(spec.name, spec.name, spec, [])]

    monkeypatch.setattr(compare, "trained", fake)
    monkeypatch.setattr(compare, "report", lambda *_: None)
    monkeypatch.setattr(tune, "_loss", lambda _, runs: losses[runs[0].name])
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs", trained, cut


def swept(folder, values="0.1:10", trials=12, **more):
    """Sweep a temperature, and return the status."""
    spec = resolve(SPEC)
    given = dict.fromkeys(("steps", "mixture", "reference", "plot"))
    given |= {"module": "titan_integration", "config": "llama3_proxy", "seed": 0, "seeds": 1}
    given |= {"allow_plugins": False, "number": number_named(spec, "tau"), "trials": trials}
    given |= {"values": values_of(values), "folder": str(folder)}
    return tune.main(spec=spec, text=SPEC, **{**given, **more})


def test_optuna_finds_the_value_of_the_least_loss(bowl, capsys):
    """Within a few trials, and no value is trained twice; the best spec is kept."""
    pytest.importorskip("optuna")
    folder, trained, _ = bowl
    assert swept(folder) == 0
    assert trained[0] == 0.5, "the spec as it is written comes first"
    assert len({*trained}) == len(trained) == 13
    best = min(trained, key=lambda x: math.log(x / 2) ** 2)
    assert 1 < best < 4
    assert number_named(resolve(str(folder / tune.BEST)), "tau").value == best
    printed = capsys.readouterr().out
    assert f"lowest validation loss: {math.log(best / 2) ** 2:.4f}" in printed
    assert "one seed of each; --seeds 3" in printed


def test_a_sweep_that_was_cut_off_chooses_as_the_whole_one(bowl, tmp_path):
    """What was chosen is noted before it is trained; more trials go on from there."""
    pytest.importorskip("optuna")
    folder, trained, cut = bowl
    (tmp_path / "other").mkdir()
    assert swept(tmp_path / "other") == 0
    whole = [*trained]
    trained.clear()
    cut.append(whole[6])
    assert swept(folder, trials=8) == 130
    assert trained == whole[:6]
    assert json.loads((folder / tune.CHOSEN).read_text())["chosen"] == whole[1:7]
    assert swept(folder, trials=8) == 0
    assert swept(folder) == 0
    assert list(dict.fromkeys(trained)) == whole


def test_another_sweep_in_the_same_folder_is_refused(bowl):
    """Values that were chosen for another range would mislead."""
    folder, *_ = bowl
    assert swept(folder, "1,2") == 0
    with pytest.raises(ValueError, match=r"holds a sweep with values = \[1\.0, 2\.0\], and now"):
        swept(folder, "1,3")


def test_a_list_is_trained_in_its_order_without_optuna(bowl, monkeypatch):
    """As is a spec whose number is a schedule, which has no value of its own."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    folder, trained, _ = bowl
    assert swept(folder, "4,1,0.5") == 0
    assert trained == [0.5, 1, 4]


def test_a_range_asks_for_optuna_before_anything_is_read(monkeypatch):
    """And says that a list does without."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["tune", "no such spec", "tau=1:2", "--train"]
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "needs Optuna: pip install 'weighting-dsl[tune]'" in " ".join(done.output.split())


def test_whole_numbers_stay_whole():
    """And there is an end when none is left."""
    pytest.importorskip("optuna")
    number = number_named(resolve("mean(domain) -> slope(4) -> temperature(1)"), "history")
    args = SimpleNamespace(values=values_of("2:5"), number=number, seed=0)
    losses = {}
    while (value := tune._next(args, losses, len(losses))) is not None:
        losses[value] = float(value)
    assert sorted(losses) == [2, 3, 4, 5]
    assert all(isinstance(value, int) for value in losses)


def test_a_sweep_asks_for_a_text_to_validate_on(tmp_path):
    """As a comparison of seeds does."""
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    words = ["tune", "linupper", "tau=1,2", "--train", "--config=llama3_proxy"]
    words += [f"--data={data}", f"--folder={tmp_path / 'runs'}"]
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "tune compares validation losses; say on which text" in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.processes
def test_a_real_sweep_trains_each_value_alike_and_reports_them(tmp_path):
    """The first step sees the same weights and data; a second call trains nothing anew."""
    (tmp_path / "small.yaml").write_text(SPEC)
    words = ["tune", "small.yaml", "tau=0.1,5", "--train", "--steps", "2", "--folder", "runs"]
    words += ["--module", "small", "--config", "debugmodel", "--", *FLAGS, "--validator.steps=1"]
    done = weighting(*words, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = tmp_path / "runs"
    first = [
        json.loads((runs / name / "weighting" / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("small", "small-tau-0.1", "small-tau-5")
    ]
    assert len({round(line["unweighted_loss"], 4) for line in first}) == 1
    assert len({round(line["weighted_loss"], 5) for line in first}) > 1
    assert "validation" in done.stdout
    assert "lowest validation loss: " in done.stdout
    assert (runs / "report.html").exists()
    assert resolve(str(runs / "best.yaml")).name.startswith("small")
    assert Path(runs / "small-tau-5.log").exists()

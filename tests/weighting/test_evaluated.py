"""What benchmarks say of models; `test_export.py` evaluates a run from end to end."""

import importlib.util

import pytest
from click.testing import CliRunner

from weighting.cli import main as weighting
from weighting.runs import evaluated
from weighting.runs.evaluated import Score


def score(**items):
    """Return the score of some questions."""
    return Score("acc", 0, {key: float(value) for key, value in items.items()})


def test_a_difference_is_paired_by_question():
    """Mean and interval by hand: gaps of 1, 0, 0 and 1 have a variance of 1/3."""
    first, other = score(a=0, b=1, c=0, d=0), score(a=1, b=1, c=0, d=1)
    gap = evaluated.difference({"t": other}, {"t": first})
    half = 1.959964 * (1 / 3 / 4) ** 0.5
    assert gap == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-6)
    # The mean of two tasks, the second without a difference and so without spread.
    two = evaluated.difference({"t": other, "u": first}, {"t": first, "u": first})
    assert two == pytest.approx((0.25, 0.25 - half / 2, 0.25 + half / 2), rel=1e-6)


def test_what_was_asked_otherwise_is_not_compared():
    """Other questions, or other examples before them, give no difference, which a dash says."""
    first = {"t": score(a=0, b=1)}
    for other in (score(a=0, c=1), score(a=1, b=1)._replace(shots=5)):
        assert evaluated.difference({"t": other}, first) is None
        ((_, _, _, gap),) = evaluated.rows([("x", first), ("y", {"t": other})])
        assert gap == "–"


def test_scores_of_several_tasks_and_checkpoints_stay_beside_a_run(tmp_path):
    """The one evaluated last is the last, and keeps its tasks of before."""
    path = tmp_path / "evaluation.json"
    evaluated.add(path, "step-1", {"t": score(a=0, b=1)}, {"lm_eval": "1"})
    evaluated.add(path, "step-1", {"t": score(a=1)}, {"lm_eval": "1"})  # a quick look in between
    evaluated.add(path, "step-2", {"t": score(a=1, b=1)}, {"lm_eval": "1"})
    evaluated.add(path, "step-1", {"u": score(a=1)}, {"lm_eval": "1"})
    found = evaluated.read(path)
    assert [*found] == ["step-2", "step-1"]
    assert found["step-1"] == {"t": score(a=0, b=1), "u": score(a=1)}
    path.write_text("{}")
    with pytest.raises(ValueError, match="not what weighting evaluate writes"):
        evaluated.read(path)


def test_help_answers_and_a_missing_extra_is_said(monkeypatch):
    """Without the harness there is a hint, and nothing has been looked for."""
    assert "--task-folder" in CliRunner().invoke(weighting, ["evaluate", "--help"]).output
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    done = CliRunner().invoke(weighting, ["evaluate", "nowhere", "--tasks=sciq"])
    assert done.exit_code == 2
    assert "pip install 'weighting-dsl[evaluate]'" in done.output
    assert "which MODEL?" in CliRunner().invoke(weighting, ["evaluate", "--tasks=sciq"]).output

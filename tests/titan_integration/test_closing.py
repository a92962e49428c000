"""The last words of a run: what it saved where, and commands that read it."""

import json
import shlex

import pytest

from titan_integration.commands.closing import Given, closing, left_by


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a run that logged two steps and recorded nothing."""
    lines = [{"step": step, "unweighted_loss": 2.0} for step in (1, 2)]
    (tmp_path / "a run" / "weighting").mkdir(parents=True)
    path = tmp_path / "a run" / "weighting" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "a run"


def given(spec="linupper"):
    """Return what a run was given."""
    return Given(spec, spec, "llama3_8b", "titan_integration", allow_plugins=False)


def commands(text):
    """Return the words of the commands that are named next."""
    return [shlex.split(line) for line in text.partition("next:\n")[2].splitlines()]


def test_only_what_is_there_is_named(folder):
    """Without record and checkpoint a report is what can be made; places are quoted."""
    text = closing(given(), folder, (0, 0, None))
    assert f"\nmetrics: {folder / 'weighting' / 'metrics.jsonl'}\n\nnext:\n" in text
    [report] = commands(text)
    assert report[-4:] == ["report", f"{folder}", "--out", f"{folder / 'report.html'}"]
    assert "nothing was left to train" not in text


def test_the_last_validation_is_told(folder):
    """With its step."""
    path = folder / "weighting" / "validation.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n')
    assert "\nvalidation loss 2.5000 nats at step 2\n" in closing(given(), folder, (0, 0, None))


def test_a_run_that_was_complete_says_so(folder, monkeypatch):
    """Nothing was logged and nothing saved since it began, and there is a checkpoint."""
    monkeypatch.setattr("titan_integration.commands.closing.flaw", lambda _: None)
    assert "nothing was left" not in closing(given(), folder, left_by(folder))
    (folder / "checkpoint" / "step-2").mkdir(parents=True)
    before = left_by(folder)
    text = closing(given(), folder, before)
    assert "nothing was left to train, step-2 was saved before; to go on take more --steps" in text
    with (folder / "weighting" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "unweighted_loss": 1.0}\n')
    assert "nothing was left" not in closing(given(), folder, before)


@pytest.mark.parametrize(("spec", "shown"), [("focal", "focal"), ("linupper", "mile")])
def test_tokens_are_shaded_by_a_spec_that_weighs_tokens(spec, shown, folder, monkeypatch):
    """The run's own if it is one; and with the run's config."""
    monkeypatch.setattr("titan_integration.commands.closing.flaw", lambda _: None)
    (folder / "checkpoint" / "step-2").mkdir(parents=True)
    _, tokens = commands(closing(given(spec), folder, (0, 0, None)))
    words = tokens[tokens.index("tokens") :]
    assert words[:4] == ["tokens", shown, "--checkpoint", f"{folder / 'checkpoint'}"]
    assert words[-4:] == ["--config", "llama3_8b", "--module", "titan_integration"]

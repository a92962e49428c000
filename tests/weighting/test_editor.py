"""What helps while typing: completion, the schema in an editor, a look here, notebooks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import click.testing
import generators as tables
import pytest
import torch

import weighting as wt
from weighting.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments):
    """Run `weighting` in this process."""
    return click.testing.CliRunner().invoke(main, [*arguments])


# Completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_that_asks_us(shell):
    """The script names the command and the variable by which it asks it for words."""
    done = run("completion", shell)
    assert done.exit_code == 0
    assert "_WEIGHTING_COMPLETE" in done.output
    assert "weighting" in done.output


def completed(line):
    """Return what bash is offered at the end of a line."""
    words = line.split(" ")
    asked = {"_WEIGHTING_COMPLETE": "bash_complete", "COMP_WORDS": line}
    asked["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run(
        [sys.executable, "-c", "from weighting.cli import main; main(prog_name='weighting')"],
        env={**os.environ, **asked, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [offer.split(",")[1] for offer in done.stdout.split()]


@pytest.mark.slow
def test_commands_flags_and_specs_are_completed():
    """A command by its beginning, its flags, and the shipped specs wherever a spec is asked for."""
    assert completed("weighting expl") == ["explain"]
    assert "--mixture" in completed("weighting train linupper --mix")
    found = completed("weighting check linupper-")
    assert [name for name in tables.SPEC_TEXTS if name.startswith("linupper-")] == found[:-1]
    assert found[-1] == "linupper-", "bash then offers files that begin so"


# The schema in an editor --------------------------------------------------------------------------


def test_the_schema_is_put_where_editors_look(tmp_path, monkeypatch):
    """It is saved beside the specs, and VS Code's settings keep what they had."""
    monkeypatch.chdir(tmp_path)
    done = run("schema", "--install", "specs")
    assert done.exit_code == 0
    saved = json.loads((tmp_path / "specs" / "weighting.schema.json").read_text())
    assert saved == json.loads((ROOT / "specs" / "weighting.schema.json").read_text())
    settings = tmp_path / ".vscode" / "settings.json"
    mine = {"./specs/weighting.schema.json": "specs/*.yaml"}
    assert json.loads(settings.read_text()) == {"yaml.schemas": mine}

    settings.write_text('{"editor.tabSize": 2, "yaml.schemas": {"./a.json": "a/*.yaml"}}')
    assert run("schema", "--install", "specs").exit_code == 0
    both = {"editor.tabSize": 2, "yaml.schemas": {"./a.json": "a/*.yaml", **mine}}
    assert json.loads(settings.read_text()) == both


def test_settings_with_comments_are_left_alone(tmp_path, monkeypatch):
    """What is not plain JSON stays as it is, and the line to add is printed."""
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / ".vscode" / "settings.json"
    settings.parent.mkdir()
    for text in ('{\n  // mine\n  "a": 1,\n}', "[]", '{"yaml.schemas": []}'):
        settings.write_text(text)
        done = run("schema", "--install", ".")
        assert done.exit_code == 0
        assert settings.read_text() == text
        assert 'add "yaml.schemas": {"./weighting.schema.json": "./*.yaml"}' in done.output


def test_a_folder_that_cannot_be_is_said(tmp_path):
    """No traceback where the schema cannot be saved."""
    (tmp_path / "file").write_text("")
    done = run("schema", "--install", str(tmp_path / "file" / "specs"))
    assert done.exit_code == 2
    assert "Not a directory" in done.output


# A look at the machine ----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Return a folder to work in, found first by new processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_sound_machine_is_said_to_be_sound(elsewhere, monkeypatch):
    """Versions, specs, imports and folders are looked at; all is well where the tests run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run("doctor")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    # Two name folders, which are where they are.
    bare = [line for line in lines if line.split()[1] not in {"tokenizer", "outputs"}]
    assert len(lines) - len(bare) == 2
    assert max(map(len, bare)) <= 80
    assert not {"\x1b", "\r"} & {*done.output}
    assert f"{len(tables.SPEC_TEXTS)} shipped" in done.output
    assert torch.__version__.partition("+")[0] in done.output
    assert str(elsewhere) in lines[-1]


def test_a_broken_import_is_shown_in_full(elsewhere):
    """The traceback is the real one, which the trainer would hide, and the status is 2."""
    package = elsewhere / "titan_integration"
    package.mkdir()
    (package / "__init__.py").write_text("import nothing_of_this_name\n")
    done = run("doctor")
    assert done.exit_code == 2
    assert "BAD integration" in done.output
    assert "No module named 'nothing_of_this_name'" in done.output


# Notebooks ----------------------------------------------------------------------------------------


def test_a_spec_shows_its_factors():
    """Each factor has a row with level and pipeline; nothing of a spec is taken for markup."""
    spec = wt.load("linupper-x-mile")
    text = spec._repr_html_()
    rows = [[cell.text for cell in row] for row in ET.fromstring(text).iter("tr")]
    assert rows[1][:2] == ["instance", "sequence"]
    assert rows[2] == ["token", "token", "entropy(gamma=1) -> token_scale"]
    odd = wt.loads('version: 1\npipeline: table("<b>&"=1) -> mean_one')
    assert "<b>&" not in odd._repr_html_()
    ET.fromstring(odd._repr_html_())


def test_weights_show_statistics_and_a_histogram():
    """The table holds the metrics, the bars count every token that weighs something."""
    fn = wt.build(wt.load("linupper"))
    out = fn(wt.Signals(loss=torch.tensor([[1.0], [2.0], [3.0], [5.0]])))
    page = ET.fromstring(out._repr_html_())
    rows = [[cell.text for cell in row] for row in page.iter("tr")]
    assert [row[0] for row in rows] == ["weights", "pipeline", "weight"]
    assert float(rows[2][2]) == pytest.approx(out.metrics["weight/max"].item(), rel=1e-3)
    heights = [float(bar.get("height")) for bar in page.iter("rect")]
    assert sum(height > 0 for height in heights) == len(out.token.unique())
    assert "4 tokens" in "".join(page.itertext())


def test_weights_of_nothing_can_be_shown_too():
    """A batch without a label has a table and no bars."""
    fn = wt.build(wt.load("mile"))
    nothing = torch.zeros(2, 3)
    out = fn(wt.Signals(loss=nothing, entropy=nothing, valid=nothing.bool()))
    assert not [*ET.fromstring(out._repr_html_()).iter("rect")]

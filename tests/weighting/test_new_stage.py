"""`weighting new-stage` writes a stage and a test that pass as they are, or nothing."""

import os
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from weighting.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("shape", "weigh", "source", "constrain", "pool")


def new_stage(folder, *arguments):
    """Run the command with a folder to write to."""
    command = ["new-stage", *arguments, "--dir", str(folder)]
    return click.testing.CliRunner().invoke(main, command)


@pytest.mark.slow
def test_every_kind_passes_its_own_test(tmp_path):
    """Stage and test of every kind pass untouched, and read as well-kept files."""
    for kind in KINDS:
        done = new_stage(tmp_path, f"my_{kind}", "--kind", kind)
        assert done.exit_code == 0, done.output
    files = sorted(path.name for path in tmp_path.iterdir())
    stems = sorted(f"my_{kind}.py" for kind in KINDS)
    assert files == [*stems, *(f"test_{stem}" for stem in stems)]
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert "$" not in text, "a placeholder was left"
        assert max(map(len, text.splitlines())) <= 88, "the formatters' usual width"

    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout


def test_it_says_what_to_do_next(tmp_path, monkeypatch):
    """It names the files, the test command, and the lines that use the stage in a spec."""
    monkeypatch.chdir(tmp_path)
    out = new_stage(".", "soft_cap").output
    assert "wrote soft_cap.py and test_soft_cap.py; next, here" in out
    assert "python -m pytest test_soft_cap.py" in out
    assert "plugins: [soft_cap]" in out
    assert "pipeline: normalize -> soft_cap(at=0.5) -> temperature(1)" in out
    assert "--allow-plugins" in out
    assert "class SoftCap(wt.Shape)" in (tmp_path / "soft_cap.py").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SoftCap", "write soft_cap"),
        ("soft-cap", "write soft_cap"),
        ("9lives", "a lower-case identifier, not '9lives'"),
        ("normalize", "there is a stage 'normalize' already"),
        ("linear", "is a schedule of the language"),
        ("class", "cannot name a Python module"),
        ("_", "cannot name a Python module"),
        ("json", "is a Python module already"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(name, words, tmp_path):
    """A bad or taken name is exit 2 with the reason, and nothing is written."""
    done = new_stage(tmp_path, name)
    assert done.exit_code == 2
    assert words in done.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("taken", ["soft_cap.py", "test_soft_cap.py"])
def test_nothing_is_overwritten(taken, tmp_path):
    """If either file exists it stays as it is, and the other is not written."""
    (tmp_path / taken).write_text("mine")
    done = new_stage(tmp_path, "soft_cap")
    assert done.exit_code == 2
    assert f"{taken} exists already" in done.output
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """If the second file cannot be put in place, the first is taken away again."""
    place = Path.replace

    def full_disk(self, target):
        if Path(target).name.startswith("test_"):
            raise OSError(28, "No space left on device", str(target))
        return place(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    done = new_stage(tmp_path, "soft_cap")
    assert done.exit_code == 2
    assert "No space left on device" in done.output
    assert not [*tmp_path.iterdir()]


def test_a_missing_folder_or_kind_is_refused(tmp_path):
    """Click's own usage errors: exit 2."""
    assert new_stage(tmp_path / "nowhere", "soft_cap").exit_code == 2
    assert new_stage(tmp_path, "soft_cap", "--kind", "shap").exit_code == 2

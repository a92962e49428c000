"""The examples of the pages pass strict type checkers, as a user writes them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from weighting.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, blocks

sys.path.pop(0)

PAGES = ("README", "tutorial", "own-stages")
"""Pages whose Python needs no other trainer."""
KINDS = ("shape", "weigh", "source", "constrain", "pool")
WRONG = """from torch import Tensor

import weighting as wt


class SoftCap(wt.Shape):
    at: wt.PositiveNumber = 1.0

    def apply(self, x: Tensor, scope: wt.Scope) -> Tensor:
        return self.at.value + self.at(scope.step).no_method()


SoftCap(att=0.5)
wt.build(wt.load("linupper"))(wt.Signals(loss=1.0)).tokens
"""
MISTAKES = ("value", "no_method", "att", "loss", "tokens")
"""What is wrong there: two attributes of what is read, two arguments, one of what is returned."""
PYTHON = ["--python-interpreter-path", sys.executable, "--search-path", str(ROOT)]
CHECKERS = {
    "pyrefly": ["pyrefly", "check", "--preset", "strict", "--output-format", "min-text", *PYTHON],
    "basedpyright": ["basedpyright", "--pythonpath", sys.executable],
    "mypy": ["mypy", "--strict", "--python-executable", sys.executable],
}
"""How each is called; the second is pyright, with its own mode `strict`, as a wheel."""
UNTYPED = '"backward"'
"""torch's Tensor.backward has no types, which mypy's strict mode minds of every call."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Return a folder with the Python of each page, a new stage of each kind, and mistakes."""
    folder = tmp_path_factory.mktemp("typing")
    for page in PAGES:
        texts = [x.text for x in blocks() if (x.page, x.language) == (page, "python")]
        assert texts
        (folder / f"{page.lower().replace('-', '_')}.py").write_text("\n\n".join(texts))
    for kind in KINDS:
        words = ["new-stage", f"my_{kind}", "--kind", kind, "--dir", str(folder)]
        assert click.testing.CliRunner().invoke(main, words).exit_code == 0
        (folder / f"test_my_{kind}.py").unlink()
    (folder / "wrong.py").write_text(WRONG)
    strict = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(strict))
    (folder / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT}\n")
    return folder


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKERS)
def test_examples_pass_a_strict_type_checker_and_mistakes_do_not(examples, name):
    """No line of the examples is objected to, and each mistake is."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", *CHECKERS[name], *sorted(x.name for x in examples.glob("*.py"))],
        cwd=examples,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if _is_of(examples, line)]
    assert errors, done.stdout + done.stderr
    right = [line for line in errors if "wrong.py" not in line and UNTYPED not in line]
    assert not right
    for mistake in MISTAKES:
        assert any(mistake in line for line in errors if "wrong.py" in line), mistake


def _is_of(folder, line):
    """Tell whether a line of a checker's is an error in a file of a folder, not of what it uses."""
    name = re.search(r"[^\s:]+\.py(?=:\d)", line)
    return bool(name) and "error" in line.lower() and (folder / name[0]).parent == folder

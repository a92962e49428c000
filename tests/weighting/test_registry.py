"""Stages come from decorators and from installed packages, and names belong to one of them."""

import subprocess
import sys

import pytest

import weighting as wt
from weighting import registry

STAGE = """
import weighting as wt


@wt.stage("{name}")
class Doubled(wt.Shape):
    '''Twice the score.

    y = 2 x
    '''

    def apply(self, x, scope):
        return 2 * x
"""


def install(folder, module, name):
    """Put a package with a stage, and its entry point, where Python finds packages."""
    (folder / f"{module}.py").write_text(STAGE.format(name=name))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[weighting.stages]\n{module} = {module}\n")


def run(folder, code):
    """Return what a fresh Python prints with these packages installed."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_installed_package_brings_its_stages(tmp_path):
    """A stage named by an entry point is a word of the language without any import."""
    install(tmp_path, "doubled_stages", "doubled")
    spec = "normalize -> doubled -> temperature(1)"
    done = run(tmp_path, f"import weighting as wt; print(wt.simulate({spec!r}, [1, 2]))")

    assert done.returncode == 0, done.stderr
    assert "tensor([0.0360, 1.9640])" in done.stdout


@pytest.mark.slow
def test_a_package_that_clashes_is_warned_of_with_both_origins(tmp_path):
    """A package whose stage takes a shipped name is left out, and both origins are named."""
    install(tmp_path, "clashing_stages", "normalize")
    done = run(tmp_path, "import weighting as wt; print(wt.loads('normalize -> temperature(1)'))")

    assert done.returncode == 0, done.stderr
    assert "two stages are named 'normalize'" in done.stderr
    assert "weighting.stages.normalize.Normalize and clashing_stages.Doubled" in done.stderr


@pytest.mark.parametrize("name", ["Doubled", "2x", "", "a-b", "linear"])
def test_a_name_is_a_free_lower_case_identifier(name, monkeypatch):
    """Names that the language could not read, or reads as a schedule, are refused."""
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))
    with pytest.raises(ValueError, match=r"lower-case identifier|is a schedule"):
        wt.stage(name)(type("Doubled", (wt.Shape,), {}))


def test_only_stages_can_be_registered():
    """A class that is no stage, or says no kind, is refused."""
    for thing in (int, wt.Stage):
        with pytest.raises(ValueError, match="needs a subclass of Source, Pool, Shape"):
            wt.stage("thing")(thing)

"""The notebook runs from its first cell to its last, and shows what it talks about."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "specs" / "tour.ipynb"
# In a process of its own: the warnings of a notebook's many libraries are not errors of ours.
RUN = "from nbclient.cli import main; main()"


def code_cells(text):
    """Return the cells of a notebook that hold code."""
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return source and outputs of every cell, run in order in an empty folder."""
    folder = tmp_path_factory.mktemp("tour")
    copy = folder / "tour.ipynb"
    copy.write_bytes(NOTEBOOK.read_bytes())
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {name: str(folder / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--inplace", "--kernel_name=python3", "--timeout=300", copy],
        env={**os.environ, **own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [("".join(cell["source"]), cell["outputs"]) for cell in code_cells(copy.read_text())]


def shown(executed, kind):
    """Return what all cells show of a kind."""
    found = [output.get("data", {}) for _, outputs in executed for output in outputs]
    return ["".join(data[kind]) for data in found if kind in data]


def test_it_is_committed_without_outputs():
    """And the cells were never numbered."""
    cells = code_cells(NOTEBOOK.read_text(encoding="utf-8"))
    assert len(cells) >= 8
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_every_cell_runs(executed):
    """In order, without an error, and without a word of warning."""
    for source, outputs in executed:
        kinds = [output.get("name", output["output_type"]) for output in outputs]
        assert not {"error", "stderr"} & {*kinds}, (source, outputs)


@pytest.mark.slow
def test_specs_and_weights_are_tables(executed):
    """A spec with its pipeline; weights with what they come to, twice."""
    spec, *weights = shown(executed, "text/html")
    assert "normalize -&gt; linupper(alpha=1) -&gt; temperature(0.4) -&gt; clamp(2/n)" in spec
    for table, factors in zip(weights, [("instance", "token"), ("pipeline",)], strict=True):
        for word in (*factors, "ess_frac", "tokens by weight, from 0 to "):
            assert word in table


@pytest.mark.slow
def test_the_error_has_a_place(executed):
    """Line, column, and the word that was meant."""
    said = "".join(line for _, outputs in executed for o in outputs for line in o.get("text", []))
    assert "<spec>:1:14: unknown stage 'linuper'; did you mean 'linupper'?" in said


@pytest.mark.slow
def test_the_picture_is_labelled(executed):
    """One picture: a title, axes with units, a legend with every spec, and a line for each."""
    [picture] = shown(executed, "image/svg+xml")
    svg, root = "{http://www.w3.org/2000/svg}", ET.fromstring(picture)
    words = ["".join(node.itertext()).strip() for node in root.iter(f"{svg}text")]
    for text in ("loss (nats per token)", "weight (mean one)", "linupper", "quadratic", "dro-kl"):
        assert text in words
    assert "The weight that three specs give to a loss" in words

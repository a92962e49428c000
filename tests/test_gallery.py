"""The gallery is what the specs say now."""

import importlib.util
import re
from pathlib import Path

import generators as tables
import pytest
import torch
from census import Products
from looping import for_each

import weighting as wt

ROOT = Path(__file__).resolve().parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))


def load(name):
    """Return a script of benchmarks/ as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


gallery = load("gallery")


def test_there_are_specs():
    """The gallery shows the shipped specs, which are many."""
    assert len(SPECS) >= 34


@for_each("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_has_its_entry_as_it_is_now(path):
    """Title, formula, paper, differences, level, signals and cost of a spec are in the gallery."""
    page = (ROOT / "specs" / "README.md").read_text(encoding="utf-8")
    spec = wt.load(path)

    assert spec.name == path.stem
    assert gallery.entry(path, spec) in page
    assert (ROOT / "specs" / "curves" / f"{spec.name}.svg").is_file()


@pytest.mark.slow
@for_each("path", SPECS, ids=lambda path: path.stem)
def test_every_picture_shows_something(path):
    """A curve has finite weights, some of them positive."""
    loss, weight = gallery.curve(wt.load(path))

    assert weight.shape == loss.shape
    assert weight.isfinite().all()
    assert weight.max() > 0


WIDTH, VOCABULARY = 7, 17
"""Of an output layer; nothing else here has these sizes."""


@for_each("path", SPECS, ids=lambda path: path.stem)
def test_the_costs_on_the_page_are_those_of_the_loss(path):
    """The page's number of products of the output layer is what the named path really takes."""
    page = (ROOT / "specs" / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {path.stem}\n")[2].partition("\n## ")[0]
    text = path.read_text(encoding="utf-8")
    fn = tables.built(text)
    said = re.search(r"- Costs: `(late|keep|recompute)`, ([\d.]+) products of the output", section)
    if fn.plan.identity:
        assert said is None
        return
    memory, products = said[1], float(said[2])
    rows, length = 4, 100
    signals = tables.batch(rows, length, domains=tables.domains_of(text))
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCABULARY, (rows, length), generator=g)
    hidden = torch.randn(rows, length, WIDTH, generator=g, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, requires_grad=True)
    columns = {k: x for k, x in signals.columns.items() if not k.startswith("topk_entropy")}

    with Products(WIDTH, VOCABULARY) as counted:
        loss, _ = wt.linear_weighted_cross_entropy(
            hidden,
            weight,
            labels,
            fn,
            step=1,
            domain_ids=signals.domain_ids,
            segment_ids=signals.segment_ids,
            ref_loss=signals.ref_loss,
            columns=columns,
            memory=memory,
        )
        loss.backward()

    # A selection may have one token more in each sequence than its share.
    assert counted.tokens / (rows * length) == pytest.approx(products, abs=0.05)

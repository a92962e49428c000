"""The page of metrics names what the code that makes them names."""

import re
from pathlib import Path

import pytest
import torch

import weighting as wt
from weighting.build.statistics import summarize

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def rows(heading):
    """Return the names in the table of a section."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_statistics_of_weights_are_on_the_page():
    """Those of the factors and of the final weights, and what the trainer adds; no others."""
    fn = wt.build(wt.loads("normalize -> temperature(0.4)"))
    moments = fn(wt.Signals(loss=torch.rand(4, 2)), 1).moments
    found = {name.replace("pipeline/", "<factor>/") for name in summarize(moments, ["pipeline"])}

    added = {"step", "unweighted_loss", "weighted_loss", "grad_norm", "tps"}
    assert found | added == rows("Every line")


def test_numbers_of_a_validation_are_on_the_page():
    """Those of a domain, and their means; no others."""
    pytest.importorskip("torchtitan")
    from titan_integration.observe.validation import summarize  # noqa: PLC0415 - needs the host

    found = summarize(["<name>"], torch.ones(2, 1))

    assert set(found) == rows("Validation")


def test_every_limit_has_its_reason():
    """Each row says what a number is."""
    cells = re.findall(r"^\| `[^`]+` \| (.*?) \|", PAGE, re.MULTILINE)
    assert len(cells) >= 24
    assert all(cells)

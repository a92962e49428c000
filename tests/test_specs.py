"""Every shipped spec: documented, readable, and weighing as its own header says."""

import dataclasses
import math
import re

import generators as tables
import pytest
import torch
from reference import REFERENCES

import weighting as wt
from weighting.spec import shipped

NAMES = sorted(tables.SPEC_TEXTS)

each_spec = pytest.mark.parametrize("name", NAMES)


def adversarial():
    """Return batches on which a wrong formula shows, by name."""
    plain = tables.batch(5, 8, seed=50)
    loss = plain.loss
    two = loss.clone()
    two[0], two[1:] = 9.0, 1.0
    outlier = loss.clone()
    outlier[2] = 200.0
    ties = (loss * 2).round() / 2
    lengths = torch.arange(8) < torch.tensor([1, 8, 3, 5, 2])[:, None]
    lonely = torch.zeros_like(plain.valid)
    lonely[3, 4] = True
    changes = {
        "unequal lengths": {"valid": lengths},
        "two values": {"loss": two},
        "one outlier": {"loss": outlier},
        "ties": {"loss": ties, "entropy": ties},
        "equal": {"loss": torch.full_like(loss, 2.0), "entropy": torch.full_like(loss, 1.0)},
        "certain and hopeless": {"loss": torch.where(loss < 2, 0.0, 30.0)},
        "one valid token": {"valid": lonely},
        "a row without labels": {"valid": lengths & (torch.arange(5) != 2)[:, None]},
        "no label at all": {"valid": torch.zeros_like(plain.valid)},
        "zero entropy": {"entropy": torch.zeros_like(loss)},
        "one domain": {"domain_ids": torch.ones_like(plain.domain_ids)},
    }
    batches = {name: dataclasses.replace(plain, **change) for name, change in changes.items()}
    one_row = tables.batch(1, 8, seed=51)
    return {
        "plain": plain,
        **batches,
        "one row": one_row,
        "many rows": tables.batch(64, 3, seed=52),
    }


def assert_like_reference(name, signals, label):
    """Compare the weights of a spec with its reference, token by token."""
    got = tables.built(tables.SPEC_TEXTS[name])(signals, 0).token.tolist()
    expected = REFERENCES[name](tables.as_lists(signals))
    for row, (got_row, expected_row) in enumerate(zip(got, expected, strict=True)):
        for column, (a, b) in enumerate(zip(got_row, expected_row, strict=True)):
            # Rounding of float32 means, magnified 2/0.4 times by the temperature.
            assert math.isclose(a, b, rel_tol=2e-5, abs_tol=1e-6), (label, row, column, a, b)


def test_every_spec_has_a_reference():
    """There are specs, and each has a slow reference of its own."""
    assert len(NAMES) >= 10
    assert sorted(REFERENCES) == NAMES


@each_spec
def test_weights_are_those_of_the_header(name):
    """On adversarial and random batches the weights are those of the formula in the header."""
    for label, signals in adversarial().items():
        assert_like_reference(name, signals, label)
    for seed in range(60, 80):
        rows, length = 1 + seed % 7, 1 + seed % 5
        assert_like_reference(name, tables.batch(rows, length, seed=seed, keep=0.6), seed)


@each_spec
def test_a_spec_says_what_it_is(name):
    """The header says in a sentence what it does, then the formula, the paper and what differs."""
    text = tables.SPEC_TEXTS[name]
    header = text[: text.index("version:")]
    lines = header.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert re.match(r"# [A-Z].*[.:]", lines[0])
    assert any(re.match(r"#   \S.* = ", line) for line in lines), "no formula"
    assert "\n# Paper: " in header
    assert re.search(r"\n# Differs[^\n]*: ", header)
    assert wt.loads(text).name == name


@each_spec
def test_a_shipped_spec_is_found_by_its_name(name):
    """`load` takes the bare name, the path and the file alike."""
    spec = wt.loads(tables.SPEC_TEXTS[name])
    for path in (name, f"specs/{name}.yaml", tables.SPECS / f"{name}.yaml"):
        assert wt.load(path) == spec
    assert set(shipped()) == set(NAMES)

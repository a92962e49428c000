"""Every shipped spec: documented, readable, and weighing as its own header says."""

import dataclasses
import math
import re

import generators as tables
import pytest
import torch
from looping import for_each
from reference_methods import FORMULAS, MEMORIES, reference

import weighting as wt
from weighting.language.find import shipped

NAMES = sorted(tables.SPEC_TEXTS)

each_spec = for_each("name", NAMES)


def adversarial(domains=tables.DOMAINS):
    """Return batches on which a wrong formula shows, by name."""
    plain = tables.batch(5, 8, seed=50, domains=domains)
    loss = plain.loss
    two = loss.clone()
    two[0], two[1:] = 9.0, 1.0
    outlier = loss.clone()
    outlier[2] = 200.0
    ties = (loss * 2).round() / 2
    lengths = torch.arange(8) < torch.tensor([1, 8, 3, 5, 2])[:, None]
    lonely = torch.zeros_like(plain.valid)
    lonely[3, 4] = True
    zero = torch.zeros_like(loss)

    def columns(x):
        return {
            **dict.fromkeys(tables.COLUMNS, x),
            "topics": (x.abs() * 40).floor(),
            "example": x.abs().floor(),
        }

    changes = {
        "unequal lengths": {"valid": lengths},
        "two values": {"loss": two},
        "one outlier": {"loss": outlier},
        "ties": dict.fromkeys(("loss", "entropy", "error_norm"), ties),
        "tied differences": {
            "loss": ties,
            "ref_loss": ties.flip(0),
            "columns": columns(ties.T.reshape(5, 8)),
        },
        "equal": {"loss": torch.full_like(loss, 2.0), "entropy": torch.full_like(loss, 1.0)},
        "nothing to learn": {"ref_loss": loss, "columns": columns(loss)},
        "certain and hopeless": {"loss": torch.where(loss < 2, 0.0, 30.0)},
        "one valid token": {"valid": lonely},
        "a row without labels": {"valid": lengths & (torch.arange(5) != 2)[:, None]},
        "no label at all": {"valid": torch.zeros_like(plain.valid)},
        "all zero": {**dict.fromkeys(tables.FLOATS, zero), "columns": columns(zero)},
        "beyond the bounds": {"columns": {**columns(loss * 4 - 8), "topk_entropy_20": loss}},
        "one domain": {"domain_ids": torch.ones_like(plain.domain_ids)},
    }
    batches = {name: dataclasses.replace(plain, **change) for name, change in changes.items()}
    one_row = tables.batch(1, 8, seed=51, domains=domains)
    return {
        "plain": plain,
        **batches,
        "one row": one_row,
        "many rows": tables.batch(64, 3, seed=52, domains=domains),
    }


def assert_equal_weights(got, expected, label, rel_tol=2e-5):
    """Compare token weights with those of a reference, token by token."""
    for row, (got_row, expected_row) in enumerate(zip(got.tolist(), expected, strict=True)):
        for column, (a, b) in enumerate(zip(got_row, expected_row, strict=True)):
            # Rounding of float32 means, magnified 2/0.4 times by the temperature.
            assert math.isclose(a, b, rel_tol=rel_tol, abs_tol=1e-6), (label, row, column, a, b)


def assert_like_reference(name, signals, label, step=0):
    """Compare the weights of a first batch with those of the reference of a spec."""
    text = tables.SPEC_TEXTS[name]
    domains = tables.domains_of(text)
    expected = reference(name, domains)(tables.as_lists(signals, domains, step))
    assert_equal_weights(tables.built(text)(signals, step).token, expected, label)


def test_every_spec_has_a_reference():
    """There are specs, and each has a slow reference of its own."""
    assert len(NAMES) >= 10
    assert sorted([*FORMULAS, *MEMORIES]) == NAMES


@each_spec
def test_weights_are_those_of_the_header(name):
    """On adversarial and random batches the weights are those of the formula in the header."""
    domains = tables.domains_of(tables.SPEC_TEXTS[name])
    for label, signals in adversarial(domains).items():
        assert_like_reference(name, signals, label)
    for seed in range(60, 67):
        rows, length = 1 + seed % 7, 1 + seed % 5
        signals = tables.batch(rows, length, seed=seed, keep=0.6, domains=domains)
        assert_like_reference(name, signals, seed)


@pytest.mark.slow
@for_each("name", sorted({"linupper-1p4b", "linupper-7b"} | tables.BURN_IN))
@for_each("step", [1, 1000, 1001, 1999, 2000, 2001, 100_000])
def test_scheduled_weights_are_those_of_the_header(name, step):
    """On both sides of its turn a schedule has the value the header says."""
    for label, signals in adversarial().items():
        assert_like_reference(name, signals, label, step)


def in_a_row(count, rows, length):
    """Return batches in a row, in some of which domains, rows or all the labels are missing."""
    batches = []
    for index in range(count):
        signals = tables.batch(rows, length, seed=100 + index, keep=0.9)
        ids, valid = signals.domain_ids, signals.valid
        change = {
            0: {"valid": valid & False},  # the first batch, and every seventh from it
            2: {"domain_ids": torch.where(ids == index % 5, (index + 1) % 5, ids)},
            4: {"domain_ids": torch.full_like(ids, index % 5)},
            5: {"valid": valid & (torch.arange(rows) % 3 != 0)[:, None]},
        }.get(index % 7, {})
        batches.append(dataclasses.replace(signals, **change))
    return batches


@pytest.mark.slow
@for_each("name", MEMORIES)
@for_each("first", [0, 1])
def test_remembered_weights_are_those_of_the_header(name, first):
    """Batch after batch the weights are those of the formula, the first with or without labels."""
    fn, expected = tables.built(tables.SPEC_TEXTS[name]), reference(name, tables.DOMAINS)
    compared = 0
    for step, signals in enumerate(in_a_row(40, 40, 3)[first:]):
        got, want = fn(signals, step).token, expected(tables.as_lists(signals, step=step))
        if getattr(expected, "tied", False):  # rounding alone says which of two is the lower
            continue
        compared += 1
        # A float32 sum of logarithms, one more in every batch.
        assert_equal_weights(got, want, step, 1e-4)
    assert compared > 10


@pytest.mark.parametrize("first", [6799, 6800])
def test_topics_move_every_hundred_batches_and_turn_after_step_7000(first):
    """ToReMi's weights move at every hundredth batch, upwards only up to step 7,000."""
    fn, expected = tables.built(tables.SPEC_TEXTS["toremi"]), reference("toremi", tables.DOMAINS)
    batches, moves = in_a_row(7, 2, 4), {}
    for number in range(1, 331):
        step, before = first + number, expected.w.copy()
        signals = batches[number % 7]
        # Remembered float32 sums of a hundred losses.
        lists = tables.as_lists(signals, step=step)
        assert_equal_weights(fn(signals, step).token, expected(lists), step, 1e-4)
        if expected.w != before:
            moves[step] = {d for d, w in expected.w.items() if w < before[d]}
    assert [*moves] == [first + 100, first + 200, first + 300]
    assert [bool(lowered) for lowered in moves.values()] == [step > 7000 for step in moves]


def buffer(fn, key):
    """Return the remembered numbers of the only stage that has some of this name."""
    (found,) = [x.tolist() for name, x in fn.state_dict().items() if name.endswith(f"__{key}")]
    return found


@pytest.mark.parametrize("name", ["doremi-proxy", "doremi-x-linupper-x-mile", "group-dro"])
def test_the_average_of_domain_weights_includes_the_initial_ones(name):
    """The exported proportions average the weights after every batch and those before the first."""
    fn, expected = tables.built(tables.SPEC_TEXTS[name]), reference(name, tables.DOMAINS)
    assert buffer(fn, "average") == pytest.approx([0.2] * 5)
    for step, signals in enumerate(in_a_row(20, 6, 5)):
        fn(signals, step)
        expected(tables.as_lists(signals))
        # A float32 sum of logarithms, one more in every batch.
        assert buffer(fn, "average") == pytest.approx([*expected.average.values()], rel=1e-4)


def test_doremi_takes_the_step_worked_out_by_hand():
    """Four domains ahead of the reference by 0.5, 0, 0.2 and 1 get the published weights."""
    hand = [0.250246, 0.151880, 0.185451, 0.412423]
    excess = torch.tensor([[0.5, 0.0, 0.2, 1.0]])
    names = ("a", "b", "c", "d")
    signals = wt.Signals(
        loss=excess + 2, ref_loss=torch.full((1, 4), 2.0), domain_ids=torch.arange(4)[None]
    )
    fn = wt.build(wt.load("doremi-proxy"), domains=names)
    # Printed to six digits.
    assert (fn(signals, 1).token[0] / 4).tolist() == pytest.approx(hand, abs=1e-6)
    assert buffer(fn, "average") == pytest.approx([(0.25 + a) / 2 for a in hand], abs=1e-6)
    slow = reference("doremi-proxy", names)
    slow.move(dict(zip(names, excess[0].tolist(), strict=True)))
    assert [*slow.a.values()] == pytest.approx(hand, abs=1e-6)


@each_spec
def test_a_spec_says_what_it_is(name):
    """The header says in a sentence what it does, then the formula, the paper and what differs."""
    text = tables.SPEC_TEXTS[name]
    header = text[: text.index("version:")]
    lines = header.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert re.match(r"# \w.*[.:]", lines[0])
    assert any(re.match(r"#   \S.* = ", line) for line in lines), "no formula"
    assert "\n# Paper: " in header
    assert re.search(r"\n# Differs[^\n]*: ", header)
    assert wt.loads(text).name == name


@pytest.mark.slow
@each_spec
def test_a_shipped_spec_is_found_by_its_name(name):
    """`load` takes the bare name, the path and the file alike."""
    spec = wt.loads(tables.SPEC_TEXTS[name])
    for path in (name, f"specs/{name}.yaml", tables.SPECS / f"{name}.yaml"):
        assert wt.load(path) == spec
    assert set(shipped()) == set(NAMES)

"""The spread of an example's probability over its visits, against a list of all of them."""

import dataclasses
import math
import statistics

import generators as tables
import pytest
import torch
from visits import Visits

import weighting as wt

TEXT = "version: 1\nnormalize: none\npipeline: variability(examples=16) -> as_is\n"
ACTIVE_BIAS = "variability(examples=16) -> mean(sequence) -> affine(1, 0.2) -> mean_one"


def probability(signals):
    """Return that of each label, [B, L]."""
    return signals.loss.double().neg().exp()


def spread(ps):
    """Return that of the probabilities of all visits."""
    if len(ps) < 2:
        return 0.0
    v = statistics.pvariance(ps)
    return math.sqrt(v + v * v / (len(ps) - 1))


def test_the_spread_is_that_of_all_visits():
    """Twenty batches, in which examples come and go."""
    fn, slow = wt.build(wt.loads(TEXT)), Visits(probability, spread)
    for step in range(20):
        signals = tables.batch(3, 5, seed=step)
        got = fn(signals, step).token.tolist()
        for mine, other in zip(got, slow.add(signals), strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_active_bias_weighs_by_it():
    """The authors' weight, sqrt(v + v^2 / (n - 1)) + 0.2, of mean one over the batch."""
    fn, slow = wt.build(wt.loads(ACTIVE_BIAS)), Visits(probability, spread)
    for step in range(6):
        rows = {"example": torch.arange(4.0)[:, None].expand(4, 3)}  # a document in each
        signals = dataclasses.replace(tables.batch(4, 3, seed=step, keep=1), columns=rows)
        got = fn(signals, step).token[:, 0].tolist()
        plus = [row[0] + 0.2 for row in slow.add(signals)]
        mean = sum(plus) / 4
        assert got == pytest.approx([x / mean for x in plus], rel=1e-5)


@pytest.mark.slow
def test_an_example_that_never_moves_has_no_spread():
    """Not even by rounding, after a thousand visits."""
    fn = wt.build(wt.loads(TEXT))
    loss = torch.tensor([[0.1234567]])
    signals = wt.Signals(loss, columns={"example": torch.zeros(1, 1)})
    for step in range(1000):
        token = fn(signals, step).token
    assert token.item() < 1e-6

"""Which labels are right, and how often examples have been forgotten, against lists of visits."""

import dataclasses
import itertools

import generators as tables
import pytest
import torch
from visits import Visits

import weighting as wt

TEXT = "version: 1\nnormalize: none\npipeline: forgotten(examples=16) -> as_is\n"
WRONG = "version: 1\nnormalize: none\npipeline: correct -> affine(-1, 1) -> as_is\n"


def right(signals):
    """Return which labels are right, [B, L]."""
    return signals.columns["label_is_top"]


def lost(visits):
    """Return the sum of all falls of accuracy."""
    return sum(max(0, a - b) for a, b in itertools.pairwise(visits))


def test_what_is_lost_is_that_of_all_visits():
    """Twenty batches, in which examples come and go."""
    fn, slow = wt.build(wt.loads(TEXT)), Visits(right, lost)
    for step in range(20):
        signals = tables.batch(3, 5, seed=step)
        got = fn(signals, step).token.tolist()
        for mine, other in zip(got, slow.add(signals), strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert max(map(slow.score, slow.history)) > 1


def test_an_example_of_one_label_counts_each_time_it_was_right_and_then_wrong():
    """Right, wrong, wrong, right, wrong: forgotten twice; never right: never forgotten."""
    fn = wt.build(wt.loads(TEXT))
    signals = wt.Signals(torch.ones(2, 1), columns={"example": torch.arange(2.0)[:, None]})
    counts = []
    for right in (1, 0, 0, 1, 0):
        columns = {**signals.columns, "label_is_top": torch.tensor([[right], [0]]).float()}
        counts.append(fn(dataclasses.replace(signals, columns=columns), 1).token[:, 0].tolist())
    assert counts == [[0, 0], [1, 0], [1, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize("memory", ["late", "keep", "recompute", "full"])
def test_a_label_is_right_where_it_is_the_most_probable_word(memory):
    """Only labels that the model would not have said weigh, on every way through the layer."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 7, 4, generator=g), torch.randn(9, 4, generator=g)
    labels = (hidden @ weight.T).argmax(-1)
    labels[:, ::2] = torch.randint(0, 9, (3, 4), generator=g)
    labels[0, 1] = -100
    fn = wt.build(wt.loads(WRONG))
    _, out = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, memory=memory)
    wrong = (labels != (hidden @ weight.T).argmax(-1)) & (labels != -100)
    assert 0 < wrong.sum() < wrong.numel()
    assert torch.equal(out.token, wrong.float())

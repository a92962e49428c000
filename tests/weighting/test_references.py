"""What references tell: which signals stages read, and the divergence of two predictions."""

import math

import generators as tables
import pytest
import torch

import weighting as wt
from weighting.contract import Alone
from weighting.loss.logits import Slice, divergence, statistics
from weighting.pipeline import signals_read

CLOSE = 1e-6


def slow_divergence(ours, theirs):
    """Return sum p (log p - log q) over the vocabulary of one token, in float64."""

    def logs(logits):
        top = max(logits)
        total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
        return [x - total for x in logits]

    pairs = zip(logs(ours), logs(theirs), strict=True)
    return math.fsum(math.exp(a) * (a - b) for a, b in pairs if a > -math.inf)


def two_models(tokens=6, words=50):
    """Return logits of two models that agree more and more from row to row, and labels."""
    rng = torch.Generator().manual_seed(0)
    ours, other = 4 * torch.randn(2, tokens, words, generator=rng)
    near = torch.linspace(0, 1, tokens)[:, None]
    labels = torch.randint(0, words, (tokens,), generator=rng)
    labels[1] = -100
    return ours, near * ours + (1 - near) * other, labels


def distance(ours, theirs, labels, cut=None):
    """Return the divergence by the log sums that statistics of both tell."""
    sums = (statistics(x, labels, frozenset(), cut)["lse"] for x in (ours, theirs))
    return divergence(ours, theirs, *sums, cut)


def test_the_divergence_is_that_of_the_formula():
    """Of float32 logits and of 16 bits; 0 where the models agree, and never below."""
    ours, theirs, labels = two_models()
    for x, y in ((ours, theirs), (ours.bfloat16(), theirs.bfloat16())):
        expected = [slow_divergence(*pair) for pair in zip(x.tolist(), y.tolist(), strict=True)]
        found = distance(x, y, labels)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, abs=1e-5, rel=CLOSE)
        assert found.min() >= 0
    assert distance(ours, theirs + 7, labels)[-1] < 1e-6
    assert distance(ours, theirs, labels)[0] > 1


def test_a_cut_vocabulary_gives_the_divergence_of_a_whole_one():
    """Each rank holds a part of the logits of both models."""
    ours, theirs, labels = two_models()

    def one(rank, ranks):
        start = (0, 30)[rank]
        mine = [x[:, start : start + 30] for x in (ours, theirs)]
        return distance(*mine, labels, Slice(start, ranks, 50))

    for found in tables.Lockstep(2).run(one):
        torch.testing.assert_close(found, distance(ours, theirs, labels), rtol=1e-5, atol=1e-6)


def test_words_that_cannot_come_add_nothing_and_a_broken_logit_is_seen():
    """A probability of 0 adds 0; one that only the other model excludes is infinitely far."""
    ours, theirs = torch.tensor([[1.0, -math.inf, 2]]), torch.tensor([[1.0, 5, 2]])
    label = torch.tensor([0])
    expected = slow_divergence(ours[0].tolist(), theirs[0].tolist())
    assert distance(ours, theirs, label).item() == pytest.approx(expected, rel=1e-6)
    assert distance(theirs, ours, label).item() == math.inf
    assert distance(torch.full_like(ours, math.nan), theirs, label).isnan()
    assert distance(ours, torch.full_like(ours, math.nan), label).isnan()
    assert distance(ours, theirs, label, Slice(0, Alone(), 3)).item() > 0


@pytest.mark.parametrize(
    ("source", "signal"),
    [
        ("ref_loss", "ref_loss"),
        ("ref_loss(old)", "columns.ref_loss_old"),
        ("ref_entropy", "columns.ref_entropy"),
        ("ref_entropy(old)", "columns.ref_entropy_old"),
        ("kl", "columns.kl"),
        ("kl(old)", "columns.kl_old"),
        ("excess_loss", "ref_loss"),
        ("excess_loss(old)", "columns.ref_loss_old"),
    ],
)
def test_a_source_reads_the_signal_of_the_reference_it_names(source, signal):
    """The only one has none; that of another reference is not taken in its place."""
    fn = wt.build(wt.loads(f"version: 1\nnormalize: none\npipeline: {source} -> as_is\n"))
    assert signals_read(fn.plan.factors["pipeline"]) - {"loss"} == {signal}
    names = ("ref_loss_old", "ref_entropy", "ref_entropy_old", "kl", "kl_old")
    given = {f"columns.{name}": torch.tensor([[1.0 + i]]) for i, name in enumerate(names)}
    given["ref_loss"] = torch.tensor([[9.0]])
    columns = {name.removeprefix("columns."): x for name, x in given.items()}
    signals = wt.Signals(torch.tensor([[20.0]]), ref_loss=columns.pop("ref_loss"), columns=columns)
    expected = given[signal].item()
    assert fn(signals).token.item() == (20 - expected if "excess" in source else expected)

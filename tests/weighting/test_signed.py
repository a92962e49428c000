"""Signed weights: loss and gradient against float64, on every way through the output layer."""

import dataclasses

import generators as tables
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from reference import mean_one
from reference_methods import linupper, npo, unlearning
from torch.testing import assert_close

import weighting as wt
from weighting.loss.cross_entropy import signals_of
from weighting.loss.late_bound import Batch, late_bound
from weighting.loss.logits import Slice
from weighting.loss.path import Sizes, path_of
from weighting.loss.sums import Head

IGNORED = -100
ROWS, LENGTH, WIDTH, VOCABULARY = 4, 6, 5, 11
COUNTED = "version: 1\npipeline: column(keep) -> signed\n"
LINUPPER = """
version: 1
factors:
  sign: column(keep) -> signed
  instance: normalize -> linupper(alpha=1) -> temperature(0.4) -> clamp(2/n)
"""


def signed_linupper(batch):
    """w_t = keep_t W_s, sizes scaled to mean one."""
    keep, weights = batch.columns["keep"], linupper(batch)
    pairs = [[*zip(*rows, strict=True)] for rows in zip(keep, weights, strict=True)]
    sizes = mean_one([[abs(k) * w for k, w in row] for row in pairs], batch.valid)
    return [
        [-x if k < 0 else x for (k, _), x in zip(*rows, strict=True)]
        for rows in zip(pairs, sizes, strict=True)
    ]


METHODS = {
    "unlearning": (tables.SPEC_TEXTS["unlearning"], unlearning),
    "npo": (tables.SPEC_TEXTS["npo"], npo),
    "linupper": (LINUPPER, signed_linupper),
}
each_method = pytest.mark.parametrize("method", METHODS)


def example():
    """Return hidden states, a weight, labels and signals of a batch, signs mixed in every row."""
    g = torch.Generator().manual_seed(3)
    signals = tables.batch(ROWS, LENGTH)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=g)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=g)
    keep = signals.columns["keep"]
    assert ((keep < 0).any(1) & (keep > 0).any(1)).all()
    return hidden, weight, labels.where(signals.valid, IGNORED), signals


def by_brute_force(method, hidden, weight, labels, signals):
    """Return loss, token weights and gradients in float64, by loops and by torch's autograd."""
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    nll = F.cross_entropy(F.linear(*wide).flatten(0, 1), labels.flatten(), reduction="none")
    found = nll.detach().view(ROWS, LENGTH).tolist()
    batch = dataclasses.replace(tables.as_lists(signals), loss=found)
    token = torch.tensor(METHODS[method][1](batch), dtype=torch.float64)
    loss = (token.flatten() * nll).sum() / (labels != IGNORED).sum()
    return loss, token, torch.autograd.grad(loss, wide)


def must_agree(got, expected):
    """Compare losses, weights and gradients; float32 sums."""
    for mine, exact in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert_close(mine.double(), exact, rtol=2e-5, atol=2e-6)


def given(signals):
    """Return what a loss is told of a batch."""
    return {"ref_loss": signals.ref_loss, "columns": signals.columns}


@pytest.mark.parametrize("memory", ["late", "keep", "recompute", "full"])
@each_method
def test_every_way_gives_the_loss_and_gradient_of_float64(method, memory):
    """Signs are mixed in each sequence, whose weights may come late."""
    hidden, weight, labels, signals = example()
    expected = by_brute_force(method, hidden, weight, labels, signals)
    assert (expected[1] < 0).any()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    fn = tables.built(METHODS[method][0])
    how = {"memory": memory, "chunks": 5, **given(signals)}
    loss, out = wt.linear_weighted_cross_entropy(*leaves, labels, fn, **how)
    must_agree((loss, out.token, torch.autograd.grad(loss, leaves)), expected)


@pytest.mark.parametrize("memory", ["late", "keep", "recompute"])
@each_method
def test_a_vocabulary_cut_over_ranks_gives_the_same(method, memory):
    """Each of two ranks finds the loss, and its part of the gradient."""
    hidden, weight, labels, signals = example()
    expected = by_brute_force(method, hidden, weight, labels, signals)
    widths = (6, 5)

    def part(rank, ranks):
        fn, mine = tables.built(METHODS[method][0]), weight.split(widths)[rank].clone()
        leaves = [x.clone().requires_grad_() for x in (hidden, mine)]
        known = {"valid": signals.valid, "ref_loss": signals.ref_loss}
        known |= {f"columns.{name}": x for name, x in signals.columns.items()}
        batch = Batch(
            labels,
            Head(leaves[1], cut=Slice(6 * rank, ranks)),
            path_of(fn.plan, Sizes.of(labels, mine), memory, chunks=3),
            fn.needs,
            lambda found: fn.local_part(signals_of(found)),
            known,
            1 / signals.valid.sum(),
        )
        loss, (token,) = late_bound(
            leaves[0], batch, lambda found: (fn(signals_of({**found, **known})).token,)
        )
        return loss, token, torch.autograd.grad(loss, leaves)

    found = tables.Lockstep(2).run(part)
    of_hidden = sum(grads[0] for *_, grads in found)
    of_weight = torch.cat([grads[1] for *_, grads in found])
    for loss, token, _ in found:
        must_agree((loss, token, (of_hidden, of_weight)), expected)


@each_method
def test_two_ranks_give_the_same(method):
    """Each has half of the sequences; sizes are scaled over both."""
    hidden, weight, labels, signals = example()
    expected = by_brute_force(method, hidden, weight, labels, signals)

    def part(rank, ranks):
        fn = tables.built(METHODS[method][0], collectives=ranks)
        half = slice(2 * rank, 2 * rank + 2)
        leaves = [x.clone().requires_grad_() for x in (hidden[half], weight)]
        own = tables.changed(signals, lambda _, x: x[half])
        loss, out = wt.linear_weighted_cross_entropy(*leaves, labels[half], fn, **given(own))
        loss = loss * own.valid.sum() / signals.valid.sum()  # a rank divides by its own tokens
        return loss, out.token, torch.autograd.grad(loss, leaves)

    (a, first, of_first), (b, second, of_second) = tables.Lockstep(2).run(part)
    of_hidden, of_weight = torch.cat([of_first[0], of_second[0]]), of_first[1] + of_second[1]
    must_agree((a + b, torch.cat([first, second]), (of_hidden, of_weight)), expected)


def test_positive_scores_weigh_as_without_a_sign():
    """Where no score is negative, `signed` gives the bits that `as_is` gives."""
    hidden, weight, labels, signals = example()
    columns = {"keep": signals.columns["keep"].abs()}
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    found = []
    for text in (COUNTED, COUNTED.replace("signed", "as_is")):
        fn = tables.built(text)
        loss, out = wt.linear_weighted_cross_entropy(*leaves, labels, fn, columns=columns)
        found.append([loss, out.token, *torch.autograd.grad(loss, leaves)])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def test_metrics_are_of_sizes_and_say_what_part_is_negative():
    """Weights of 1, -1 and 2 have a mean size of one, and a quarter of it is below 0."""
    columns = {"keep": torch.tensor([[1.0, -1.0, 2.0, 0.0]])}
    out = tables.built(COUNTED)(wt.Signals(loss=torch.ones(1, 4), columns=columns))
    metrics = {name: x.item() for name, x in out.metrics.items()}
    assert out.token.tolist() == [[1, -1, 2, 0]]
    assert metrics["weight/negative_frac"] == 0.25
    assert metrics["weight/ess_frac"] == pytest.approx(16 / (4 * 6))
    assert (metrics["weight/min"], metrics["weight/max"]) == (-1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("column(keep) -> mean(sequence) -> signed", "each token decides alone"),
        ("loss -> center -> signed", "each token decides alone"),
        ("column(keep) -> signed -> clamp(2/n)", "in another factor"),
        ("loss -> over(loss -> signed) -> mean_one", "leave signed out of it"),
        ("table(a=1, b=-1) -> temperature(1)", "b must be at least 0"),
        ("apply: sampling\npipeline: table(a=1, b=-1) -> signed", "no factor weighs domains"),
    ],
)
def test_a_sign_that_could_not_be_kept_is_refused(text, message):
    """A sign that comes late or is capped, a negative proportion, and a table without the word."""
    text = text if "pipeline" in text else f"pipeline: {text}"
    with pytest.raises(wt.SpecError, match=message) as error:
        wt.build(wt.loads(f"version: 1\n{text}\n"), domains=("a", "b"))
    assert len(error.value.problems) == 1

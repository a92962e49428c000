"""Sources that read hidden states: every path of the loss, and what has none and says so."""

import hidden_states
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch.testing import assert_close

import weighting as wt
from weighting.build import plan_of
from weighting.cli.tokens import refusal
from weighting.loss.late_bound import Batch, begin
from weighting.loss.path import Path
from weighting.loss.sums import Head
from weighting.testing import check_stage

ROWS, LENGTH, WIDTH, VOCABULARY, IGNORED = 4, 6, 5, 11, -100
PIPELINES = {
    "tokens": "length_of_hidden -> mean_one",
    "sequences": "length_of_hidden -> mean(sequence) -> mean_one",
    "tokens, late": "length_of_hidden -> center -> sigmoid -> mean_one",
    "beside a loss": "loss -> over(length_of_hidden) -> mean_one",
}


@pytest.fixture(autouse=True)
def length_of_hidden(monkeypatch):
    """Register a stage for the test alone, and return its class."""
    return hidden_states.length_of_hidden(monkeypatch)


def built(name):
    """Return a pipeline by its name, built; its weights are left as they are."""
    return wt.build(wt.loads(f"version: 1\nnormalize: none\npipeline: {PIPELINES[name]}\n"))


def example():
    """Return hidden states, a weight and labels, some of them ignored."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=g, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=g)
    labels[0, :2] = labels[2, 3] = IGNORED
    return hidden, weight, labels


def by_hand(name, hidden, weight, labels):
    """Return weights, loss and gradients in float64, one token after the other."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    nll = F.cross_entropy(
        F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="none"
    )
    losses = nll.detach().view(ROWS, LENGTH).tolist()
    places = [(i, j) for i in range(ROWS) for j in range(LENGTH) if labels[i, j] != IGNORED]
    score = {(i, j): sum(x * x for x in hidden[i, j].tolist()) ** 0.5 for i, j in places}
    if name == "sequences":
        rows = [[score[at] for at in places if at[0] == i] for i in range(ROWS)]
        means = [sum(row) / len(row) for row in rows]
        score = {at: means[at[0]] * ROWS / sum(means) for at in places}
    else:
        if name == "tokens, late":
            middle = sum(score.values()) / len(places)
            score = {at: 1 / (1 + 2.718281828459045 ** (middle - x)) for at, x in score.items()}
        elif name == "beside a loss":
            score = {(i, j): losses[i][j] / x for (i, j), x in score.items()}
        score = {at: x * len(places) / sum(score.values()) for at, x in score.items()}
    token = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for at in places:
        token[at] = score[at]
    loss = (token.flatten() * nll).sum() / len(places)
    return token, loss.detach(), torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.parametrize("memory", ["late", "keep", "recompute", "full"])
@pytest.mark.parametrize("name", PIPELINES)
def test_weights_loss_and_gradients_are_those_of_float64_on_every_path(name, memory):
    """Chunks cross rows; the score of a vector acts like any other, and has no gradient."""
    hidden, weight, labels = example()
    fn = built(name)
    if memory == "late" and fn.plan.deferred_level == "token":
        memory = "auto"
    loss, out = wt.linear_weighted_cross_entropy(
        hidden, weight, labels, fn, memory=memory, chunks=5
    )
    token, expected, wanted = by_hand(name, hidden, weight, labels)
    assert_close(out.token.double(), token, rtol=1e-5, atol=1e-6)  # float32 against float64
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(loss, [hidden, weight]), wanted, strict=True):
        assert_close(mine.double(), other, rtol=1e-4, atol=1e-6)  # sums of float32
    assert out.token.std() > 0.1


def test_flat_tokens_and_whole_logits_take_them_too():
    """[T, D] gives what [B, L, D] gives, and so do logits beside their hidden states."""
    hidden, weight, labels = example()
    fn = built("tokens")
    logits = F.linear(hidden, weight)
    loss, out = wt.weighted_cross_entropy(logits, labels, fn, hidden=hidden)
    flat, _ = wt.linear_weighted_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), fn)
    assert_close(flat, loss, rtol=1e-5, atol=1e-6)  # sums of float32
    assert not out.token.requires_grad
    (through_logits,) = torch.autograd.grad(loss, logits)
    (gradient,) = torch.autograd.grad(flat, hidden)
    assert_close(gradient, through_logits @ weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_such_a_source_obeys_every_law(length_of_hidden):
    """Among them: ranks, chunks, ignored tokens, one compiled graph."""
    check_stage(length_of_hidden())


def test_a_vector_with_one_number_that_is_not_finite_weighs_nothing():
    """The token is counted as not finite; an ignored one is not looked at."""
    spec = wt.loads("version: 1\non_nonfinite: drop\npipeline: length_of_hidden -> mean_one\n")
    hidden = torch.ones(1, 3, WIDTH)
    hidden[0, 0, 2], hidden[0, 2, 0] = torch.inf, torch.nan
    valid = torch.tensor([[True, True, False]])
    out = wt.build(spec)(wt.Signals(loss=torch.ones(1, 3), valid=valid, hidden=hidden))
    assert out.token.tolist() == [[0, 2, 0]]  # of mean one over the two that count
    assert out.metrics["weight/nonfinite_frac"] == 0.5


def test_nobody_who_does_not_read_them_is_handed_any():
    """The signals of a batch hold hidden states only where they are needed."""
    hidden, weight, labels = example()
    for needs in (frozenset({"loss"}), frozenset({"loss", "hidden"})):
        batch = Batch(
            labels,
            Head(weight),
            Path("recompute", 1, 8, None, 0),
            needs,
            lambda found: found["loss"],
            {},
            torch.ones(()),
        )
        found, _ = begin(batch, hidden)
        assert ("hidden" in found) == ("hidden" in needs)
    assert found["hidden"].data_ptr() == hidden.data_ptr(), "no copy"


def test_where_there_are_none_the_spec_is_refused_by_name():
    """Logits alone, numbers in a table, a text and a model: each says what lacks."""
    hidden, weight, labels = example()
    fn, text = built("tokens"), PIPELINES["tokens"]
    with pytest.raises(ValueError, match=r"this spec reads hidden; give Signals\(hidden=\.\.\.\)"):
        wt.weighted_cross_entropy(F.linear(hidden, weight), labels, fn)
    with pytest.raises(ValueError, match=r"hidden has shape \[4, 6\], the loss \[4, 6\]"):
        fn(wt.Signals(loss=torch.ones(ROWS, LENGTH), hidden=torch.ones(ROWS, LENGTH)))
    with pytest.raises(ValueError, match="reads hidden states, and units here are numbers"):
        wt.simulate(text, loss=[1.0, 2.0])
    assert "reads hidden states" in refusal(fn.spec, plan_of(fn.spec))

"""Signals from logits, and the weighted cross entropy."""

import math

import generators as tables
import pytest
import reference
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.loss.cross_entropy import signals_from, token_loss

IGNORED = -100
ABC = ("a", "b", "c")


def example(shape=(3, 5), vocabulary=7, dtype=torch.float32):
    """Return logits and labels, some of them ignored; the first label counts."""
    logits = (2 * torch.randn(*shape, vocabulary)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, shape)
    labels[torch.rand(shape) < 0.3] = IGNORED
    labels.view(-1)[0] = 2
    return logits, labels


def weighted(logits, labels, text):
    """Return loss and weights of a spec, given every signal that comes from elsewhere."""
    rows, length = labels.shape
    signals = tables.batch(rows, length)
    return wt.weighted_cross_entropy(
        logits,
        labels,
        tables.built(text),
        step=1,
        domain_ids=signals.domain_ids,
        segment_ids=signals.segment_ids,
        ref_loss=signals.ref_loss,
        columns=signals.columns,
    )


def table_spec(pipeline="table(a=0, b=1, c=2.5) -> mean_one"):
    """Return a built spec that weighs tokens by given numbers."""
    return wt.build(wt.loads(f"version: 1\npipeline: {pipeline}\n"), domains=ABC)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_validation_moves_no_state(linear):
    """A loss under no_grad is that of evaluation mode; the next one with a gradient goes on."""
    fn = wt.build(wt.load("group-dro"), domains=ABC)
    hidden, weight = torch.randn(3, 5, 4), torch.randn(7, 4, requires_grad=True)
    labels, ids = torch.randint(0, 7, (3, 5)), torch.arange(3)[:, None].expand(3, 5)

    def state_after():
        if linear:
            wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, step=1, domain_ids=ids)
        else:
            wt.weighted_cross_entropy(hidden @ weight.T, labels, fn, step=1, domain_ids=ids)
        return {name: x.clone() for name, x in fn.state_dict().items()}

    before = state_after()
    with torch.no_grad():
        same = state_after()
    assert fn.training
    moved = state_after()
    assert all(torch.equal(same[name], x) for name, x in before.items())
    assert any(not torch.equal(moved[name], x) for name, x in before.items())


def test_a_step_that_is_not_given_is_told_of_where_it_matters():
    """With a schedule or a start; other specs do without."""
    logits, labels = example()
    for text in ("loss -> temperature(linear(2, 1, over=9))", "loss -> mean_one\nstart: 5"):
        fn = tables.built(f"version: 1\nname: late\npipeline: {text}\n")
        with pytest.warns(UserWarning, match="late depends on the optimizer step"):
            wt.weighted_cross_entropy(logits, labels, fn)
        wt.weighted_cross_entropy(logits, labels, fn, step=1)
    wt.weighted_cross_entropy(
        logits, labels, tables.built("version: 1\npipeline: loss -> mean_one\n")
    )


def test_state_keeps_float32_in_a_model_of_sixteen_bits():
    """Small steps would be lost in bfloat16; counts stay whole numbers."""
    model = torch.nn.Linear(2, 2)
    model.add_module("weighting", wt.build(wt.load("group-dro"), domains=ABC))
    kinds = {name: x.dtype for name, x in model.weighting.state_dict().items()}
    model.to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert {name: x.dtype for name, x in model.weighting.state_dict().items()} == kinds
    assert torch.float32 in kinds.values()
    model.to("meta")
    assert {x.device.type for x in model.weighting.buffers()} == {"meta"}


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("flat", [False, True], ids=["[1, T]", "[T]"])
def test_four_samples_in_one_row_weigh_like_four_rows(linear, flat):
    """LinUpper weighs padding-free samples 1.354, 1.18, 1.354 and 0.111, as it does four rows."""
    fn = wt.build(wt.load("linupper"))
    losses = torch.tensor([3.0, 1.945, 3.0, 1.0])  # nats; the second is a little below the middle
    rows = torch.stack([torch.zeros(4), losses.expm1().log()], -1)[:, None].expand(4, 5, 2)
    labels, ids = torch.zeros(4, 5, dtype=torch.long), torch.arange(4)[:, None].expand(4, 5)
    _, expected = wt.weighted_cross_entropy(rows, labels, fn)
    assert_close(expected.token[:, 0], torch.tensor([1.354, 1.18, 1.354, 0.111]), rtol=0, atol=2e-3)
    shape = (20,) if flat else (1, 20)
    given = {"sequence_ids": ids.reshape(shape)}
    call, *args = (wt.weighted_cross_entropy,)
    if linear:
        call, args = wt.linear_weighted_cross_entropy, [torch.eye(2)]
    _, out = call(rows.reshape(*shape, 2), *args, labels.reshape(shape), fn, **given)
    assert_close(out.token.flatten(), expected.token.flatten())


@pytest.mark.parametrize("shape", [(3, 5), (15,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_is_cross_entropy_bit_by_bit(shape, dtype):
    """With weights that are one by construction, loss and gradient are torch's, to the last bit."""
    logits, labels = example(shape, dtype=dtype)
    loss, _ = wt.weighted_cross_entropy(logits, labels, wt.build(wt.load("uniform")))
    (gradient,) = torch.autograd.grad(loss, logits)
    plain = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(plain, logits)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient, expected)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(
    "pipeline",
    ["uniform -> clamp(2/n) -> floor(0.5)", "uniform -> interpolate(0.5)", "uniform"],
)
def test_constrained_uniform_is_uniform(pipeline):
    """Constraints leave weights of one alone, so the spec still counts as plain training."""
    fn = wt.build(wt.loads(pipeline))
    assert fn.plan.identity
    logits, labels = example()
    loss, _ = wt.weighted_cross_entropy(logits, labels, fn)
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("pipeline", ["temperature(1e30)", "affine(0) -> mean_one"])
def test_weights_that_happen_to_be_one_give_cross_entropy(pipeline):
    """Computed weights of one agree with plain cross entropy to float32 rounding."""
    logits, labels = example()
    fn = wt.build(wt.loads(pipeline))
    assert not fn.plan.identity
    loss, out = wt.weighted_cross_entropy(logits, labels, fn)
    assert_close(out.token, (labels != IGNORED).float(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (expected,) = torch.autograd.grad(plain, logits)
    assert_close(loss, plain, rtol=1e-6, atol=0)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_loss_and_gradient_are_those_of_float64(shape):
    """Given weights, one of them zero at the first token, multiply loss and gradient exactly."""
    logits, labels = example(shape)
    domains = torch.randint(0, 3, shape)
    domains.view(-1)[0] = 0
    loss, out = wt.weighted_cross_entropy(logits, labels, table_spec(), domain_ids=domains)
    (gradient,) = torch.autograd.grad(loss, logits)

    entries = [0.0, 1.0, 2.5]
    valid = (labels != IGNORED).flatten().tolist()
    raw = [entries[d] if ok else 0.0 for d, ok in zip(domains.flatten(), valid, strict=True)]
    weights = [w * sum(valid) / sum(raw) for w in raw]
    wide = logits.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for t, (row, label) in enumerate(
        zip(wide.flatten(0, -2), labels.flatten().tolist(), strict=True)
    ):
        if valid[t]:
            total = total - weights[t] * row.log_softmax(-1)[label]
    expected = total / sum(valid)
    (expected_gradient,) = torch.autograd.grad(expected, wide)

    # Float32 against float64.
    assert_close(out.token.flatten(), torch.tensor(weights), rtol=1e-6, atol=1e-7)
    assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-8)
    assert (gradient.flatten(0, -2)[0] == 0).all()
    assert (gradient[labels == IGNORED] == 0).all()


@for_each("name", tables.SPEC_TEXTS)
def test_weights_carry_no_gradient(name):
    """The gradient of the loss is that of the weighted sum with the weights held constant."""
    logits, labels = example()
    loss, out = weighted(logits, labels, tables.SPEC_TEXTS[name])
    (gradient,) = torch.autograd.grad(loss, logits)
    nll = token_loss(logits, labels)
    plain = (out.token * nll).sum() / (labels != IGNORED).sum()
    (expected,) = torch.autograd.grad(plain, logits)
    # The same sum in another order.
    assert_close(loss, plain, rtol=1e-6, atol=0)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@for_each("name", tables.SPEC_TEXTS)
def test_a_batch_without_labels_costs_nothing(name):
    """When every label is ignored the loss and its gradient are 0, not NaN."""
    logits, labels = example()
    labels[:] = IGNORED
    loss, _ = weighted(logits, labels, tables.SPEC_TEXTS[name])
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_a_weight_of_zero_hides_an_infinite_loss():
    """An impossible label of weight 0 leaves loss and gradient finite."""
    logits, labels = example()
    logits = logits.detach().clone()
    logits[0, 0, labels[0, 0]] = -torch.inf
    logits.requires_grad_()
    domains = torch.ones_like(labels)
    domains[0, 0] = 0
    loss, out = wt.weighted_cross_entropy(logits, labels, table_spec(), domain_ids=domains)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert out.token[0, 0] == 0
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_weight_of_zero_hides_a_nan_loss():
    """A token of NaN logits and weight 0 spoils neither the loss nor other tokens' gradient."""
    logits, labels = example()
    logits = logits.detach().clone()
    logits[0, 0] = torch.nan
    logits.requires_grad_()
    domains = torch.ones_like(labels)
    domains[0, 0] = 0
    loss, _ = wt.weighted_cross_entropy(logits, labels, table_spec(), domain_ids=domains)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.flatten(0, 1)[1:].isfinite().all()


@pytest.mark.parametrize("block", [1, 21, 2**20])
def test_signals_of_the_distribution_are_their_formulas(block, monkeypatch):
    """Entropy and error norm are those of the softmax, however many rows are taken at a time."""
    monkeypatch.setattr("weighting.loss.logits._BLOCK", block)
    logits, labels = example()
    got = signals_from(logits, labels, frozenset({"entropy", "error_norm", "loss"}))
    assert set(got) == {"entropy", "error_norm"}
    for b, t in (labels != IGNORED).nonzero().tolist():
        p, label = reference.distribution(logits[b, t].double().tolist()), labels[b, t].item()
        entropy = -sum(x * math.log(x) for x in p)
        norm = sum((x - (v == label)) ** 2 for v, x in enumerate(p)) ** 0.5
        # Float32 sums over the vocabulary; the norm is a root of a difference.
        assert got["entropy"][b, t].item() == pytest.approx(entropy, rel=1e-5, abs=1e-6)
        assert got["error_norm"][b, t].item() == pytest.approx(norm, rel=1e-4, abs=1e-3)


def test_token_loss_is_the_negative_log_likelihood():
    """Each label's loss is -log softmax, and 0 where the label is ignored."""
    logits, labels = example()
    got = token_loss(logits, labels)
    for b, row in enumerate(labels.tolist()):
        for t, label in enumerate(row):
            expected = (
                0.0
                if label == IGNORED
                else reference.softmax_cross_entropy(logits[b, t].double().tolist(), label)
            )
            assert got[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32


def test_entropy_of_certain_and_uniform_predictions():
    """A certain prediction has entropy 0, even with infinite logits, and V equal ones log V."""
    logits = torch.full((1, 2, 8), -torch.inf)
    logits[0, 0, 3] = 0
    logits[0, 1] = 1
    got = signals_from(logits, torch.tensor([[3, 3]]), frozenset({"entropy"}))["entropy"]
    assert_close(got, torch.tensor([[0.0, 8.0]]).where(got == 0, torch.tensor(8.0).log()))


def test_mile_reads_the_entropy_of_the_logits():
    """MiLe through the loss weighs by one plus the entropy of each prediction."""
    logits, labels = example()
    _, out = wt.weighted_cross_entropy(logits, labels, wt.build(wt.load("mile")))
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    raw = torch.where(labels != IGNORED, 1 + entropy, 0)
    assert_close(out.token, raw * (labels != IGNORED).sum() / raw.sum(), rtol=1e-5, atol=1e-6)


def test_logits_and_labels_must_belong_together():
    """Labels of another shape are an error that names both shapes."""
    logits, labels = example()
    with pytest.raises(ValueError, match=r"logits \[3, 5, 7\] and labels \[3, 4\]"):
        wt.weighted_cross_entropy(logits, labels[:, :4], wt.build(wt.load("uniform")))


@pytest.mark.parametrize(
    ("name", "argument"), [("table-x-linupper", "domain_ids"), ("document", "segment_ids")]
)
def test_a_missing_signal_is_asked_for(name, argument):
    """A spec that reads ids which are not given says which."""
    text = tables.SPEC_TEXTS.get(name, "version: 1\npipeline: mean(document) -> mean_one\n")
    logits, labels = example()
    with pytest.raises(ValueError, match=argument):
        wt.weighted_cross_entropy(logits, labels, tables.built(text))


@pytest.mark.parametrize("spec", ["uniform", "linupper"])
def test_a_label_outside_the_vocabulary_is_named(spec):
    """With its place in the user's shape, rows or flat."""
    fn = wt.build(wt.load(spec))
    labels = torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 0] = 5
    with pytest.raises(IndexError, match=r"label 5 at \[1, 0\] is outside the vocabulary of 5;"):
        wt.weighted_cross_entropy(torch.zeros(2, 3, 5), labels, fn)


def test_int32_labels_are_labels():
    """They give the bits of int64."""
    fn, logits = wt.build(wt.load("linupper")), torch.randn(2, 3, 5)
    labels = torch.randint(0, 5, (2, 3))
    losses = [wt.weighted_cross_entropy(logits, x, fn)[0] for x in (labels, labels.int())]
    assert torch.equal(*losses)

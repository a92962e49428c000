"""The trainer's loss in this process: every spec, every memory mode, no waiting."""

import dataclasses

import generators as tables
import hidden_states
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from census import Census, Products
from looping import for_each
from torch import nn
from torch.testing import assert_close

import titan_integration.host.cpu as on_cpu
import weighting as wt

on_cpu.use_cpu()

from titan_integration.loss import vocab_parallel  # noqa: E402
from titan_integration.loss.loss import WeightedChunkedLoss, WeightedCrossEntropyLoss  # noqa: E402
from titan_integration.state.microbatches import When  # noqa: E402
from titan_integration.state.run import start  # noqa: E402
from weighting.loss.cross_entropy import weighted_cross_entropy  # noqa: E402
from weighting.loss.logits import statistics  # noqa: E402

ROWS, LENGTH, WIDTH, VOCABULARY, IGNORED = 4, 6, 5, 11, -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Cut small batches as large ones are."""
    monkeypatch.setattr("weighting.loss.path.MIN_CHUNK", 1)


def example(text):
    """Return a run at step 3 with its batch, hidden states, an output layer and labels."""
    g = torch.Generator().manual_seed(0)
    signals = tables.batch(ROWS, LENGTH, domains=tables.domains_of(text))
    run = start(tables.built(text), torch.device("cpu"))
    run.begin_step(3)
    given = {name: getattr(signals, name) for name in ("domain_ids", "segment_ids", "ref_loss")}
    # Top-k entropies are the logits' own, whatever a batch says.
    columns = {k: v for k, v in signals.columns.items() if not k.startswith("topk_entropy")}
    run.microbatches.set_batch({**given, **{f"columns.{name}": x for name, x in columns.items()}})
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=g, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=g))
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=g)
    labels = torch.where(signals.valid, labels, IGNORED)
    return run, {**given, "columns": columns}, hidden, head, labels


def chunked(run, head, memory="auto", chunks=3):
    """Return the chunked loss, ready to be called."""
    loss = WeightedChunkedLoss.Config(num_chunks=chunks, memory=memory).build(compile_config=None)
    loss.set_lm_head(head)
    loss.bind(run)
    return loss


@pytest.mark.filterwarnings("ignore::weighting.errors.OneUnitWarning")
@pytest.mark.parametrize(
    ("rows", "units", "by_domain"), [([0, 1, 1], 3, 0), ([1] * 4, 1, 0), ([0, 1, 1, 0, 1], 2, 5)]
)
def test_where_rows_are_of_one_domain_a_run_weighs_domains_in_three_products(
    rows, units, by_domain, monkeypatch
):
    """Drawn rows of two domains, or a batch in turns; loss and gradients are those of logits."""
    monkeypatch.setitem(globals(), "ROWS", len(rows))
    text = tables.SPEC_TEXTS["group-dro"]
    run, given, hidden, head, labels = example(text)
    given["domain_ids"] = torch.tensor(rows)[:, None].expand(-1, LENGTH)
    run.microbatches.set_batch({name: given[name] for name in ("domain_ids", "segment_ids")})
    run = dataclasses.replace(run, row_domains=len({*rows}))
    loss_of = chunked(run, head, "late")
    count = (labels != IGNORED).sum()
    with Products(WIDTH, VOCABULARY) as products:
        loss, _ = loss_of(hidden, labels, count)
        loss.backward()
    assert (loss_of._path.memory, loss_of._path.units) == ("late", units)
    assert loss_of._path.by_domain == by_domain
    assert products.tokens == 3 * count, "those that count, three times"
    logits = F.linear(hidden, head.weight)
    expected, _ = weighted_cross_entropy(logits, labels, tables.built(text), step=3, **given)
    assert_close(loss, expected, rtol=2e-5, atol=1e-6)  # float32 sums in another order
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    for mine, other in zip((hidden.grad, head.weight.grad), wanted, strict=True):
        assert_close(mine, other, rtol=2e-4, atol=2e-5)  # as above


@pytest.mark.slow
@for_each("name, memory", lambda: tables.in_modes(tables.SPEC_TEXTS))
def test_the_chunked_loss_is_the_core_s(name, memory):
    """Every shipped spec: loss and gradients are those of the core's loss over whole logits."""
    text = tables.SPEC_TEXTS[name]
    run, given, hidden, head, labels = example(text)
    count = (labels != IGNORED).sum()
    loss, _ = chunked(run, head, memory)(hidden, labels, count)
    loss.backward()
    grads = hidden.grad, head.weight.grad
    logits = F.linear(hidden, head.weight)
    fn = tables.built(text)
    expected, out = weighted_cross_entropy(logits, labels, fn, step=3, **given)
    assert_close(loss, expected, rtol=2e-5, atol=1e-6)  # float32 sums in another order
    for mine, other in zip(
        grads, torch.autograd.grad(expected, [hidden, head.weight]), strict=True
    ):
        assert_close(mine, other, rtol=2e-4, atol=2e-5)  # magnified by the spec's normalisation

    found = run.read_statistics()
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert found["unweighted_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert found["weighted_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["weight/max"] == pytest.approx(out.token.max().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["linupper-x-mile", "rho-1"])
def test_the_loss_over_logits_is_the_core_s(name):
    """The loss for models that give logits: the same value and gradient."""
    run, given, hidden, head, labels = example(tables.SPEC_TEXTS[name])
    loss_fn = WeightedCrossEntropyLoss.Config().build(compile_config=None)
    loss_fn.bind(run)
    logits = head(hidden)
    loss, _ = loss_fn(logits, labels, (labels != IGNORED).sum())
    fn = tables.built(tables.SPEC_TEXTS[name])
    expected, _ = weighted_cross_entropy(logits, labels, fn, step=3, **given)
    assert_close(loss, expected, rtol=2e-5, atol=1e-6)
    mine, other = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, expected))
    assert_close(mine, other, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@for_each("memory", ["auto", "keep", "recompute"])
@for_each("name", tables.ways)
def test_no_step_waits_for_the_device(name, memory, monkeypatch):
    """Forward and backward ask for no value: a captured graph could hold them."""
    # What looks at values on CPU alone, where it costs nothing: ids, ignored labels, NaN, and a
    # gradient times 1.
    monkeypatch.setattr("weighting.contract.levels._ids", lambda ids, *_: ids.reshape(-1).long())
    monkeypatch.setattr("weighting.loss.late_bound._counted", lambda _: None)
    monkeypatch.setattr("weighting.loss.sums._is_one", lambda _: False)
    monkeypatch.setattr("weighting.loss.logits._is_finite", lambda *_: False)
    run, _, hidden, head, labels = example(tables.SPEC_TEXTS[name])
    loss_fn, count = chunked(run, head, memory), (labels != IGNORED).sum()
    with Census() as census:
        loss, _ = loss_fn(hidden, labels, count)
        loss.backward()
    assert "mm" in census.names or "addmm" in census.names
    assert not census.waits


@pytest.mark.parametrize(
    ("name", "memory", "products"),
    [
        ("mile", "auto", 3),
        ("linupper-x-mile", "late", 3),
        ("linupper", "keep", 3),
        ("linupper", "recompute", 4 - 1 / 4),
        ("rho-1", "recompute", 1 + 3 * 0.7),
        ("rho-1", "keep", 1 + 2 * 0.7),
    ],
)
def test_each_memory_choice_takes_its_number_of_matrix_products(name, memory, products):
    """Late and kept logits take three products; twice takes four, less the chunk it kept.

    Of 40 tokens a selection of 60 % trains on 28: 24, and one more for each sequence.
    """
    run = start(tables.built(tables.SPEC_TEXTS[name]), torch.device("cpu"))
    hidden = torch.randn(4, 10, WIDTH, requires_grad=True)
    head, labels = nn.Linear(WIDTH, VOCABULARY, bias=False), torch.randint(0, VOCABULARY, (4, 10))
    run.microbatches.set_batch({"ref_loss": torch.rand(4, 10)})
    with Products(WIDTH, VOCABULARY) as products_of:
        chunked(run, head, memory, chunks=4)(hidden, labels, torch.tensor(40))[0].backward()
    assert products_of.tokens / 40 == pytest.approx(products)


def test_state_and_statistics_stay_where_they_are():
    """Ten batches move the state and the statistics in tensors that are never replaced."""
    text = tables.SPEC_TEXTS["doremi-x-linupper-x-mile"]
    run, given, hidden, head, labels = example(text)
    loss_fn, count = chunked(run, head), (labels != IGNORED).sum()
    tensors = {
        "step": run.step,
        "moments": run.statistics.moments,
        "shares": run.statistics._shares,
        **run.microbatches._current.given,
        **dict(run.fn.named_buffers()),
    }
    places = {name: x.data_ptr() for name, x in tensors.items()}
    before = {name: x.clone() for name, x in tensors.items()}
    for step in range(4, 14):
        run.begin_step(step)
        run.microbatches.set_batch({**given, "domain_ids": given["domain_ids"].roll(step)})
        loss_fn(hidden, labels, count)[0].backward()
    after = {
        "step": run.step,
        "moments": run.statistics.moments,
        "shares": run.statistics._shares,
        **run.microbatches._current.given,
        **dict(run.fn.named_buffers()),
    }
    assert {name: x.data_ptr() for name, x in after.items()} == places
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert {"step", "moments", "shares", "domain_ids"} <= moved
    assert any("log_weights" in name for name in moved)


def test_an_output_layer_of_its_own_kind_is_called_as_it_is():
    """A layer that is more than linear is run as it is, unless another way was asked for."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    text = tables.SPEC_TEXTS["mile"]
    run, _, hidden, head, labels = example(text)
    doubled = Doubled(WIDTH, VOCABULARY, bias=False)
    doubled.load_state_dict(head.state_dict())
    count = (labels != IGNORED).sum()
    with pytest.raises(ValueError, match=r"Doubled, .* set --loss.memory full"):
        chunked(run, doubled, "recompute")(hidden, labels, count)
    logits = 2 * F.linear(hidden, head.weight)
    expected, _ = weighted_cross_entropy(logits, labels, tables.built(text), step=3)
    for memory in ("auto", "full"):
        loss, _ = chunked(run, doubled, memory)(hidden, labels, count)
        assert_close(loss, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "mile"])
@pytest.mark.parametrize("memory", ["auto", "late", "keep", "recompute", "full"])
def test_a_label_outside_the_vocabulary_is_refused(memory, name):
    """In training, in validation, and over logits; its row and column are told."""
    run, _, hidden, head, labels = example(tables.SPEC_TEXTS[name])
    labels[2, 4], count = VOCABULARY + 1, torch.tensor(1)
    loss, logits = chunked(run, head, memory), head(hidden)
    whole = WeightedCrossEntropyLoss.Config().build(compile_config=None)
    whole.bind(run)
    for call in (
        lambda: loss(hidden, labels, count),
        lambda: loss(hidden.detach(), labels, count),
        lambda: loss.token_losses(hidden, labels, head),
        lambda: whole(logits, labels, count),
        lambda: whole(logits.detach(), labels, count),
        lambda: whole.token_losses(logits, labels, head),
    ):
        with pytest.raises(IndexError, match=r"label 12 at \[2, 4\] is outside the vocabulary"):
            call()


@pytest.mark.parametrize("name", ["uniform", "mile"])
@pytest.mark.parametrize("memory", ["auto", "late", "keep", "recompute", "full"])
def test_int32_labels_train_alike(memory, name):
    """Over hidden states and over logits the loss is that of int64."""
    run, _, hidden, head, labels = example(tables.SPEC_TEXTS[name])
    loss, count, logits = chunked(run, head, memory), torch.tensor(20), head(hidden)
    whole = WeightedCrossEntropyLoss.Config().build(compile_config=None)
    whole.bind(run)
    for each, pred in ((loss, hidden), (loss, hidden.detach()), (whole, logits)):
        assert torch.equal(each(pred, labels.int(), count)[0], each(pred, labels, count)[0])
    assert loss.token_losses(hidden, labels.int(), head).shape == labels.shape


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "logits"])
def test_the_divergence_from_two_references_sums_the_logits_of_each_model_once(whole, monkeypatch):
    """The log sums of the model serve both; the values are those of the formula."""
    run, _, hidden, head, labels = example(tables.SPEC_TEXTS["mile"])
    own, *others = (hidden.detach() * x for x in (1, 2, -1))
    loss = chunked(run, head, "auto")
    if whole:
        loss = WeightedCrossEntropyLoss.Config().build(compile_config=None)
        own, *others = (head(x).detach() for x in (own, *others))
    rows = []

    def counted(logits, *rest):
        rows.append(len(logits))
        return statistics(logits, *rest)

    monkeypatch.setattr(vocab_parallel, "statistics", counted)
    lse = None
    for other in others:
        found = loss.token_signals((other, head), labels, frozenset(), (own, head), lse)
        lse = found["model_lse"]
        p, q = (x if whole else head(x) for x in (own, other))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1).float()
        assert_close(found["kl"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert sum(rows) == 3 * labels.numel()


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute"])
def test_hidden_states_of_deferred_microbatches_are_weighed_as_one_batch(memory, monkeypatch):
    """Two calls whose weights come with the second's signals learn as one, and as whole logits."""
    hidden_states.length_of_hidden(monkeypatch)
    pipeline = "length_of_hidden -> mean(sequence) -> normalize -> temperature(1)"
    spec = wt.loads(f"version: 1\npipeline: {pipeline}\n")
    _, _, hidden, head, labels = example(tables.SPEC_TEXTS["linupper"])
    count = (labels != IGNORED).sum()
    grads = []
    for parts, when in ((1, When.NOW), (1, When.NOW), (2, When.DEFERRED)):
        run = start(wt.build(spec), torch.device("cpu"), when=when, calls=parts)
        run.begin_step(1)
        calls = list(zip(hidden.chunk(parts), labels.chunk(parts), strict=True))
        for _, given in calls:
            run.microbatches.set_batch({}, given)
        loss_fn = chunked(run, head, memory if grads else "full")
        losses = [loss_fn(states, given, count)[0] for states, given in calls]
        grads.append(torch.autograd.grad(sum(losses), [hidden, head.weight]))
    whole, *others = grads
    for found in others:
        for mine, other in zip(found, whole, strict=True):
            assert_close(mine, other, rtol=1e-4, atol=1e-6)  # float32 sums in another order

"""The weighted cross entropy from hidden states, against logits and against float64."""

from itertools import accumulate, pairwise

import generators as tables
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from census import Products
from looping import for_each
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import scheduler
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import weighting as wt
from weighting.compiled import compiled
from weighting.loss import late_bound, linear, sums
from weighting.loss.path import LLAMA3_8B, Sizes, path_of

IGNORED = -100
ROWS, LENGTH, WIDTH, VOCABULARY = 4, 6, 5, 11
MIB = 2**20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Cut small batches as large ones are."""
    monkeypatch.setattr("weighting.loss.path.MIN_CHUNK", 1)


def example(text, *, bias=False, dtype=torch.float32, shape=(ROWS, LENGTH)):
    """Return hidden states, a weight, a bias, labels and what else a spec may read."""
    g = torch.Generator().manual_seed(0)
    signals = tables.batch(*shape, domains=tables.domains_of(text))
    hidden = torch.randn(*shape, WIDTH, generator=g, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=dtype)
    offset = torch.randn(VOCABULARY, generator=g, dtype=dtype) if bias else None
    labels = torch.randint(0, VOCABULARY, shape, generator=g)
    labels = torch.where(signals.valid, labels, IGNORED)
    given = {
        "domain_ids": signals.domain_ids,
        "segment_ids": signals.segment_ids,
        "ref_loss": signals.ref_loss,
        "columns": signals.columns,
    }
    leaves = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    return leaves, labels, given


def from_logits(leaves, labels, given, fn):
    """Return loss, weights and gradients by way of whole logits."""
    hidden, weight, *bias = leaves
    logits = F.linear(hidden, weight, *bias)
    loss, out = wt.weighted_cross_entropy(logits, labels, fn, step=3, **given)
    return loss, out, torch.autograd.grad(loss * 1.5, leaves)


def from_hidden(leaves, labels, given, fn, **how):
    """Return loss, weights and gradients without whole logits."""
    hidden, weight, *bias = leaves
    how["bias"] = bias[0] if bias else None
    loss, out = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, step=3, **given, **how)
    return loss, out, torch.autograd.grad(loss * 1.5, leaves)


def must_agree(got, expected):
    """Compare losses, weights and gradients."""
    loss, out, grads = got
    # Sums of float32 in another order; a spread of scores divided by a temperature magnifies it.
    assert_close(loss, expected[0], rtol=2e-5, atol=1e-6)
    assert_close(out.token, expected[1].token, rtol=1e-4, atol=1e-5)
    for mine, other in zip(grads, expected[2], strict=True):
        assert_close(mine, other, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@for_each("case, memory", lambda: tables.in_modes(tables.CASES))
def test_hidden_states_give_what_logits_give(case, memory):
    """Every spec: loss, weights and gradients are those of the logits, whatever is kept."""
    text = tables.CASES[case]
    batch = example(text)
    expected = from_logits(*batch, tables.built(text))
    must_agree(from_hidden(*batch, tables.built(text), memory=memory, chunks=5), expected)


@for_each("chunks", [1, 3, 24, 100])
@for_each("bias", [False, True])
@for_each("memory", ["late", "keep", "recompute"])
def test_chunks_and_bias_change_nothing(memory, bias, chunks):
    """Late factors of several levels, with and without bias, in one chunk and one token each."""
    text = tables.SPEC_TEXTS["linupper-x-mile"]
    batch = example(text, bias=bias)
    expected = from_logits(*batch, tables.built(text))
    must_agree(from_hidden(*batch, tables.built(text), memory=memory, chunks=chunks), expected)


@for_each("memory", ["auto", "keep", "recompute"])
@for_each("name", ["mile", "rho-1", "linupper", "uniform"])
def test_gradients_are_those_of_float64(name, memory):
    """Against a float64 product of plain autograd, with the weights held fixed."""
    fn = tables.built(tables.SPEC_TEXTS[name])
    (hidden, weight), labels, given = example(tables.SPEC_TEXTS[name])
    _, out, grads = from_hidden([hidden, weight], labels, given, fn, memory=memory)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll = F.cross_entropy(F.linear(*wide).flatten(0, 1), labels.flatten(), reduction="none")
    token, count = out.token.flatten().double(), (labels != IGNORED).sum()
    expected = torch.autograd.grad((token * nll).sum() / count * 1.5, wide)
    for mine, exact in zip(grads, expected, strict=True):
        assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)  # float32 sums


def test_a_sequence_of_weight_zero_and_ignored_tokens_leave_no_trace():
    """The first sequence weighs 0 and some labels are ignored: their gradients are exactly 0."""
    text = "version: 1\nnormalize: none\npipeline: mean(sequence) -> threshold(at=2.5)\n"
    (hidden, weight), labels, given = example(text)
    with torch.no_grad():
        labels[0] = F.linear(hidden[0], weight).argmax(-1)  # well predicted: a small loss
    batch = [hidden, weight], labels, given
    for memory in ("late", "keep", "recompute"):
        _, out, (d_hidden, _) = from_hidden(*batch, tables.built(text), memory=memory)
        assert not out.token[0].any()
        assert out.token[1:].any()
        assert not d_hidden[0].any()
        assert not d_hidden[labels == IGNORED].any()


@pytest.mark.parametrize("memory", ["late", "keep", "recompute"])
@pytest.mark.parametrize("name", ["linupper", "linupper-x-mile", "rho-1"])
@pytest.mark.parametrize("bias", [False, True])
def test_whole_rows_and_ends_of_rows_may_be_ignored(name, memory, bias):
    """As in padded batches and in fine-tuning: a row without labels, one label, a whole row."""
    if (name, memory) == ("rho-1", "late"):
        return  # which weighs every token late
    text = tables.SPEC_TEXTS[name]
    leaves, labels, given = example(text, bias=bias)
    labels[0], labels[1, 1:], labels[2, :3] = IGNORED, IGNORED, IGNORED
    expected = from_logits(leaves, labels, given, tables.built(text))
    for chunks in (1, 3, 24):
        got = from_hidden(leaves, labels, given, tables.built(text), memory=memory, chunks=chunks)
        must_agree(got, expected)
    labels[:] = IGNORED
    loss, _, grads = from_hidden(leaves, labels, given, tables.built(text), memory=memory)
    assert loss == 0
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("memory", ["late", "keep", "recompute"])
def test_ignored_tokens_take_no_part_in_the_products(memory):
    """Fine-tuning ignores prompts: two of three tokens cost nothing."""
    text = tables.SPEC_TEXTS["linupper"]
    leaves, labels, given = example(text)
    labels[:] = 0
    counts = []
    for cut in (0, 4):
        labels[:, :cut] = IGNORED
        with Products(WIDTH, VOCABULARY) as products:
            from_hidden(leaves, labels, given, tables.built(text), memory=memory)
        counts.append(products.tokens)
    once = ROWS * LENGTH
    assert counts[0] == (4 * once - once / 8 if memory == "recompute" else 3 * once)
    assert counts[1] <= counts[0] / 3


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute"])
def test_weights_that_vanish_all_at_once_count_as_one(memory):
    """Scores that are 0 for every token weigh 1 each, also where they act before that is known."""
    text = "version: 1\npipeline: column(weight) -> mean_one\n"
    leaves, labels, given = example(text)
    for zeros in (torch.ones(ROWS, 1, dtype=torch.bool), torch.arange(ROWS)[:, None] < 2):
        columns = {"weight": torch.where(zeros, 0, torch.ones(ROWS, LENGTH))}
        batch = leaves, labels, {**given, "columns": columns}
        expected = from_logits(*batch, tables.built(text))
        must_agree(from_hidden(*batch, tables.built(text), memory=memory), expected)


def test_a_selection_within_sequences_of_flat_tokens_skips_nothing():
    """Without rows nobody knows how many tokens a selection in each sequence keeps."""
    text = "version: 1\npipeline: column(weight) -> select(0.5, within=sequence)\n"
    (hidden, weight), _, _ = example(text)
    labels = torch.randint(0, VOCABULARY, (ROWS * LENGTH,))
    columns = {"weight": torch.rand(ROWS * LENGTH)}
    given = {"segment_ids": torch.arange(ROWS * LENGTH), "columns": columns}
    batch = [hidden.flatten(0, 1), weight], labels, given
    expected = from_logits(*batch, tables.built(text))
    for memory in ("keep", "recompute"):
        must_agree(from_hidden(*batch, tables.built(text), memory=memory), expected)


def test_scores_that_are_all_tiny_still_differ():
    """Scores of 1e-25 and 3e-25 weigh one to three, in weights and in the gradient."""
    text = "version: 1\npipeline: column(weight) -> mean_one\n"
    leaves, labels, given = example(text)
    columns = {"weight": torch.where(torch.arange(LENGTH) < 3, 1e-25, 3e-25).expand(ROWS, LENGTH)}
    batch = leaves, labels, {**given, "columns": columns}
    expected = from_logits(*batch, tables.built(text))
    assert expected[1].token.max() > 2.9 * expected[1].token[labels != IGNORED].min()
    for memory in ("late", "keep"):
        must_agree(from_hidden(*batch, tables.built(text), memory=memory), expected)


def test_ties_beyond_the_room_of_a_selection_keep_the_total_weight():
    """More tokens tie for the last places than there are: those that fit carry the others."""
    text = "version: 1\npipeline: column(weight) -> select(0.25)\n"
    leaves, labels, given = example(text)
    labels = labels.where(labels != IGNORED, 0)
    columns = {"weight": (torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) < 20).float()}
    batch = leaves, labels, {**given, "columns": columns}
    for memory in ("keep", "recompute"):
        loss, out, (d_hidden, _) = from_hidden(*batch, tables.built(text), memory=memory)
        assert (out.token > 0).sum() == 20
        assert d_hidden.flatten(0, 1).any(-1).sum() <= ROWS * LENGTH * 0.25 + ROWS
        full = from_logits(*batch, tables.built(text))
        assert_close(loss, full[0])


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute"])
def test_bad_tokens_are_dropped_before_the_products(memory):
    """Logits that overflow under `on_nonfinite: drop` leave the other rows' gradients finite."""
    text = "version: 1\non_nonfinite: drop\npipeline: normalize -> temperature(0.5)\n"
    (hidden, weight), labels, given = example(text)
    with torch.no_grad():
        hidden[1, 2] = 3e38
    batch = [hidden, weight], labels, given
    _, out, (d_hidden, _) = from_hidden(*batch, tables.built(text), memory=memory)
    assert not out.token[1].any()
    assert d_hidden[0].isfinite().all()
    assert d_hidden[0].any()


def test_float16_is_refused_but_for_full_logits():
    """Made before any loss scaling, a float16 gradient would be lost without a word."""
    text = tables.SPEC_TEXTS["mile"]
    batch = example(text, dtype=torch.float16)
    with pytest.raises(ValueError, match="use bfloat16, or memory='full'"):
        from_hidden(*batch, tables.built(text))
    assert from_hidden(*batch, tables.built(text), memory="full")[0].isfinite()


@pytest.mark.parametrize("memory", ["late", "keep", "recompute"])
def test_bfloat16_agrees_with_float32(memory):
    """In bfloat16 the gradient is the float32 one to the precision of the dtype."""
    dtype = torch.bfloat16
    text = tables.SPEC_TEXTS["linupper-x-mile"]
    leaves, labels, given = example(text, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    loss, _, grads = from_hidden(leaves, labels, given, tables.built(text), memory=memory)
    expected = from_hidden(wide, labels, given, tables.built(text), memory=memory)
    eps = torch.finfo(dtype).eps
    assert_close(loss, expected[0], rtol=4 * eps, atol=4 * eps)
    for mine, exact in zip(grads, expected[2], strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).norm() < 4 * eps * exact.norm()


def test_autocast_and_frozen_layers_are_obeyed():
    """Under autocast the products run in its dtype; a frozen weight gets no gradient."""
    fn = tables.built(tables.SPEC_TEXTS["linupper"])
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["linupper"])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    plain, _ = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn)
    assert loss != plain
    assert_close(loss, plain, rtol=0.02, atol=0.02)  # bfloat16 products

    frozen = weight.detach()
    loss, _ = wt.linear_weighted_cross_entropy(hidden, frozen, labels, fn)
    loss.backward()
    assert frozen.grad is None


def test_flat_tokens_with_a_tied_weight_give_what_rows_give():
    """Flat tokens give what rows give; a weight shared with an embedding gets both gradients."""
    fn = tables.built(tables.SPEC_TEXTS["mile"])
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["mile"])
    rows, _ = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn)
    flat, _ = wt.linear_weighted_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), fn)
    assert_close(rows, flat)

    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    loss, _ = wt.linear_weighted_cross_entropy(weight[tokens], weight, labels, fn)
    (tied,) = torch.autograd.grad(loss, weight)
    logits = F.linear(weight[tokens], weight)
    expected, _ = wt.weighted_cross_entropy(logits, labels, fn)
    assert_close(tied, torch.autograd.grad(expected, weight)[0], rtol=1e-4, atol=1e-6)


def test_uniform_agrees_with_torch():
    """With unit weights loss and gradients are torch's to 1e-6, also chunk by chunk."""
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["uniform"])
    fn = tables.built(tables.SPEC_TEXTS["uniform"])
    loss, _ = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn)
    plain = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten())
    assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(loss, [hidden, weight])
    for mine, other in zip(grads, torch.autograd.grad(plain, [hidden, weight]), strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_the_gradient_can_be_had_once():
    """A second backward pass is refused: the first one gave the gradient away."""
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["mile"])
    fn = tables.built(tables.SPEC_TEXTS["mile"])
    loss, _ = wt.linear_weighted_cross_entropy(hidden, weight, labels, fn)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be had once"):
        loss.backward()


# Sequences told by ids ----------------------------------------------------------------------------

SAMPLES = (6, 3, 5, 4)


def one_row(batch):
    """Return a batch of padded samples as one row without padding, and its tokens' places."""
    (hidden, weight), labels, given = batch
    here = torch.arange(LENGTH) < torch.tensor(SAMPLES)[:, None]
    places = here.flatten().nonzero().squeeze(-1)

    def flattened(x):
        return x.flatten(0, 1)[places][None]

    rows = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)
    columns = {name: flattened(x) for name, x in given["columns"].items()}
    ids = {"segment_ids": given["segment_ids"] + LENGTH * rows, "sequence_ids": rows}
    # Eighteen tokens, and ids of documents must be below that.
    _, ids["segment_ids"] = ids["segment_ids"].unique(return_inverse=True)
    new = {name: flattened(x) for name, x in {**given, **ids}.items() if name != "columns"}
    leaves = [flattened(hidden).detach().requires_grad_(), weight]
    return (leaves, flattened(labels), {**new, "columns": columns}), places


@pytest.mark.slow
@for_each("name, memory", lambda: tables.in_modes(tables.SPEC_TEXTS))
def test_a_padding_free_row_with_sequence_ids_trains_like_padded_rows(name, memory):
    """Every shipped spec: loss, weights and gradients of the samples are those of their rows."""
    text = tables.SPEC_TEXTS[name]
    leaves, labels, given = example(text)
    labels = labels.where(torch.arange(LENGTH) < torch.tensor(SAMPLES)[:, None], IGNORED)
    expected = from_logits(leaves, labels, given, tables.built(text))
    batch, places = one_row((leaves, labels, given))
    loss, out, grads = from_hidden(*batch, tables.built(text), memory=memory, chunks=3)
    # Sums of float32 in another order, as above.
    assert_close(loss, expected[0], rtol=2e-5, atol=1e-6)
    assert_close(out.token[0], expected[1].token.flatten()[places], rtol=1e-4, atol=1e-5)
    by_row = expected[2][0].flatten(0, 1)
    assert_close(grads[0][0], by_row[places], rtol=2e-4, atol=2e-5)
    assert_close(grads[1], expected[2][1], rtol=2e-4, atol=2e-5)


def test_late_is_refused_where_sequences_are_no_rows():
    """A gradient for each row cannot serve a row of several sequences; a token's own weight can."""
    text = tables.SPEC_TEXTS["linupper"]
    batch, _ = one_row(example(text))
    with pytest.raises(ValueError, match="use memory auto, keep or recompute"):
        from_hidden(*batch, tables.built(text), memory="late")
    text = tables.SPEC_TEXTS["mile"]
    expected = from_logits(*batch, tables.built(text))
    must_agree(from_hidden(*batch, tables.built(text), memory="late"), expected)


# Rows of one domain -------------------------------------------------------------------------------

BY_DOMAIN = {
    name: text
    for name, text in tables.SPEC_TEXTS.items()
    if "domain" in (tables.built(text).plan.deferred_level or "")
}
DROPPED = """
version: 1
on_nonfinite: drop
pipeline: loss -> over(ref_loss) -> mean(domain) -> temperature(1)
"""


def rows_of_one_domain(text, *, domains, bad=(), **how):
    """Return a batch of six rows, each of one domain, a spec built on some, and the rows' ids."""
    leaves, labels, given = example(text, shape=(6, LENGTH), **how)
    names = tables.domains_of(text)[:domains]
    of_rows = torch.tensor([2, 0, 1, 1, 0, 2]).clamp(max=len(names) - 1)[:, None]
    given["domain_ids"] = of_rows.expand(6, LENGTH).where(labels != IGNORED, 99)
    ref_loss = given["ref_loss"].clone()
    for place in bad:
        ref_loss[place] = torch.nan
    given["ref_loss"] = ref_loss
    return (leaves, labels, given), of_rows


def test_there_are_specs_whose_weights_come_late_by_domain():
    """Those with a weight for each domain, and those with one for sequences as well."""
    assert {"doremi-proxy", "group-dro", "doremi-x-linupper-x-mile", "dwa"} <= {*BY_DOMAIN}
    assert "cvar" not in BY_DOMAIN


@pytest.mark.parametrize("bias", [False, True])
@for_each("name", [*BY_DOMAIN, "dropped"])
def test_rows_of_one_domain_need_a_gradient_for_each_domain(name, bias):
    """Loss, weights and gradients are those of logits, in chunks that cross rows, for 3 or 6 rows.

    A token whose reference loss is not finite weighs nothing, and the others of its domain do.
    """
    text = BY_DOMAIN.get(name, DROPPED)
    bad = [(1, 2), (3, 0)] if name == "dropped" else []
    batch, of_rows = rows_of_one_domain(text, domains=3, bias=bias, bad=bad)
    leaves, labels, given = batch
    expected = from_logits(leaves, labels, given, tables.built(text))
    given = {**given, "domain_ids": of_rows}
    for chunks in (1, 4):
        got = from_hidden(leaves, labels, given, tables.built(text), memory="late", chunks=chunks)
        must_agree(got, expected)
        if bad:
            assert not got[2][0][1, 2].any()
            assert got[2][0][1, 3].any() or labels[1, 3] == IGNORED
    labels[0], labels[1], labels[5] = (
        IGNORED,
        IGNORED,
        IGNORED,
    )
    expected = from_logits(*batch, tables.built(text))
    must_agree(from_hidden(leaves, labels, given, tables.built(text), memory="late"), expected)


@pytest.mark.parametrize("name", ["group-dro", "doremi-x-linupper-x-mile"])
def test_gradients_by_domain_are_those_of_float64(name):
    """Against a float64 product of plain autograd, with the weights held fixed."""
    text = tables.SPEC_TEXTS[name]
    (leaves, labels, given), of_rows = rows_of_one_domain(text, domains=3)
    given = {**given, "domain_ids": of_rows}
    _, out, grads = from_hidden(leaves, labels, given, tables.built(text), memory="late")
    wide = [x.detach().double().requires_grad_() for x in leaves]
    nll = F.cross_entropy(F.linear(*wide).flatten(0, 1), labels.flatten(), reduction="none")
    token, count = out.token.flatten().double(), (labels != IGNORED).sum()
    expected = torch.autograd.grad((token * nll).sum() / count * 1.5, wide)
    for mine, exact in zip(grads, expected, strict=True):
        assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)  # float32 sums


@for_each(
    "name, rows, domains, memory, units, by_domain, layers",
    [
        ("group-dro", 8, 0, "keep", 1, 0, None),
        ("group-dro", 8, 1, "late", 1, 0, 0),
        ("group-dro", 8, 3, "late", 3, 8, 3),
        ("group-dro", 4, 3, "late", 4, 0, 3),
        ("group-dro", 2, 3, "late", 2, 0, 1),
        ("doremi-x-linupper-x-mile", 8, 3, "late", 8, 0, 7),
        ("doremi-x-linupper-x-mile", 8, 0, "keep", 1, 0, None),
        ("linupper", 8, 3, "late", 8, 0, 7),
        ("mile", 8, 3, "late", 1, 0, 0),
    ],
)
def test_the_fewer_of_rows_and_domains_get_a_gradient(
    name, rows, domains, memory, units, by_domain, layers
):
    """One for each domain needs room for one more, as which is added to is known on the device."""
    plan = tables.built(tables.SPEC_TEXTS[name]).plan
    path = path_of(plan, Sizes(rows * 512, rows, 8192, 64, 4, 256 * MIB, domains))
    assert (path.memory, path.units, path.by_domain) == (memory, units, by_domain)
    layer = 8192 * 64 * 4
    kept = (rows * 512 - path.chunk) * 8192 * 4
    assert path.extra == (kept if layers is None else layers * layer)


def test_rows_shorter_than_the_layer_is_wide_keep_logits():
    """To add thin products to a gradient found on the device takes longer than to make logits."""
    plan = tables.built(tables.SPEC_TEXTS["group-dro"]).plan
    for length, memory in ((64, "late"), (32, "keep")):
        assert path_of(plan, Sizes(8 * length, 8, 8192, 64, 4, 256 * MIB, 3)).memory == memory


# Which way ----------------------------------------------------------------------------------------


@for_each(
    "name, rows, memory, expected",
    [
        ("uniform", 4, "auto", "late"),
        ("mile", 4, "auto", "late"),
        ("linupper", 1, "auto", "late"),
        ("linupper", 4, "auto", "late"),
        ("linupper", 64, "auto", "keep"),
        ("linupper", 64, "late", "keep"),
        ("rho-1", 4, "auto", "keep"),
        ("rho-1", 512, "auto", "recompute"),
        ("doremi-proxy", 4, "auto", "keep"),
    ],
)
def test_the_way_is_the_cheapest_within_the_budget(name, rows, memory, expected):
    """Late where it needs less memory than kept logits, and twice when neither fits."""
    fn = tables.built(tables.SPEC_TEXTS[name])
    path = path_of(fn.plan, Sizes(rows * 1024, rows, 512, 1100, 4, 256 * MIB), memory)
    assert path.memory == expected
    late = 0 if name in {"uniform", "mile"} else (rows - 1) * 1100
    extra = {"late": late, "keep": rows * 1024 - path.chunk, "recompute": 0}
    assert path.extra == extra[expected] * 512 * 4
    assert path.memory in str(path)


def test_logits_are_kept_where_late_needs_as_much_memory():
    """As many products, and none in pieces of sequences; where late needs nothing, it is taken."""
    sizes = Sizes(4 * 512, 4, 8192, 512, 2, 256 * MIB)  # three gradients, or three chunks of logits
    linupper, mile = (tables.built(tables.SPEC_TEXTS[name]).plan for name in ("linupper", "mile"))
    late, auto = (path_of(linupper, sizes, x, chunks=4) for x in ("late", "auto"))
    assert (late.memory, auto.memory) == ("late", "keep")
    assert late.extra == auto.extra == 3 * 512 * 8192 * 2
    assert [path_of(x, sizes, chunks=1).memory for x in (linupper, mile)] == ["keep", "late"]


@pytest.mark.parametrize(
    ("rows", "name", "memory"),
    [
        (1, "linupper", "late"),
        (8, "linupper", "late"),
        (16, "linupper", "late"),
        (8, "rho-1", "recompute"),
    ],
)
def test_8b_on_80_gb_recomputes_only_beyond_what_the_unweighted_loss_takes(rows, name, memory):
    """At 8 rows late takes 10.4 GiB where torchtitan's own loss takes 16.2: no fourth product."""
    sizes = LLAMA3_8B._replace(tokens=rows * 8192, rows=rows)
    path = path_of(tables.built(tables.SPEC_TEXTS[name]).plan, sizes)
    assert path.memory == memory
    assert path.chunk == min(rows * 1024, 2048)
    plain = rows * 1024 * sizes.vocabulary * 14  # bfloat16, and float32 three times
    assert path.extra + path.chunk * sizes.vocabulary * 2 <= max(plain, sizes.budget)


@for_each(
    "lengths, chunk, cuts",
    [
        ([480, 480, 480, 422], 512, [480, 960, 1440]),
        ([300, 300, 300, 300], 700, [600]),
        ([1200, 1200], 512, [400, 800, 1200, 1600, 2000]),
        ([100, 0, 700, 100], 600, [100, 450]),
        ([7], 3, [3, 6]),
        ([0, 5, 0], 8, []),
        ([0], 8, []),
    ],
)
def test_chunks_are_whole_rows_where_rows_fit(lengths, chunk, cuts):
    """A row in two chunks adds a thin product to its gradient; an even part of a long one must."""
    ends = [*accumulate(lengths)]
    found = late_bound._spans(ends, chunk)
    assert [(x.start, x.stop) for x in found] == [*pairwise([0, *cuts, ends[-1]])] * bool(ends[-1])
    assert all(0 < x.stop - x.start <= chunk for x in found)


def test_room_for_logits_is_that_of_one_chunk(monkeypatch):
    """4 rows of 6 tokens in chunks of 7 or less need room for 6."""
    made = []
    room = late_bound._room

    def noting(*args):
        made.append(room(*args))
        return made[-1]

    monkeypatch.setattr(late_bound, "_room", noting)
    text = tables.SPEC_TEXTS["linupper"]
    batch = example(text)
    how = {"memory": "late", "chunks": 4}
    expected = from_logits(*batch, tables.built(text))
    must_agree(from_hidden(*batch, tables.built(text), **how), expected)
    assert [x.shape for x in made] == [(5, VOCABULARY)], "4 of 24 labels are ignored"
    must_agree(from_hidden(*batch, tables.built(text), memory="late", chunks=5), expected)
    assert made[-1].shape == (5, VOCABULARY), "of spans that begin and end inside of rows"


def test_calls_that_wait_each_keep_what_they_take():
    """In a pipeline even one scalar that comes late keeps a gradient of the layer a microbatch."""
    fn = tables.built(tables.SPEC_TEXTS["mile"])
    sizes = Sizes(64, 1, 8192, 80, 4, 256 * MIB)
    layer = 8192 * 80 * 4

    late = path_of(fn.plan, sizes._replace(tokens=128), "late", parts=8)
    assert (late.units, late.extra) == (1, 7 * layer)
    assert "a gradient of the output layer a call" in str(late)
    auto = path_of(fn.plan, sizes, parts=8)
    assert (auto.memory, auto.extra) == ("keep", (8 * 64 - auto.chunk) * 8192 * 4)


def test_late_is_refused_for_weights_of_single_tokens():
    """A selection of tokens cannot be late-bound; the message says what can."""
    fn = tables.built(tables.SPEC_TEXTS["rho-1"])
    with pytest.raises(ValueError, match="auto, keep or recompute"):
        path_of(fn.plan, Sizes(64, 4, 100, 8, 4, MIB), "late")


def test_shapes_must_belong_together():
    """Labels of another shape are an error that names all shapes."""
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["mile"])
    fn = tables.built(tables.SPEC_TEXTS["mile"])
    with pytest.raises(ValueError, match=r"labels \[4, 5\]"):
        wt.linear_weighted_cross_entropy(hidden, weight, labels[:, :-1], fn)


# Labels -------------------------------------------------------------------------------------------

MODES = ("auto", "late", "keep", "recompute", "full")


@for_each("memory", MODES)
@for_each("label", [VOCABULARY, VOCABULARY + 5, -1])
@for_each("name", ["uniform", "mile"])
def test_a_label_outside_the_vocabulary_is_an_index_error(name, label, memory):
    """Every memory mode names the label, its row and column, and the vocabulary's size."""
    leaves, labels, given = example(tables.SPEC_TEXTS[name])
    labels[1, 2] = label
    said = rf"label {label} at \[1, 2\] is outside the vocabulary of {VOCABULARY};"
    with pytest.raises(IndexError, match=said):
        from_hidden(leaves, labels, given, tables.built(tables.SPEC_TEXTS[name]), memory=memory)


@for_each("memory", MODES)
@for_each("name", ["uniform", "linupper", "mile"])
def test_int32_labels_give_what_int64_labels_give(name, memory):
    """Loss, weights and gradients are the same bits, whole logits included."""
    leaves, labels, given = example(tables.SPEC_TEXTS[name])
    fn = tables.built(tables.SPEC_TEXTS[name])
    loss, out, grads = from_hidden(leaves, labels, given, fn, memory=memory)
    other, again, others = from_hidden(leaves, labels.int(), given, fn, memory=memory)
    assert torch.equal(loss, other)
    assert torch.equal(out.token, again.token)
    assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))


# Launches -----------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel: all but views, and memory that is only taken."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note the name of the operation."""
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or "empty" in name or name == "_unsafe_view"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "folds"), [("linupper", 1), ("mile", 0)])
def test_an_accelerator_launches_few_kernels_beside_compiled_ones(monkeypatch, name, folds):
    """Eight chunks are eight compiled calls, and what is around them takes 43 operations or less.

    Three products a chunk are 24 of these.
    """
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function.__name__)
            with _disable_current_modes():
                return function(*args)

        return call

    for module in (linear, late_bound, sums):
        monkeypatch.setattr(module, "compiles", lambda _: True)
        monkeypatch.setattr(module, "compiled", counted)
    fn = tables.built(tables.SPEC_TEXTS[name])
    fn.forward = counted(fn.forward)
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS[name], shape=(4, 16))
    with Launches() as launches:
        wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, memory="late")[0].backward()
    assert len(launches.names) <= 43
    expected = ["_read", *["_weighed"] * 8, "forward", "_bound", *["_fold_pieces_"] * folds]
    assert calls == expected


class CountedError(Exception):
    """Ends a compilation whose kernels have been counted."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_accelerator_launches_at_most_150_kernels_a_call(monkeypatch):
    """All of a call of linupper: loops that torch's compiler makes, and what is around them.

    It makes them for a CPU here, where it fuses less: it copies what is stacked piece by piece.
    """
    around, inside, made, codegen = Launches(), [], {}, scheduler.Scheduler.codegen

    def counting(self):
        kernels = sum(not isinstance(x, scheduler.NopKernelSchedulerNode) for x in self.nodes)
        if not kernels:  # of constants
            return codegen(self)
        inside.append(kernels)
        raise CountedError

    def counted(function):
        def call(*args):
            name = function.__name__
            with _disable_current_modes():
                if name not in made:
                    anew = torch._inductor.config.patch(force_disable_caches=True)
                    with anew, pytest.raises(BaseException, match="CountedError"):
                        torch.compile(function, fullgraph=True, dynamic=False)(*args)
                    made[name] = inside.pop()
                inside.append(made[name])
                return function(*args)

        return call

    torch._dynamo.reset()
    monkeypatch.setattr(scheduler.Scheduler, "codegen", counting)
    for module in (linear, late_bound, sums):
        monkeypatch.setattr(module, "compiles", lambda _: True)
        monkeypatch.setattr(module, "compiled", counted)
    fn = tables.built(tables.SPEC_TEXTS["linupper"])
    fn.forward = counted(fn.forward)
    (hidden, weight), labels, _ = example(tables.SPEC_TEXTS["linupper"], shape=(4, 256))
    with around:
        wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, memory="late")[0].backward()
    assert made.keys() == {"_read", "_weighed", "forward", "_bound", "_fold_pieces_"}
    assert len(around.names) + sum(inside) <= 150, (len(around.names), made)


def test_what_cannot_be_compiled_runs_as_it_is():
    """A branch on a value is told of once; results are those of the function."""

    def halved(x):
        return x / 2 if x.sum() > 0 else x

    call = compiled(halved)
    with pytest.warns(UserWarning, match="halved runs without being compiled"):
        assert call(torch.ones(2)).tolist() == [0.5, 0.5]
    assert call(-torch.ones(2)).tolist() == [-1, -1]


# Compiled callers ---------------------------------------------------------------------------------


def compiled_on(name, memory, backend):
    """Return a loss with its weights, the same compiled, and what they are called with."""
    leaves, labels, given = example(tables.SPEC_TEXTS[name])
    fn = tables.built(tables.SPEC_TEXTS[name]).eval()  # a state would move between two calls

    def both(hidden, weight, labels, step):
        how = {"memory": memory, "step": step, "chunks": 4, **given}
        return wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, **how)

    torch._dynamo.reset()
    return both, torch.compile(both, fullgraph=True, backend=backend), leaves, labels


def must_compile_alike(eager, compiled, leaves, labels):
    """Compare loss, weights, their factors and metrics, and gradients."""
    loss, out = compiled(*leaves, labels, torch.tensor(3))
    expected, other = eager(*leaves, labels, torch.tensor(3))
    assert_close(loss, expected)
    assert_close(out.token, other.token)
    assert not out.token.requires_grad
    assert_close(dict(out.factors), dict(other.factors))
    assert_close(dict(out.metrics), dict(other.metrics))
    assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "memory"), [("rho-1", "keep"), ("group-dro", "recompute")])
def test_a_compiled_function_returns_loss_and_weights(name, memory):
    """Both, and gradients, are what eager code gives, however much is kept."""
    must_compile_alike(*compiled_on(name, memory, "eager"))


@pytest.mark.slow
def test_a_compiled_function_that_keeps_no_logits():
    """It returns what eager code does, works on a chunk once, and refuses labels by an assertion.

    The graph calls the work on a chunk for each of them, and holds no operation of it.
    """
    names = []

    def note(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note)
    eager, compiled, leaves, labels = compiled_on("linupper", "late", backend)
    must_compile_alike(eager, compiled, leaves, labels)
    assert names.count("invoke_subgraph") == 4
    assert not [name for name in names if "expm1" in name]
    labels[1, 2] = VOCABULARY
    with pytest.raises(RuntimeError, match="label is outside the vocabulary"):
        compiled(*leaves, labels, torch.tensor(3))

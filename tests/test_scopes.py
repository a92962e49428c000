"""Which tokens a statistic runs over, and what counts alike: ranks, sequences and domains."""

import dataclasses
import math

import generators as tables
import pytest
import torch
from looping import for_each
from torch.testing import assert_close

import weighting as wt

PIPELINES = {
    "uniform": "uniform",
    "tokens": "loss -> mean_one",
    "sequences": "normalize -> temperature(0.5) -> clamp(2/n)",
    "documents": "max(document) -> temperature(2)",
    "domains": "mean(domain) -> temperature(1)",
    "share": "loss -> select(0.4)",
    "within domains": "entropy -> temperature(1, within=domain)",
}
RANKS = (1, 2, 4)

each_pipeline = for_each("name", PIPELINES)


def spec_text(pipeline, **options):
    """Return the text of a spec of one pipeline with options."""
    lines = ["version: 1", *(f"{key}: {value}" for key, value in options.items())]
    return "\n".join([*lines, f"pipeline: '{pipeline}'", ""])


def unequal(seed=0):
    """Return eight rows of sizes from none to all, and domains of which one has a single token."""
    signals = tables.batch(8, 7, seed=seed, keep=2.0)
    sizes = torch.tensor([1, 7, 0, 3, 2, 7, 5, 4])
    ids = torch.where(signals.domain_ids > 2, 0, signals.domain_ids)
    ids[0, 0] = 4
    valid = torch.arange(7) < sizes[:, None]
    return dataclasses.replace(signals, valid=valid, domain_ids=ids)


def slice_of(signals, rank, ranks):
    """Return the rows one of several ranks holds."""
    return tables.changed(signals, lambda _, x: x.chunk(ranks)[rank])


def on_ranks(text, signals, ranks):
    """Return the outcome of every rank for its rows."""

    def one(rank, collectives):
        return tables.built(text, collectives=collectives)(slice_of(signals, rank, ranks), 3)

    return tables.Lockstep(ranks).run(one)


# Ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
@for_each("case", [case for case, text in tables.CASES.items() if "scope:" not in text])
def test_scope_rank_weighs_as_one_rank_alone_does(case):
    """With scope: rank every rank gives, bit by bit, what it gives without the others."""
    text = tables.CASES[case].replace("version: 1\n", "version: 1\nscope: rank\n")
    signals = tables.batch(8, 5, seed=3)
    for rank, got in enumerate(on_ranks(text, signals, 2)):
        alone = tables.built(tables.CASES[case])(slice_of(signals, rank, 2), 3)
        assert torch.equal(got.token, alone.token)
        assert torch.equal(got.moments, alone.moments)


@for_each("reduction", ["sequence_mean", "domain_mean"])
@each_pipeline
def test_scope_rank_reduces_as_one_rank_alone_does(name, reduction):
    """With scope: rank the sequences and domains that count alike are those of the rank."""
    text = spec_text(PIPELINES[name], reduction=reduction, scope="rank")
    signals = unequal()
    for rank, got in enumerate(on_ranks(text, signals, 2)):
        alone = tables.built(text)(slice_of(signals, rank, 2), 3)
        assert torch.equal(got.token, alone.token)


def test_scope_rank_is_not_the_scope_of_all_ranks():
    """The test above would notice: over all ranks the weights are others."""
    pipeline, signals = PIPELINES["sequences"], unequal()
    own = on_ranks(spec_text(pipeline, scope="rank"), signals, 2)
    together = on_ranks(spec_text(pipeline, scope="microbatch"), signals, 2)
    assert not torch.allclose(own[0].token, together[0].token, atol=0.05)


# What counts alike --------------------------------------------------------------------------------


def units_of(signals, level):
    """Return for each row the unit of each token, or None where the label does not count."""
    rows = []
    for row, oks in enumerate(signals.valid.tolist()):
        ids = [row] * len(oks) if level == "sequence" else signals.domain_ids[row].tolist()
        rows.append([unit if ok else None for unit, ok in zip(ids, oks, strict=True)])
    return rows


def reduced(factor, units, normalize):
    """Return f_t / n_u, scaled so that it, or for `none` 1 / n_u, has mean one over tokens."""
    sizes = {}
    for unit in (u for row in units for u in row if u is not None):
        sizes[unit] = sizes.get(unit, 0) + 1
    weights = [
        [0.0 if u is None else f / sizes[u] for f, u in zip(fs, us, strict=True)]
        for fs, us in zip(factor, units, strict=True)
    ]
    tokens, total = sum(sizes.values()), math.fsum(w for row in weights for w in row)
    scale = tokens / (total if normalize == "mean_one" else len(sizes))
    return [[w * scale for w in row] for row in weights]


@for_each("ranks", RANKS)
@for_each("normalize", ["mean_one", "none"])
@for_each("level", ["sequence", "domain"])
@each_pipeline
def test_units_count_alike_whatever_their_length(name, level, normalize, ranks):
    """A token weighs its factor over the length of its sequence or domain, on any ranks."""
    signals = unequal()
    text = spec_text(PIPELINES[name], reduction=f"{level}_mean", normalize=normalize)
    outs = on_ranks(text, signals, ranks)
    (factor,) = tables.built(spec_text(PIPELINES[name]))(signals, 3).factors.values()
    expected = reduced(factor.tolist(), units_of(signals, level), normalize)
    got = torch.cat([out.token for out in outs])
    # A few float32 divisions, and sums in another order.
    assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@for_each("ranks", RANKS)
@for_each("normalize", ["mean_one", "none"])
@for_each("level", ["sequence", "domain"])
def test_the_loss_is_the_mean_of_the_means_of_units(level, normalize, ranks):
    """With uniform weights the mean over tokens of w l is the mean over units of their mean l."""
    signals = unequal(seed=1)
    losses = {}
    for us, row in zip(units_of(signals, level), signals.loss.tolist(), strict=True):
        for u, x in zip(us, row, strict=True):
            losses.setdefault(u, []).append(x)
    del losses[None]
    expected = math.fsum(math.fsum(xs) / len(xs) for xs in losses.values()) / len(losses)
    text = spec_text("uniform", reduction=f"{level}_mean", normalize=normalize)
    token = torch.cat([out.token for out in on_ranks(text, signals, ranks)])
    got = (token * signals.loss).sum() / signals.valid.sum()
    assert got.item() == pytest.approx(expected, rel=1e-6)


@for_each("ranks", RANKS)
def test_a_weighted_mean_of_domains_is_group_dro(ranks):
    """With domain_mean the mean over tokens of w l is sum_d q_d L_d, q of the domains present."""
    signals = unequal(seed=2)
    token = torch.cat([o.token for o in on_ranks(tables.SPEC_TEXTS["group-dro"], signals, ranks)])
    losses = {}
    for us, row in zip(units_of(signals, "domain"), signals.loss.tolist(), strict=True):
        for u, x in zip(us, row, strict=True):
            losses.setdefault(u, []).append(x)
    means = {u: math.fsum(xs) / len(xs) for u, xs in losses.items() if u is not None}
    q = {u: math.exp(0.01 * mean) for u, mean in means.items()}
    expected = math.fsum(q[u] * means[u] for u in means) / math.fsum(q.values())
    got = (token * signals.loss).sum() / signals.valid.sum()
    assert got.item() == pytest.approx(expected, rel=1e-5)


# Chance -------------------------------------------------------------------------------------------

CHANCE = {
    "bernoulli": "error_norm -> mean(sequence) -> bernoulli(seed=3)",
    "corrected": "error_norm -> mean(sequence) -> bernoulli(correct=true, seed=3)",
    "multinomial": "error_norm -> mean(sequence) -> multinomial(0.5, correct=true, seed=3)",
    "selective-backprop": "rank(history=12) -> pow(3) -> bernoulli",
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pipeline", CHANCE.values(), ids=CHANCE)
def test_ranks_draw_the_same_lots(pipeline, ranks):
    """Batch after batch the ranks keep together what one rank alone keeps of the whole batch."""
    text = spec_text(pipeline, normalize="none")
    batches = [tables.batch(8, 4, seed=70 + i, keep=2.0) for i in range(4)]

    def one(rank, collectives):
        fn = tables.built(text, collectives=collectives)
        return [fn(slice_of(signals, rank, ranks), i).token for i, signals in enumerate(batches)]

    parts, whole = tables.Lockstep(ranks).run(one), tables.built(text)
    drawn = set()
    for i, signals in enumerate(batches):
        expected = whole(signals, i).token
        got = torch.cat([part[i] for part in parts])
        # Means over rows of a rank: float32 rounding.
        assert_close(got, expected, rtol=1e-5, atol=1e-6)
        drawn.add(tuple((expected[:, 0] > 0).tolist()))
    assert len(drawn) > 1, "every batch the same"


@pytest.mark.parametrize("pipeline", CHANCE.values(), ids=CHANCE)
def test_rows_without_labels_change_no_draw(pipeline):
    """Rows of nothing but padding, before and between the others, leave the others their lots."""
    text = spec_text(pipeline, normalize="none")
    plain, padded, rows = tables.built(text), tables.built(text), torch.tensor([1, 2, 4, 7, 8])
    for i in range(8):
        signals = tables.batch(5, 4, seed=90 + i, keep=2.0)

        def among_padding(_, x):
            return x.new_zeros(9, 4).index_copy_(0, rows, x)

        got = padded(tables.changed(signals, among_padding), i).token
        assert_close(got[rows], plain(signals, i).token, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pipeline", CHANCE.values(), ids=CHANCE)
def test_a_resumed_run_draws_what_it_would_have_drawn(pipeline):
    """After loading a saved state the lots are those of the run that never stopped."""
    text = spec_text(pipeline, normalize="none")
    batches = [tables.batch(8, 4, seed=80 + i, keep=2.0) for i in range(8)]
    through, first, second = (tables.built(text) for _ in range(3))
    expected = [through(signals, i).token for i, signals in enumerate(batches)]
    for i in range(3):
        first(batches[i], i)
    saved = {name: x.clone() for name, x in first.state_dict().items()}
    second.load_state_dict(saved)
    for i in range(3, 8):
        assert torch.equal(second(batches[i], i).token, expected[i])
    fresh = tables.built(text)
    assert not all(torch.equal(fresh(batches[i], i).token, expected[i]) for i in range(3, 8))


# The k-th largest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_share_of_all_ranks_is_a_share_of_the_whole(ranks):
    """The tokens kept on the ranks are together the highest of all, some ranks keeping none."""
    signals = tables.batch(8, 5, seed=5)
    signals = dataclasses.replace(signals, loss=signals.loss + torch.arange(8)[:, None])
    outs = on_ranks(spec_text("loss -> select(0.2)"), signals, ranks)
    got = torch.cat([out.token for out in outs]) > 0
    losses = sorted(signals.loss[signals.valid].tolist(), reverse=True)
    lowest = losses[math.floor(0.2 * len(losses)) - 1]
    assert torch.equal(got, signals.valid & (signals.loss >= lowest))
    assert (outs[0].token == 0).all()


RUNNING = """
version: 1
scope: running
pipeline: normalize -> linupper -> temperature(0.4) -> clamp(1.5/n)
"""


def test_running_weighs_a_batch_among_the_units_before_it():
    """The weights of a batch are its part of those of all batches so far, with a running mean of 1.

    The mean forgets four of 1,024 units with every batch of four.
    """
    fn, plain = wt.build(wt.loads(RUNNING)), wt.build(wt.loads(RUNNING.replace("running", "rank")))
    generator = torch.Generator().manual_seed(0)
    seen, total, count = [], 0.0, 0.0
    for _ in range(6):
        loss = torch.rand(4, 1, generator=generator) * 5
        seen.insert(0, loss)
        got = fn(wt.Signals(loss=loss)).token
        among = plain(wt.Signals(loss=torch.cat(seen))).token[:4]
        total, count = (x * (1 - 4 / 1024) for x in (total, count))
        total, count = total + among.sum(), count + 4
        assert_close(got, among / total * count, rtol=1e-5, atol=1e-6)  # float32 sums


def test_running_weighs_batches_of_one_sequence_apart():
    """A sequence that comes alone, as in a pipeline, weighs by how it compares with the others."""
    fn = wt.build(wt.loads(RUNNING))
    losses = [3.0, 1.0, 5.0, 2.0, 4.0, 1.5, 4.5]
    weights = [fn(wt.Signals(loss=torch.full((1, 3), x))).token[0, 0].item() for x in losses]
    assert max(weights[2:]) / min(weights[2:]) > 2
    high, low = weights[-1], weights[-2]
    assert high > low


def test_running_takes_tokens_along_that_need_no_statistics():
    """A factor per token that looks at nothing else goes with scope: running."""
    text = (
        RUNNING.replace("pipeline: ", "factors:\n  instance: ") + "  token: target_prob -> as_is\n"
    )
    signals = tables.batch(4, 3)
    both, alone = (wt.build(wt.loads(x))(signals).token for x in (text, RUNNING))
    expected = alone * signals.target_prob
    expected = expected / expected.sum() * signals.valid.sum()
    assert_close(both, expected, rtol=1e-5, atol=1e-6)  # float32 sums


def test_running_forgets_the_oldest_units():
    """Only the last 1,024 units count: an early extreme loss stops mattering."""
    fn = wt.build(wt.loads(RUNNING))
    fn(wt.Signals(loss=torch.full((1, 1), 1e6)))
    batch = wt.Signals(loss=torch.linspace(1, 5, 64)[:, None])
    first = fn(batch).token
    for _ in range(17):
        last = fn(batch).token
    assert first.std() < 1e-3, "all losses are alike beside 1e6"
    assert last.std() > 0.3


def test_running_is_the_same_on_all_ranks_and_after_a_resume():
    """Two lockstep ranks weigh as one, and a restored module goes on as the first."""
    spec = wt.loads(RUNNING)
    one = wt.build(spec)
    batches = [tables.batch(4, 3, seed=seed) for seed in range(4)]
    alone = [one(signals).token for signals in batches]

    def on_rank(rank, collectives):
        fn = wt.build(spec, collectives=collectives)
        rows = slice(rank * 2, rank * 2 + 2)
        parts = [tables.changed(b, lambda _, x: x[rows]) for b in batches]
        return [fn(part).token for part in parts]

    both = tables.Lockstep(2).run(on_rank)
    for number, expected in enumerate(alone):
        got = torch.cat([weights[number] for weights in both])
        assert_close(got, expected, rtol=1e-5, atol=1e-6)  # sums in another order

    half, rest = wt.build(spec), wt.build(spec)
    for signals in batches[:2]:
        half(signals)
    rest.load_state_dict(half.state_dict())
    assert torch.equal(rest(batches[2]).token, alone[2])


@pytest.mark.parametrize(
    "pipeline", ["entropy(1) -> token_scale", "mean(domain) -> temperature(1)"]
)
def test_running_is_refused_where_it_cannot_be(pipeline):
    """Tokens and domains are not remembered, and the refusal says why and what to do."""
    spec = wt.loads(f"version: 1\nscope: running\npipeline: {pipeline}\n")
    with pytest.raises(wt.SpecError, match="scope: running remembers documents and sequences"):
        wt.build(spec, domains=["a"])

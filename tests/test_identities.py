"""Methods that are each other's special cases, limits, and stages against plain sorting."""

import collections
import dataclasses
import itertools
import math

import generators as tables
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import weighting as wt
from weighting.contract import Alone, Scope
from weighting.contract.levels import Groups
from weighting.counter_rng import uniform
from weighting.schedules import Constant

positive = st.integers(-4, 4).map(lambda exponent: 2.0**exponent)
shares = st.integers(1, 16).map(lambda sixteenths: sixteenths / 16)


def plain(pipeline):
    """Return the text of a spec whose weights are those of its pipeline, unscaled."""
    return f"version: 1\nnormalize: none\npipeline: '{pipeline}'\n"


def of_rows(values):
    """Return signals of one token a row, with the given losses."""
    return wt.Signals(loss=torch.tensor(values).reshape(-1, 1))


def _tempered(spec, tau):
    """Return a spec with one temperature everywhere."""
    hot = Constant(value=tau)
    factors = {
        name: tuple(
            stage.model_copy(update={"tau": hot}) if stage.name == "temperature" else stage
            for stage in pipeline
        )
        for name, pipeline in spec.factors.items()
    }
    return spec.model_copy(update={"factors": factors})


# Special cases ------------------------------------------------------------------------------------


@pytest.mark.slow
@given(tables.losses(1, 24), positive)
def test_tilting_by_t_is_dro_kl_at_one_over_t(loss, t):
    """TERM's weights, the gradient of log(mean(exp(t l))) / t, are DRO-KL's at lambda = 1 / t."""
    x = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
    (((t * x).logsumexp(0) - math.log(len(loss))) / t).backward()
    for pipeline in (f"temperature({1 / t})", f"affine({t}) -> temperature(1)"):
        got = wt.simulate(pipeline, loss).double()
        # Exponents of up to 320, rounded.
        assert_close(got, len(loss) * x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@given(tables.losses(1, 24))
def test_the_spec_term_is_dro_kl_at_half(loss):
    """The shipped TERM, t = 2, weighs as the shipped DRO-KL does twice the losses."""
    twice = [2 * x for x in loss]
    # The same exponents but for rounding.
    assert_close(wt.simulate("term", loss), wt.simulate("dro-kl", twice), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", [0.5, 1, 2])
def test_the_power_of_the_probability_is_the_gradient_of_its_own_loss(q):
    """Cross entropy times the detached weight p^q has the gradient of (1 - p^q) / q."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(16, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (16,), generator=generator)
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad(
        ((1 - (-q * loss).exp()) / q).sum(), logits, retain_graph=True
    )
    (exact,) = torch.autograd.grad(
        (loss * (-q * loss).exp().detach()).sum(), logits, retain_graph=True
    )
    assert_close(exact, expected, rtol=1e-12, atol=1e-15)
    fn = tables.built(plain(f"target_prob -> pow({q}) -> as_is"))
    weight = fn(wt.Signals(loss=loss.detach()[:, None])).token[:, 0]
    (got,) = torch.autograd.grad((loss * weight).sum(), logits)
    # The weight is float32.
    assert_close(got, expected, rtol=1e-5, atol=1e-9)
    if q in {0.5, 1}:
        shipped = tables.built(tables.SPEC_TEXTS["beyond-ll" if q == 0.5 else "dft"])
        given_ = wt.Signals(loss=loss.detach()[:, None])
        assert torch.equal(shipped(given_).token[:, 0], weight)


@pytest.mark.slow
@given(tables.losses(1, 24), positive)
def test_upper_is_linupper_out_of_reach_at_twice_the_temperature(loss, r):
    """The shipped `upper` at r is linupper(alpha=2) at 2r, under the cap too."""
    upper = _tempered(wt.loads(tables.SPEC_TEXTS["upper"]), r)
    line = f"normalize -> linupper(alpha=2) -> temperature({2 * r}) -> clamp(2/n)"
    # The same exponents but for rounding.
    assert_close(wt.simulate(line, loss), wt.simulate(upper, loss), rtol=2e-5, atol=1e-5)


@pytest.mark.slow
@given(tables.losses(1, 24))
def test_keeping_all_is_uniform(loss):
    """select(1), threshold(quantile=0) and the whole of a row weigh every unit one."""
    one = torch.ones(len(loss))
    for pipeline in ("select(1)", "threshold(quantile=0)", "loss -> select(1, within=sequence)"):
        assert torch.equal(wt.simulate(pipeline, loss), one)
    assert torch.equal(wt.simulate("threshold(quantile=1, side=below)", loss), one)


@pytest.mark.slow
@given(st.integers(0, 2**16))
def test_hierarchical_term_in_one_domain_is_its_inner_factor(seed):
    """With a single domain the outer factor is one, the inner one TERM at t = -2 on tokens."""
    signals = tables.batch(4, 6, seed=seed)
    signals = dataclasses.replace(signals, domain_ids=torch.full_like(signals.domain_ids, 3))
    out = tables.built(tables.SPEC_TEXTS["term-hierarchical"])(signals)
    inner = tables.built("loss -> affine(-1) -> temperature(0.5)")(signals)
    # Sums over a domain and over the batch run in another order: float32 rounding.
    assert_close(out.factors["across"], signals.valid.float(), rtol=1e-5, atol=0)
    assert_close(out.token, inner.token, rtol=1e-5, atol=1e-6)


WITHIN = {
    "mean_one": ("loss -> mean_one(within={})", "loss -> mean_one"),
    "normalize": (
        "loss -> normalize({}) -> affine(1, shift=1) -> as_is",
        "loss -> normalize -> affine(1, shift=1) -> as_is",
    ),
    "select": ("loss -> select(0.4, within={})", "loss -> select(0.4)"),
    "temperature": ("loss -> temperature(0.7, within={})", "loss -> temperature(0.7)"),
}

each_within = pytest.mark.parametrize(("inside", "over_all"), WITHIN.values(), ids=WITHIN)


@each_within
@pytest.mark.parametrize("level", ["sequence", "document", "domain"])
def test_inside_the_only_unit_is_over_all(inside, over_all, level):
    """A statistic inside each unit is the one over all tokens when there is one unit."""
    fn, plainly = tables.built(plain(inside.format(level))), tables.built(plain(over_all))
    one = dict.fromkeys(("domain_ids", "segment_ids"), torch.zeros(1, 9, dtype=torch.long))
    for seed in range(20):
        signals = dataclasses.replace(tables.batch(1, 9, seed=seed), **one)
        # Sums in another order: float32 rounding.
        assert_close(fn(signals).token, plainly(signals).token, rtol=1e-5, atol=1e-6)


@each_within
def test_inside_each_row_is_row_by_row(inside, over_all):
    """A statistic inside each sequence gives every row what it gets in a batch of its own."""
    fn, alone = tables.built(plain(inside.format("sequence"))), tables.built(plain(over_all))
    signals = tables.batch(6, 7, seed=4)
    got = fn(signals).token
    for row in range(6):
        own = tables.changed(signals, lambda _, x, r=row: x[r : r + 1])
        # Sums in another order: float32 rounding.
        assert_close(got[row], alone(own).token[0], rtol=1e-5, atol=1e-6)


def test_doremi_is_what_it_stands_for():
    """Batch after batch the sugar weighs and remembers as the stages it stands for, bit by bit."""
    long = "excess_loss -> clip(min=0) -> mean(domain) -> exponentiated(0.7, smoothing=0.01)"
    short, long = (tables.built(text) for text in ("doremi(step_size=0.7, smoothing=0.01)", long))
    for seed in range(8):
        signals = tables.batch(seed=seed, keep=0.4)
        assert torch.equal(short(signals, seed).token, long(signals, seed).token)
    values = zip(short.state_dict().values(), long.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in values)


# Limits -------------------------------------------------------------------------------------------


TEMPERED = [
    name for name, text in tables.SPEC_TEXTS.items() if "temperature(" in text.split("version")[1]
]


def test_several_specs_have_a_temperature():
    """The limit below is taken of many methods."""
    assert len(TEMPERED) >= 14
    assert {"linupper", "term", "dro-kl", "upper", "term-hierarchical"} <= {*TEMPERED}


@pytest.mark.parametrize("name", TEMPERED)
def test_a_high_temperature_is_uniform(name):
    """As r grows every tempered factor of every spec weighs all its units one."""
    text = tables.SPEC_TEXTS[name]
    domains = tables.domains_of(text)
    spec = _tempered(wt.loads(text), 1e6)
    for seed in range(8):
        signals = tables.batch(5, 6, seed=seed, domains=domains)
        out = wt.build(spec, domains=domains)(signals, 3000)
        for factor, pipeline in spec.factors.items():
            if any(stage.name == "temperature" for stage in pipeline):
                # exp(5e-6) and float32 rounding.
                assert_close(out.factors[factor], signals.valid.float(), rtol=2e-5, atol=0)


def _tilted(t, signals):
    return tables.built(plain(f"loss -> tilted(sequence, tilt={t}) -> as_is"))(signals).token[:, 0]


def test_a_tilted_mean_lies_between_minimum_and_maximum():
    """For t to 0 it is the mean, for t to infinity the maximum, to minus infinity the minimum."""
    signals = tables.batch(6, 8, seed=2, keep=2.0)
    mean, low, high = signals.loss.mean(1), signals.loss.amin(1), signals.loss.amax(1)
    for sign in (1, -1):
        # The next term is t var / 2, some 1e-3, and rounding by eps / t.
        assert_close(_tilted(sign * 1e-3, signals), mean, rtol=0, atol=2e-3)
    # log(8) / t.
    assert_close(_tilted(1e4, signals), high, rtol=0, atol=3e-4)
    assert_close(_tilted(-1e4, signals), low, rtol=0, atol=3e-4)
    means = torch.stack([_tilted(t, signals) for t in (-8, -2, -0.5, -0.1, 0.1, 0.5, 2, 8)])
    assert (means.diff(dim=0) > 0).all()


@pytest.mark.slow
@settings(max_examples=8)
@given(tables.losses(2, 12, high=8.0), st.lists(tables.float32s(0.0, 8.0), min_size=1, max_size=6))
def test_absgd_settles_at_mean_one(loss, first):
    """After many equal batches the running average is theirs and the weights have mean one."""
    fn = tables.built(tables.SPEC_TEXTS["absgd"])
    fn(of_rows(first))
    signals = of_rows(loss)
    for _ in range(250):  # 0.9^250 e^8 is 1e-8
        token = fn(signals).token
    # Float32 exponents of up to 8.
    assert token.double().mean().item() == pytest.approx(1, rel=1e-5)
    # The same exponents but for rounding.
    assert_close(token[:, 0], wt.simulate("dro-kl", loss), rtol=1e-4, atol=1e-6)


# Against sorting ----------------------------------------------------------------------------------


@pytest.mark.slow
@given(tables.losses(1, 40), shares)
def test_select_keeps_the_first_of_the_sorted(loss, keep):
    """Sequences at least as high as the k-th of the sorted weigh n over their number."""
    ordered = sorted(loss, reverse=True)
    lowest = ordered[max(1, math.floor(keep * len(loss))) - 1]
    expected = [float(x >= lowest) for x in loss]
    weight = wt.simulate(f"mean(sequence) -> select({keep})", loss)
    # One float32 division.
    assert_close(weight, torch.tensor(expected) * len(loss) / sum(expected), rtol=1e-6, atol=0)


@pytest.mark.slow
@given(st.integers(1, 40), st.sampled_from([2, 3, 4, 5, 8]), st.randoms(use_true_random=False))
def test_slices_share_out_the_sorted(n, parts, random):
    """The slices of a share of distinct losses take k each, from the highest down."""
    loss = [float(x) for x in random.sample(range(100), n)]
    ordered, k = sorted(loss, reverse=True), max(1, n // parts)
    for index in range(min(parts, n // k)):
        weight = wt.simulate(f"select({1 / parts}, slice={index})", loss)
        here = {x for x, w in zip(loss, weight.tolist(), strict=True) if w}
        assert here == {*ordered[index * k : (index + 1) * k]}


@pytest.mark.slow
@given(tables.losses(1, 40), st.integers(0, 16).map(lambda s: s / 16))
def test_threshold_keeps_one_side_of_the_sorted(loss, q):
    """A quantile keeps the highest floor((1 - q) n), or the lowest floor(q n), at least one."""
    ordered, n = sorted(loss), len(loss)
    above = ordered[n - max(1, math.floor((1 - q) * n))]
    below = ordered[max(1, math.floor(q * n)) - 1]
    given_ = of_rows(loss)
    fn = tables.built(plain(f"mean(sequence) -> threshold(quantile={q})"))
    assert fn(given_).token[:, 0].tolist() == [float(x >= above) for x in loss]
    fn = tables.built(plain(f"mean(sequence) -> threshold(quantile={q}, side=below)"))
    assert fn(given_).token[:, 0].tolist() == [float(x <= below) for x in loss]
    at = loss[0]
    for side, holds in {"above": float.__ge__, "below": float.__le__}.items():
        fn = tables.built(plain(f"mean(sequence) -> threshold(at={at!r}, side={side})"))
        assert fn(given_).token[:, 0].tolist() == [float(holds(x, at)) for x in loss]


numbers = st.one_of(
    tables.float32s(-10.0, 10.0),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3.4028234663852886e38]),
)
missing = st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 1e30])


@given(st.lists(st.one_of(numbers, st.tuples(missing)), min_size=1, max_size=40), st.data())
def test_the_kth_largest_is_the_kth_of_the_sorted(values, data):
    """With ties, zeros of both signs and anything in invalid places; beyond n it is the last."""
    there = [x for x in values if not isinstance(x, tuple)]
    assume(there)
    ok = torch.tensor([not isinstance(x, tuple) for x in values])
    x = torch.tensor([v[0] if isinstance(v, tuple) else v for v in values])
    scope = Scope("sequence", torch.tensor(0), ok)
    k = data.draw(st.integers(1, len(there) + 4))
    got = scope.kth_largest(x, torch.tensor(float(k)))
    assert got.dtype == torch.float32
    assert got.item() == sorted(there, reverse=True)[min(k, len(there)) - 1]


@given(st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=40), st.data())
def test_the_kth_largest_of_a_group_is_the_kth_of_its_sorted(units, data):
    """Inside groups every token gets the k-th largest of its own, for a k of its own."""
    values, ids = (list(part) for part in zip(*units, strict=True))
    groups = Groups("sequence", torch.tensor(ids), 4, 0, Alone())
    valid = torch.ones(len(ids), dtype=torch.bool)
    scope = Scope("token", torch.tensor(0), valid).within(groups)
    k = data.draw(st.lists(st.integers(1, 12), min_size=4, max_size=4))
    each = torch.tensor([float(k[i]) for i in ids])
    got = scope.kth_largest(torch.tensor(values), each).tolist()
    for i, found in zip(ids, got, strict=True):
        own = sorted((x for x, other in units if other == i), reverse=True)
        assert found == own[min(k[i], len(own)) - 1]


def test_of_nothing_nothing_is_selected():
    """Without a valid unit the k-th largest is no number that any unit reaches."""
    scope = Scope("sequence", torch.tensor(0), torch.zeros(3, dtype=torch.bool))
    x = torch.tensor([-1.0, 0.0, 3e38])
    assert not (x >= scope.kth_largest(x, torch.tensor(1.0))).any()


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=6),
    st.integers(1, 14),
)
def test_rank_compares_with_a_deque(batches, history):
    """Batch after batch the rank is the share of the last scores that are lower, ties not."""
    fn = tables.built(plain(f"rank(history={history}) -> as_is"))
    last = collections.deque(maxlen=history)
    for batch in batches:
        last.extendleft(reversed([float(x) for x in batch]))  # its first row is the newest
        expected = [sum(h < x for h in last) / len(last) for x in batch]
        got = fn(of_rows([float(x) for x in batch])).token[:, 0]
        # One float32 division.
        assert got.tolist() == pytest.approx(expected, rel=1e-6)


# Chance -------------------------------------------------------------------------------------------

PROBABILITIES = (0.02, 0.3, 0.5, 0.9)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1])
def test_draws_are_those_of_the_hash_by_hand(seed):
    """The numbers of a seed and a counter are, bit by bit, those of whole-number arithmetic."""
    for counter in (0, 1, 2, 1000, 2**31, 2**40):
        got = uniform(seed, torch.tensor(counter), 300)
        assert got.dtype == torch.float32
        assert got.tolist() == reference.draws(seed, counter, 300)


def test_draws_are_spread_evenly_and_differ():
    """Sixteen bins fill alike, and neither the next batch, unit nor seed goes with the last."""
    draws = torch.stack([uniform(0, torch.tensor(c), 4000) for c in range(1, 11)]).double()
    counts = (draws * 16).long().flatten().bincount(minlength=16)
    n = draws.numel()
    assert (counts - n / 16).abs().max() < 4 * math.sqrt(n / 16 * 15 / 16)
    other = uniform(1, torch.tensor(1), 4000).double()
    pairs = [(draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:]), (draws[0], other)]
    for a, b in pairs:
        product = ((a - 0.5) * (b - 0.5)).flatten() * 12  # variance one
        assert abs(product.mean().item()) < 4 / math.sqrt(product.numel())


def _chances(repeats):
    p = torch.tensor(PROBABILITIES).repeat(repeats)[:, None]
    return wt.Signals(loss=torch.ones_like(p), columns={"quality": p})


@pytest.mark.parametrize("seed", [0, 11])
def test_the_rate_of_keeping_is_the_probability(seed):
    """Of many units of each probability that share is kept; with `correct` they weigh one."""
    signals = _chances(1500)
    source = "column(quality) -> mean(sequence)"
    kept = tables.built(plain(f"{source} -> bernoulli(seed={seed})"))
    correct = tables.built(plain(f"{source} -> bernoulli(correct=true, seed={seed})"))
    rates = torch.stack([kept(signals).token for _ in range(8)]).double()
    weights = torch.stack([correct(signals).token for _ in range(8)]).double()
    number = 8 * 1500
    for index, p in enumerate(PROBABILITIES):
        error = math.sqrt(p * (1 - p) / number)
        assert abs(rates[:, index :: len(PROBABILITIES)].mean().item() - p) < 4 * error
        mean = weights[:, index :: len(PROBABILITIES)].mean().item()
        assert abs(mean - 1) < 4 * error / p
    assert set(rates.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weights > 0, rates > 0)


@pytest.mark.slow
@pytest.mark.parametrize("correct", [True, False])
def test_units_are_drawn_in_proportion(correct):
    """Over many batches a unit weighs n p on average, or, with `correct`, one."""
    scores = [0.1, 0.2, 0.4, 0.4, 0.8, 1.6, 0.5, 0.0]
    p = [x / math.fsum(scores) for x in scores]
    column = torch.tensor(scores)[:, None]
    signals = wt.Signals(loss=torch.ones(8, 1), columns={"quality": column})
    word = str(correct).lower()
    fn = tables.built(
        plain(f"column(quality) -> mean(sequence) -> multinomial(0.5, correct={word}, seed=5)")
    )
    batches, k = 1200, 4
    mean = torch.stack([fn(signals).token[:, 0] for _ in range(batches)]).double().mean(0)
    for got, x in zip(mean.tolist(), p, strict=True):
        expected, scale = (1 if x else 0, x) if correct else (8 * x, 1 / 8)
        error = math.sqrt(x * (1 - x) / (k * batches)) / scale if x else 0
        assert abs(got - expected) <= 4 * error, (got, expected)


@pytest.mark.slow
def test_importance_weights_are_unbiased():
    """Over many batches the drawn weights of the shipped importance sampling have mean one."""
    spec = wt.loads(tables.SPEC_TEXTS["importance"])
    (pipeline,) = spec.factors.values()
    without = tuple(stage for stage in pipeline if stage.name != "gate")
    assert len(without) == len(pipeline) - 1
    ungated = spec.model_copy(update={"factors": {"x": without}, "normalize": "none"})
    norms = torch.linspace(0.1, 1.3, 9)[:, None]
    fn, signals = wt.build(ungated), wt.Signals(loss=torch.ones(9, 1), error_norm=norms)
    weights = torch.stack([fn(signals).token[:, 0] for _ in range(1200)]).double()
    error = weights.std(0) / math.sqrt(1200)
    assert ((weights.mean(0) - 1).abs() < 4 * error).all()
    assert all(len({*map(tuple, pair)}) == 2 for pair in itertools.pairwise(weights[:6].tolist()))

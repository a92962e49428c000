"""Domain weights act where a spec says: on what is drawn, on the loss, or on both."""

import random

import generators as tables
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from hypothesis import given
from hypothesis import strategies as st
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.build.domains import (
    average_weights,
    domain_weights,
    live_weights,
    proportions,
    send_feedback,
)
from weighting.mixture import MIXTURE, mixture_text, with_mixture

DOMAINS = tables.DOMAINS
TABLE = "table(code=3, data=1, docs=0, tables=2, tests=2) -> mean_one"
OTHER = "table(code=1, data=4, docs=1, tables=1, tests=0) -> mean_one"
UNITS = "linear(1, 9, over=4)"


def spec(*lines):
    """Return the spec of some lines."""
    return wt.loads("\n".join(["version: 1", *lines]))


def built(*lines, **given):
    """Return such a spec, built."""
    return wt.build(spec(*lines), domains=DOMAINS, **given)


def shipped(name):
    """Return a shipped spec, built for the domains of its table."""
    return tables.built(tables.SPEC_TEXTS[name])


def table(weights):
    """Return a table as arrow text."""
    entries = (f"{d}={x!r}" for d, x in zip(DOMAINS, weights, strict=True))
    return f"table({', '.join(entries)}) -> mean_one"


def tokens(*counts, loss=1.0):
    """Return signals with so many tokens of each domain."""
    ids = torch.tensor([[d for d, count in enumerate(counts) for _ in range(count)]])
    losses = torch.full(ids.shape, loss)
    return wt.Signals(loss=losses, ref_loss=torch.zeros_like(losses), domain_ids=ids)


def state_of(fn):
    """Return a copy of the state."""
    return {name: x.clone() for name, x in fn.state_dict().items()}


# Where factors act --------------------------------------------------------------------------------

ACTS = {
    # lines: where each factor acts, which draw, what is read, is the loss the host's own
    "a table": (
        [f"pipeline: {TABLE}"],
        ({"pipeline": "loss"}, (), {"domain_ids"}, False),
    ),
    "a table that draws": (
        ["apply: sampling", f"pipeline: {TABLE}"],
        ({"pipeline": "sampling"}, ("pipeline",), set(), True),
    ),
    "a table that does both": (
        ["apply: both", f"pipeline: {TABLE}"],
        ({"pipeline": "both"}, ("pipeline",), {"domain_ids"}, False),
    ),
    "two tables that draw": (
        ["apply: sampling", "factors:", f"  a: {TABLE}", f"  b: {OTHER}"],
        ({"a": "sampling", "b": "sampling"}, ("a", "b"), set(), True),
    ),
    "a word for all is for those that weigh domains": (
        ["apply: sampling", "factors:", f"  a: {TABLE}", "  b: entropy -> token_scale"],
        ({"a": "sampling", "b": "loss"}, ("a",), {"entropy"}, False),
    ),
    "a factor left out acts on the loss": (
        ["apply: {a: sampling}", "factors:", f"  a: {TABLE}", "  b: mean(domain) -> exponentiated"],
        ({"a": "sampling", "b": "loss"}, ("a",), {"loss", "domain_ids"}, False),
    ),
    "who does nothing else draws": (
        [
            "apply: {a: both, b: sampling, c: both}",
            "factors:",
            f"  a: {TABLE}",
            f"  b: {OTHER}",
            "  c: doremi",
        ],
        (
            {"a": "both", "b": "sampling", "c": "both"},
            ("b",),
            {"loss", "ref_loss", "domain_ids"},
            False,
        ),
    ),
    "drawing beside plain training": (
        ["apply: {a: sampling}", "factors:", f"  a: {TABLE}", "  b: uniform"],
        ({"a": "sampling", "b": "loss"}, ("a",), set(), True),
    ),
    "drawing all alike": (
        ["apply: sampling", "pipeline: uniform"],
        ({"pipeline": "sampling"}, ("pipeline",), set(), True),
    ),
    "what draws remembers": (
        ["apply: sampling", "pipeline: excess_loss -> mean(domain) -> bandit"],
        ({"pipeline": "sampling"}, ("pipeline",), {"loss", "ref_loss", "domain_ids"}, False),
    ),
    "tokens count by their sequence": (
        ["apply: sampling", "reduction: sequence_mean", f"pipeline: {TABLE}"],
        ({"pipeline": "sampling"}, ("pipeline",), set(), False),
    ),
    "tokens may be dropped": (
        ["apply: sampling", "on_nonfinite: drop", f"pipeline: {TABLE}"],
        ({"pipeline": "sampling"}, ("pipeline",), set(), False),
    ),
}


@for_each("case", ACTS)
def test_a_factor_acts_where_the_spec_says(case):
    """Where it acts, who draws, what is read and whether the loss is the host's follow from it."""
    lines, (applied, sampling, needs, identity) = ACTS[case]
    fn = built(*lines)
    assert fn.plan.targets == applied
    assert fn.plan.sampling == sampling
    assert fn.needs == needs
    assert fn.plan.identity == identity


@for_each("case", [case for case, (_, given) in ACTS.items() if given[-1]])
def test_the_loss_of_what_only_draws_is_the_hosts(case):
    """Bit for bit the mean cross entropy of torch, and every weight is one."""
    fn = built(*ACTS[case][0])
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[1, 3:] = -100
    loss, out = wt.weighted_cross_entropy(logits, labels, fn)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.equal(loss, total / 17)
    assert torch.equal(out.token, (labels != -100).float())


@pytest.mark.parametrize("name", ["odm", "uniform-domains", "doge-table-x-linupper"])
def test_what_draws_multiplies_nothing(name):
    """The weights are those of the other factors, whatever the domains."""
    fn, signals = shipped(name), tables.batch(6, 8, seed=1)
    other = shipped("linupper" if "linupper" in name else "uniform")
    for step in range(1001, 1004):  # one is plain before
        assert_close(fn(signals, step).token, other(signals, step).token, rtol=1e-6, atol=1e-6)
    factor = fn.plan.sampling[0]
    assert torch.equal(fn(signals, 3).factors[factor], signals.valid.float())


# Proportions --------------------------------------------------------------------------------------


def test_proportions_are_the_table_normalised():
    """Whatever the table, they sum to one; zeros stay zero, and one domain gets all."""
    rng = random.Random(0)
    for count in (1, 2, 10):
        for _ in range(50):
            weights = [rng.choice([0.0, rng.uniform(0, 9)]) for _ in range(count - 1)]
            weights += [rng.uniform(0.1, 9)]
            rng.shuffle(weights)
            entries = ", ".join(f"d{i}={x!r}" for i, x in enumerate(weights))
            read = spec("apply: sampling", f"pipeline: table({entries}) -> mean_one")
            p = proportions(wt.build(read, domains=[f"d{i}" for i in range(count)]))
            assert p.sum().item() == pytest.approx(1, abs=1e-12)
            # The entries are float32.
            assert p.tolist() == pytest.approx([x / sum(weights) for x in weights], abs=1e-6)


def test_proportions_follow_the_order_of_the_domains():
    """It is the domains given to `build` that say where each is found."""
    fn = wt.build(spec("apply: sampling", f"pipeline: {TABLE}"), domains=DOMAINS[::-1])
    assert proportions(fn).tolist() == pytest.approx([2 / 8, 2 / 8, 0, 1 / 8, 3 / 8])


def test_all_domains_are_drawn_alike_by_uniform():
    """Each gets its K-th."""
    assert proportions(shipped("uniform-domains")).tolist() == pytest.approx([0.2] * 5)


def test_proportions_follow_a_schedule():
    """A table that changes is read at the step of the batch to be drawn."""
    fn = built("apply: sampling", f"pipeline: '{TABLE.replace('code=3', f'code={UNITS}')}'")
    assert fn.plan.draws_live
    for step, code in {0: 1, 1: 3, 2: 5, 4: 9, 100: 9}.items():
        expected = [x / (code + 5) for x in (code, 1, 0, 2, 2)]
        assert proportions(fn, step).tolist() == pytest.approx(expected)
        assert proportions(fn, torch.tensor(step)).tolist() == pytest.approx(expected)


def test_factors_that_draw_multiply():
    """The proportions are those of the product of their weights."""
    fn = built("apply: sampling", "factors:", f"  a: {TABLE}", f"  b: {OTHER}", "  c: uniform")
    assert not fn.plan.draws_live
    assert proportions(fn).tolist() == pytest.approx([3 / 9, 4 / 9, 0, 2 / 9, 0])


def test_what_does_both_draws_only_when_nothing_else_does():
    """A factor that says `sampling` draws alone; two that do both draw by their product."""
    factors = ["factors:", f"  a: {TABLE}", f"  b: {OTHER}"]
    fn = built("apply: {a: sampling, b: both}", *factors)
    assert proportions(fn).tolist() == pytest.approx([3 / 8, 1 / 8, 0, 2 / 8, 2 / 8])
    fn = built("apply: both", *factors)
    assert proportions(fn).tolist() == pytest.approx([3 / 9, 4 / 9, 0, 2 / 9, 0])


LIVE = {
    "exponentiated": "mean(domain) -> exponentiated(0.5)",
    "bandit": "mean(domain) -> bandit",
    "doremi": "doremi",
    "topical": "mean(domain) -> topical(every=1)",
}


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("word", ["sampling", "both"])
def test_proportions_follow_the_state(name, word):
    """A batch in which a domain has a high loss raises its share, and evaluation changes none."""
    fn = built(f"apply: {word}", f"pipeline: {LIVE[name]}")
    assert fn.plan.draws_live
    assert proportions(fn).tolist() == pytest.approx([0.2] * 5)
    high = tokens(3, 3, 3, 3, 3)
    high.loss[high.domain_ids == 1] = 4.0
    fn.eval()
    fn(high)
    assert proportions(fn).tolist() == pytest.approx([0.2] * 5)
    fn.train()
    seen = []
    for step in range(1, 21):  # the bandit explores for eight batches of five domains
        out = fn(high, step)
        seen.append(proportions(fn, step)[1].item())
        if word == "sampling":
            assert torch.equal(out.token, torch.ones_like(high.loss))
    p = proportions(fn, 21)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert max(seen) > 0.25
    told = domain_weights(fn, 21)["pipeline"]
    assert_close(p, told.double(), rtol=1e-6, atol=0)  # float32 weights that sum to one


def test_proportions_are_those_of_the_weights_after_their_bounds():
    """What follows the stage that remembers acts on the weights of all domains."""
    plain = built("apply: sampling", f"pipeline: {LIVE['exponentiated']}")
    mixed = built("apply: sampling", f"pipeline: {LIVE['exponentiated']} -> interpolate(0.5)")
    capped = built("apply: sampling", f"pipeline: {LIVE['exponentiated']} -> clamp(1.5)")
    for fn in (plain, mixed, capped):
        fn(tokens(1, 0, 0, 0, 2, loss=5.0))
        fn(tokens(1, 3, 0, 0, 0, loss=3.0))
    p = proportions(plain)
    assert p.max() > 0.35
    assert_close(proportions(mixed), 0.5 * p + 0.1, rtol=1e-5, atol=0)  # float32 weights
    assert proportions(capped).max().item() == pytest.approx(1.5 / 5, abs=1e-6)
    assert proportions(capped).sum().item() == pytest.approx(1, abs=1e-12)


def test_feedback_changes_the_proportions_that_are_drawn():
    """Dynamic loading draws what it starts from until a validation is told."""
    fn = shipped("dynamic-loading")
    starts = [x / 6 for x in (2, 1, 1, 1, 1)]
    fn(tables.batch(4, 6), 1)
    assert proportions(fn, 1).tolist() == pytest.approx(starts)
    targets = torch.tensor([2.5, 3, 2.8, 2, 2.6])
    behind = torch.tensor([0.0, 0.5, 0.0, 0.0, -0.5])
    send_feedback(fn, "validation", targets + behind, 1)
    found = proportions(fn, 2)
    raised = torch.tensor(starts).double() * behind.double().exp()
    # Smoothing takes 1e-4.
    assert_close(found, raised / raised.sum(), rtol=0, atol=1e-4)


def test_doge_tells_the_proportions_of_a_later_run():
    """It draws nothing itself; its weights of the domains sum to one, and follow the gradients."""
    fn = shipped("doge-proxy")
    assert fn.plan.sampling == ()
    assert domain_weights(fn)["pipeline"].tolist() == pytest.approx([0.2] * 5)
    gram = torch.eye(5)
    gram[2, 2] = 4
    send_feedback(fn, "gradients", gram, 1)
    told = domain_weights(fn)["pipeline"]
    assert told.sum().item() == pytest.approx(1, abs=1e-6)
    assert told.argmax() == 2


MOVES = {
    # a spec: the factors whose weights of domains move; those that keep an average
    "linupper": ((), ()),
    "table-x-linupper": ((), ()),
    "uniform-domains": ((), ()),
    "doremi-proxy": (("domain",), ("domain",)),
    "doremi-x-linupper-x-mile": (("domain",), ("domain",)),
    "doge-proxy": (("pipeline",), ("pipeline",)),
    "dynamic-loading": (("catch_up",), ()),
    "odm": (("pipeline",), ()),
    "ado": (("pipeline",), ("pipeline",)),
    "odm-validation": (("pipeline",), ()),
    "toremi": (("pipeline",), ()),
    "toremi-topics": ((), ()),
    "absgd": ((), ()),
}


@pytest.mark.parametrize("name", MOVES)
def test_weights_of_domains_that_move(name):
    """Only those of factors that remember move, and some keep an average; all sum to one."""
    fn = shipped(name)
    live, averaged = live_weights(fn), average_weights(fn)
    assert (tuple(live), tuple(averaged)) == MOVES[name]
    assert fn.plan.moves_domains == bool(live)
    assert fn.plan.draws_live == any(factor in live for factor in fn.plan.sampling)
    for w in (*live.values(), *averaged.values(), *domain_weights(fn).values()):
        assert w.sum().item() == pytest.approx(1, abs=1e-6)
        assert w.shape == (len(fn.domains),)


@pytest.mark.parametrize("case", ["spec odm", "spec doremi-proxy", "extra both", "extra live draw"])
def test_ranks_draw_alike(case):
    """Two ranks with half the batch each have bitwise the same proportions, those of one rank."""
    batches = [tables.batch(4, 6, seed=60 + i) for i in range(24)]
    whole = tables.built(tables.CASES[case])
    for step, signals in enumerate(batches, 1):
        whole(signals, step)

    def one(rank, collectives):
        fn = tables.built(tables.CASES[case], collectives=collectives)
        for step, signals in enumerate(batches, 1):
            fn(tables.changed(signals, lambda _, x: x.chunk(2)[rank]), step)
        return fn

    first, second = tables.Lockstep(2).run(one)
    weights = domain_weights(first, 25)
    assert torch.equal(proportions(first, 25), proportions(second, 25))
    assert weights.keys() == domain_weights(whole, 25).keys()
    for name, w in domain_weights(whole, 25).items():
        assert torch.equal(weights[name], domain_weights(second, 25)[name])
        assert_close(weights[name], w, rtol=1e-5, atol=1e-7)  # sums in another order
    assert max(x.max() for x in weights.values()) > 0.21, "no weight moved"


# The draw and the loss together -------------------------------------------------------------------


def test_a_token_weighs_what_undoes_the_draw():
    """With p drawn, multipliers are w / p: the expected share of the gradient is that of w.

    p_d * multiplier_d / w_d is the same for all domains, whatever p, w and the batch.
    """
    rng = random.Random(1)
    for trial in range(50):
        w = [rng.uniform(0.05, 3) for _ in DOMAINS]
        drawn = [rng.uniform(0.05, 3) for _ in DOMAINS]
        fn = built(
            "apply: {draw: sampling, weigh: both}",
            "factors:",
            f"  draw: {table(drawn)}",
            f"  weigh: {table(w)}",
        )
        p = proportions(fn, trial)
        fn.drawn.copy_(p)
        signals = tokens(*(rng.randint(1, 9) for _ in DOMAINS))
        token = fn(signals, trial).token
        multiplier = [token[signals.domain_ids == d] for d in range(5)]
        assert all(m.max() == m.min() for m in multiplier)
        shares = torch.stack([m[0] for m in multiplier]) * p
        expected = torch.tensor(w) / sum(w)
        # Products of float32 numbers.
        assert_close(shares.float() / shares.sum().float(), expected, rtol=1e-5, atol=0)


def test_a_batch_in_the_proportions_drawn_has_the_gradient_of_the_weights():
    """Of a batch with p_d of each domain, the loss has w_d of each, for p that start elsewhere."""
    fn = built(
        "apply: {draw: sampling, weigh: both}",
        "factors:",
        f"  draw: {table([1.0, 2.0, 3.0, 4.0, 10.0])}",
        f"  weigh: {table([5.0, 1.0, 1.0, 2.0, 1.0])}",
    )
    fn.drawn.copy_(proportions(fn))
    signals = tokens(1, 2, 3, 4, 10)
    logits = torch.zeros(1, 20, 2, requires_grad=True)
    labels = torch.zeros(1, 20, dtype=torch.int64)
    loss, _ = wt.weighted_cross_entropy(logits, labels, fn, domain_ids=signals.domain_ids)
    loss.backward()
    gradient = logits.grad[0, :, 1]
    share = torch.stack([gradient[signals.domain_ids[0] == d].sum() for d in range(5)])
    assert_close(share / share.sum(), torch.tensor([0.5, 0.1, 0.1, 0.2, 0.1]))


def test_the_multiplier_is_the_weight_over_the_share_drawn():
    """Not normalised, a token weighs exactly a_d / p_d."""
    fn = built(
        "normalize: none",
        "apply: {draw: sampling, weigh: both}",
        "factors:",
        f"  draw: {table([1.0, 2.0, 3.0, 4.0, 10.0])}",
        "  weigh: mean(domain) -> exponentiated",
    )
    p = proportions(fn)
    fn.drawn.copy_(p)
    signals = tokens(1, 1, 1, 1, 1)
    signals.loss[0, 2] = 2.0
    token = fn(signals, 1).token[0]
    a = domain_weights(fn, 1)["weigh"]
    assert a[2] > 0.3
    assert_close(token.double(), a.double() / p, rtol=1e-6, atol=0)  # float32 quotients


def test_what_draws_by_its_own_weights_leaves_the_loss_alone():
    """With `apply: both` and nothing else to draw, weight and correction cancel."""
    fn = built("apply: both", f"pipeline: {TABLE}")
    fn.drawn.copy_(proportions(fn))
    signals = tokens(2, 1, 0, 5, 3)
    assert_close(fn(signals).token, torch.ones_like(signals.loss))
    never = fn(tokens(2, 1, 3, 5, 3))  # docs are never drawn, and weigh 0
    assert (never.token[tokens(2, 1, 3, 5, 3).domain_ids == 2] == 0).all()
    assert never.token.isfinite().all()


def test_what_was_drawn_is_no_state():
    """It is 1 / K until the trainer says otherwise, follows the module, and is not saved."""
    fn = shipped("doremi-proxy")
    assert fn.drawn.tolist() == pytest.approx([0.2] * 5)
    saved = state_of(fn)
    assert not [name for name in saved if "drawn" in name]
    fn.drawn.copy_(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]))
    fn.load_state_dict(saved)
    assert fn.drawn.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    assert fn.to(torch.device("meta")).drawn.device.type == "meta"
    assert not hasattr(shipped("odm"), "drawn"), "what draws alone has nothing to undo"


@pytest.mark.slow
def test_one_graph_serves_every_draw():
    """Shares drawn and states told between the calls change the weights, not the graph."""
    lines = (
        "apply: {draw: sampling, weigh: both}",
        "factors:",
        f"  draw: '{TABLE.replace('code=3', f'code={UNITS}').replace('docs=0', 'docs=1')}'",
        "  weigh: mean(domain) -> exponentiated",
        "  later: doge(step_size=0.5)",
    )
    fn, twin = built(*lines), built(*lines)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    seen = []
    for step in range(1, 5):
        signals = tables.batch(4, 6, seed=70 + step)
        for one in (fn, twin):
            one.drawn.copy_(proportions(one, step))
            send_feedback(one, "gradients", torch.eye(5) * torch.arange(1, 6), step)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = compiled(signals, torch.tensor(step))
        seen.append(fn(signals, step).token)
        assert_close(got.token, seen[-1], rtol=1e-6, atol=1e-7)  # the same operations
    assert_close(twin.state_dict(), fn.state_dict())
    assert fn.drawn[0] > 1.9 / 6


# Mixtures -----------------------------------------------------------------------------------------

MIX = "version: 1\nname: mix\napply: sampling\npipeline: " + TABLE
PLAIN = [
    name
    for name, text in tables.SPEC_TEXTS.items()
    if not tables.built(text).plan.sampling and {*tables.domains_of(text)} == {*DOMAINS}
]
"""Shipped specs that draw nothing."""


def test_some_specs_draw_nothing():
    """The laws below speak of many specs."""
    assert len(PLAIN) >= 30


@pytest.mark.slow
@for_each("name", PLAIN)
def test_a_mixture_draws_and_leaves_the_weights(name):
    """The joined spec draws by the mixture, weighs bitwise as before, and is another spec."""
    before = wt.load(name)
    joined = with_mixture(before, wt.loads(MIX))
    fn, plain = wt.build(joined, domains=DOMAINS), wt.build(before, domains=DOMAINS)
    assert fn.plan.sampling == (MIXTURE,)
    assert proportions(fn, 1).tolist() == pytest.approx([x / 8 for x in (3, 1, 0, 2, 2)])
    assert (fn.needs, fn.plan.identity, fn.plan.deferred_level) == (
        plain.needs,
        plain.plan.identity,
        plain.plan.deferred_level,
    )
    for step in range(1, 4):
        signals = tables.batch(4, 6, seed=80 + step)
        assert torch.equal(fn(signals, step).token, plain(signals, step).token)
    assert joined.hash != before.hash
    assert joined.name == before.name


@pytest.mark.slow
@for_each("name", PLAIN)
@for_each("spelling", ["arrow", "yaml"])
def test_a_joined_spec_reads_back(name, spelling):
    """Written in either spelling, it is read as the same spec with the same hash."""
    joined = with_mixture(wt.load(name), wt.loads(MIX))
    again = wt.loads(wt.dumps(joined, spelling))
    assert again == joined
    assert again.hash == joined.hash


def test_the_hash_is_that_of_the_mixture():
    """Equal mixtures give equal hashes, whatever they are called; others give others."""
    base = wt.load("linupper")
    one = with_mixture(base, wt.loads(MIX)).hash
    assert with_mixture(base, wt.loads(MIX.replace("name: mix", "name: other"))).hash == one
    assert with_mixture(base, wt.loads(MIX.replace("data=1", "data=1.5"))).hash != one
    by_loss = wt.load("linupper").model_copy(
        update={"factors": with_mixture(base, wt.loads(MIX)).factors}
    )
    assert by_loss.hash != one, "the same factors on the loss are another spec"


def test_a_mixture_of_several_factors_keeps_them_apart():
    """Each becomes a factor of its own, and all of them draw; options of the spec stay its own."""
    mixture = wt.load("dynamic-loading")
    base = spec("normalize: none", "reduction: sequence_mean", "pipeline: temperature(1)")
    joined = with_mixture(base, mixture)
    assert list(joined.factors) == ["pipeline", "mixture-start", "mixture-catch_up"]
    assert (joined.normalize, joined.reduction) == ("none", "sequence_mean")
    fn = wt.build(joined, domains=DOMAINS)
    assert proportions(fn).tolist() == pytest.approx([x / 6 for x in (2, 1, 1, 1, 1)])
    assert fn.plan.listens_to == {"validation"}
    assert wt.loads(wt.dumps(joined)) == joined


def test_a_mixture_draws_for_what_did_both():
    """A factor that weighed what it drew goes on to weigh, over what the mixture draws."""
    base = spec("apply: both", f"pipeline: {table([5.0, 1.0, 1.0, 2.0, 1.0])}")
    fn = wt.build(with_mixture(base, wt.loads(MIX)), domains=DOMAINS)
    assert fn.plan.targets == {"pipeline": "both", MIXTURE: "sampling"}
    p = proportions(fn)
    assert p.tolist() == pytest.approx([x / 8 for x in (3, 1, 0, 2, 2)])
    fn.drawn.copy_(p)
    token = fn(tokens(1, 1, 0, 1, 1)).token[0]
    expected = torch.tensor([5 / 3, 1 / 1, 2 / 2, 1 / 2])
    assert_close(token / token.sum(), expected / expected.sum())


def test_plugins_of_both_are_joined():
    """Each is named once, the spec's own first."""
    lists = {"a": "plugins: [json, random]", "b": "plugins: [random, math]\napply: sampling"}
    base, mixture = (spec(text, "pipeline: uniform") for text in lists.values())
    assert with_mixture(base, mixture).plugins == ("json", "random", "math")


REFUSED = {
    "it weighs no domain": (
        "linupper",
        "mile",
        "mile is no mixture: every factor of one weighs domains, and it says apply: sampling",
    ),
    "it weighs the loss": ("linupper", MIX.replace("apply: sampling\n", ""), "mix is no mixture"),
    "it does both": ("linupper", MIX.replace("sampling", "both"), "mix is no mixture"),
    "a factor of it weighs the loss": (
        "linupper",
        "doge-table-x-linupper",
        "doge-table-x-linupper is no mixture",
    ),
    "it does not stand by itself": (
        "linupper",
        "version: 1\napply: sampling\npipeline: mean(domain) -> temperature(1)",
        "apply: sampling draws before a batch is seen",
    ),
    "the spec draws": (
        "odm",
        MIX,
        "odm draws data by its factor pipeline, and mix would as well; leave out one of them",
    ),
    "the spec draws by one of its factors": (
        "doremi-proxy",
        "uniform-domains",
        "doremi-proxy draws data by its factor draw, and uniform-domains would as well",
    ),
    "the name is taken": (
        "version: 1\nname: x\nfactors:\n  mixture: temperature(1)",
        MIX,
        "x has a factor 'mixture' already; give it another name",
    ),
    "one of the names is taken": (
        "version: 1\nname: x\nfactors:\n  mixture-start: temperature(1)",
        "dynamic-loading",
        "x has a factor 'mixture-start' already; give it another name",
    ),
}


@for_each("case", REFUSED)
def test_what_is_refused_as_a_mixture(case):
    """It is said which of the two is wrong, and what to do."""
    base, mixture, message = REFUSED[case]
    read = [wt.loads(x) if "\n" in x else wt.load(x) for x in (base, mixture)]
    with pytest.raises(wt.SpecError) as caught:
        with_mixture(*read)
    assert message in str(caught.value)


# Mixtures as text ---------------------------------------------------------------------------------

ODD = [
    *("two words", "it's", 'say "x"', "Größe", "日本語", "a=b", "true", "null", "", "1e5"),
    *("08", "n", "a: b", "- x", "# c", "->", "\\", "two\nlines", "a\tb", "2/n", "{", "\u2028"),
]


@for_each("name", ODD)
def test_any_domain_may_be_in_a_mixture(name):
    """However odd its name, the text reads back, draws it, and joins another spec."""
    read = wt.loads(mixture_text("m", {name: 0.25, "other": 0.75}, "A title.", {}))
    assert proportions(wt.build(read, domains=[name, "other"])).tolist() == [0.25, 0.75]
    joined = with_mixture(wt.load("linupper"), read)
    assert wt.loads(wt.dumps(joined)) == joined


@given(
    st.dictionaries(
        # Control characters are no part of YAML but for those in `ODD`.
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
        st.floats(0, 1e6, allow_subnormal=False),
        min_size=1,
        max_size=8,
    ).filter(lambda x: sum(x.values()) > 1e-6)
)
def test_a_mixture_reads_back_in_its_proportions(found):
    """Shares are written to six places."""
    read = wt.loads(mixture_text("found", found, "A title.", {"steps": 100}))
    assert read.name == "found"
    assert read.apply == "sampling"
    fn = wt.build(read, domains=list(found))
    total = sum(found.values())
    written = read.factors["pipeline"][0].weights
    for domain, x in found.items():
        assert written[domain].value == pytest.approx(x / total, abs=0.51e-6)
    # Half a millionth off for each domain, which the sum spreads over all of them.
    shares = [x / total for x in found.values()]
    assert proportions(fn).tolist() == pytest.approx(shares, abs=0.51e-6 * (len(shares) + 1))


HOSTILE = [
    *("a\nversion: 2", "a\r\nversion: 2", "a\rversion: 2", "a\x85version: 2", "a\u2028name: x"),
    *("---", "a: b", "# c", "\tx", "%YAML 1.1", "", None, 3, ["x", "y"], "zero \x00", "bell \x07"),
]


@for_each("value", HOSTILE, ids=repr)
def test_where_a_mixture_comes_from_is_only_ever_a_comment(value):
    """Title and provenance, whatever they hold, change nothing of what is read."""
    plain = wt.loads(mixture_text("m", {"a": 1, "b": 3}, "A title.", {}))
    text = mixture_text("m", {"a": 1, "b": 3}, f"{value}", {"made by": value, f"{value}": 1})
    assert wt.loads(text) == plain
    assert "\n# made by:" in text


def test_a_mixture_file_says_how_to_use_it_and_how_it_was_made():
    """It begins with its title and how to use it; then comes how it was made; then the spec."""
    made = {"from": "doremi-proxy, 100 steps", "average": True}
    text = mixture_text("found", {"web": 2, "code": 1}, "What a proxy found.", made)
    assert (
        text
        == """\
# What a proxy found.
#
#   weighting train specs/linupper.yaml --mixture FILE
#
# from: doremi-proxy, 100 steps
# average: True
version: 1
name: found
apply: sampling
pipeline:
- table: {web: 0.666667, code: 0.333333}
- mean_one
"""
    )

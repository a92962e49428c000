"""The laws every stage and every spec obeys, checked over the table of all of them."""

import contextlib
import dataclasses
import functools
import re

import generators as tables
import pytest
import torch
from census import Census
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.build.statistics import MOMENTS, summarize
from weighting.contract import Stage
from weighting.pipeline import expand
from weighting.schedules import Constant, Schedule
from weighting.spec import arrow_text
from weighting.testing.batches import hard_batches
from weighting.testing.checks import (
    check_compiles,
    check_many_ranks,
    check_no_host_sync,
    check_pointwise,
    checks_for,
    name_of,
)
from weighting.testing.subject import as_subject

CASES = tables.CASES
SPECS = [name for name in CASES if name.startswith("spec ")]
MIXED = {
    "shapes": (
        "reduction: domain_mean\n"
        "pipeline: 'loss -> normalize -> clip(min=-0.9, max=linear(0.1, 0.6, over=5)) -> "
        "quadratic -> affine(step(2, 0.5, at=3), shift=-1) -> center(median) -> abs -> "
        "pow(linear(0.5, 3, over=4)) -> standardize(within=sequence) -> tanh -> exp -> log -> "
        "normalize -> extremes -> linupper(alpha=linear(1, 1.5, over=3)) -> sigmoid -> "
        "temperature(piecewise({0: 4, 2: 1, 5: 2})) -> clamp(linear(2, 1.2, over=4)) -> "
        "floor(linear(0.5, 0.1, over=4)) -> interpolate(exponential(1, 0.1, over=4)) -> "
        "where(position, at_least=step(0, 1, at=3), below=2)'"
    ),
    "sources": (
        "reduction: document_mean\nfactors:\n"
        "  many: entropy(gamma=linear(1, 2, over=4), sigma=0.5) -> plus(target_prob) -> "
        "plus(focal(gamma=cosine(0.5, 2, over=5))) -> plus(column(quality)) -> minus(correct) -> "
        "plus(error_norm) -> plus(position -> affine(0.1)) -> plus(token_id) -> plus(kl) -> "
        "plus(ref_entropy(old)) -> plus(ref_loss) -> times(short_loss(1024)) -> "
        "plus(topk_entropy(20)) -> plus(token_id -> effective_number(2)) -> "
        "normalize(within=sequence) -> temperature(1)\n"
        "  seen: variability(examples=7) -> plus(forgotten(examples=7)) -> affine(1, 0.2) -> "
        "mean_one\n"
        "  document: remembered(examples=7) -> mean(document) -> "
        "over(length(document) -> pow(-0.5)) -> temperature(2)\n"
        "  gain: context_gain(1024) -> center(within=document) -> sigmoid -> "
        "mean_one(within=document)\n"
        "  excess: excess_loss -> exp -> clip(max=5) -> mean_one"
    ),
    "choices": (
        "normalize: none\nreduction: sequence_mean\nfactors:\n"
        "  sign: column(quality) -> affine(1, step(-1.5, -1, at=3)) -> signed\n"
        "  low: loss -> indicator(mean-0.5*std) -> affine(1, 0.5) -> as_is\n"
        "  gate: error_norm -> mean(sequence) -> gate(0.95, decay=0.5) -> mean_one\n"
        "  coin: normalize -> affine(0.5, 0.5) -> bernoulli(correct=true, seed=7)\n"
        "  lots: error_norm -> mean(sequence) -> multinomial(0.5, correct=true)\n"
        "  best: loss -> select(linear(0.3, 0.8, over=4))\n"
        "  half: entropy -> threshold(quantile=linear(0.2, 0.7, over=4))\n"
        "  below: loss -> threshold(at=mean+1*std, side=below)\n"
        "  scaled: entropy(gamma=1) -> token_scale\n"
        "  short: focal -> mean(sequence) -> mean_one -> where(length(sequence), below=5)"
    ),
    "domains": (
        "factors:\n"
        "  slope: mean(domain) -> ema(linear(0.9, 0.5, over=4)) -> last(2) -> slope(3) -> "
        "temperature(1)\n"
        "  ado: mean(domain) -> ado(every=2, warmup=1)\n"
        "  bandit: mean(domain) -> bandit(linear(0.1, 0.3, over=4))\n"
        "  doge: doge(step_size=0.5)\n"
        "  doremi: doremi(step_size=linear(1, 0.5, over=4), smoothing=1e-2)\n"
        "  loading: dynamic_loading(code=2, data=3, docs=linear(3, 2, over=4), tables=2, tests=2)\n"
        "  exponentiated: mean(domain) -> exponentiated(0.5, absent=skip, unseen=2)\n"
        "  topical: mean(domain) -> topical(every=2, lift=step(1, 0, at=3))\n"
        "  topics: topics(topics, number=8, every=2, lift=step(1, 0, at=3))\n"
        "  validated: validation_bandit(linear(0.1, 0.3, over=4))\n"
        "  table: table(code=1, data=0.5, docs=1.5, tables=linear(0.5, 2, over=4), tests=1) -> "
        "mean_one\n"
        "apply: {slope: sampling, exponentiated: sampling, doremi: both}"
    ),
    "pools": (
        "start: 3\nreduction: sequence_mean\nfactors:\n"
        "  running: running(tau=2, decay=0.8)\n"
        "  within: tilted(document, tilt=2) -> standardize(within=domain) -> "
        "select(0.5, within=domain)\n"
        "  over: max(document) -> over(ref_loss -> mean(document)) -> "
        "temperature(1, within=domain)\n"
        "  sum: loss -> sum(sequence) -> temperature(median)\n"
        "  rank: rank(history=6) -> affine(1, shift=0.1) -> mean_one\n"
        "  one: uniform"
    ),
    "unscaled": "normalize: none\npipeline: loss -> minus(entropy -> affine(0.5)) -> abs -> as_is",
}
"""Specs that among them hold every stage, its schedules, and every way through a `Weighting`.

Compiled one by one, the stages would take three times as long: most of it is the same each time.
"""
GRAPHS = {
    **{f"mixed {name}": f"version: 1\n{text}\n" for name, text in MIXED.items()},
    **{name: CASES[name] for name in ("extra running", "spec dynamic-loading")},
}


def graphs():
    """Return what is compiled: the specs above, and what nobody has put into one of them."""
    plans = [tables.planned(text)[0] for text in GRAPHS.values()]
    written = [plan.spec.factors for plan in plans] + [plan.factors for plan in plans]
    steps = [step for factors in written for pipeline in factors.values() for step in pipeline]
    held = {getattr(step, "stage", step).name for step in steps}
    return [*GRAPHS, *(f"stage {name}" for name in tables.STAGE_PIPELINES if name not in held)]


STEPS = range(0, 7, 2)

each_case = for_each("case", CASES)
each_case_but_specs = for_each("case", [name for name in CASES if not name.startswith("spec ")])
each_case_without_luck = for_each(
    "case", [name for name, text in CASES.items() if not re.search("bernoulli|multinomial", text)]
)


def of_shipped_specs(law):
    """Return a law of stages as one of shipped specs, over which it takes as long again."""
    specs = [name for name in CASES if name.startswith("spec ")]
    return pytest.mark.slow(for_each("case", specs)(law.__wrapped__))


def weigh(case, signals, step=0):
    """Return the weights of a case."""
    return tables.built(CASES[case])(signals, step)


def draws(case):
    """Tell whether a case draws lots, whose luck depends on where a unit stands."""
    return "bernoulli" in CASES[case]


def test_the_table_holds_every_stage_and_every_spec(record_property):
    """The laws speak of all stages of the language and of all shipped specs, and both exist."""
    stages = len(tables.STAGE_PIPELINES)
    record_property("laws", f"each over {stages} stages and {len(SPECS)} specs")
    assert set(tables.STAGE_PIPELINES) == set(tables.own_stages())
    assert len(tables.STAGE_PIPELINES) >= 20
    assert len(SPECS) >= 10
    for name, pipeline in tables.STAGE_PIPELINES.items():
        spec = wt.loads(CASES[f"stage {name}"])
        assert name in {stage.name for stage in spec.factors["pipeline"]}, pipeline


@functools.cache
def subjects():
    """Return what the laws of `weighting.testing` are asked of: stages in pipelines, and specs."""
    return {f"stage {stage.name}": stage for stage in tables.one_of_each_stage()} | {
        name: wt.loads(text) for name, text in CASES.items() if not name.startswith("stage ")
    }


CLOSER = (check_compiles, check_many_ranks, check_no_host_sync)
EXCEPTIONS = {
    "bernoulli": {"order_free": "draws by the place of the unit"},
    "multinomial": {"order_free": "draws by the place of the unit"},
    "rank": {"order_free": "of a batch longer than its history it keeps the first scores"},
}
"""Laws that a stage breaks, and why it may."""


def of_kind(*kinds):
    """Return the names of some of them."""
    return [name for name in subjects() if name.startswith(kinds)]


@for_each("name", lambda: of_kind("stage ", "extra "))
def test_the_laws_of_the_kit_hold(name):
    """Every stage and every kind of spec passes what users check theirs with.

    Compiling, ranks, and waiting for a device are looked at below, more closely.
    """
    must_hold(subjects()[name])


@pytest.mark.slow
@for_each("name", lambda: of_kind("spec "))
def test_the_laws_of_the_kit_hold_of_shipped_specs(name):
    """Every shipped spec passes what users check theirs with."""
    must_hold(subjects()[name])


def must_hold(subject):
    """Check a stage or spec, but for what is excepted."""
    broken = {}
    expected = {law for stage in stages_of(subject) for law in EXCEPTIONS.get(stage.name, {})}
    prepared = as_subject(subject)
    for check in checks_for(prepared):
        if check not in CLOSER:
            try:
                check(prepared)
            except AssertionError as error:
                broken[name_of(check)] = str(error)
    assert broken.keys() <= expected, "\n".join(broken.values())
    assert broken.keys() == expected or isinstance(subject, wt.Spec), "an exception nobody needs"


def stages_of(subject):
    """Return the stages of a stage or a spec."""
    pipelines = subject.factors.values() if isinstance(subject, wt.Spec) else [(subject,)]
    return [stage for pipeline in pipelines for stage in pipeline]


@each_case
def test_signals_of_ignored_tokens_are_never_read(case):
    """NaN, infinity and 1e30 in the signals of ignored tokens change no bit of the outcome."""
    signals = tables.batch(seed=6)
    expected = weigh(case, signals)
    many = torch.tensor([torch.inf, 1e30, -1e30]).repeat(8).view(4, 6)
    for poison in (torch.nan, many):
        spoilt = tables.changed(
            signals, lambda _, x, p=poison: torch.where(signals.valid, x, p), tables.FLOATS
        )
        out = weigh(case, spoilt)
        assert torch.equal(out.token, expected.token)
        assert torch.equal(out.moments, expected.moments)


@each_case
def test_ids_of_ignored_tokens_are_never_read(case):
    """A domain, document or sequence id out of range is no error where the label is ignored."""
    signals = tables.batch(seed=6)
    expected = weigh(case, signals)
    poison = torch.tensor([-1, 99, 99]).repeat(8).view(4, 6)
    spoilt = tables.changed(
        signals, lambda _, x: torch.where(signals.valid, x, poison), ("domain_ids", "segment_ids")
    )
    assert torch.equal(weigh(case, spoilt).token, expected.token)


@each_case
def test_autocast_changes_nothing(case):
    """Inside an autocast region the weights are the same, bit by bit."""
    signals = tables.batch(seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = weigh(case, signals)
    assert torch.equal(out.token, weigh(case, signals).token)


@each_case
def test_signals_are_not_modified(case):
    """The given tensors hold the same values after the call, and were never written to."""
    signals = tables.batch(seed=8)
    fields = {n: getattr(signals, n) for n in (*tables.FLOATS, "domain_ids", "segment_ids")}
    fields["valid"] = signals.valid
    before = {name: (x.clone(), x._version) for name, x in fields.items()}
    weigh(case, signals)
    for name, (values, version) in before.items():
        assert torch.equal(fields[name], values), name
        assert fields[name]._version == version, name


@each_case_without_luck
def test_order_of_sequences_does_not_matter(case):
    """Permuting the rows permutes their weights."""
    signals = tables.batch(6, 5, seed=9)
    order = torch.randperm(6)
    out = weigh(case, tables.changed(signals, lambda _, x: x[order]))
    # Sums run in another order: float32 rounding.
    assert_close(out.token, weigh(case, signals).token[order], rtol=2e-5, atol=1e-6)


@each_case
def test_order_of_tokens_does_not_matter(case):
    """Permuting the tokens of the rows permutes their weights."""
    signals = tables.batch(6, 5, seed=10)
    order = torch.randperm(5)
    out = weigh(case, tables.changed(signals, lambda _, x: x[:, order]))
    # Sums run in another order: float32 rounding.
    assert_close(out.token, weigh(case, signals).token[:, order], rtol=2e-5, atol=1e-6)


@each_case_without_luck
def test_padding_does_not_matter(case):
    """Ignored tokens appended to every row, and ignored rows, change no weight."""
    signals = tables.batch(4, 6, seed=11)

    def padded(_, x):
        fill = torch.zeros(6, 9, dtype=x.dtype)
        fill[:4, :6] = x
        return fill

    out = weigh(case, tables.changed(signals, padded))
    # Sums run over more zeros, in another order: float32 rounding.
    assert_close(out.token[:4, :6], weigh(case, signals).token, rtol=2e-5, atol=1e-6)


SAMPLES = (6, 4, 5, 3)
"""Lengths of four samples, each padded to a row of its own where nothing else is said."""
ONE_ROW, TWO_ROWS = ((0, 1, 2, 3),), ((0, 1), (2, 3))
LAYOUTS = {
    "[T]": (ONE_ROW, True),
    "[1, T]": (ONE_ROW, True),
    "[2, L], ids from 0 in each row": (TWO_ROWS, False),
    "[2, L], ids that count on": (TWO_ROWS, True),
}
"""The samples of each row, and whether sequence ids count on from row to row."""


def padded_samples(seed):
    """Return four samples of unequal lengths as rows; every third batch has one without labels."""
    signals = tables.batch(len(SAMPLES), max(SAMPLES), seed=seed)
    here = torch.arange(max(SAMPLES)) < torch.tensor(SAMPLES)[:, None]
    here[2] &= seed % 3 > 0
    return dataclasses.replace(signals, valid=signals.valid & here)


def laid_out(signals, layout):
    """Return padded samples in a layout, with ids; and which token of the rows each token is."""
    rows, counting_on = LAYOUTS[layout]
    width = max(sum(SAMPLES[i] for i in row) for row in rows)
    places, sequences, segments = [], [], []
    for row in rows:
        tokens = [(i, t) for i in row for t in range(SAMPLES[i])]
        documents = [(i, int(signals.segment_ids[i, t])) for i, t in tokens]
        numbers = {document: n for n, document in enumerate(dict.fromkeys(documents))}
        fill = [0] * (width - len(tokens))
        places.append([i * max(SAMPLES) + t for i, t in tokens] + [-1 for _ in fill])
        sequences.append([i - (0 if counting_on else row[0]) for i, _ in tokens] + fill)
        segments.append([numbers[document] for document in documents] + fill)
    at = torch.tensor(places)
    new = tables.changed(signals, lambda _, x: x.reshape(-1)[at.clamp(min=0)])
    ids = {"sequence_ids": torch.tensor(sequences), "segment_ids": torch.tensor(segments)}
    new = dataclasses.replace(new, valid=new.valid & (at >= 0), **ids)
    if layout == "[T]":
        new, at = tables.changed(new, lambda _, x: x[0]), at[0]
    return new, at


@each_case_but_specs
def test_sequences_weigh_alike_however_they_are_laid_out(case):
    """Samples that ids tell weigh, and are remembered, as the same samples do as padded rows."""
    by_row = tables.built(CASES[case])
    by_id = {layout: tables.built(CASES[case]) for layout in LAYOUTS}
    for step in range(3 if by_row.plan.has_state else 2):
        signals = padded_samples(seed=120 + step)
        expected = by_row(signals, step)
        for layout, fn in by_id.items():
            new, at = laid_out(signals, layout)
            got = fn(new, step)
            there = at >= 0
            # Sums per row and per id run in another order: float32 rounding.
            for mine, other in (
                (got.token, expected.token),
                *zip(got.factors.values(), expected.factors.values(), strict=True),
            ):
                assert_close(mine[there], other.reshape(-1)[at[there]], rtol=2e-5, atol=1e-6)
                assert not mine[~there].any(), layout
            assert_close(got.moments, expected.moments, rtol=1e-4, atol=1e-4)
    for name, value in by_row.state_dict().items():
        for fn in by_id.values():
            assert_close(fn.get_buffer(name), value, rtol=1e-4, atol=1e-5)  # as above


test_sequences_of_shipped_specs_weigh_alike_however_they_are_laid_out = of_shipped_specs(
    test_sequences_weigh_alike_however_they_are_laid_out
)


def test_a_layout_keeps_every_token_once():
    """The law above compares every token of every sample, in each layout."""
    for layout in LAYOUTS:
        _, at = laid_out(padded_samples(seed=120), layout)
        assert sorted(at[at >= 0].tolist()) == [
            i * max(SAMPLES) + t for i, length in enumerate(SAMPLES) for t in range(length)
        ]


@for_each("name", tables.own_stages())
def test_every_number_of_a_stage_may_be_a_schedule(name):
    """No argument of a stage is a fraction by default: such a number is a schedule."""
    stage = tables.own_stages()[name]
    assert issubclass(stage, Stage)
    for field, info in stage.model_fields.items():
        assert not isinstance(info.default, float), field
        # tilt shapes the pool, unseen is where a state starts
        assert info.annotation is not float or field in {"tilt", "unseen"}, field


@each_case
def test_looking_changes_nothing(case):
    """Outside training no call changes the state, so that the same call gives the same bits."""
    signals, fn = tables.batch(seed=15), tables.built(CASES[case])
    fn(tables.batch(seed=16), 0)
    fn.eval()
    before = {name: x.clone() for name, x in fn.state_dict().items()}
    first, again = fn(signals, 1), fn(signals, 1)
    assert torch.equal(first.token, again.token)
    assert torch.equal(first.moments, again.moments)
    for name, x in fn.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_the_laws_of_state_are_asked_of_some_cases():
    """The laws of state speak of several stages that have one, and others have none."""
    remembering = {name for name, text in CASES.items() if [*tables.built(text).buffers()]}
    assert {f"stage {n}" for n in ("doremi", "exponentiated", "rank", "running")} <= remembering
    assert {"spec uniform", "spec linupper", "spec mile"}.isdisjoint(remembering)


@each_case_but_specs
def test_no_value_is_ever_looked_at(case, monkeypatch):
    """It runs on tensors that have shapes but no values, so nothing waits for a device."""
    # The only thing here that does not know the device without values.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    fn = tables.built(CASES[case]).to("meta")
    signals = tables.changed(tables.batch(seed=18), lambda _, x: x.to("meta"))
    step = torch.tensor(3, device="meta")
    with Census() as census:
        out = fn(signals, step)
    assert not census.waits
    assert out.token.device.type == "meta"
    assert out.token.shape == (4, 6)


test_no_value_is_ever_looked_at_by_shipped_specs = of_shipped_specs(test_no_value_is_ever_looked_at)


@settings(max_examples=40)
@given(tables.spec_texts())
def test_any_spec_reads_back_from_both_spellings(text):
    """Loading what was dumped gives an equal spec, and dumping that gives the same text."""
    spec = wt.loads(text)
    for spelling in ("arrow", "yaml"):
        written = wt.dumps(spec, spelling)
        again = wt.loads(written)
        assert again == spec
        assert again.hash == spec.hash
        assert wt.dumps(again, spelling) == written


@settings(max_examples=40)
@given(tables.spec_texts(), st.integers(0, 1000))
def test_any_spec_gives_sound_weights(text, step):
    """Any legal pipeline gives finite, non-negative weights, 0 where ignored, at any step."""
    spec = wt.loads(text)
    names = set()
    for pipeline in spec.factors.values():
        names |= {n for stage in pipeline for n in getattr(stage, "weights", {})}
    entries = [getattr(stage, "weights", None) for p in spec.factors.values() for stage in p]
    domains = sorted(names) or ["only"]
    if any(set(table) != names for table in entries if table):  # no data fits both
        with pytest.raises(wt.SpecError):
            wt.build(spec, domains=domains)
        return
    signals = tables.batch(seed=17)
    ids = signals.domain_ids.clamp(max=len(domains) - 1)
    signals = dataclasses.replace(signals, domain_ids=ids)
    out = wt.build(spec, domains=domains)(signals, step)
    assert out.token.isfinite().all()
    assert (out.token >= 0).all()
    assert (out.token[~signals.valid] == 0).all()


# Compiling ---------------------------------------------------------------------------------------


def _parity(text, backend):
    """Compile a spec once and compare it with eager over steps, values and masks that change."""
    torch._dynamo.reset()
    fn = tables.built(text)
    # A module of its own: state advances on both sides.
    compiled = torch.compile(tables.built(text), fullgraph=True, backend=backend)
    for step in STEPS:
        keep = (0.0, 0.3, 0.9)[step % 3]
        signals = tables.batch(seed=30 + step, keep=keep)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(signals, torch.tensor(step))
        expected = fn(signals, torch.tensor(step))
        # The same operations, fused or decomposed: float32 rounding.
        assert_close(out.token, expected.token, rtol=1e-5, atol=1e-6)
        assert_close(out.moments, expected.moments, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@for_each("case", graphs)
def test_one_graph_serves_every_step_and_never_waits(case):
    """It compiles whole, once for many steps, into operations none of which asks the device."""
    traced, census = [], Census()

    def note(graph, _inputs):
        def run(*inputs):
            with census:
                return graph(*inputs)

        traced.append(graph)
        return run

    _parity({**CASES, **GRAPHS}[case], note)
    assert len(traced) == 1
    assert len(census.names) > 3 * len(STEPS), "the census saw nothing"
    assert not census.waits


@pytest.mark.slow
def test_compiled_weights_are_the_eager_ones():
    """Torch's own compiler gives the eager weights, with one compilation for many steps.

    It is asked of one spec, which pools, scales, caps and remembers nothing: it takes ten seconds.
    What it does before it writes code is asked of one that remembers.
    """
    _parity(CASES["spec linupper"], "inductor")
    _parity(CASES["extra running"], "aot_eager")


def test_the_census_sees_what_waits():
    """The law above would catch an item(), a boolean mask and a nonzero."""
    x = torch.tensor([0.0, 1.0])
    waiting = (
        *(torch.nonzero, lambda x: x[x > 0], lambda x: x[0].item(), lambda x: x.long().bincount()),
        *(torch.unique, lambda x: x.masked_select(x > 0), lambda x: x.index_put((x > 0,), x[0])),
    )
    for offend in waiting:
        with Census() as census:
            offend(x)
        assert len(census.waits) >= 1, census.names
    with Census() as census:
        torch.where(x > 0, x, 0).index_add(0, x.long(), x)[x.long()].index_put((x.long(),), x)
    assert not census.waits


# Ranks -------------------------------------------------------------------------------------------

RANK_CASES = [name for name in CASES if not name.startswith("stage ")] + [
    f"stage {name}"
    for name in (
        *("mean", "max", "sum", "table", "clip", "floor", "focal", "as_is", "bernoulli"),
        *("doremi", "exponentiated", "rank", "running", "select", "threshold", "tilted"),
    )
]


@for_each("case", RANK_CASES)
def test_many_ranks_weigh_like_one(case):
    """A global batch cut into ranks, one of them without a label, weighs as it does whole.

    Two ranks are looked at in `test_hostile_signals`.  Summed or extremised over ranks, the
    moments give the statistics of the whole batch.
    """
    ranks, signals = 4, tables.batch(8, 5, seed=40)
    signals.valid[2:4] = False  # of the second rank
    expected = weigh(case, signals, 2)

    def part(rank, collectives):
        mine = tables.changed(signals, lambda _, x: x.chunk(ranks)[rank])
        return tables.built(CASES[case], collectives=collectives)(mine, 2)

    parts = tables.Lockstep(ranks).run(part)
    # Partial sums are added in another order: float32 rounding.
    assert_close(torch.cat([p.token for p in parts]), expected.token, rtol=1e-5, atol=1e-6)
    for name, weight in expected.factors.items():
        assert_close(torch.cat([p.factors[name] for p in parts]), weight, rtol=1e-5, atol=1e-6)

    moments = torch.stack([part.moments for part in parts])
    low, high = MOMENTS.index("min"), MOMENTS.index("max")
    combined = moments.sum(0)
    combined[:, low], combined[:, high] = moments[..., low].amin(0), moments[..., high].amax(0)
    got = summarize(combined, tuple(expected.factors))
    for name, value in expected.metrics.items():
        # Partial sums are added in another order: float32 rounding.
        assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {got[name]}, {value}")


@pytest.mark.slow
@for_each("flat", [True, False])
@for_each("case", RANK_CASES)
def test_ranks_of_sequences_told_by_ids_weigh_like_one(case, flat):
    """The same holds for sequences and documents that ids of its own tell on each rank."""
    signals = tables.batch(4, 6, seed=42)
    expected = weigh(case, signals, 1)

    def part(rank, collectives):
        mine = tables.changed(signals, lambda _, x: x.chunk(2)[rank])
        rows = torch.arange(2)[:, None].expand(2, 6)
        ids = {"segment_ids": mine.segment_ids + 6 * rows, "sequence_ids": rows}
        shape = (-1,) if flat else (1, -1)
        new = tables.changed(dataclasses.replace(mine, **ids), lambda _, x: x.reshape(shape))
        return tables.built(CASES[case], collectives=collectives)(new, 1).token.flatten()

    got = torch.cat(tables.Lockstep(2).run(part))
    # Partial sums are added in another order: float32 rounding.
    assert_close(got, expected.token.reshape(-1), rtol=2e-5, atol=1e-6)


@for_each("case", RANK_CASES)
def test_sequences_told_by_ids_are_cut_over_ranks_like_rows(case):
    """Two samples in each row, the rows cut over two ranks each: they weigh as if they were rows.

    The second sample of a row begins on the first rank and ends on the second.
    """
    signals = tables.batch(4, 8, seed=47)
    expected = weigh(case, signals, 1).token
    rows = torch.arange(4)[:, None].expand(4, 8)
    ids = {"segment_ids": signals.segment_ids + 8 * (rows % 2), "sequence_ids": rows % 2}
    folded = tables.changed(dataclasses.replace(signals, **ids), lambda _, x: x.reshape(2, 16))

    def one(rank, collectives):
        row, part = divmod(rank, 2)
        mine = tables.changed(folded, lambda _, x: cut(x[row : row + 1], part, 2, in_order=False))
        return tables.built(CASES[case], collectives=collectives)(mine, 1).token

    outs = tables.Lockstep(4, parts=2).run(one)
    got = torch.cat([joined(outs[2 * row : 2 * row + 2], in_order=False) for row in range(2)])
    # Partial sums are added in another order: float32 rounding.
    assert_close(got.view(4, 8), expected, rtol=2e-5, atol=1e-6)


def cut(x, part, parts, in_order):
    """Return a part of every row: the next piece of it, or the next from its head and its tail."""
    if in_order:
        return x.chunk(parts, dim=1)[part]
    pieces = x.chunk(2 * parts, dim=1)
    return torch.cat([pieces[part], pieces[-1 - part]], dim=1)


def joined(cuts, in_order):
    """Return rows put together again from their parts."""
    if in_order:
        return torch.cat(cuts, dim=1)
    heads, tails = zip(*(x.chunk(2, dim=1) for x in cuts), strict=True)
    return torch.cat([*heads, *reversed(tails)], dim=1)


def test_cut_rows_are_joined_again():
    """Of two ranks one gets the first and the last quarter of a row; together they hold it all."""
    rows = torch.arange(16).view(2, 8)
    assert cut(rows, 0, 2, in_order=False)[0].tolist() == [0, 1, 6, 7]
    assert cut(rows, 1, 2, in_order=False)[0].tolist() == [2, 3, 4, 5]
    for in_order in (True, False):
        assert torch.equal(joined([cut(rows, p, 2, in_order) for p in (0, 1)], in_order), rows)


CUTS = [(case, 4, False) for case in CASES] + [
    (case, 2, True) for case in RANK_CASES if not case.startswith("spec ")
]
"""Every case in pieces from head and tail of a row, and every kind of stage in pieces in order."""


@pytest.mark.slow
@for_each("case, ranks, in_order", CUTS)
def test_sequences_cut_over_ranks_weigh_like_whole_ones(case, ranks, in_order):
    """Parts of sequences on two ranks each weigh, and remember, what whole sequences do.

    Documents and sequences span the ranks, and some parts hold no label; ids of documents count
    along the whole row.
    """
    batches = [tables.batch(4, 8, seed=45 + i, keep=(0.9, 0.5)[i]) for i in range(2)]
    for signals in batches:
        signals.valid[0, :4] = False
    assert int(batches[0].segment_ids[:, 4:].max()) >= 4, "ids exceed the length of a part"
    whole = tables.built(CASES[case])
    expected = [whole(signals, step) for step, signals in enumerate(batches)]
    rows = ranks // 2

    def one(rank, collectives):
        row, part = divmod(rank, 2)
        mine = [
            tables.changed(x, lambda _, x: cut(x.chunk(rows)[row], part, 2, in_order))
            for x in batches
        ]
        fn = tables.built(CASES[case], collectives=collectives)
        return [fn(signals, step) for step, signals in enumerate(mine)], fn

    outs = tables.Lockstep(ranks, parts=2).run(one)

    def gathered(of):
        cuts = [of(weights) for weights, _ in outs]
        return torch.cat([joined(cuts[2 * row : 2 * row + 2], in_order) for row in range(rows)])

    for step, wanted in enumerate(expected):
        # Partial sums are added in another order: float32 rounding.
        got = gathered(lambda weights, step=step: weights[step].token)
        assert_close(got, wanted.token, rtol=2e-5, atol=1e-6)
        for name, weight in wanted.factors.items():
            got = gathered(lambda weights, at=(step, name): weights[at[0]].factors[at[1]])
            assert_close(got, weight, rtol=2e-5, atol=1e-6)
    for name, value in whole.state_dict().items():
        for _, fn in outs:
            assert_close(fn.get_buffer(name), value, rtol=1e-4, atol=1e-5)  # as above


# Local and late ----------------------------------------------------------------------------------


@functools.cache
def plans():
    """Return the plan of every case."""
    return {case: tables.planned(text)[0] for case, text in CASES.items()}


def local():
    """Return the cases that wait for nothing."""
    return [case for case, plan in plans().items() if plan.token_local]


def late():
    """Return cases whose tokens wait for no number of their own; uniform is the host's own loss."""
    waits = {case: plan for case, plan in plans().items() if plan.deferred_level != "token"}
    return [case for case, plan in waits.items() if not plan.identity]


@functools.cache
def chunk_batches():
    """Return hard batches, and more with zeros, signals that are not finite, and many tokens."""
    # A score below 1e-20 counts as that much; the promise is for scores above it.
    hard = hard_batches(len(tables.DOMAINS), (*tables.COLUMNS, "example"))
    del hard["certain predictions"]
    plain = tables.batch(seed=50, keep=0.8)
    spoilt = {
        "loss": plain.loss.index_put((torch.tensor([1, 2]), torch.tensor([2, 3])), bad()),
        "entropy": plain.entropy.index_put((torch.tensor([0, 2]), torch.tensor([0, 1])), bad()),
    }
    loss = plain.loss.where(plain.loss > 2, 0)
    columns = {name: x.where(x > 1, 0) for name, x in plain.columns.items()}
    return {
        **hard,
        "not finite": dataclasses.replace(plain, **spoilt),
        "zeros among others": dataclasses.replace(
            plain, loss=loss, entropy=loss, target_prob=(-loss).exp(), columns=columns
        ),
        "larger": tables.batch(8, 33, seed=51),
    }


def bad():
    """Return values that are not finite."""
    return torch.tensor([torch.nan, torch.inf])


def test_some_cases_are_local_and_some_late():
    """The two laws below speak of several cases of each kind."""
    assert {"spec mile", "spec linupper-x-mile", "spec dft", "spec uniform"} <= {*local()}
    levels = {"sequence", "domain", "sequence of a domain"}
    assert {plans()[case].deferred_level for case in late()} == {None, *levels}
    assert {"spec rgd", "extra sequence-mean", "extra uniform-by-sequence"} <= {*late()}
    assert {"spec cvar", "spec rho-1", "stage max"}.isdisjoint(late())
    assert len(local()) >= 20
    assert len(late()) >= 50


@for_each("case", local)
def test_a_chunk_knows_its_local_part(case):
    """However the tokens are cut, the local part of the pieces is that of the whole."""
    fn = tables.built(CASES[case])
    for name, signals in chunk_batches().items():
        whole = fn.local_part(signals, 2).reshape(-1)
        assert whole.isfinite().all(), name
        for size in (1, 7, 1000):
            count = -(-whole.numel() // size)

            def piece(i, signals=signals, size=size):
                return tables.changed(
                    signals, lambda _, x: x.reshape(-1)[i * size : (i + 1) * size]
                )

            got = torch.cat([fn.local_part(piece(i), 2) for i in range(min(count, 4))])
            # A vector unit and a scalar one may round an exponential differently.
            assert_close(got, whole[: len(got)], rtol=1e-6, atol=0, msg=f"{name}, {size}")


@for_each("case", late)
def test_the_rest_of_a_weight_is_one_number_per_late_unit(case):
    """Weights are the local part times one number, for all tokens or for each late unit.

    That number is at least 0: signs are those of the local part.
    """
    for name, signals in chunk_batches().items():
        fn = tables.built(CASES[case])
        token = fn(signals, 2).token.double()
        part = fn.local_part(signals, 2).double()
        level, unit = fn.plan.deferred_level, torch.zeros_like(token, dtype=torch.int64)
        if "sequence" in (level or ""):
            unit += torch.arange(len(token)).view(-1, *[1] * (token.dim() - 1))
        if "domain" in (level or ""):
            unit = unit * len(tables.DOMAINS) + signals.domain_ids.clamp(0, len(tables.DOMAINS) - 1)
        # Ignored tokens, whose ids may be anything, weigh nothing on either side.
        total, whole = torch.zeros(2, token.numel() * len(tables.DOMAINS)).double()
        total = total.index_add(0, unit.flatten(), part.abs().flatten())
        whole = whole.index_add(0, unit.flatten(), token.abs().flatten())
        number = whole / torch.where(total > 0, total, 1)
        # Scores of 0 count as 1e-20 beside others; products in float32.
        assert_close(part * number[unit], token, rtol=2e-6, atol=1e-6, msg=name)


MAY_LOOK_AROUND = {
    "threshold": "its threshold may be a quantile",
    "indicator": "its threshold may be a statistic",
}
"""Stages that are pointwise with some arguments only, and why they do not say so."""


@functools.cache
def every_stage():
    """Return the stages of all cases but pools, sugar spelled out, by what one writes for them."""
    others = [f"loss -> {x}" for x in ("threshold(1)", "indicator(1) -> mean_one")]
    every = [*plans().values(), *(tables.planned(text)[0] for text in others)]
    stages = [step.stage for plan in every for steps in plan.factors.values() for step in steps]
    return {arrow_text((x,)): x for x in stages if not isinstance(x, wt.Pool)}


def stands_alone(stage):
    """Tell whether a stage passes for pointwise, whatever it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stage), "pointwise", True)
        try:
            check_pointwise(stage)
        except AssertionError:
            return False
    return True


@for_each("text", every_stage)
def test_a_stage_that_stands_alone_says_so(text):
    """What gives a unit the same alone as among others is `pointwise`, and nothing else is."""
    stage = every_stage()[text]
    if stage.name in MAY_LOOK_AROUND:
        assert not stage.pointwise
    else:
        assert stage.pointwise == stands_alone(stage)


def test_stages_of_both_kinds_are_looked_at():
    """The law above speaks of many pointwise stages and of others, and excepts none needlessly."""
    stages = every_stage().values()
    names = {stage.name for stage in stages if stage.pointwise}
    assert len(names) >= 15
    assert {"normalize", "temperature", "select", "clamp"}.isdisjoint(names)
    alone = {stage.name for stage in stages if not stage.pointwise and stands_alone(stage)}
    assert alone == {*MAY_LOOK_AROUND}


# Caps and floors ---------------------------------------------------------------------------------


def capped():
    """Return cases and their factors that end in `clamp`."""
    return [
        (case, factor)
        for case, plan in plans().items()
        for factor, pipeline in plan.spec.factors.items()
        if pipeline[-1].name == "clamp"
    ]


def test_some_cases_are_capped():
    """The law of the cap speaks of several pipelines."""
    assert len(capped()) >= 8


@pytest.mark.slow
@for_each("case, factor", capped)
def test_no_unit_weighs_more_than_its_cap(case, factor):
    """A factor that ends in `clamp` has no unit above it and keeps mean one over its units."""
    steps = expand(plans()[case].spec.factors[factor])
    level, clamp = steps[-1].level, steps[-1].stage
    values = [value for step in steps for _, value in step.stage]
    moves = any(isinstance(x, Schedule) and not isinstance(x, Constant) for x in values)
    for name, signals in hard_batches(len(tables.DOMAINS), tables.COLUMNS).items():
        for step in STEPS if moves else STEPS[:1]:
            weight = weigh(case, signals, step).factors[factor]
            cap = clamp.max(torch.tensor(step)).item()
            # The projection is exact to float32 rounding.
            assert weight.max() <= cap * (1 + 1e-5), name
            if level == "sequence" and signals.valid.any():
                units = weight.amax(1)[signals.valid.any(1)]
                # A float32 sum of a few weights.
                assert_close(units.mean().item(), 1.0, rtol=1e-5, atol=0, msg=name)

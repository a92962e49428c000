"""Batches, pipelines and ranks for the tests: the tables of cases, and hypothesis strategies."""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hypothesis import strategies as st
from reference import Batch

import weighting as wt
from weighting.build import plan_of
from weighting.registry import stages

SPECS = Path(__file__).resolve().parent.parent / "specs"
BURN_IN = {
    "linupper-gpt2",
    "quadratic-gpt2",
    "extremes-gpt2",
    "dro-kl-gpt2",
    "doge-table-x-linupper",
    "doremi-table-x-linupper",
}
"""Specs that weigh all alike for a thousand steps, and then as their headers say."""
COLUMNS = (
    "quality",
    "weight",
    "topk_entropy_20",
    "short_loss_1024",
    "short_loss_4096",
    "position",
    "token_id",
    "ref_entropy_old",
    "kl",
    "label_count",
    "ref_loss_base",
    "ref_loss_better",
    "keep",
    "label_is_top",
)
"""Columns of the batches, by the names the shipped specs read them under."""
DOMAINS = ("code", "data", "docs", "tables", "tests")
_TABLE = "table(code=1, data=0.5, docs=1.5, tables=linear(0.5, 2, over=4), tests=0)"

STAGE_PIPELINES = {
    "abs": "normalize -> abs -> temperature(0.7)",
    "ado": "mean(domain) -> ado(every=2, warmup=1)",
    "affine": "affine(step(2, 0.5, at=3), shift=-1) -> temperature(1)",
    "as_is": "error_norm -> as_is",
    "bandit": "mean(domain) -> bandit(linear(0.1, 0.3, over=4))",
    "bernoulli": "normalize -> affine(0.5, 0.5) -> bernoulli(correct=true, seed=7)",
    "center": "center(median) -> sigmoid -> mean_one",
    "clamp": "normalize -> temperature(0.3) -> clamp(linear(2, 1.2, over=4))",
    "clip": "normalize -> clip(min=-0.5, max=linear(0.1, 0.6, over=5)) -> temperature(0.5)",
    "column": "column(quality) -> mean_one",
    "context_gain": "context_gain(1024) -> abs -> mean_one(within=document)",
    "correct": "correct -> affine(-1, step(1.5, 2, at=3)) -> mean_one",
    "doge": "doge(step_size=0.5)",
    "doremi": "doremi(step_size=linear(1, 0.5, over=4), smoothing=1e-2)",
    "dynamic_loading": (
        "dynamic_loading(code=2, data=3, docs=linear(3, 2, over=4), tables=2, tests=2.6)"
    ),
    "effective_number": "token_id -> effective_number(2) -> affine(1, 0.5) -> mean_one",
    "ema": "mean(domain) -> ema(linear(0.9, 0.5, over=4)) -> temperature(1)",
    "entropy": "entropy(gamma=linear(1, 2, over=4), sigma=0.5) -> mean_one",
    "error_norm": "error_norm -> mean(sequence) -> mean_one",
    "excess_loss": "excess_loss -> exp -> clip(max=5) -> mean_one",
    "exp": "affine(0.5) -> exp -> mean_one",
    "exponentiated": "mean(domain) -> exponentiated(0.5, absent=skip, unseen=2)",
    "extremes": "normalize -> extremes -> temperature(0.4)",
    "floor": "normalize -> temperature(0.3) -> floor(linear(0.5, 0.1, over=4))",
    "focal": "focal(gamma=cosine(0.5, 2, over=5)) -> mean_one",
    "forgotten": "forgotten(examples=7) -> affine(1, 0.2) -> mean_one",
    "gate": "error_norm -> mean(sequence) -> gate(0.95, decay=0.5) -> mean_one",
    "indicator": "loss -> indicator(mean-0.5*std) -> affine(1, 0.5) -> mean_one",
    "interpolate": "normalize -> temperature(0.4) -> interpolate(exponential(1, 0.1, over=4))",
    "kl": "kl -> affine(step(0.5, 1, at=3)) -> mean_one",
    "last": "mean(domain) -> last(1) -> over(mean(domain) -> last(2)) -> temperature(2)",
    "length": "length(document) -> pow(-0.5) -> mean_one",
    "linupper": "normalize -> linupper(alpha=linear(1, 1.5, over=3)) -> temperature(0.4)",
    "log": "mean(domain) -> log -> temperature(1)",
    "loss": "loss -> mean_one",
    "max": "max(document) -> temperature(2)",
    "minus": "loss -> minus(entropy -> affine(0.5)) -> abs -> mean_one",
    "mean": "entropy -> mean(domain) -> temperature(0.8)",
    "mean_one": "target_prob -> affine(scale=-1, shift=1) -> mean_one",
    "multinomial": "error_norm -> mean(sequence) -> multinomial(0.5, correct=true)",
    "over": "max(document) -> over(ref_loss -> mean(document)) -> normalize -> temperature(1)",
    "position": "position -> affine(0.1) -> exp -> mean_one",
    "plus": "mean(domain) -> plus(ref_loss -> times(entropy) -> mean(domain)) -> temperature(1)",
    "remembered": "remembered(examples=7) -> mean(document) -> temperature(2)",
    "ref_entropy": "ref_entropy(old) -> mean(document) -> temperature(2)",
    "ref_loss": "ref_loss -> affine(step(0.5, 1, at=3)) -> mean_one",
    "short_loss": "short_loss(1024) -> mean_one",
    "times": "mean(sequence) -> times(ref_loss -> mean(sequence)) -> temperature(2)",
    "normalize": "normalize -> temperature(0.4)",
    "pow": "normalize -> abs -> pow(linear(0.5, 3, over=4)) -> temperature(1)",
    "quadratic": "normalize -> quadratic -> temperature(0.4)",
    "rank": "rank(history=6) -> affine(1, shift=0.1) -> mean_one",
    "running": "running(tau=2, decay=0.8)",
    "select": "excess_loss -> select(linear(0.3, 0.8, over=4))",
    "signed": "column(quality) -> affine(1, step(-1.5, -1, at=3)) -> signed",
    "sigmoid": "entropy -> center(within=document) -> sigmoid -> mean_one",
    "slope": "mean(domain) -> slope(3) -> temperature(1)",
    "standardize": "standardize -> temperature(linear(1, 2, over=4))",
    "sum": "loss -> sum(document) -> normalize -> temperature(1)",
    "table": f"{_TABLE} -> mean_one",
    "tanh": "ref_loss -> standardize(within=sequence) -> tanh -> temperature(0.5)",
    "target_prob": "target_prob -> pow(0.5) -> mean_one",
    "temperature": "temperature(piecewise({0: 4, 2: 1, 5: 2}))",
    "threshold": "entropy -> threshold(quantile=linear(0.2, 0.7, over=4))",
    "tilted": "tilted(document, tilt=2) -> temperature(1)",
    "topical": "mean(domain) -> topical(every=2, lift=step(1, 0, at=3))",
    "topics": "topics(topics, number=8, every=2, lift=step(1, 0, at=3))",
    "topk_entropy": "topk_entropy(20) -> normalize(within=sequence) -> temperature(1)",
    "token_id": "token_id -> indicator(1) -> affine(1, 0.5) -> mean_one",
    "token_scale": "entropy(gamma=1) -> token_scale",
    "uniform": "uniform",
    "validation_bandit": "validation_bandit(linear(0.1, 0.3, over=4))",
    "variability": "variability(examples=7) -> affine(1, 0.2) -> mean_one",
    "where": "focal -> as_is -> where(position, at_least=step(0, 1, at=3), below=2)",
}
"""For every stage of the language a small pipeline in which it stands legally."""

EXTRA_SPECS = {
    "sequence-mean": "reduction: sequence_mean\npipeline: normalize -> temperature(0.5)",
    "uniform-by-sequence": "reduction: sequence_mean\npipeline: uniform",
    "within domains": "pipeline: normalize(within=domain) -> temperature(0.5, within=domain)",
    "documents within domains": (
        "pipeline: max(document) -> standardize(within=domain) -> select(0.5, within=domain)"
    ),
    "statistics": (
        "factors:\n"
        "  a: affine(-1) -> temperature(median)\n"
        "  b: loss -> threshold(at=mean+1*std, side=below)\n"
        "  c: normalize(delta=linear(1, 2, over=4)) -> temperature(1)"
    ),
    "document-mean": "reduction: document_mean\npipeline: focal -> mean_one",
    "none-by-document": (
        "normalize: none\nreduction: document_mean\npipeline: normalize -> temperature(0.5)"
    ),
    "none": "normalize: none\npipeline: normalize -> temperature(0.5) -> clamp(2/n)",
    "none-by-sequence": "normalize: none\nreduction: sequence_mean\npipeline: focal -> mean_one",
    "all-levels": (
        "factors:\n"
        "  domain: mean(domain) -> normalize -> temperature(1) -> clamp(2/n) -> floor(0.1/n)\n"
        "  document: max(document) -> normalize -> linupper -> temperature(1) -> clamp(1.5)\n"
        "  instance: sum(sequence) -> temperature(20) -> floor(0.2)\n"
        "  token: entropy(1) -> token_scale -> interpolate(0.5)"
    ),
    "tokens": (
        "pipeline: loss -> normalize -> abs -> temperature(0.5) -> clamp(1.5) -> floor(0.5/n)"
    ),
    "late start": (
        "start: 3\nfactors:\n"
        "  instance: normalize -> temperature(0.5)\n"
        "  token: entropy(1) -> token_scale"
    ),
    "running": "scope: running\npipeline: normalize -> temperature(0.5) -> clamp(2/n)",
    "both": (
        "factors:\n"
        "  draw: table(code=1, data=0.5, docs=1.5, tables=1, tests=2) -> mean_one\n"
        "  domain: doremi -> interpolate(0.5)\n"
        "  instance: normalize -> temperature(0.5)\n"
        "apply: {draw: sampling, domain: both}"
    ),
    "both alone": f"apply: both\npipeline: {_TABLE} -> mean_one",
    "live draw": (
        "factors:\n"
        "  domain: mean(domain) -> exponentiated(0.5) -> floor(0.1)\n"
        "  token: entropy(1) -> token_scale\n"
        "apply: sampling"
    ),
    "some sequences": (
        "factors:\n"
        "  a: normalize -> temperature(0.5) -> where(length(sequence), below=5)\n"
        "  b: entropy -> mean_one -> where(token_id, at_least=1)"
    ),
    "remembered draw": (
        "apply: {domain: sampling}\nfactors:\n"
        "  domain: mean(domain) -> last -> over(mean(domain) -> ema(0.5)) -> temperature(1)\n"
        "  token: entropy -> mean_one"
    ),
    "signed with sizes of every level": (
        "factors:\n"
        "  sign: column(quality) -> affine(1, -1.5) -> signed\n"
        "  domain: mean(domain) -> temperature(1)\n"
        "  instance: normalize -> temperature(0.5) -> clamp(2/n)\n"
        "  token: entropy(1) -> token_scale"
    ),
    "signed sequences": (
        "reduction: sequence_mean\nfactors:\n"
        "  sign: entropy -> affine(1, -2) -> signed\n"
        "  instance: normalize -> temperature(0.5)"
    ),
    "signed selection": (
        "normalize: none\nfactors:\n"
        "  sign: column(quality) -> affine(-1, 1.5) -> signed\n"
        "  token: loss -> select(0.5)"
    ),
    "signed domains": (
        "reduction: domain_mean\npipeline: table(code=1, data=-0.5, docs=1, tables=0, tests=-1) -> "
        "signed"
    ),
    "drop": "on_nonfinite: drop\npipeline: normalize -> temperature(0.5)",
}
"""What neither the shipped specs nor `STAGE_PIPELINES` reach."""


def _text(body):
    """Return spec text of options and a pipeline, or of a pipeline alone."""
    if "pipeline: " not in body and "factors:" not in body:
        body = f"pipeline: '{body}'"
    return f"version: 1\n{body}\n"


SPEC_TEXTS = {path.stem: path.read_text() for path in sorted(SPECS.glob("*.yaml"))}
"""The shipped specs."""

CASES = {
    **{f"spec {name}": text for name, text in SPEC_TEXTS.items()},
    **{f"stage {name}": _text(pipeline) for name, pipeline in STAGE_PIPELINES.items()},
    **{f"extra {name}": _text(body) for name, body in EXTRA_SPECS.items()},
}
"""Every spec the laws are checked on."""


def own_stages():
    """Return the stages of the language itself, without those other tests may have registered."""
    return {n: c for n, c in stages().items() if c.__module__.startswith("weighting.stages.")}


@functools.cache
def planned(text):
    """Return the plan of a spec text, and the domains of its table, or else `DOMAINS`."""
    plan = plan_of(wt.loads(text))
    tables = [s.weights for p in plan.spec.factors.values() for s in p if s.name == "table"]
    return plan, tuple(tables[0]) if tables else DOMAINS


OF_LOGITS = {"entropy", "error_norm", "target_prob", "columns.label_is_top"}
"""Signals that the loss makes from logits, beside the entropies of the largest."""


def ways(texts=SPEC_TEXTS):
    """Return one spec of each way through the loss from hidden states, by name.

    It goes by when weights are known, what is read from logits, and what a selection drops.
    """
    found = {}
    for name, text in texts.items():
        plan = planned(text)[0]
        made = frozenset(x for x in plan.needs if x in OF_LOGITS or "topk_entropy" in x)
        late = plan.deferred_level, plan.domain_late != (), plan.max_active_fraction(None) < 1
        found.setdefault((plan.identity, plan.spec.scope, made, *late), name)
    return [*found.values()]


def in_modes(texts):
    """Return every spec with the mode that the library takes, and one of each way with the others.

    The weights of a spec are made in the same place in all modes.
    """
    others = [(name, x) for name in ways(texts) for x in ("keep", "recompute", "full")]
    return [*((name, "auto") for name in texts), *others]


def domains_of(text):
    """Return the domains of a spec text's table, or else `DOMAINS`."""
    return planned(text)[1]


def built(text, **given):
    """Return a spec text as a module, for the domains of its table, or else `DOMAINS`."""
    plan, domains = planned(text)
    return wt.build(plan, domains=domains, **given)


def batch(rows=4, length=6, *, seed=0, keep=0.7, domains=DOMAINS):
    """Return random signals of rows of tokens, with a share of ignored ones and several documents.

    The first token of the batch always counts; rows differ in length.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    valid = torch.rand(shape, generator=g) < keep
    valid[0, 0] = True
    loss = torch.rand(shape, generator=g) * 5 + 0.01
    starts = torch.rand(shape, generator=g) < 0.3
    starts[:, 0] = False
    return wt.Signals(
        loss=loss,
        valid=valid,
        entropy=torch.rand(shape, generator=g) * 4,
        target_prob=(-loss).exp(),
        error_norm=torch.rand(shape, generator=g),
        ref_loss=torch.rand(shape, generator=g) * 5,
        domain_ids=torch.randint(0, len(domains), shape, generator=g),
        segment_ids=starts.long().cumsum(1),
        columns={
            **{name: torch.rand(shape, generator=g) * 3 for name in COLUMNS[:7]},
            "topics": torch.randint(0, 256, shape, generator=g).float(),
            "example": torch.randint(0, 12, shape, generator=g).float(),
            **{name: torch.rand(shape, generator=g) * 3 for name in COLUMNS[7:-2]},
            "keep": torch.rand(shape, generator=g) * 3 - 1.5,
            "label_is_top": (torch.rand(shape, generator=g) < 0.5).float(),
        },
    )


FLOATS = ("loss", "entropy", "target_prob", "error_norm", "ref_loss")
IDS = ("domain_ids", "segment_ids", "sequence_ids")


def changed(signals, change, names=(*FLOATS, *IDS, "valid")):
    """Return signals with `change(name, tensor)` in place of each given tensor."""
    values = {name: getattr(signals, name) for name in names}
    new = {name: change(name, value) for name, value in values.items() if value is not None}
    if "loss" in names:  # a column is a signal like the loss
        new["columns"] = {name: change(name, value) for name, value in signals.columns.items()}
    return dataclasses.replace(signals, **new)


def as_lists(signals, domains=DOMAINS, step=0):
    """Return signals as the nested lists a reference reads."""
    return Batch(
        **{name: getattr(signals, name).tolist() for name in (*FLOATS, "valid")},
        domain=[[domains[d] for d in row] for row in signals.domain_ids.tolist()],
        document=signals.segment_ids.tolist(),
        columns={name: x.tolist() for name, x in signals.columns.items()},
        domains=domains,
        step=step,
    )


class Lockstep:
    """Ranks in one process: a thread each, meeting at every collective.

    With `parts`, each sequence is cut over that many ranks, which are neighbours.
    """

    def __init__(self, ranks, parts=1):
        """Prepare for a number of ranks."""
        self.ranks, self.parts = ranks, parts
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.slots = [None] * ranks

    def run(self, function):
        """Return what `function(rank, collectives)` gives on each rank."""

        def one(rank):
            try:
                return function(rank, RankCollectives(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(one, range(self.ranks)))

    def exchange(self, rank, kind, x):
        """Return every rank's x, insisting that all call the same collective on the same shape."""
        self.slots[rank] = (kind, x)
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        calls = {(k, tuple(v.shape), v.dtype) for k, v in everyone}
        assert len(calls) == 1, f"ranks disagree on what they exchange: {calls}"
        return torch.stack([v for _, v in everyone])


class RankCollectives:
    """What `build` is given on one rank: all ranks, or those that share its sequences."""

    def __init__(self, lockstep, number, only_parts=False):
        """Belong to a lockstep, as one of its ranks."""
        self.lockstep, self.number, self.only_parts = lockstep, number, only_parts
        self.rank, part = divmod(number, lockstep.parts)
        self.size = lockstep.ranks // lockstep.parts
        self.same_part = slice(part, None, lockstep.parts)
        self.same_rows = slice(self.rank * lockstep.parts, (self.rank + 1) * lockstep.parts)
        if only_parts:
            self.rank, self.size = part, lockstep.parts

    @property
    def parts(self):
        """The ranks that share its sequences."""
        return RankCollectives(self.lockstep, self.number, only_parts=True)

    def gather(self, x):
        """Return the x of every rank with other sequences."""
        return self._exchange("gather", x)[self.same_part]

    def sum(self, x):
        """Return the sum over ranks."""
        return self._exchange("sum", x).sum(0)

    def max(self, x):
        """Return the maximum over ranks."""
        return self._exchange("max", x).amax(0)

    def _exchange(self, kind, x):
        everyone = self.lockstep.exchange(self.number, kind, x)
        return everyone[self.same_rows] if self.only_parts else everyone


# Strategies -------------------------------------------------------------------------------------


def float32s(low, high):
    """Return floats between bounds that float32 holds exactly."""
    return st.floats(low, high, width=32, allow_nan=False, allow_infinity=False)


def losses(min_size=1, max_size=32, high=20.0):
    """Return lists of losses, nats."""
    return st.lists(float32s(0.0, high), min_size=min_size, max_size=max_size)


_numbers = st.one_of(
    st.integers(0, 10**6),
    st.floats(0, 1e6, allow_nan=False),
    st.sampled_from([1e-3, 0.1, 1 / 3, 1e-20, 123456789.123, 1e15, 1e16]),
)


def _schedules(numbers, positive):
    """Return the texts of numbers and schedules whose values are drawn from `numbers`."""
    steps, spans = st.integers(0, 10**12), st.integers(1, 10**6)

    def text(name, *parts):
        return st.tuples(*parts).map(lambda got: f"{name}({', '.join(map(_argument, got))})")

    def named(name, values):
        return values.map(lambda value: (name, value))

    pairs = st.dictionaries(steps, numbers, min_size=1, max_size=3).map(
        lambda d: "piecewise({" + ", ".join(f"{k}: {v!r}" for k, v in d.items()) + "})"
    )
    return st.one_of(
        numbers.map(repr),
        text("constant", numbers),
        text("step", numbers, numbers, named("at", steps)),
        text("linear", numbers, numbers, named("over", spans)),
        text("linear", numbers, numbers, named("over", spans), named("begin", steps)),
        text("cosine", named("start", numbers), named("end", numbers), named("over", spans)),
        text("exponential", positive, positive, named("over", spans)),
        pairs,
    )


def _argument(value):
    return f"{value[0]}={value[1]!r}" if isinstance(value, tuple) else repr(value)


@st.composite
def pipelines(draw):
    """Return the arrow text of a legal pipeline, of any level, with numbers of every kind."""
    positive = st.floats(1e-3, 1e6)
    number = _schedules(st.one_of(_numbers, _numbers.map(lambda x: -x)), positive)
    above_zero = _schedules(positive, positive)
    unit = _schedules(st.floats(0, 1), st.floats(1e-3, 1))
    cap = st.one_of(
        st.integers(1, 9).map(lambda k: f"{k}/n"), _schedules(st.floats(1, 99), st.floats(1, 99))
    )
    floor = st.one_of(st.just("0.25/n"), unit)
    words = st.text("abcxyz_0", min_size=1, max_size=5).filter(lambda w: not w[0].isdigit())
    names = st.one_of(words, st.sampled_from(["true", "null", "web text", "a: b", "→", "n", "x#y"]))
    table = st.dictionaries(names, st.floats(0, 9), min_size=1, max_size=4).map(
        lambda d: "table(" + ", ".join(f'"{k}"={v!r}' for k, v in d.items()) + ")"
    )
    source = draw(
        st.one_of(
            st.sampled_from(["", "loss", "entropy", "target_prob", "focal", "uniform"]),
            number.map(lambda x: f"entropy({x})"),
            above_zero.map(lambda x: f"entropy(sigma={x})"),
            above_zero.map(lambda x: f"focal(gamma={x})"),
            table,
        )
    )
    stages_ = [source] if source else []
    if source != "uniform":
        pool = st.builds(
            "{}({})".format,
            st.sampled_from(["mean", "sum", "max"]),
            st.sampled_from(["sequence", "document", "domain"]),
        )
        stages_ += draw(st.lists(pool, max_size=1))
        shape = st.one_of(
            st.sampled_from(["normalize", "abs", "quadratic", "extremes", "linupper"]),
            number.map(lambda x: f"affine({x})"),
            st.tuples(number, number).map(lambda x: f"affine(scale={x[0]}, shift={x[1]})"),
            number.map(lambda x: f"clip(min={x})"),
            number.map(lambda x: f"clip(max={x})"),
            number.map(lambda x: f"pow({x})"),
            above_zero.map(lambda x: f"linupper(alpha={x})"),
        )
        stages_ += draw(st.lists(shape, max_size=3))
        weigh = st.one_of(
            st.sampled_from(["mean_one", "token_scale"]),
            above_zero.map(lambda x: f"temperature({x})"),
        )
        stages_.append(draw(weigh))
    constrain = st.one_of(
        cap.map(lambda x: f"clamp({x})"),
        floor.map(lambda x: f"floor({x})"),
        unit.map(lambda x: f"interpolate({x})"),
    )
    stages_ += draw(st.lists(constrain, max_size=2))
    return " -> ".join(stages_)


@st.composite
def spec_texts(draw):
    """Return the text of a legal spec: options, and one pipeline or several factors."""
    lines = ["version: 1"]
    options = {
        "name": st.sampled_from(["x", "my-spec", "v1.2", "A_b"]),
        "normalize": st.sampled_from(["mean_one", "none"]),
        "reduction": st.sampled_from(["token_mean", "sequence_mean"]),
        "on_nonfinite": st.sampled_from(["error", "drop"]),
    }
    for key, values in options.items():
        if draw(st.booleans()):
            lines.append(f"{key}: {draw(values)}")
    if draw(st.booleans()):
        lines.append(f"pipeline: '{draw(pipelines())}'")
    else:
        names = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True))
        lines.append("factors:")
        lines += [f"  {name}: '{draw(pipelines())}'" for name in names]
    return "\n".join(lines) + "\n"


def one_of_each_stage():
    """Return one of each of the language's stages, as the table of pipelines writes it."""
    pipelines = {name: wt.loads(CASES[f"stage {name}"]).factors for name in STAGE_PIPELINES}
    return [
        next(stage for stage in factors["pipeline"] if stage.name == name)
        for name, factors in sorted(pipelines.items())
    ]

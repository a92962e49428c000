"""Saved states that no run could have written are refused, in plain loops as well."""

import functools

import generators as tables
import pytest
import torch
from looping import for_each
from torch import nn

import weighting as wt
from weighting import registry
from weighting.build import plan_of
from weighting.build.domains import send_feedback

DOMAINS = ("web", "code", "docs")
NAN, INF = float("nan"), float("inf")
SPECS = {
    "exponentiated": "mean(domain) -> exponentiated",
    "doremi": "doremi",
    "doge": "doge",
    "dynamic_loading": "dynamic_loading(web=1, code=1, docs=1)",
    "bandit": "mean(domain) -> bandit",
    "ado": "mean(domain) -> ado",
    "validation_bandit": "validation_bandit",
    "topical": "mean(domain) -> topical(every=2)",
    "topics": "topics(key=bits, number=3, every=2)",
    "remembered": "remembered(examples=4, key=bits) -> mean(sequence) -> temperature(1)",
    "rank": "rank(history=8) -> pow(3) -> mean_one",
    "bernoulli": "mean(sequence) -> bernoulli",
    "multinomial": "mean(sequence) -> multinomial(draws=0.5)",
    "gate": "mean(sequence) -> gate(ess_below=0.5) -> mean_one",
    "running": "mean(sequence) -> running(tau=1)",
}
"""Every shipped stage with a state."""
RUNNING = "version: 1\nname: runs\nscope: running\npipeline: mean(sequence) -> mean_one"


@functools.cache
def plan(name):
    """Return the plan of a spec by its name above."""
    return plan_of(wt.loads(SPECS.get(name, RUNNING)))


def built(name):
    """Return a built spec by its name above."""
    return wt.build(plan(name), domains=DOMAINS)


def key_of(fn, end):
    """Return the key in a state that ends so."""
    return next(key for key in fn.state_dict() if key.endswith(end))


def changed(fn, end, value):
    """Return a state in which one tensor is another, all of it if a number is given."""
    key = key_of(fn, end)
    old = fn.state_dict()[key]
    new = torch.tensor(value) if isinstance(value, list) else torch.full_like(old, value)
    return {**fn.state_dict(), key: new.to(old.dtype)}


def floating():
    """Return every floating tensor of every stage's state, by spec and key."""
    return [
        (name, key)
        for name in (*SPECS, "scope: running")
        for key, x in built(name).state_dict().items()
        if x.is_floating_point()
    ]


@for_each("name, key", floating())
@for_each("value", [NAN, INF, -INF])
def test_no_tensor_that_is_not_finite_is_loaded(name, key, value):
    """Whichever stage's it is, one such number is enough."""
    fn = built(name)
    saved = {k: x.clone() for k, x in fn.state_dict().items()}
    saved[key].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"{key} is .*{value:g}.* must be finite\. .*load an ear"):
        fn.load_state_dict(saved)
    assert fn.state_dict()[key].isfinite().all(), "nothing was taken over"


@pytest.mark.parametrize(
    ("name", "end", "value", "reason"),
    [
        ("exponentiated", "log_weights", 0.0, r"\[0, 0, 0\] .* logarithms of weights that sum to"),
        ("exponentiated", "average", [0.7, 0.7, -0.4], r"\[0.7, 0.7, -0.4\] .*weights that sum to"),
        ("exponentiated", "average", 0.5, "weights that sum to one"),
        ("exponentiated", "average", 0.0, "weights that sum to one"),
        ("exponentiated", "batches", 0, "0 and must be at least 1"),
        ("doremi", "log_weights", 1.0, "logarithms of weights that sum to one"),
        ("doge", "log_weights", 1.0, "logarithms of weights that sum to one"),
        ("doge", "average", -1.0, "weights that sum to one"),
        ("doge", "moves", -1, "at least 0"),
        ("dynamic_loading", "log_weights", -9.0, "logarithms of weights that sum to one"),
        ("bandit", "weights", [1.5, -0.5, 0.0], "weights that sum to one"),
        ("bandit", "batches", -1, "at least 0"),
        ("topical", "weights", [1.0, -1.0, 1.0], "at least 0 and not all of them 0"),
        ("topical", "weights", 0.0, "at least 0 and not all of them 0"),
        ("topical", "times", -1.0, "at least 0"),
        ("topical", "batches", -1, "at least 0"),
        ("topics", "weights", 0.0, "at least 0 and not all of them 0"),
        ("topics", "tokens", -1.0, "at least 0"),
        ("topics", "batches", -1, "at least 0"),
        ("remembered", "earlier_known", 2.0, "from 0 to 1"),
        ("rank", "count", 9, "from 0 to 8"),
        ("rank", "count", -1, "from 0 to 8"),
        ("bernoulli", "batches", -1, "at least 0"),
        ("multinomial", "batches", -1, "at least 0"),
        ("gate", "ess", 1.5, "from 0 to 1"),
        ("gate", "ess", -0.1, "from 0 to 1"),
        ("scope: running", "seen_count", 1025, "from 0 to 1024"),
        ("scope: running", "seen_count", -1, "from 0 to 1024"),
        ("scope: running", "seen_mean", [-1.0, 4.0], r"\[-1, 4\] and must be at least 0"),
    ],
)
def test_what_a_stage_promises_of_its_state_holds_of_a_saved_one(name, end, value, reason):
    """The message has the key, the value, and what it must be."""
    fn = built(name)
    with pytest.raises(ValueError, match=f"{key_of(fn, end)} is .*{reason}"):
        fn.load_state_dict(changed(fn, end, value))


def test_a_tensor_of_another_kind_is_refused():
    """Whole numbers are not cut out of fractions, nor truth out of numbers."""
    for name, end, kind in (("rank", "count", "int64"), ("running", "started", "bool")):
        fn = built(name)
        saved = {**fn.state_dict(), key_of(fn, end): torch.tensor(0.5)}
        with pytest.raises(ValueError, match=f"is 0.5 and must be {kind}"):
            fn.load_state_dict(saved)


def test_a_weighting_inside_a_model_is_checked_as_well():
    """As in a plain loop, where its state is part of the model's."""
    model = nn.Module()
    model.fn = built("exponentiated")
    saved = {f"fn.{key}": x for key, x in changed(model.fn, "average", NAN).items()}
    with pytest.raises(ValueError, match=r"fn\.pipeline__2_exponentiated__average is \[nan, nan"):
        model.load_state_dict(saved)


def test_a_long_memory_is_told_in_one_line():
    """Where it is not finite, or its range."""
    fn = built("scope: running")
    saved = {key: x.clone() for key, x in fn.state_dict().items()}
    saved["pipeline__seen"][700] = NAN
    with pytest.raises(ValueError, match="pipeline__seen is nan at place 700 of 1024 and must"):
        fn.load_state_dict(saved)


@pytest.mark.slow
@for_each("name", [*SPECS, "scope: running"])
@for_each("dtype", [torch.float32, torch.bfloat16])
def test_what_a_run_leaves_is_loaded(name, dtype):
    """After no batch and after many, with extreme losses, also from a model in half precision."""
    fn = built(name)
    state = torch.Generator().manual_seed(0)
    for step in range(30):
        fresh = built(name)
        kept = {k: x.to(dtype) if x.is_floating_point() else x for k, x in fn.state_dict().items()}
        fresh.load_state_dict(kept)
        loss = torch.rand(4, 6, generator=state) * 10 ** torch.randint(-4, 5, (1,), generator=state)
        ids = torch.randint(0, 1 + step % 3, (4, 6), generator=state)
        bits = torch.randint(0, 8, (4, 6), generator=state).float()
        columns = {"bits": bits}
        fn(wt.Signals(loss, ref_loss=loss / 2, domain_ids=ids, columns=columns), step)
        if "gradients" in fn.plan.listens_to:
            factor = torch.randn(3, 9, generator=state)
            send_feedback(fn, "gradients", factor @ factor.T, step)
        if "validation" in fn.plan.listens_to:
            send_feedback(fn, "validation", torch.tensor([1.0, NAN, 3.0]), step)


def test_a_state_without_all_of_a_stage_is_loaded_as_far_as_it_goes():
    """With strict=False, as torch allows; what is there must be finite."""
    fn = built("exponentiated")
    key = key_of(fn, "last")
    fn.load_state_dict({key: torch.tensor([1.0, 2.0, 3.0])}, strict=False)
    assert fn.state_dict()[key].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="must be finite"):
        fn.load_state_dict({key: torch.tensor([1.0, NAN, 3.0])}, strict=False)


def test_a_stage_of_ones_own_says_what_its_state_must_be(monkeypatch):
    """By default finite, unless it begins otherwise; what it yields beside that is refused."""
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))

    @wt.stage("test_saved_counts")
    class Counts(wt.Shape):
        """Count batches."""

        def initial_state(self, domains):
            del domains
            return {"even": torch.zeros(()), "highest": torch.tensor(-INF)}

        def problems_with_state(self, state, domains):
            yield from super().problems_with_state(state, domains)
            if state["even"] % 2:
                yield "even", "even"

        def advance(self, x, scope):
            del x
            return {**scope.state, "even": scope.state["even"] + 2}

        def apply(self, x, scope):
            del scope
            return x

    fn = wt.build(wt.loads("mean(sequence) -> test_saved_counts -> mean_one"))
    fn.load_state_dict(changed(fn, "even", 4.0))
    with pytest.raises(ValueError, match=f"{key_of(fn, 'even')} is 3 and must be even"):
        fn.load_state_dict(changed(fn, "even", 3.0))
    with pytest.raises(ValueError, match=f"{key_of(fn, 'even')} is nan and must be finite"):
        fn.load_state_dict(changed(fn, "even", NAN))


def test_every_rule_is_of_a_tensor_that_is_remembered():
    """A rule whose name is misspelt would let anything pass."""
    ruled = [stage for stage in tables.one_of_each_stage() if stage.state_rules]
    assert len(ruled) >= 9
    for stage in ruled:
        assert stage.state_rules.keys() <= stage.initial_state(DOMAINS).keys(), stage.name

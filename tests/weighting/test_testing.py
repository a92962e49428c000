"""The test kit: a right stage passes every check, and each fault is named by its own check."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import generators as tables
import pytest
import torch
from hypothesis import given
from torch import Tensor

import weighting as wt
from weighting.language.find import shipped
from weighting.testing import (
    CHECKS,
    assert_weights,
    check_stage,
    generators,
    parametrize_with_checks,
)
from weighting.testing.checks import checks_for, name_of
from weighting.testing.ranks import Lockstep
from weighting.testing.subject import as_subject

ROOT = Path(__file__).resolve().parent.parent.parent


@wt.stage("soft_cap_of_the_kit")
class SoftCap(wt.Shape):
    """Level off smoothly instead of abruptly.

    y = at * tanh(x / at)
    """

    pointwise: ClassVar[bool] = True
    at: wt.PositiveNumber = 1.0

    def apply(self, x: Tensor, scope: wt.Scope) -> Tensor:
        """Return the levelled scores."""
        at = self.at(scope.step)
        return at * (x / at).tanh()


class Average(wt.Weigh):
    """Remember the mean score, and weigh by what exceeds it; it has a name but is not registered.

    w = n * r / sum(r),  r = sigmoid(x - mean)
    """

    name: ClassVar[str] = "average"

    def initial_state(self, domains):
        """Return no mean yet."""
        del domains
        return {"mean": torch.zeros(()), "batches": torch.zeros((), dtype=torch.int64)}

    def advance(self, x, scope):
        """Move the mean half of the way."""
        here = scope.sum(x) / scope.count().clamp(min=1)
        mean = (scope.state["mean"] + here) / 2
        return {"mean": mean, "batches": scope.state["batches"] + 1}

    def apply(self, x, scope):
        """Return the weights."""
        r = (x - scope.state["mean"]).sigmoid()
        total = scope.sum(r)
        return torch.where(total > 0, r / total * scope.count(), 1)


# Right stages -----------------------------------------------------------------------------------


@parametrize_with_checks(
    [SoftCap(at=0.5), SoftCap, Average(), "normalize -> soft_cap_of_the_kit -> temperature(1)"]
)
def test_a_right_stage_passes(stage, check):
    """A stage of fifteen lines, one with state, and a pipeline of one pass every check."""
    check(stage)


@pytest.mark.slow
def test_shipped_specs_pass():
    """A spec passes by name, and as a whole."""
    assert {"table-x-linupper", "mile"} <= {*shipped()}
    check_stage("table-x-linupper")
    check_stage(wt.load("mile"))


# Wrong stages -----------------------------------------------------------------------------------

_LEARNED = torch.nn.Parameter(torch.ones(()))
_SEEN: list[int] = []


def shape(function, **fields):
    """Return a stage class from score to score that does this."""
    return _class(wt.Shape, function, fields)


def weigh(function, **fields):
    """Return a stage class from score to weight that does this."""
    return _class(wt.Weigh, function, fields)


def constrain(function):
    """Return a stage class from weight to weight that does this."""
    return _class(wt.Constrain, function, {})


def remember(first, advance, name="remembers", apply=lambda _self, x, _scope: x, **fields):
    """Return a stage class with this initial state and this change of it."""
    body = {"initial_state": lambda _self, _domains: first(), "advance": advance, "name": name}
    return _class(wt.Shape, apply, {**body, **fields})


def _class(kind, function, body):
    given = {"apply": function, "__doc__": "Do something wrong.", "__module__": __name__, **body}
    given.setdefault("__annotations__", {})
    if "name" in body:
        given["__annotations__"] = {"name": ClassVar[str]}
    return type(f"Wrong{kind.__name__}", (kind,), given)


def _with_gradient(_self, x, _scope):
    with torch.enable_grad():
        return x * 2


def _branches(_self, x, _scope):
    return x if x.max() > 1 else -x


def _counts_in_python(_self, x, _scope):
    _SEEN.append(0)
    return x * len(_SEEN)


def _flat_is_nan(_self, x, scope):
    low, high = scope.range(x)
    return (x - low) / (high - low)


def _mean_of_one_rank(_self, x, scope):
    return x - torch.where(scope.valid, x, 0).sum() / scope.valid.sum().clamp(min=1)


def _grows(_self, x, scope):
    return {"seen": torch.cat([scope.state["seen"], x.new_zeros(1)])}


def _keeps(_self, _x, scope):
    return dict(scope.state)


def _own_rank_only(_self, x, scope):
    return {"seen": scope.state["seen"] + torch.where(scope.valid, x, 0).sum()}


_SHARED = torch.zeros(())


@wt.stage("cannot_be_printed_by_the_kit")
class Unprintable(wt.Shape):
    """Hold what the language has no word for."""

    names: frozenset[str] = frozenset()

    def apply(self, x, scope):
        """Return the scores."""
        del scope
        return x


class PlainNumber(wt.Shape):
    """Read the number of a schedule that may change."""

    at: wt.PositiveNumber = 1.0

    def apply(self, x, scope):
        """Return the scores."""
        del scope
        return x * self.at.value


WRONG = {
    "holds a parameter": ("detached", "leaks a gradient", shape(lambda _, x, _s: x * _LEARNED)),
    "switches gradients on": ("detached", "leaks a gradient", shape(_with_gradient)),
    "averages ignored units": (
        "mask_respected",
        "values of ignored units",
        shape(lambda _, x, _s: x - x.mean()),
    ),
    "counts ignored units": (
        "mask_respected",
        "number of ignored units",
        shape(lambda _, x, s: x - s.sum(x) / x.numel()),
    ),
    "edits in place": ("not_in_place", r"modifies x in place", shape(lambda _, x, _s: x.mul_(2))),
    "edits behind the counter": (
        "not_in_place",
        "modifies x in place",
        shape(lambda _, x, _s: x.data.mul_(2)),
    ),
    "calls item": ("no_host_sync", r"\.item\(\)", shape(lambda _, x, _s: x / x.max().item())),
    "asks for an index": ("no_host_sync", r"int\(x\)", shape(lambda _, x, _s: x * int(x.argmax()))),
    "branches on a value": ("no_host_sync", "Python `if`", shape(_branches)),
    "picks by mask": ("no_host_sync", "shape that depends", shape(lambda _, x, s: x[s.valid])),
    "works in numpy": (
        "no_host_sync",
        "numpy",
        shape(lambda _, x, _s: torch.from_numpy(x.numpy() * 2)),
    ),
    "stays on the CPU": (
        "no_host_sync",
        "on the CPU",
        shape(lambda _, x, _s: x * torch.ones(x.shape)),
    ),
    "branches when compiled": ("compiles", "does not compile whole", shape(_branches)),
    "counts in Python": ("compiles", "compiled anew", shape(_counts_in_python)),
    "divides by the range": ("finite", "NaN or infinity for equal values", shape(_flat_is_nan)),
    "weighs below zero": (
        "non_negative",
        "negative weights",
        weigh(lambda _, x, s: x - s.sum(x) / s.count().clamp(min=1) + 1),
    ),
    "is not mean one": ("mean_one", "of mean", weigh(lambda _, x, _s: x.clamp(0, 9))),
    "loses weight": (
        "sum_kept",
        "changes the sum of the weights from",
        constrain(lambda _, x, _s: x.clamp(max=1.5)),
    ),
    "looks at the order": (
        "order_free",
        "order of the units",
        shape(lambda _, x, _s: x * torch.arange(x.numel(), device=x.device)),
    ),
    "takes a maximum, pointwise": (
        "pointwise",
        "asks the scope for a maximum",
        shape(lambda _, x, s: x - s.max(x), pointwise=True),
    ),
    "takes a mean, pointwise": (
        "pointwise",
        "asks the scope for a sum",
        weigh(lambda _, x, s: x.abs() * s.count() / s.sum(x.abs()).clamp(min=1), pointwise=True),
    ),
    "looks at the others, pointwise": (
        "pointwise",
        "says pointwise = True, but other units",
        shape(lambda _, x, _s: x - x.mean(), pointwise=True),
    ),
    "looks at where it stands, pointwise": (
        "pointwise",
        "or where a unit stands",
        shape(lambda _, x, _s: x * torch.arange(x.numel(), device=x.device), pointwise=True),
    ),
    "remembers, pointwise": (
        "pointwise",
        "it remembers",
        remember(lambda: {"a": torch.zeros(())}, _keeps, pointwise=True),
    ),
    "returns doubles": ("float32", "returned torch.float64", shape(lambda _, x, _s: x.double())),
    "returns one number": ("shape", r"shape \[\] for \[24\]", shape(lambda _, x, _s: x.mean())),
    "draws": (
        "deterministic",
        "different results",
        shape(lambda _, x, _s: x + torch.rand_like(x)),
    ),
    "averages its own rank": ("many_ranks", "unlike on one", shape(_mean_of_one_rank)),
    "remembers its own rank": (
        "many_ranks",
        "remembers another seen",
        remember(
            lambda: {"seen": torch.zeros(())},
            _own_rank_only,
            apply=lambda _, x, _s: x,
        ),
    ),
    "overflows int32": (
        "int_step",
        "step 1000",
        shape(lambda _, x, s: x * (s.step * 10_000_000).float() / 1e10),
    ),
    "reads a schedule as a number": (
        "constant_schedule",
        r"call self\.at\(scope\.step\)",
        PlainNumber,
    ),
    "renames its state": (
        "state",
        "changes its state",
        remember(lambda: {"a": torch.zeros(())}, lambda _, _x, s: {"b": s.state["a"]}),
    ),
    "grows its state": (
        "state",
        r"from .*\[0\].* to .*\[1\]",
        remember(lambda: {"seen": torch.zeros(0)}, _grows),
    ),
    "shares its state": (
        "state",
        "between builds",
        remember(lambda: {"seen": _SHARED}, _keeps),
    ),
    "hides its state": (
        "resumes",
        "unlike without a stop",
        remember(lambda: {"a": torch.zeros(())}, _keeps, apply=_counts_in_python),
    ),
    "has no docstring": (
        "documented",
        "has no docstring",
        shape(lambda _, x, _s: x, __doc__=None),
    ),
    "cannot be printed": ("round_trip", "raised", Unprintable(names=frozenset("ab"))),
}
"""Stages with one fault each: the check that must name it, and its words."""


@pytest.fixture(autouse=True)
def _nothing_seen():
    """Forget what the wrong stages counted."""
    _SEEN.clear()


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_is_named_by_its_check(fault):
    """The check made for a fault fails, and its first line names both."""
    name, words, stage = WRONG[fault]
    (check,) = [check for check in checks_for(stage) if name_of(check) == name]

    with pytest.raises(AssertionError) as caught:
        check(stage)

    first, law, *_ = str(caught.value).splitlines()
    assert first.startswith(f"{name}: ")
    assert re.search(words, first), first
    assert law.startswith("  the law: ")


def test_every_check_is_shown_to_catch_something():
    """Every check has a wrong stage, but the one no stage can break: a build masks the weights."""
    caught = {name for name, _, _ in WRONG.values()}
    assert caught == {name_of(check) for check in CHECKS} - {"zero_where_ignored"}
    assert len(CHECKS) >= 20


@pytest.mark.slow
def test_all_failures_are_named_at_once():
    """`check_stage` words the first failure and lists the others."""
    with pytest.raises(AssertionError) as caught:
        check_stage(weigh(lambda _, x, _s: x.clamp(0, 9) / x.max().item()))
    text = str(caught.value)
    assert text.startswith("no_host_sync: WrongWeigh() waits for a tensor's value")
    assert re.search(r"^  also failed: .*mean_one", text, re.MULTILINE)


@pytest.mark.slow
def test_what_a_stage_raises_is_told():
    """An exception in a stage fails the check with its type and words, and is its cause."""

    def broken(_self, _x, _scope):
        msg = "not today"
        raise KeyError(msg)

    with pytest.raises(AssertionError, match="raised KeyError: 'not today'") as caught:
        check_stage(shape(broken))
    assert isinstance(caught.value.__cause__, KeyError)


# What can be checked ----------------------------------------------------------------------------


def test_a_class_that_needs_arguments_says_so():
    """A class whose arguments have no defaults is refused with what to write."""
    with pytest.raises(TypeError, match=r"give Temperature\(tau=\.\.\.\)"):
        check_stage(type(wt.loads("temperature(1)").factors["pipeline"][0]))


def test_what_is_no_stage_is_refused():
    """Neither a stage nor a spec: a TypeError; a wrong spec: its own error."""
    with pytest.raises(TypeError, match="can be checked"):
        check_stage(3)
    with pytest.raises(wt.SpecError, match="did you mean 'linupper'"):
        check_stage("normalize -> linuper -> temperature(1)")


def test_a_stage_with_state_needs_a_name():
    """State is saved under the name of the stage, so a stage without one is told to get one."""
    stage = remember(lambda: {"a": torch.zeros(())}, _keeps, name="x")
    del stage.name
    with pytest.raises(AssertionError, match=r"write @wt\.stage"):
        check_stage(stage)


def test_stages_stand_where_they_may():
    """A stage is tried at the levels it allows, by itself and in a spec."""
    assert list(as_subject(SoftCap()).specs) == ["sequence", "token"]
    spec = wt.loads("mean(domain) -> temperature(1)")
    assert as_subject(spec).domains == ("code", "news", "web")
    table = wt.loads("table(a=1, b=2) -> mean_one")
    assert as_subject(table).domains == ("a", "b")


def test_a_spec_is_held_to_what_it_promises():
    """Specs that scale nothing need not be mean one; those of scope rank may differ over ranks."""
    spec = wt.loads("version: 1\nnormalize: none\nscope: rank\npipeline: temperature(1)\n")
    names = {name_of(check) for check in checks_for(spec)}
    assert {"finite", "compiles", "round_trip"} <= names
    assert not {"mean_one", "many_ranks", "documented", "resumes"} & names


def test_ranks_that_disagree_are_told():
    """Ranks that exchange different shapes get an error that says what each asked for."""
    with pytest.raises(RuntimeError, match="ranks disagree"):
        Lockstep(2).run(lambda ranks: ranks.sum(torch.zeros(ranks.rank + 1)))


# Expected weights -------------------------------------------------------------------------------


def test_expected_weights_agree():
    """Mean-one weights, shares of the total, steps and signals are compared as `simulate` takes."""
    assert_weights("temperature(1)", loss=[1.0, 1.0], expect=[1, 1])
    assert_weights("temperature(1)", loss=[2.0, 2.0, 2.0, 2.0], expect=[0.25] * 4, share=True)
    assert_weights("mean_one", loss=[1.0, 3.0], expect=[0.5, 1.5], step=7)
    assert_weights("entropy -> mean_one", entropy=[1.0, 3.0], expect=[0.5, 1.5])
    assert_weights(
        "table(a=1, b=3) -> mean_one", loss=[1.0, 1.0], domain=["a", "b"], expect=[0.5, 1.5]
    )


def test_unexpected_weights_are_shown_in_a_table():
    """A failure shows unit, loss, got, expected and difference, and marks what is off."""
    with pytest.raises(AssertionError) as caught:
        assert_weights("mean_one", loss=[1.0, 2.0, 3.0], expect=[0.5, 1.25, 1.5])
    head, titles, *rows = str(caught.value).splitlines()
    assert "mean_one at step 0 are off by up to 0.25" in head
    assert titles.split() == ["unit", "loss", "got", "expected", "difference"]
    assert [row.split()[:2] for row in rows] == [["0", "1"], ["1", "2"], ["2", "3"]]
    assert [row.endswith("<") for row in rows] == [False, True, False]
    with pytest.raises(AssertionError, match="2 weights are expected for 1 units"):
        assert_weights("mean_one", loss=[1.0], expect=[1.0, 1.0])


# Generated batches ------------------------------------------------------------------------------


@pytest.mark.slow
@given(generators.signals(domains=tables.DOMAINS))
def test_any_generated_batch_is_weighed(signals):
    """Every generated batch is legal, and a spec of all levels gives it sound weights."""
    out = tables.built(tables.CASES["extra all-levels"])(signals, 3)
    assert signals.loss.dtype in {torch.float32, torch.bfloat16}
    assert all(
        getattr(signals, field.name).shape == signals.loss.shape
        for field in dataclasses.fields(signals)
        if isinstance(getattr(signals, field.name), Tensor) and field.name != "hidden"
    )
    assert signals.hidden.shape[:-1] == signals.loss.shape
    assert out.token.isfinite().all()
    assert (out.token >= 0).all()
    assert not out.token[~signals.valid].any()


@given(generators.losses(min_size=2, max_size=9))
def test_generated_losses_can_be_simulated(losses):
    """Every generated list of losses has mean-one weights."""
    weights = wt.simulate("normalize -> linupper -> temperature(1)", loss=losses)
    assert 2 <= len(weights) <= 9
    assert abs(weights.mean().item() - 1) < 1e-5


# Under pytest itself ----------------------------------------------------------------------------

_STAGES = '''
import weighting as wt
from weighting.testing import parametrize_with_checks


@wt.stage("halved")
class Halved(wt.Shape):
    """Halve the score."""

    by: wt.PositiveNumber = 2.0

    def apply(self, x, scope):
        return x / self.by(scope.step)


class Skewed(wt.Shape):
    """Depend on the order."""

    def apply(self, x, scope):
        return x.cumsum(0)


def reasons(stage):
    return {"order_free": "on purpose"} if isinstance(stage, Skewed) else {}


@parametrize_with_checks([Halved(by=3), "normalize -> halved -> temperature(1)"])
def test_right(stage, check):
    check(stage)


@parametrize_with_checks(
    [Skewed()],
    expected_failed_checks={
        "order_free": "on purpose", "mask_respected": "sums up", "many_ranks": "per rank"
    },
)
def test_expected(stage, check):
    check(stage)


@parametrize_with_checks([Halved], expected_failed_checks=lambda stage: {"finite": "long mended"})
def test_stale(stage, check):
    check(stage)
'''


def _pytest(folder, *arguments, plugin=True):
    """Return what pytest prints in a folder, with the plugin as an installation declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "site" / "weighting_kit-0.dist-info"
    if plugin:
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weighting-kit\nVersion: 0\n")
        (group,) = [g for g in project["entry-points"] if g == "pytest11"]
        lines = [f"{name} = {home}" for name, home in project["entry-points"][group].items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        # An installed wheel lists its files, and pytest rewrites the asserts in all of them.
        files = sorted((ROOT / "weighting").rglob("*.py"))
        (info / "RECORD").write_text("".join(f"{f.relative_to(ROOT)},,\n" for f in files))
    env = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_ids_are_readable_and_expected_failures_strict(tmp_path):
    """Ids say stage and check; an expected failure is told with its reason, a stale one fails."""
    (tmp_path / "test_stages.py").write_text(_STAGES)
    out = _pytest(tmp_path, "-v", "-rxf", "-k", "not compiles", "test_stages.py", plugin=False)
    assert "test_right[halved(by=3)-mask_respected] PASSED" in out
    assert "test_right[normalize -> halved -> temperature(1)-zero_where_ignored] PASSED" in out
    assert "test_expected[Skewed()-order_free] XFAIL (on purpose)" in out
    assert "test_stale[halved-finite] FAILED" in out
    assert "[XPASS(strict)] long mended" in out
    assert re.search(r"=+ 1 failed, \d+ passed, \d+ deselected, 3 xfailed", out), out


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"order_fre": "?"}, "there is no check 'order_fre'; did you mean 'order_free'"),
        (lambda _: {"sum_kept": "?"}, r"sum_kept does not concern soft_cap_of_the_kit"),
    ],
)
def test_an_expected_failure_must_be_able_to_happen(expected, words):
    """A reason under a name that no check has, or for one that is not run, is an error."""
    with pytest.raises(ValueError, match=words):
        parametrize_with_checks([SoftCap()], expected_failed_checks=expected)


def _specs(folder):
    """Write a good and a broken spec, other YAML, and a spec in a folder below."""
    good = (ROOT / "specs" / "mile.yaml").read_text()
    (folder / "specs" / "deep").mkdir(parents=True)
    (folder / "specs" / "good.yaml").write_text(good)
    (folder / "specs" / "deep" / "deep.yml").write_text(good)
    (folder / "specs" / "broken.yaml").write_text("version: 1\npipeline: normalize -> tempera(1)\n")
    (folder / "specs" / "compose.yaml").write_text('version: "3"\nservices: {}\n')


@pytest.mark.slow
def test_pytest_tests_spec_files(tmp_path):
    """`pytest specs/` tests what looks like a spec there, and shows errors without traceback."""
    _specs(tmp_path)
    out = _pytest(tmp_path, "-v", "specs/")
    for name in ("loads", "round trips", "laws"):
        assert f"specs/good.yaml::{name} PASSED" in out
    assert "specs/broken.yaml::loads FAILED" in out
    assert "specs/broken.yaml::laws SKIPPED (it does not load)" in out
    assert "specs/broken.yaml:2:24: unknown stage 'tempera'; did you mean 'temperature'?" in out
    assert "Traceback" not in out
    assert "plugin.py" not in out
    assert "compose" not in out
    assert "deep" not in out
    assert re.search(r"=+ 1 failed, 3 passed, 2 skipped", out), out


@pytest.mark.slow
def test_pytest_leaves_other_projects_alone(tmp_path):
    """Without a folder or file named, or `weighting_specs`, no YAML file is looked at."""
    _specs(tmp_path)
    assert "no tests ran" in _pytest(tmp_path)
    assert "no tests ran" in _pytest(tmp_path, ".")
    out = _pytest(tmp_path, "--collect-only", "-q", "-o", "weighting_specs=specs/deep")
    assert "specs/deep/deep.yml::laws" in out
    assert "good" not in out


def test_the_plugin_itself_needs_no_torch():
    """The plugin's own module imports neither torch nor the language before there is a spec."""
    path = importlib.util.find_spec("weighting.testing.plugin").origin
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({path!r})\n"
        "assert not {'torch', 'weighting', 'yaml', 'hypothesis'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_checks_need_neither_pytest_nor_hypothesis():
    """`check_stage` and `assert_weights` work where only the package itself is installed."""
    code = (
        "import sys\n"
        "sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "from weighting.testing import assert_weights, check_stage\n"
        "from weighting.testing.checks import check_finite\n"
        "check_finite('temperature(1)')\n"
        "assert_weights('temperature(1)', loss=[1.0], expect=[1.0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, cwd=ROOT)

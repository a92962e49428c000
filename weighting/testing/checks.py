"""The laws every stage and every spec obeys, one small function each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from typing_extensions import override

from weighting.contract import Combine, Constrain, Pool, Scope, Shape, Signals, Source, Weigh
from weighting.language.read import loads
from weighting.schedules import Constant, Linear, Piecewise, Schedule, Step
from weighting.spec import dumps
from weighting.testing.batches import flat, mapped, mapped_floats, valid_of
from weighting.testing.ranks import Lockstep
from weighting.testing.subject import Call, Checkable, Subject, Trial, as_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weighting.build import Weighting, Weights
    from weighting.contract import Collectives


class Check(Protocol):
    """A check: takes a stage or spec and raises AssertionError if it breaks the law."""

    __name__: str

    def __call__(self, stage: Checkable | Subject, /) -> None:
        """Raise AssertionError, whose first line names the check and the fault."""
        ...


def check_stage(stage: Checkable) -> None:
    """Run every check that concerns a stage or spec.

    Args:
        stage: A stage, a stage class that needs no arguments, arrow text, the path or name of a
            spec, or a spec.

    Raises:
        AssertionError: It breaks a law.  The first line names the first failed check and the
            fault; the last line names the other checks that failed.
    """
    failures: list[tuple[str, AssertionError]] = []
    subject = as_subject(stage)
    for check in checks_for(subject):
        try:
            check(subject)
        except AssertionError as error:
            failures.append((name_of(check), error))
    if failures:
        (_, first), *others = failures
        names = ", ".join(name for name, _ in others)
        msg = f"{first}\n  also failed: {names}" if names else str(first)
        raise AssertionError(msg) from first.__cause__


def checks_for(stage: Checkable | Subject) -> tuple[Check, ...]:
    """Return the checks that concern a stage or spec: constraints keep sums, sources do not."""
    subject = as_subject(stage)
    return tuple(check for check in CHECKS if _CONCERNS[name_of(check)](subject))


def name_of(check: Check) -> str:
    """Return the name of a check, "finite" for `check_finite`."""
    return check.__name__.removeprefix("check_")


class _FaultError(AssertionError):
    """A broken law, in words that follow the name of what broke it."""


_CONCERNS: dict[str, Callable[[Subject], bool]] = {}
"""Which subjects each check has something to say about."""


def _must(holds: bool, fault: str) -> None:
    if not holds:
        raise _FaultError(fault)


def _law(concerns: Callable[[Subject], bool]) -> Callable[[Callable[[Subject], None]], Check]:
    """Make a check of a law: let it take anything checkable, and name itself when it fails."""

    def make(law: Callable[[Subject], None]) -> Check:
        name = law.__name__.removeprefix("check_")
        _CONCERNS[name] = concerns

        @functools.wraps(law)
        def check(stage: Checkable | Subject, /) -> None:
            subject = as_subject(stage)
            if not concerns(subject):
                return
            said = f"  the law: {law.__doc__}"
            try:
                law(subject)
            except _FaultError as fault:
                msg = f"{name}: {subject.label} {fault}\n{said}"
                raise AssertionError(msg) from None
            except Exception as error:  # whatever a stage raises breaks the law
                what = f"{type(error).__name__}: {error}".partition("\n")[0]
                msg = f"{name}: {subject.label} raised {what}\n{said}"
                raise AssertionError(msg) from error

        return check

    return make


def _always(_: Subject) -> bool:
    return True


def _is_stage(subject: Subject) -> bool:
    return subject.stage is not None


def _gives_weights(subject: Subject) -> bool:
    return subject.last.gives == "weight"


def _scales(subject: Subject) -> bool:
    if subject.stage is None:
        return subject.spec.normalize == "mean_one"
    return isinstance(subject.last, Weigh) and subject.last.scaled


def _constrains(subject: Subject) -> bool:
    return subject.stage is not None and isinstance(subject.last, Constrain)


def _spans_ranks(subject: Subject) -> bool:
    return subject.spec.scope != "rank"


def _is_written(subject: Subject) -> bool:
    return subject.is_registered


def _remembers(subject: Subject) -> bool:
    return subject.remembers


def _says_pointwise(subject: Subject) -> bool:
    return any(part.pointwise for parts in subject.parts.values() for part in parts)


# What a stage returns -------------------------------------------------------------------------


@_law(_is_stage)
def check_documented(subject: Subject) -> None:
    """A stage has a docstring of its own, which `weighting list` and `explain` print."""
    doc = type(subject.stage).__doc__
    _must(bool(doc and doc.strip()), "has no docstring; say in one sentence what it does")


@_law(_always)
def check_shape(subject: Subject) -> None:
    """It returns one value per unit: [T] from tokens, [U] from units."""
    for call in _hard_calls(subject):
        shape, units = [*call.result.shape], [*call.counts.shape]
        fault = f"returned a tensor of shape {shape} for {units} units; return one value per unit"
        _must(shape == units, fault)


@_law(_always)
def check_float32(subject: Subject) -> None:
    """It returns float32, whatever the dtype of the signals; bfloat16 ones are widened first."""
    for call in _hard_calls(subject):
        fault = f"returned {call.result.dtype}; return float32, or the dtype of the input"
        _must(call.result.dtype == torch.float32, fault)
    narrow = mapped_floats(subject.batch(seed=7), torch.Tensor.bfloat16)
    wide = mapped_floats(narrow, torch.Tensor.float)
    for where in subject.specs:
        got, expected = (subject.built(where)(signals).token for signals in (narrow, wide))
        _must(got.dtype == torch.float32, f"gives weights of {got.dtype} for bfloat16 signals")
        _must(_same(got, expected), "weighs bfloat16 signals unlike the same values in float32")


@_law(_always)
def check_finite(subject: Subject) -> None:
    """Extreme, equal, single and all-ignored units give neither NaN nor infinity."""
    for name in subject.hard_flat:
        for call in (call for calls in subject.hard_calls(name) for call in calls):
            fault = f"gives NaN or infinity for {name}; guard the division, log or power"
            _must(bool(call.of_counting.isfinite().all()), fault)
            everything = (*call.new.values(), call.result[:0])
            fault = f"remembers NaN or infinity after {name}"
            _must(all(bool(x.isfinite().all()) for x in everything), fault)
    for name, _, out in _hard_weights(subject):
        finite = all(bool(x.isfinite().all()) for x in (out.token, *out.factors.values()))
        _must(finite, f"makes weights NaN or infinite for {name}")
        finite = all(bool(x.isfinite()) for x in out.metrics.values())
        _must(finite, f"makes statistics NaN or infinite for {name}")


@_law(_gives_weights)
def check_non_negative(subject: Subject) -> None:
    """No weight is negative, as that unlearns, unless `signed = True` says that it may be."""
    for name, call in _final_calls(subject):
        negative = bool((call.of_counting < 0).any()) and not call.stage.signed
        _must(not negative, f"gives negative weights for {name}")


@_law(_scales)
def check_mean_one(subject: Subject) -> None:
    """Sizes of weights have mean one over what counts, unless `scaled = False` says otherwise."""
    if subject.stage is None:
        for name, signals, out in _hard_weights(subject):
            if out.token.any():
                _must_mean_one(out.token[valid_of(signals)].abs(), name)
        return
    for name, call in _final_calls(subject):
        if call.counts.any():
            _must_mean_one(call.of_counting, name)


@_law(_constrains)
def check_sum_kept(subject: Subject) -> None:
    """A constraint moves weight between units but keeps its sum."""
    for name, call in _final_calls(subject):
        before, after = call.given["x"][call.counts].sum(), call.of_counting.sum()
        fault = f"changes the sum of the weights from {before:.6g} to {after:.6g} for {name}"
        _must(_close(after, before, rtol=1e-4), fault)


# What a stage may look at -----------------------------------------------------------------------


@_law(_always)
def check_mask_respected(subject: Subject) -> None:
    """Ignored units change nothing: neither their values nor how many there are."""
    cure = "take statistics with scope.sum, scope.max, scope.range and scope.count, not x.mean()"
    for seed in range(3):
        signals = flat(subject.batch(seed=60 + seed, keep=0.5))
        plain = [call.of_counting for call in subject.final_calls(signals)]
        for poison in (7.0, -3.0, 1e6):
            spoilt = _spoilt(signals, poison)
            got = [call.of_counting for call in subject.final_calls(spoilt)]
            fault = f"lets the values of ignored units change the others; {cure}"
            _must(_all_close(got, plain), fault)
        longer = mapped(signals, lambda x: torch.cat([x, x.new_zeros(5)]))
        got = [call.of_counting for call in subject.final_calls(longer)]
        fault = f"lets the number of ignored units change the others; {cure}, nor x.numel()"
        _must(_all_close(got, plain), fault)


@_law(_always)
def check_zero_where_ignored(subject: Subject) -> None:
    """Ignored tokens weigh zero."""
    for name, signals, out in _hard_weights(subject):
        ignored = ~valid_of(signals)
        weighed = any(bool(x[ignored].any()) for x in (out.token, *out.factors.values()))
        _must(not weighed, f"gives weight to ignored tokens for {name}")


@_law(_always)
def check_order_free(subject: Subject) -> None:
    """Reordering the units reorders what they get, and changes nothing else; ties are equal."""
    plain = subject.batch(5, 6, seed=61)
    tied = mapped_floats(plain, lambda x: (x * 2).round() / 2)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(62))
    for rows in (plain, tied):
        signals = flat(rows)
        before = [*subject.final_calls(signals)]
        after = [*subject.final_calls(mapped(signals, lambda x: x[order]))]
        for a, b, parts in zip(before, after, subject.parts.values(), strict=True):
            pooled = any(part.kind == "pool" for part in parts)
            counts = a.counts if pooled else a.counts[order]
            expected = a.result if pooled else a.result[order]
            fault = "depends on the order of the units; look at others only through the scope"
            _must(_all_close([b.result[counts]], [expected[counts]]), fault)


@_law(_says_pointwise)
def check_pointwise(subject: Subject) -> None:
    """A stage that says `pointwise` gives some units alone what it gives them among others."""
    for trial in subject.trials().values():
        for part in (part for part in trial.parts if part.pointwise):
            joins = isinstance(part, Pool) or part.inside() is not None
            _must(not joins, _LIES.format("it brings units together"))
            remembers = part.initial_state(subject.domains) and not part.listens_to
            _must(not remembers, _LIES.format("it remembers"))
    for name, signals in subject.hard_flat.items():
        for call in (call for calls in subject.hard_calls(name) for call in calls):
            if call.stage.pointwise:
                _must_be_pointwise(call, signals, subject)


# What a stage may do ----------------------------------------------------------------------------


@_law(_always)
def check_detached(subject: Subject) -> None:
    """Weights carry no gradient: nothing learnable inside, no gradients switched on."""
    cure = "hold no parameters and leave gradients off: a weight is never trained"
    for enabled in (True, False):
        signals = flat(subject.batch(seed=63))
        if not enabled:
            signals = mapped_floats(signals, lambda x: x.clone().requires_grad_())
        with torch.set_grad_enabled(enabled):
            calls = [call for trial in subject.trials().values() for call in trial.run(signals)]
        for call in calls:
            for x in (call.result, *call.new.values()):
                leaks = x.requires_grad if enabled else x.grad_fn is not None
                _must(not leaks, f"leaks a gradient; {cure}")
    for where in subject.specs:
        loss = mapped_floats(subject.batch(seed=63), lambda x: x.requires_grad_())
        _must(not subject.built(where)(loss).token.requires_grad, f"leaks a gradient; {cure}")


@_law(_always)
def check_not_in_place(subject: Subject) -> None:
    """What it is handed is never written to: others read the same tensors."""
    for call in _hard_calls(subject):
        for name, (values, version) in call.before.items():
            now = call.given[name]
            changed = now._version != version or not _same(now.detach(), values)  # noqa: SLF001
            fault = f"modifies {name} in place; make a new tensor (x.clamp(...), not x.clamp_(...))"
            _must(not changed, fault)


@_law(_always)
def check_deterministic(subject: Subject) -> None:
    """The same input gives the same bits, whatever came before; chance needs a seed and state."""
    signals = flat(subject.batch(seed=64))
    with torch.random.fork_rng(devices=[]):
        runs: list[list[Tensor]] = []
        for seed in range(3):
            torch.manual_seed(seed)
            runs.append([call.result for call in subject.final_calls(signals)])
    equal = all(_same(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    _must(equal, "gives different results for the same input; draw nothing, remember nothing")


@_law(_always)
def check_int_step(subject: Subject) -> None:
    """An int step and a tensor step, of any integer type, give the same bits."""
    signals = subject.batch(seed=65)
    for where in subject.specs:
        for step in (0, 7, 1000):
            expected = subject.built(where)(signals, step).token
            for dtype in (torch.int64, torch.int32):
                got = subject.built(where)(signals, torch.tensor(step, dtype=dtype)).token
                _must(_same(got, expected), f"tells step {step} from torch.tensor({step})")


@_law(_is_stage)
def check_constant_schedule(subject: Subject) -> None:
    """A number and a schedule that stays at it give the same weights."""
    assert subject.stage is not None
    signals = subject.batch(seed=66)
    for name in type(subject.stage).model_fields:
        number = getattr(subject.stage, name)
        if not isinstance(number, Constant):
            continue
        v = number.value
        steady: tuple[Schedule, ...] = (
            Step(before=v, after=v, at=2),
            Linear(start=v, end=v, over=5),
            Piecewise(values={0: v, 2: v}),
        )
        for schedule in steady:
            other = as_subject(subject.stage.model_copy(update={name: schedule}))
            for where in subject.specs:
                expected = subject.built(where)(signals, 3).token
                try:
                    got = other.built(where)(signals, 3).token
                except AttributeError as error:
                    cure = f"call self.{name}(scope.step)"
                    fault = f"cannot take a schedule for {name} ({error}); {cure}"
                    raise _FaultError(fault) from error
                fault = f"weighs {name}={v:g} unlike a schedule that stays at {v:g}"
                _must(_close(got, expected), fault)


# What a device and a compiler need --------------------------------------------------------------


@_law(_always)
def check_no_host_sync(subject: Subject) -> None:
    """It runs without looking at a value: nothing waits for the device, no shape depends on data.

    It is run on tensors that have a device but no values, where `.item()`, `float(x)`, a Python
    `if` on a tensor, `nonzero` and `x[mask]` cannot work.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        signals = flat(subject.batch(seed=67))
        signals = mapped(signals, lambda x: torch.empty_like(x, device="cuda"))
        try:
            for trial in subject.trials().values():
                for call in trial.run(signals):
                    fault = "returns a tensor on the CPU; keep to the device of the input"
                    _must(call.result.device.type == "cuda", fault)
        except DataDependentOutputException as error:
            fault = (
                f"waits for a tensor's value ({error}): .item(), float(x), int(x), bool(x) or "
                "a Python `if` on it; use torch.where and 0-D tensors"
            )
            raise _FaultError(fault) from error
        except DynamicOutputShapeException as error:
            fault = (
                f"makes a shape that depends on values ({error}): nonzero, unique or x[mask]; "
                "use torch.where"
            )
            raise _FaultError(fault) from error
        except RuntimeError as error:
            if "same device" in str(error):
                fault = "makes tensors on the CPU; give torch.tensor(...) device=x.device"
                raise _FaultError(fault) from error
            if "numpy" in str(error):
                fault = "copies to the CPU with .numpy(); use torch"
                raise _FaultError(fault) from error
            raise


@_law(_always)
def check_compiles(subject: Subject) -> None:
    """torch.compile makes one graph of it, which serves every step and every value."""
    from torch._dynamo.exc import Unsupported  # noqa: PLC0415 - what no other check waits for

    where = next(iter(subject.specs))
    graphs: list[torch.fx.GraphModule] = []

    def note(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()  # noqa: SLF001 - the documented way to forget earlier compilations
    eager, fn = subject.built(where), subject.built(where)
    compiled = torch.compile(fn, fullgraph=True, backend=note)
    for step in range(4):
        signals = subject.batch(seed=70 + step, keep=(0.0, 0.4, 0.9, 0.7)[step])
        try:
            got = compiled(signals, torch.tensor(step)).token
        except Unsupported as error:
            reason = str(error).strip().partition("\n")[0]
            cure = "no Python branch on a value, no .item(), torch.where instead"
            fault = f"does not compile whole: {reason}; {cure}"
            raise _FaultError(fault) from error
        fault = f"is compiled anew for step {step}; keep Python numbers out of the calculation"
        _must(len(graphs) == 1, fault)
        expected = eager(signals, torch.tensor(step)).token
        _must(_close(got, expected), f"weighs differently once compiled, at step {step}")


@_law(_spans_ranks)
def check_many_ranks(subject: Subject) -> None:
    """A batch cut over ranks weighs as it does whole, and every rank remembers the same."""
    cure = "take every statistic over units through the scope, and sums per unit through groups"
    batches = [subject.batch(seed=80), subject.batch(seed=81)]
    valid_of(batches[1])[2:] = False  # the second of two ranks has no label at all
    for where in subject.specs:
        whole = subject.built(where)
        expected = [whole(signals, step).token for step, signals in enumerate(batches)]

        def part(collectives: Collectives, where: str = where) -> tuple[list[Tensor], Weighting]:
            fn = subject.built(where, collectives)
            rank, size = collectives.rank, collectives.size
            parts = [mapped(rows, lambda x: x.chunk(size)[rank]) for rows in batches]
            return [fn(signals, step).token for step, signals in enumerate(parts)], fn

        parts = Lockstep(2).run(part)
        for step, wanted in enumerate(expected):
            got = torch.cat([tokens[step] for tokens, _ in parts])
            fault = f"weighs a batch on two ranks unlike on one (per {where}); {cure}"
            _must(_close(got, wanted, rtol=1e-4), fault)
        for name, value in whole.state_dict().items():
            kept = [fn.get_buffer(name) for _, fn in parts]
            what = name.rpartition("__")[2]
            fault = f"remembers another {what} on two ranks than on one; {cure}"
            _must(all(_close(mine, value, rtol=1e-4) for mine in kept), fault)


# What a stage remembers -------------------------------------------------------------------------


@_law(_remembers)
def check_state(subject: Subject) -> None:
    """State keeps its names, shapes and dtypes from batch to batch, and starts afresh each time."""
    for name, trial in subject.trials().items():
        again = Trial(subject.parts[name], subject.domains)
        for first, second in zip(trial.states, again.states, strict=True):
            shared = [
                key
                for key, value in first.items()
                if value.numel() and value.data_ptr() == second[key].data_ptr()
            ]
            fault = f"shares its initial {', '.join(shared)} between builds; make a new tensor"
            _must(not shared, fault)
        for seed in range(3):
            for call in trial.run(flat(subject.batch(seed=90 + seed))):
                old, new = _kinds(call.old), _kinds(call.new)
                fault = f"changes its state from {old} to {new}; keep names, shapes and dtypes"
                _must(old == new, fault)


@_law(_remembers)
def check_resumes(subject: Subject) -> None:
    """Saving the state and going on from it elsewhere equals never having stopped."""
    batches = [subject.batch(seed=95 + step) for step in range(4)]
    for where in subject.specs:
        through, first, second = (subject.built(where) for _ in range(3))
        expected = [through(signals, step).token for step, signals in enumerate(batches)]
        for step in (0, 1):
            first(batches[step], step)
        second.load_state_dict(first.state_dict(), strict=True)
        for step in (2, 3):
            got = second(batches[step], step).token
            _must(_same(got, expected[step]), "goes on from a saved state unlike without a stop")


@_law(_is_written)
def check_round_trip(subject: Subject) -> None:
    """What it prints, as arrow text and as YAML, reads back as the same."""
    for spec in subject.specs.values():
        for spelling in ("arrow", "yaml"):
            text = dumps(spec, spelling)
            again = loads(text, allow_plugins=bool(spec.plugins))
            _must(again == spec, f"is not what it reads back as from {spelling}:\n{text}")
            _must(dumps(again, spelling) == text, f"prints differently after reading {text}")


CHECKS: tuple[Check, ...] = (
    check_shape,
    check_float32,
    check_no_host_sync,
    check_not_in_place,
    check_detached,
    check_deterministic,
    check_finite,
    check_non_negative,
    check_mean_one,
    check_sum_kept,
    check_mask_respected,
    check_zero_where_ignored,
    check_order_free,
    check_pointwise,
    check_int_step,
    check_constant_schedule,
    check_compiles,
    check_many_ranks,
    check_state,
    check_resumes,
    check_round_trip,
    check_documented,
)
"""Every check; those that name a cause come before those that see its effects."""


def _spoilt(signals: Signals, poison: float) -> Signals:
    """Return signals with another value wherever the label is ignored."""
    valid = valid_of(signals)
    return mapped_floats(signals, lambda x: torch.where(valid, x, poison))


def _hard_calls(subject: Subject) -> Iterator[Call]:
    """Yield the calls of every stage on every hard batch."""
    for name in subject.hard_flat:
        for calls in subject.hard_calls(name):
            yield from calls


def _final_calls(subject: Subject) -> Iterator[tuple[str, Call]]:
    """Yield the last call of every factor on every hard batch, with the batch's name."""
    for name in subject.hard_flat:
        for calls in subject.hard_calls(name):
            yield name, calls[-1]


def _hard_weights(subject: Subject) -> Iterator[tuple[str, Signals, Weights]]:
    """Yield what every spec weighs every hard batch, with the batch and its name."""
    for name, signals in subject.hard.items():
        for out in subject.hard_weights(name).values():
            yield name, signals, out


_LIES = "says pointwise = True, but {}; leave pointwise out"


class _Pointwise(Scope):
    """A scope that has no statistics to give."""

    @override
    def sum(self, x: Tensor) -> Tensor:
        raise _FaultError(_LIES.format("it asks the scope for a sum or count"))

    @override
    def max(self, x: Tensor) -> Tensor:
        raise _FaultError(_LIES.format("it asks the scope for a maximum or range"))


def _must_be_pointwise(call: Call, signals: Signals, subject: Subject) -> None:
    """Compare what a stage returned with what it returns for some of the units, in any order."""
    number = len(call.counts)
    units = torch.arange(number)
    for some in (units, units[number // 2 :], units[-1:], units.flip(0)):
        valid, step = call.counts[some], torch.zeros((), dtype=torch.int64)
        scope = _Pointwise("token", step, valid, subject.domains, None, call.new)
        if isinstance(call.stage, Source):
            got = call.stage.read(mapped(signals, lambda x, i=some: x[i]), scope)
        else:
            assert isinstance(call.stage, Shape | Weigh | Constrain | Combine)
            got = call.stage.apply(call.given["x"][..., some], scope)
        fault = _LIES.format("other units, or where a unit stands, change its value")
        same = got.shape == some.shape and _close(got[valid], call.result[some][valid])
        _must(same, fault)


def _must_mean_one(weights: Tensor, name: str) -> None:
    mean = weights.double().mean()
    fault = f"gives weights of mean {mean:.6g} for {name}; scale them, or write scaled = False"
    _must(_close(mean, torch.ones_like(mean), rtol=1e-4), fault)


def _kinds(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{[*x.shape]} {x.dtype}" for name, x in sorted(state.items())}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), 0, 0, equal_nan=True)


def _close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> bool:
    """Tell whether tensors agree but for float32 rounding."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol, 1e-6, equal_nan=True)


def _all_close(got: list[Tensor], expected: list[Tensor]) -> bool:
    # Sums in another order, magnified by a temperature: float32 rounding.
    return all(_close(a, b, rtol=1e-4) for a, b in zip(got, expected, strict=True))

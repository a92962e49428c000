"""What is being checked: a stage in small legal pipelines, or a whole spec."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from weighting.build import Plan, Weighting, Weights, build, plan_of
from weighting.columns import column_of
from weighting.contract import (
    Alone,
    Collectives,
    Combine,
    Constrain,
    Groups,
    Level,
    Pool,
    Scope,
    ScopeWithin,
    Shape,
    Signals,
    Source,
    Stage,
    Weigh,
)
from weighting.contract.levels import domains_of, group, inside_domains
from weighting.language.read import resolve
from weighting.pipeline import expand
from weighting.registry import stages
from weighting.schedules import Constant
from weighting.spec import Spec, arrow_text
from weighting.stages import Loss, Mean, Normalize, Temperature
from weighting.testing.batches import (
    DOMAINS,
    batch,
    flat,
    hard_batches,
    mapped,
    mapped_floats,
    valid_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Checkable = Stage | type[Stage] | Spec | str
"""A stage, a stage class that needs no arguments, a spec, or what `wt.simulate` takes for one."""

_LEVELS: tuple[Level, ...] = ("sequence", "token", "document", "domain")
"""Where a stage is tried, the first place that suits it before all others."""


@dataclass(frozen=True)
class Subject:
    """A stage or spec, with what it takes to run it.

    Attributes:
        label: What it is, as one would write it.
        stage: The stage; None for a whole spec.
        specs: The specs in which it is built, by the level of the units it sees.
        parts: The stages that are called by themselves, one list per factor.
        domains: Names of the domains.
        columns: Names of the columns that are read.
    """

    label: str
    stage: Stage | None
    specs: dict[str, Spec]
    parts: dict[str, tuple[Stage, ...]]
    domains: tuple[str, ...]
    columns: tuple[str, ...]
    _calls: dict[str, list[list[Call]]] = field(default_factory=dict)
    _weights: dict[str, dict[str, Weights]] = field(default_factory=dict)

    @property
    def spec(self) -> Spec:
        """The whole spec, or the first that holds the stage."""
        return next(iter(self.specs.values()))

    @property
    def is_registered(self) -> bool:
        """Whether it can be written: a spec can, a stage when it has a name."""
        cls = type(self.stage)
        return self.stage is None or stages().get(getattr(cls, "name", "")) is cls

    @property
    def last(self) -> Stage:
        """The last stage it stands for."""
        return [*self.parts.values()][-1][-1]

    @cached_property
    def remembers(self) -> bool:
        """Whether it has state."""
        every = (stage for parts in self.parts.values() for stage in parts)
        return any(stage.initial_state(self.domains) for stage in every)

    def batch(self, rows: int = 4, length: int = 6, *, seed: int = 0, keep: float = 0.7) -> Signals:
        """Return an ordinary batch with its domains and columns; see `batches.batch`."""
        given: dict[str, Any] = {"domains": len(self.domains), "columns": self.columns}
        return batch(rows, length, seed=seed, keep=keep, **given)

    @cached_property
    def hard(self) -> dict[str, Signals]:
        """Batches that break careless arithmetic, by name."""
        return hard_batches(len(self.domains), self.columns)

    @cached_property
    def hard_flat(self) -> dict[str, Signals]:
        """Hard batches of flat tokens, with scores of either sign where scores go in."""
        found = {name: flat(signals) for name, signals in self.hard.items()}
        first = next(iter(self.parts.values()))[0]
        if first.takes == "score" and first.kind != "pool":
            for name, signals in [*found.items()]:
                found[f"{name}, shifted below zero"] = mapped_floats(signals, lambda x: x - 3)
                found[f"{name}, negated"] = mapped_floats(signals, lambda x: -x)
        return found

    def hard_calls(self, name: str) -> list[list[Call]]:
        """Return the calls of its stages on a hard batch, per factor; all laws look at the same."""
        if name not in self._calls:
            # A stage that writes to what it is given spoils nothing but its own calls.
            signals = mapped(self.hard_flat[name], torch.Tensor.clone)
            self._calls[name] = [trial.run(signals) for trial in self.trials().values()]
        return self._calls[name]

    def hard_weights(self, name: str) -> dict[str, Weights]:
        """Return what its specs, each built anew, weigh a hard batch; all laws look at the same."""
        if name not in self._weights:
            self._weights[name] = {
                where: self.built(where)(mapped(self.hard[name], torch.Tensor.clone))
                for where in self.specs
            }
        return self._weights[name]

    def built(self, where: str, collectives: Collectives | None = None) -> Weighting:
        """Return one of its specs, built anew."""
        if self.stage is not None and self.remembers and not hasattr(type(self.stage), "name"):
            msg = "a stage that remembers needs a name; write @wt.stage(...) above it"
            raise TypeError(msg)
        return build(self._plans[where], domains=self.domains, collectives=collectives)

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        return {where: plan_of(spec) for where, spec in self.specs.items()}

    def trials(self) -> dict[str, Trial]:
        """Return its stages ready to be called one by one, per factor."""
        return {name: Trial(parts, self.domains) for name, parts in self.parts.items()}

    def final_calls(self, signals: Signals, step: int = 0) -> Iterator[Call]:
        """Call its stages and yield the last call of each factor."""
        for trial in self.trials().values():
            yield trial.run(signals, step)[-1]


def as_subject(thing: Checkable | Subject) -> Subject:
    """Return what is to be checked, ready to run.

    Raises:
        SpecError: A spec is wrong.
        TypeError: It is neither a stage nor a spec, or a class that needs arguments.
    """
    if isinstance(thing, Subject):
        return thing
    if isinstance(thing, str):
        return _spec_subject(resolve(thing), thing)
    if isinstance(thing, Spec):
        return _spec_subject(thing, thing.name)
    stage = _instance(thing)
    parts = tuple(step.stage for step in expand((Loss(), stage)))[1:]
    levels: list[Level] = [
        level for level in _LEVELS if all(level in part.levels for part in parts)
    ]
    if any(part.inside() for part in parts):
        levels = ["token"]
    if isinstance(stage, Combine):
        levels = [expand(stage.other)[-1].level]
    specs: dict[str, Spec] = {}
    for level in levels[:2]:
        specs[level] = _around(stage, level)
    # One value per domain, no more; two scores are of the same units.
    if stage.takes is not None and (levels[0] == "domain" or isinstance(stage, Combine)):
        pooled = () if levels[0] == "token" else (Mean(level=levels[0]),)
        parts = (Loss(), *pooled, *_weights_first(stage), *parts)
    return Subject(
        _label(stage), stage, specs, {"": parts}, _domains(parts), tuple(_columns(parts))
    )


def _instance(thing: object) -> Stage:
    if isinstance(thing, Stage):
        return thing
    if not (isinstance(thing, type) and issubclass(thing, Stage)):
        msg = f"a stage, a stage class, arrow text or a spec can be checked, not {thing!r}"
        raise TypeError(msg)
    try:
        return thing()
    except ValidationError as error:
        needed = ", ".join(f"{item['loc'][0]}=..." for item in error.errors() if item["loc"])
        msg = f"{thing.__name__} needs arguments to be checked: give {thing.__name__}({needed})"
        raise TypeError(msg) from None


def _spec_subject(spec: Spec, label: str) -> Subject:
    parts = {name: tuple(s.stage for s in expand(steps)) for name, steps in spec.factors.items()}
    every = tuple(stage for stages in parts.values() for stage in stages)
    return Subject(label, None, {"spec": spec}, parts, _domains(every), tuple(_columns(every)))


def _around(stage: Stage, level: Level) -> Spec:
    """Return the smallest legal spec in which the stage sees units of a level."""
    head: tuple[Stage, ...] = ()
    if stage.takes is not None:
        head = (Loss(),)
        if stage.kind != "pool" and level != "token":
            head = (Loss(), Mean(level=level))
    tail = (Temperature(tau=Constant(value=1)),) if stage.gives == "score" else ()
    pipeline = (*head, *_weights_first(stage), stage, *tail)
    return Spec(factors={"pipeline": pipeline}, normalize="none", on_nonfinite="drop")


def _weights_first(stage: Stage) -> tuple[Stage, ...]:
    takes_weights = stage.takes == "weight"
    return (Normalize(), Temperature(tau=Constant(value=0.5))) if takes_weights else ()


def _domains(parts: tuple[Stage, ...]) -> tuple[str, ...]:
    """Return the domains that tables name, or some."""
    named = (getattr(part, part.collects) for part in parts if part.collects)
    return tuple(dict.fromkeys(name for names in named for name in names)) or DOMAINS


def _columns(parts: tuple[Stage, ...]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Source):
            yield from filter(None, map(column_of, sorted(part.reads())))


def _label(stage: Stage) -> str:
    if hasattr(type(stage), "name"):
        try:
            return arrow_text((stage,))
        except AssertionError:  # a field of a type the language cannot write: `round_trip` says so
            return stage.name
    given = ((name, getattr(stage, name)) for name in sorted(stage.model_fields_set))
    shown = (f"{name}={getattr(value, 'value', value)}" for name, value in given)
    return f"{type(stage).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Call:
    """One stage called by itself.

    Attributes:
        stage: The stage.
        given: The tensors it was handed, by name.
        before: Copies of them, and how often they had been written to, from before the call.
        result: What it returned.
        counts: [U] bool, the units that count among those it should return.
        old: Its state before the batch.
        new: Its state after it.
    """

    stage: Stage
    given: dict[str, Tensor]
    before: dict[str, tuple[Tensor, int]]
    result: Tensor
    counts: Tensor
    old: dict[str, Tensor] = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)

    @property
    def of_counting(self) -> Tensor:
        """What it returned for the units that count."""
        return self.result[self.counts]


class Trial:
    """Stages called one after the other as a build calls them, but unprotected."""

    def __init__(self, parts: tuple[Stage, ...], domains: tuple[str, ...]) -> None:
        """Prepare stages with the state they start from."""
        self.parts = parts
        self.domains = domains
        self.states = [part.initial_state(domains) for part in parts]

    def run(self, signals: Signals, step: int = 0) -> list[Call]:
        """Call the stages on flat signals; the first gets the loss, or weights, if it takes any."""
        valid = valid_of(signals)
        at = torch.full((), step, dtype=torch.int64, device=valid.device)
        level = next(level for level in _LEVELS if level in self.parts[0].levels)
        level = "token" if isinstance(self.parts[0], Source) or self.parts[0].inside() else level
        scope = Scope(level, at, valid, self.domains)
        x = weights(signals) if self.parts[0].takes == "weight" else signals.loss
        calls: list[Call] = []
        held: list[tuple[Tensor, Scope]] = []
        groups: Groups | None = None
        for index, part in enumerate(self.parts):
            state = {k: v.to(valid.device) for k, v in self.states[index].items()}
            if isinstance(part, Source):
                held.append((x, scope))
                scope = Scope("token", at, valid, self.domains)
                call = _read(part, signals, scope, state)
                self.states[index] = call.new
            elif isinstance(part, Pool):
                groups = group(signals, part.level, len(self.domains), Alone())
                assert groups is not None
                call = _pool(part, x, groups, scope)
                scope = Scope(part.level, at, call.counts, self.domains)
            else:
                assert isinstance(part, Shape | Weigh | Constrain | Combine)
                if isinstance(part, Combine):
                    first, around = held.pop()
                    x = torch.stack([first, x])
                    scope = replace(scope, valid=around.valid & scope.valid)
                inside = _inside(part, signals, scope, groups)
                call = _apply(part, x, inside, scope, state)
                self.states[index] = call.new
            calls.append(call)
            if call.result.shape != call.counts.shape:
                return calls  # what follows could not take it
            # What is not finite at ignored units is nobody's fault: a build sets it to 0.
            x = torch.where(scope.valid | call.result.isfinite(), call.result, 0)
        return calls


def weights(signals: Signals) -> Tensor:
    """Return mean-one weights of flat tokens that differ widely; any value at ignored ones."""
    valid, loss = valid_of(signals), signals.loss.clamp(max=1e30)
    lowest = torch.where(valid, loss, torch.inf).amin().clamp(max=1e30)
    highest = torch.where(valid, loss, -torch.inf).amax().clamp(min=-1e30)
    width = (highest - lowest).clamp(min=1e-30)
    raw = torch.where(valid, (4 * (loss - lowest) / width).exp(), 0)
    scale = valid.sum() / raw.sum().clamp(min=1e-30)
    return torch.where(valid, raw * scale, signals.loss.abs())


def _copies(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    return {name: (x.detach().clone(), x._version) for name, x in tensors.items()}  # noqa: SLF001


def _tensors(signals: Signals) -> dict[str, Tensor]:
    given = {name: x for name, x in vars(signals).items() if isinstance(x, Tensor)}
    return {**given, **signals.columns}


def _read(stage: Source, signals: Signals, scope: Scope, state: dict[str, Tensor]) -> Call:
    given = {**_tensors(signals), **_held(state)}
    before = _copies(given)
    around = Scope(scope.level, scope.step, scope.valid, scope.domains, None, state)
    new = dict(stage.advance(signals, around)) if state else {}
    after = Scope(scope.level, scope.step, scope.valid, scope.domains, None, new)
    return Call(stage, given, before, stage.read(signals, after), scope.valid, state, new)


def _inside(stage: Stage, signals: Signals, scope: Scope, units: Groups | None) -> Groups | None:
    """Return the groups inside which a stage works, of tokens or of units."""
    level, number = stage.inside(), len(scope.domains)
    if not level or scope.level == "token":
        return group(signals, level, number, Alone()) if level else None
    assert units is not None
    assert signals.domain_ids is not None
    ids = domains_of(units, signals.domain_ids, valid_of(signals), number)
    return inside_domains(ids, number)


def _held(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"scope.state[{name!r}]": value for name, value in state.items()}


def _pool(stage: Pool, x: Tensor, groups: Groups, scope: Scope) -> Call:
    given = {"score": x, "valid": scope.valid, "ids": groups.ids}
    before = _copies(given)
    result = stage.pool(x, scope.valid, groups)
    return Call(stage, given, before, result, groups.sum(scope.valid.float()) > 0)


def _apply(
    stage: Shape | Weigh | Constrain | Combine,
    x: Tensor,
    inside: Groups | None,
    scope: Scope,
    state: dict[str, Tensor],
) -> Call:
    given = {"x": x, "scope.valid": scope.valid, "scope.step": scope.step, **_held(state)}
    before = _copies(given)
    around = Scope(scope.level, scope.step, scope.valid, scope.domains, None, state)
    new = dict(stage.advance(x, around)) if state else {}
    after = Scope(scope.level, scope.step, scope.valid, scope.domains, None, new)
    if inside:
        after = ScopeWithin(**vars(after), groups=inside)
    result = stage.apply(x, after)
    return Call(stage, given, before, result, scope.valid, state, new)

"""Numbers that may change over training: optimizer step -> scalar.

Every number of the language is one of these, a plain number being `Constant`.  A schedule is
evaluated on a tensor, so one compiled graph serves every step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError
from torch import Tensor
from typing_extensions import override


class Percent(BaseModel):
    """A share of the optimizer steps of a run, in percent: `5%`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)
    value: float

    def of(self, steps: int) -> int:
        """Return the share of so many steps, rounded to a whole one."""
        return round(steps * self.value / 100)

    @override
    def __repr__(self) -> str:
        return f"{self.value:g}%"  # pydantic names a key of a map by it

    __str__ = __repr__


class Schedule(BaseModel, ABC):
    """A scalar for every optimizer step, counted from 1 as the trainer counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)
    name: ClassVar[str]
    positional: ClassVar[int] = 0
    """How many arguments are printed without their names."""
    collects: ClassVar[str | None] = None
    """The field that holds a map given as the only argument."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """Return the value at `step` (0-D, steps) as a 0-D float32 tensor."""

    @abstractmethod
    def extremes(self) -> tuple[float, ...]:
        """Return values between which every value of the schedule lies."""

    @property
    def shares(self) -> list[str]:
        """What is given as a share of the run, as it is written: at=5%."""
        return [f"{name}={share}" for name, share in self._shares().items()]

    def over_steps(self, steps: int) -> Schedule:
        """Return the schedule for a run of so many optimizer steps: shares as numbers of steps."""
        counts = {name: share.of(steps) for name, share in self._shares().items()}
        counts |= {name: max(counts[name], 1) for name in {"over"} & {*counts}}
        return self.model_copy(update=counts) if counts else self

    def _shares(self) -> dict[str, Percent]:
        found = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in found if isinstance(value, Percent)}


class Constant(Schedule):
    """The same value at every step."""

    name: ClassVar[str] = "constant"
    positional: ClassVar[int] = 1
    value: float

    @override
    def __call__(self, step: Tensor) -> Tensor:
        return _scalar(self.value, step)

    @override
    def extremes(self) -> tuple[float, ...]:
        return (self.value,)


class ShareOfN(Schedule):
    """k/n of the total, n the number of units in scope: k in mean-one terms, at every step."""

    name: ClassVar[str] = "share"
    numerator: float

    @override
    def __call__(self, step: Tensor) -> Tensor:
        return _scalar(self.numerator, step)

    @override
    def extremes(self) -> tuple[float, ...]:
        return (self.numerator,)


def _steps(low: int | None) -> Any:  # noqa: ANN401 - what Annotated takes
    """Let a whole number of steps, at least `low`, or a share of the run, stand for steps."""

    def check(value: object) -> object:
        if isinstance(value, Percent):
            if 0 <= value.value <= 100:  # noqa: PLR2004 - percent
                return value
            msg = f"must be from 0% to 100% of the run, not {value}"
            raise ValueError(msg)
        if isinstance(value, bool) or not isinstance(value, int):
            kind = "int_from_float" if isinstance(value, float) else "int_type"
            raise PydanticKnownError(kind)
        if low is not None and value < low:
            kind = "greater_than_equal"
            raise PydanticKnownError(kind, {"ge": low})
        return value

    return PlainValidator(check, json_schema_input_type=int)


def _steps_written(low: int) -> WithJsonSchema:
    share = {"type": "string", "pattern": r"^\s*[0-9.]+\s*%\s*$"}
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": low}, share]})


_FromZero = Annotated[int | Percent, _steps(0), _steps_written(0)]
_FromOne = Annotated[int | Percent, _steps(1), _steps_written(1)]


class Step(Schedule):
    """`before` until step `at`, then `after` (from step `at` on)."""

    name: ClassVar[str] = "step"
    positional: ClassVar[int] = 2
    before: float
    after: float
    at: _FromZero

    @override
    def __call__(self, step: Tensor) -> Tensor:
        return torch.where(step < known_steps(self.at), self.before, self.after)

    @override
    def extremes(self) -> tuple[float, ...]:
        return (self.before, self.after)


class _Ramp(Schedule):
    """From `start` to `end` over `over` steps; constant outside them."""

    positional: ClassVar[int] = 2
    start: float
    end: float
    over: _FromOne

    def progress(self, step: Tensor, begin: int | Percent = 0) -> Tensor:
        """Return how far the ramp has come, from 0 to 1."""
        return ((step - known_steps(begin)).to(torch.float32) / known_steps(self.over)).clamp(0, 1)

    @override
    def extremes(self) -> tuple[float, ...]:
        return (self.start, self.end)


class Linear(_Ramp):
    """start + (end - start) * t, t running from 0 to 1 over `over` steps after `begin`."""

    name: ClassVar[str] = "linear"
    begin: _FromZero = 0

    @override
    def __call__(self, step: Tensor) -> Tensor:
        return torch.lerp(
            _scalar(self.start, step), _scalar(self.end, step), self.progress(step, self.begin)
        )


class Cosine(_Ramp):
    """end + (start - end) * (1 + cos(pi t)) / 2, t from 0 to 1 over `over` steps after `begin`."""

    name: ClassVar[str] = "cosine"
    begin: _FromZero = 0

    @override
    def __call__(self, step: Tensor) -> Tensor:
        share = (1 - torch.cos(math.pi * self.progress(step, self.begin))) / 2
        return torch.lerp(_scalar(self.start, step), _scalar(self.end, step), share)


class Exponential(_Ramp):
    """start * (end / start) ** t, t from 0 to 1 over `over` steps; both ends positive."""

    name: ClassVar[str] = "exponential"
    start: float = Field(gt=0)
    end: float = Field(gt=0)

    @override
    def __call__(self, step: Tensor) -> Tensor:
        logs = _scalar(math.log(self.start), step), _scalar(math.log(self.end), step)
        return torch.lerp(*logs, self.progress(step)).exp()


def _sorted_steps(values: dict[int | Percent, float]) -> dict[int | Percent, float]:
    shares = {at.value: at for at in values if isinstance(at, Percent)}
    steps = [at for at in values if not isinstance(at, Percent)]
    if not values or min(steps, default=0) < 0:
        msg = "needs at least one step: value, steps from 0"
        raise ValueError(msg)
    if shares and (any(steps) or (steps and 0 in shares)):
        msg = (
            f"{steps[-1]} is a number of steps and {next(iter(shares.values()))} a share of the "
            "run; beside shares only step 0 can stand, once"
        )
        raise ValueError(msg)
    order = {at: at.value if isinstance(at, Percent) else at for at in values}
    return {at: values[at] for at in sorted(values, key=order.__getitem__)}


class Piecewise(Schedule):
    """The value of the last step reached: {0: 100, 500: 0.4}; before the first step, its value.

    All steps may be shares of the run, {0: 100, 5%: 0.4}.
    """

    name: ClassVar[str] = "piecewise"
    positional: ClassVar[int] = 1
    collects: ClassVar[str | None] = "values"
    values: Annotated[
        dict[Annotated[int | Percent, _steps(None)], float],
        AfterValidator(_sorted_steps),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
    ]

    @override
    def __call__(self, step: Tensor) -> Tensor:
        (_, first), *later = self.values.items()
        value = _scalar(first, step)
        for at, held in later:
            value = torch.where(step >= known_steps(at), held, value)
        return value

    @property
    @override
    def shares(self) -> list[str]:
        return [str(at) for at in self.values if isinstance(at, Percent)][:1]  # one says it

    @override
    def over_steps(self, steps: int) -> Schedule:
        if not self.shares:
            return self
        # Of shares that come to the same step, the later one's value holds.
        values = {
            at.of(steps) if isinstance(at, Percent) else at: value
            for at, value in self.values.items()
        }
        return self.model_copy(update={"values": values})

    @override
    def extremes(self) -> tuple[float, ...]:
        return tuple(self.values.values())


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Constant, Step, Linear, Cosine, Exponential, Piecewise)
}
"""The schedules of the language, by name."""


def _number(value: object) -> object:
    """Let a plain number stand for the constant schedule."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Percent):
        msg = f"{value} is a share of a run's steps, and not one of these; give a number"
        raise ValueError(msg)  # noqa: TRY004 - as below
    if isinstance(value, tuple):
        msg = "a list is not a value here"
        raise ValueError(msg)  # noqa: TRY004 - as below
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"must be a number or a schedule, not {value!r}{_quotes_hint(value)}"
        raise ValueError(msg)  # noqa: TRY004 - pydantic turns only a ValueError into a message
    return Constant(value=value)


def _quotes_hint(value: object) -> str:
    """Advise to take quotes off a text that is a number."""
    try:
        finite = isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        finite = False
    return "; remove the quotes" if finite else ""


def _within(low: float, high: float, *, share: bool = False) -> AfterValidator:
    """Check every value a schedule can take, and whether k/n has a meaning here."""

    def check(schedule: Schedule) -> Schedule:
        if isinstance(schedule, ShareOfN) and not share:
            msg = "k/n is a share of the total weight and has no meaning here; write a number"
            raise ValueError(msg)
        for value in schedule.extremes():
            if not low <= value <= high:
                over = "/n" if isinstance(schedule, ShareOfN) else ""
                least = f"at least {low:g}{over}"
                least = "positive, at least 1e-30" if low == _SMALLEST else least
                bound = least if value < low else f"at most {high:g}{over}"
                msg = f"must be {bound}, not {value:g}{over}"
                raise ValueError(msg)
        return schedule

    return AfterValidator(check)


SCHEDULE_HERE = {"$comment": "a schedule"}
"""Stands in a stage's JSON Schema where a schedule may; `weighting.language.schema` defines it."""


def _written(low: float, high: float, *, share: bool = False) -> WithJsonSchema:
    """Say in JSON Schema how a number can be written; schedules are defined once, elsewhere."""
    ways: list[dict[str, Any]] = [{"type": "number", "minimum": low, "maximum": high}]
    ways += [{"type": "string", "pattern": r"^\s*[-+0-9.eE]+\s*/\s*n\s*$"}] if share else []
    return WithJsonSchema({"anyOf": [*ways, SCHEDULE_HERE]})


_COERCE = BeforeValidator(_number)
_LARGEST, _SMALLEST = 1e30, 1e-30

Number = Annotated[Schedule, _COERCE, _within(-_LARGEST, _LARGEST), _written(-_LARGEST, _LARGEST)]
"""Any number or schedule."""
PositiveNumber = Annotated[
    Schedule, _COERCE, _within(_SMALLEST, _LARGEST), _written(_SMALLEST, _LARGEST)
]
"""At least 1e-30."""
NonNegativeNumber = Annotated[Schedule, _COERCE, _within(0, _LARGEST), _written(0, _LARGEST)]
"""At least 0."""
UnitNumber = Annotated[Schedule, _COERCE, _within(0, 1), _written(0, 1)]
"""From 0 to 1."""
ShareNumber = Annotated[Schedule, _COERCE, _within(_SMALLEST, 1), _written(_SMALLEST, 1)]
"""Greater than 0, at most 1."""
CapNumber = Annotated[
    Schedule, _COERCE, _within(1, _LARGEST, share=True), _written(1, _LARGEST, share=True)
]
"""A largest weight, in mean-one terms or as k/n of the total; below 1 no weights can obey it."""
FloorNumber = Annotated[Schedule, _COERCE, _within(0, 1, share=True), _written(0, 1, share=True)]
"""A smallest weight, in mean-one terms or as k/n of the total; above 1 no weights can obey it."""


def known_steps(steps: int | Percent) -> int:
    """Return a number of steps, as all are in what was built."""
    assert not isinstance(steps, Percent), "`plan_of` and `build` are given the steps of the run"
    return steps


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, device=like.device, dtype=torch.float32)

"""A spec with one of its numbers changed: which number, over which values, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from weighting.errors import Source, nearest
from weighting.language.arrow import Argument, Literal
from weighting.language.calls import make_stage, stage_call
from weighting.schedules import Constant, Schedule, ShareOfN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weighting.contract import Stage
    from weighting.errors import Problem
    from weighting.spec import Spec

_POINTS = 13
"""Values of a range that are looked at first."""
_WIDE = 10
"""A range whose ends are that many times apart is gone through by ratios."""


class Number(NamedTuple):
    """A number of a spec.

    Attributes:
        label: "stage.argument".
        factor: The factor it belongs to.
        index: Place of the stage in its pipeline.
        argument: Its name there.
        value: As it is written; None for a schedule or a statistic.
        whole: Whether only whole numbers can stand there.
    """

    label: str
    factor: str
    index: int
    argument: str
    value: float | None
    whole: bool


class Values(NamedTuple):
    """What a number is to be: from `low` to `high`, or those of a list.

    Attributes:
        low: The smallest.
        high: The largest.
        listed: All of them, ascending; empty for a range.
    """

    low: float
    high: float
    listed: tuple[float, ...] = ()

    @property
    def by_ratio(self) -> bool:
        """Whether the values between are even in their logarithm."""
        return self.low > 0 and self.high >= _WIDE * self.low

    def grid(self, *, whole: bool) -> list[float]:
        """Return values to look at first, ascending, both ends among them."""
        if self.listed:
            return [*self.listed]
        inner = [self.between(self.low, self.high, i / (_POINTS - 1)) for i in range(1, _POINTS)]
        found = [self.low, *(round(x) if whole else rounded(x) for x in inner[:-1]), self.high]
        return sorted({x for x in found if self.low <= x <= self.high})

    def between(self, a: float, b: float, share: float = 0.5) -> float:
        """Return what is that share of the way from a to b."""
        if self.by_ratio:
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
        return a + share * (b - a)


def numbers_of(spec: Spec) -> Iterator[Number]:
    """Yield the numbers that stages of a spec have, in its order."""
    for factor, pipeline in spec.factors.items():
        for index, stage in enumerate(pipeline):
            for argument, value in _arguments(stage):
                whole = isinstance(value, int)
                now = value.value if isinstance(value, Constant) else None
                now = value.numerator if isinstance(value, ShareOfN) else now
                now = float(value) if isinstance(value, int | float) else now
                yield Number(f"{stage.name}.{argument}", factor, index, argument, now, whole)


def number_named(spec: Spec, name: str) -> Number:
    """Return the number that "argument", "stage.argument" or "factor.stage.argument" names.

    Raises:
        ValueError: There is none, or there are several.
    """
    there = [*numbers_of(spec)]
    labels = list(dict.fromkeys(number.label for number in there))
    found = [x for x in there if name in {x.label, x.argument, f"{x.factor}.{x.label}"}]
    if not found:
        hint = nearest(name, labels) if labels else "; it has none"
        msg = f"{spec.name} has no number {name!r}{hint}"
        raise ValueError(msg)
    if len(found) > 1:
        full = list(dict.fromkeys(f"{x.factor}.{x.label}" for x in found))
        fix = f"write {' or '.join(full)}"
        fix = fix if len(full) == len(found) else "write a spec in which it stands once"
        msg = f"{name} stands {len(found)} times in {spec.name}; {fix}"
        raise ValueError(msg)
    return found[0]


def varied(spec: Spec, number: Number, value: float) -> Spec:
    """Return the spec with another value for one of its numbers, and a name that says so.

    Raises:
        ValueError: It cannot be that value.
    """
    pipeline = spec.factors[number.factor]
    call = stage_call(pipeline[number.index])
    first = next(iter(type(pipeline[number.index]).model_fields))
    kept = [a for a in call.arguments if (a.name or first) != number.argument]
    given = int(value) if number.whole else value
    now = Argument(number.argument, Literal(given, (0, 0)), (0, 0))
    arguments = tuple(replace(a, name=a.name or first) for a in kept)
    problems: list[Problem] = []
    made = make_stage(Source("", ""), replace(call, arguments=(*arguments, now)), problems)
    if made is None:
        msg = f"{number.label} = {value:g}: {problems[0].message}"
        raise ValueError(msg)
    stages = (*pipeline[: number.index], made, *pipeline[number.index + 1 :])
    name = f"{spec.name}-{number.argument}-{value:g}".replace("+", "")
    return spec.model_copy(
        update={"name": name, "factors": {**spec.factors, number.factor: stages}}
    )


def values_of(text: str) -> Values:
    """Return the values that a text gives: 0.1:10, or 0.1,0.4,1.

    Raises:
        ValueError: It gives none.
    """
    low, colon, high = text.partition(":")
    parts = [low, high] if colon else text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        msg = f"{text!r} gives no values; write a range, 0.1:10, or some, 0.1,0.4,1"
        raise ValueError(msg)
    if not colon:
        return Values(min(numbers), max(numbers), tuple(sorted({*numbers})))
    first, last = numbers
    if first >= last:
        msg = f"{text!r} is no range; write its lower end first, and another upper one"
        raise ValueError(msg)
    return Values(first, last)


def rounded(x: float) -> float:
    """Return a number to three digits."""
    return float(f"{x:.3g}")


def _arguments(stage: Stage) -> Iterator[tuple[str, object]]:
    """Yield the arguments of a stage that are numbers, those of free names among them."""
    for name, field in type(stage).model_fields.items():
        value = getattr(stage, name)
        if name == stage.collects:
            yield from value.items()
        elif isinstance(value, Schedule | int | float) and not isinstance(value, bool):
            yield name, value
        elif isinstance(value, str) and field.annotation is Schedule:
            yield name, value  # a statistic

"""Numbers that a stage may take from its own scores: their median, or deviations from the mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ValidationError, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator
from torch import Tensor

from weighting.schedules import SCHEDULE_HERE, Number, PositiveNumber, Schedule

if TYPE_CHECKING:
    from weighting.contract.scope import Scope

DEVIATIONS = r"mean\s*[-+]\s*(?:\d+\.?\d*|\.\d+)\s*\*\s*std"
"""So many standard deviations above or below the mean."""
STATISTIC = re.compile(rf"median|mean|std|{DEVIATIONS}")


def value_of(number: Schedule | str, x: Tensor, scope: Scope) -> Tensor:
    """Return a number at the step of a scope, or the statistic of x [U] it stands for; 0 of none.

    The median of an even number of scores is the lower of the two in the middle; deviations are
    those of all scores, not of a sample.
    """
    if isinstance(number, Schedule):
        return number(scope.step)
    if number == "median":
        count = scope.count()
        middle = scope.kth_largest(x, (count / 2).floor() + 1)
        return torch.where(count > 0, middle, 0)
    center, spread = mean_and_deviation(x, scope)
    if number in {"mean", "std"}:
        return center if number == "mean" else spread
    times = float(number.removeprefix("mean").removesuffix("*std"))
    return center + times * spread


def mean_and_deviation(x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of x [U] over a scope.

    Scores that differ by less than a millionth of their mean differ by rounding: 0.
    """
    total, count = scope.sum(torch.stack([x, torch.ones_like(x)]))
    center = total / count.clamp(min=1)
    spread = (scope.sum((x - center) ** 2) / count.clamp(min=1)).sqrt()
    return center, torch.where(spread > 1e-6 * center.abs(), spread, 0)


def _read(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Return a statistic as it is written, or whatever number it is."""
    if isinstance(value, str) and STATISTIC.fullmatch(value.strip()):
        return "".join(value.split())
    try:
        return handler(value)
    except ValidationError as error:
        if isinstance(value, str) and value.isidentifier():
            reason = error.errors()[0].get("ctx", {}).get("error", "")
            msg = f"{reason}; a statistic is median, mean, std, or mean+3*std with any number"
            raise ValueError(msg) from None
        raise


def _written(low: float) -> WithJsonSchema:
    ways = [
        {"type": "number", "minimum": low, "maximum": 1e30},
        {"type": "string", "pattern": rf"^\s*({STATISTIC.pattern})\s*$"},
        SCHEDULE_HERE,
    ]
    return WithJsonSchema({"anyOf": ways})


NumberOrStatistic = Annotated[Number, WrapValidator(_read), _written(-1e30)]
"""Any number or schedule, or a statistic of the stage's scores, which is a str."""
PositiveNumberOrStatistic = Annotated[PositiveNumber, WrapValidator(_read), _written(1e-30)]
"""At least 1e-30, or a statistic."""

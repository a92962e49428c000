"""Arguments of schedules that are shares of a run, `at=5%`: steps once their number is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.errors import Problem
from weighting.pipeline import numbers
from weighting.schedules import Schedule

if TYPE_CHECKING:
    from weighting.contract import Stage
    from weighting.spec import Spec


def over_steps(spec: Spec, steps: int) -> Spec:
    """Return a spec for a run of so many optimizer steps; the same one if it has no shares."""
    if not share_problems(spec):
        return spec
    factors = {
        name: tuple(_stage_over(stage, steps) for stage in pipeline)
        for name, pipeline in spec.factors.items()
    }
    return spec.model_copy(update={"factors": factors})


def share_problems(spec: Spec) -> list[Problem]:
    """Return every place where a spec has a share of a run, which nothing can be built of."""
    problems: list[Problem] = []
    for factor, pipeline in spec.factors.items():
        for index, stage in enumerate(pipeline):
            for _, schedule in numbers(stage):
                for share in schedule.shares:
                    message = (
                        f"{share} of {schedule.name} is a share of the run, and "
                        "how many steps it has is not known here; write a number of steps, or "
                        "give the steps of the run: build(spec, steps=...)"
                    )
                    problems.append(Problem(message, spec.place(factor, index)))
    return problems


def _stage_over(stage: Stage, steps: int) -> Stage:
    changed: dict[str, object] = {}
    for field in type(stage).model_fields:
        value = getattr(stage, field)
        if isinstance(value, Schedule) and value.shares:
            changed[field] = value.over_steps(steps)
        elif isinstance(value, dict):
            changed[field] = {key: number.over_steps(steps) for key, number in value.items()}
    return stage.model_copy(update=changed)

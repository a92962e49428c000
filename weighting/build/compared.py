"""Which units a spec compares with each other, and what to say where there is only one of them.

A statistic over one unit says nothing: alone, a sequence is as hard as the mean of its batch, and
its weight is 1 whatever its loss.  Training goes on as if there were no weighting, so it is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.build.plan import reduced_level
from weighting.contract import Pool, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.build.plan import Plan
    from weighting.contract import Level
    from weighting.pipeline import Step
    from weighting.spec import Spec


def compared_levels(plan: Plan) -> dict[str, Level]:
    """Return what weighs all tokens alike when a batch has one unit, with the level of the unit.

    Factors stand by their names, the reduction as "reduction: sequence_mean".  Left out is what
    compares a unit with earlier batches too, and what weighs it by its own score alone.
    """
    if plan.spec.scope == "running":
        return {}
    levels = {
        name: steps[-1].level
        for name, steps in plan.factors.items()
        if plan.targets[name] == "loss"
        and steps[-1].level != "token"
        and _compares(plan.spec, steps)
    }
    return levels | _reduced(plan.spec)


def domains_compared(plan: Plan) -> list[str]:
    """Return what weighs or draws domains: factors, and the reduction, by name."""
    names = [
        name
        for name, steps in plan.factors.items()
        if name in plan.sampling or any(x.level == "domain" or _reads_domains(x) for x in steps)
    ]
    return [*names, *(name for name, level in _reduced(plan.spec).items() if level == "domain")]


def tables_compared(plan: Plan) -> list[str]:
    """Return the factors that weigh a token by its domain alone, which batches of one domain undo.

    The mean over a batch of one domain is the weight of that domain.
    """
    if plan.spec.normalize == "none" or plan.spec.scope == "running":
        return []
    return [
        name
        for name, steps in plan.factors.items()
        if plan.targets[name] == "loss" and steps[-1].level == "token" and _reads_domains(steps[0])
    ]


def one_unit(plan: Plan, name: str, level: Level, where: str, advice: str) -> str:
    """Return the sentence that a factor, or the reduction, has one unit to weigh.

    Args:
        plan: The spec's.
        name: The factor or the reduction, as in `compared_levels`.
        level: Its level.
        where: What has one unit: "this batch has".
        advice: What to do.
    """
    return (
        f"{plan.spec.name}: {name} compares {level}s with each other, and {where} only one, so it "
        f"weighs all tokens alike; {advice}"
    )


def _compares(spec: Spec, steps: Sequence[Step]) -> bool:
    """Tell whether one unit alone gets the same weight whatever its score."""
    if spec.normalize == "mean_one":
        return True
    stages = [step.stage for step in steps if not isinstance(step.stage, Source | Pool)]
    return any(not (stage.pointwise or stage.initial_state(("",))) for stage in stages)


def _reads_domains(step: Step) -> bool:
    return isinstance(step.stage, Source) and "domain_ids" in step.stage.reads()


def _reduced(spec: Spec) -> dict[str, Level]:
    """Return the level whose units the reduction counts alike, by what it is called."""
    level = reduced_level(spec)
    return {f"reduction: {spec.reduction}": level} if level else {}


MORE_UNITS: dict[Level, str] = {
    "sequence": (
        "a row is one sequence unless sequence_ids tell them apart, as they must in a padding-free "
        "batch: give sequence_ids, or larger batches, or write scope: running into the spec"
    ),
    "document": "give segment_ids, or larger batches, or write scope: running into the spec",
    "domain": "mix domains in each batch, and give build all of their names",
}
"""What to do in a loop of one's own where a batch has one unit of a level."""

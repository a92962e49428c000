"""Where each factor's weights act: on the loss, on which data is drawn, or on both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.errors import Problem
from weighting.pipeline import expand, weighs_domains

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weighting.spec import Apply, Spec


def targets_of(spec: Spec) -> dict[str, Apply]:
    """Return where each factor acts; those that weigh anything but domains act on the loss."""
    if isinstance(spec.apply, dict):
        return {name: spec.apply.get(name, "loss") for name in spec.factors}
    by_domain = _weighing_domains(spec)
    return {name: spec.apply if name in by_domain else "loss" for name in spec.factors}


def drawing(targets: Mapping[str, Apply]) -> tuple[str, ...]:
    """Return the factors that draw: those that do nothing else, or else those that do both."""
    for word in ("sampling", "both"):
        if found := tuple(name for name, acts in targets.items() if acts == word):
            return found
    return ()


def target_problems(spec: Spec) -> list[Problem]:
    """Return what keeps domain weights from acting where they should."""
    problems: list[Problem] = []
    asked = spec.apply if isinstance(spec.apply, dict) else dict.fromkeys(spec.factors, spec.apply)
    for factor, acts in asked.items():
        steps = expand(spec.factors[factor])
        place = spec.place(factor, len(spec.factors[factor]) - 1)
        by_name = isinstance(spec.apply, dict)
        if acts == "loss" or not (by_name or steps[-1].level == "domain"):
            continue
        if weighs_domains(steps):
            continue
        if steps[-1].level == "domain":
            message = (
                f"apply: {acts} draws before a batch is seen, and {factor} knows its weights only "
                "after; end it in a stage that remembers, such as exponentiated, or apply it to "
                "the loss"
            )
        else:
            message = (
                f"apply: {acts} draws by the weights of domains, and {factor} weighs each "
                f"{steps[-1].level}; leave it to the loss, or name a factor that weighs domains"
            )
        problems.append(Problem(message, place))
    if spec.reduction == "domain_mean" and "both" in targets_of(spec).values():
        message = (
            "reduction: domain_mean counts every domain alike whatever is drawn, so apply: both "
            "would undo the draw twice; apply it to the loss"
        )
        problems.append(Problem(message, spec.place(next(iter(spec.factors)), 0)))
    by_domain = _weighing_domains(spec)
    for name, acts in asked.items():
        stages = (step.stage for step in expand(spec.factors[name]))
        listening = [stage.name for stage in stages if stage.listens_to == "gradients"]
        if listening and acts != "loss" and name in by_domain:
            message = (
                f"{listening[0]} compares the gradients of domains that take turns, so it draws "
                "nothing; apply it to the loss, and draw a later run's data by what it finds"
            )
            problems.append(Problem(message, spec.place(name, 0)))
    if isinstance(spec.apply, str) and spec.apply != "loss" and not by_domain and not problems:
        message = f"apply: {spec.apply}, but no factor weighs domains; add one, such as a table"
        problems.append(Problem(message, spec.place(next(iter(spec.factors)), 0)))
    return problems


def _weighing_domains(spec: Spec) -> set[str]:
    return {name for name, pipeline in spec.factors.items() if weighs_domains(expand(pipeline))}

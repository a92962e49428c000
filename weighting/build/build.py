"""Spec -> Weighting, checked against the domains of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.build.checks import domain_problems
from weighting.build.plan import Plan, plan_of
from weighting.build.shares import share_problems
from weighting.build.weighting import Weighting
from weighting.contract import Alone
from weighting.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.contract import Collectives
    from weighting.spec import Spec


def build(
    spec: Spec | Plan,
    *,
    domains: Sequence[str] | None = None,
    collectives: Collectives | None = None,
    steps: int | None = None,
) -> Weighting:
    """Turn a spec into a module that maps signals and a step to weights.

    Args:
        spec: The spec, or its plan.
        domains: Names of the domains in the order of their ids; needed when a factor reads them.
        collectives: How statistics reach other ranks; a single rank when None.
        steps: Optimizer steps of the run, for schedules that are shares of it: `at=5%`.

    Raises:
        SpecError: The stages do not fit together, or the domains do not fit the spec, or it has
            shares of a run whose steps are not given; every problem at once.
    """
    if isinstance(spec, Plan) and steps is None:
        plan = spec
    else:
        plan = plan_of(spec.spec if isinstance(spec, Plan) else spec, steps=steps)
    if problems := share_problems(plan.spec) or domain_problems(plan.spec, domains):
        raise SpecError(problems)
    alone = collectives is None or plan.spec.scope == "rank"
    return Weighting(plan, tuple(domains or ()), Alone() if alone else collectives)

"""What a weighting remembers between batches: the state of its stages, and earlier units.

All of it lives in buffers of the module, flat and named for where a stage stands, so that a
checkpoint holds plain tensors.  They are written in place: a captured graph goes on reading them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weighting.contract import Scope, Stage
from weighting.saved import between, broken, not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from weighting.build.plan import Plan

RUNNING_UNITS = 1024
"""How many earlier units count in the statistics of `scope: running`."""
RUNNING_MEAN = "seen_mean"
"""The buffer of a faded sum of weights, and of how many they were, [2]."""


def initial_buffers(plan: Plan, domains: tuple[str, ...]) -> dict[str, Tensor]:
    """Return all that is remembered, as it is before the first batch, by buffer name."""
    found: dict[str, Tensor] = {}
    running = plan.spec.scope == "running"
    for factor, steps in plan.factors.items():
        for index, names in state_names(plan, factor, domains).items():
            state = steps[index].stage.initial_state(domains)
            found |= {names[key]: value.clone() for key, value in state.items()}
        if running and steps[-1].level in {"document", "sequence"}:
            units, count = earlier_names(factor)
            found[units] = torch.zeros(RUNNING_UNITS)
            found[count] = torch.zeros((), dtype=torch.int64)
    return found | ({RUNNING_MEAN: torch.zeros(2)} if running else {})


def state_names(plan: Plan, factor: str, domains: tuple[str, ...]) -> dict[int, dict[str, str]]:
    """Return for each step of a factor that remembers the buffer of each key of its state."""
    return {
        index: {key: f"{factor}__{index}_{step.stage.name}__{key}" for key in state}
        for index, step in enumerate(plan.factors[factor])
        if (state := step.stage.initial_state(domains))
    }


def earlier_names(factor: str) -> tuple[str, str]:
    """Return the buffers of a factor's earlier units: their scores, and how many there are."""
    return f"{factor}__seen", f"{factor}__seen_count"


def state_problems(
    plan: Plan,
    domains: tuple[str, ...],
    buffers: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
) -> Iterator[tuple[str, str]]:
    """Yield (buffer, what it must be) for saved tensors that a run cannot go on from.

    Args:
        plan: The spec's.
        domains: Names of the domains.
        buffers: What is remembered now, by name.
        saved: What is to be loaded.
    """
    known: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        value = saved.get(name)
        if value is None or value.is_meta or value.shape != buffer.shape:
            continue  # what is missing or has another shape torch refuses itself
        if torch.can_cast(value.dtype, buffer.dtype):
            known[name] = value
        else:
            yield name, f"{buffer.dtype}".removeprefix("torch.")
    for factor, steps in plan.factors.items():
        for index, names in state_names(plan, factor, domains).items():
            stage = steps[index].stage
            state = {key: known.pop(name) for key, name in names.items() if name in known}
            if state.keys() == names.keys():
                problems = stage.problems_with_state(state, domains)
            else:  # with strict=False
                problems = Stage.problems_with_state(stage, state, domains)
            yield from ((names[key], must) for key, must in problems)
    yield from not_finite(known)  # the rest is of scope: running
    rules = {earlier_names(factor)[1]: between(0, RUNNING_UNITS) for factor in plan.factors}
    yield from broken(known, {**rules, RUNNING_MEAN: between(0)})


def with_earlier(
    x: Tensor, scope: Scope, earlier: Tensor, count: Tensor, *, remember: bool
) -> tuple[Tensor, Scope]:
    """Return scores [U] with those of earlier units behind them, [U + 1024], and their scope.

    Args:
        x: Scores of the batch at hand.
        scope: Which of them count.
        earlier: Scores of earlier units, newest first; written in place.
        count: How many of these there are; written in place.
        remember: Put the batch at hand before the earlier units.
    """
    kept = torch.arange(RUNNING_UNITS, device=x.device) < count
    values, usable = torch.cat([x, earlier]), torch.cat([scope.valid, kept])
    if remember:
        newest = usable.to(torch.int8).argsort(descending=True, stable=True)[:RUNNING_UNITS]
        count.copy_((count + scope.valid.sum()).clamp(max=RUNNING_UNITS))
        earlier.copy_(values[newest])
    return values, Scope(scope.level, scope.step, usable, scope.domains)


def with_earlier_mean(
    sums: Tensor, earlier: Tensor, sequences: Tensor, *, remember: bool
) -> Tensor:
    """Return a sum and a number of weights, [2], with those before, which fade as units do.

    A batch of one sequence would else be scaled to one, and weigh nothing.

    Args:
        sums: Of the batch at hand.
        earlier: Of all batches before; written in place.
        sequences: How many sequences the batch has on all ranks, 0-D.
        remember: Keep what is returned.
    """
    after = (1 - sequences / RUNNING_UNITS).clamp(min=0) * earlier + sums
    if remember:
        earlier.copy_(after)
    return after

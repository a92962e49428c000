"""A pipeline spelled out: implied head and sugar expanded, each step with the level it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from weighting.contract import Combine, Constrain, Level, Pool, Source, Stage, Weigh
from weighting.schedules import Constant, Schedule, ShareOfN
from weighting.stages import Loss, Mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Step(NamedTuple):
    """A stage of an expanded pipeline.

    Attributes:
        stage: The stage; never sugar.
        index: Place in the pipeline as written.
        level: Level of what it returns.
    """

    stage: Stage
    index: int
    level: Level


def expand(pipeline: tuple[Stage, ...]) -> tuple[Step, ...]:
    """Return the steps a pipeline stands for.

    A pipeline that starts with a pool reads the loss; one that starts with another stage that takes
    a score reads each sequence's mean loss.  What is to be combined stands before what combines
    it: `loss -> over(ref_loss)` is loss, ref_loss, over.
    """
    head: tuple[Stage, ...] = ()
    if pipeline[0].kind == "pool":
        head = (Loss(),)
    elif pipeline[0].takes == "score":
        head = (Loss(), Mean(level="sequence"))
    steps: list[Step] = []
    level: Level = "token"
    for index, written in [*((0, stage) for stage in head), *enumerate(pipeline)]:
        for stage in _without_sugar(written):
            if isinstance(stage, Combine):
                steps += [Step(inner, index, at) for inner, _, at in expand(stage.other)]
            if isinstance(stage, Pool):
                level = stage.level
            steps.append(Step(stage, index, level))
    return tuple(steps)


def numbers(stage: Stage) -> Iterator[tuple[str, Schedule]]:
    """Yield the numbers of a stage that may change over training, by name."""
    for field in type(stage).model_fields:
        value = getattr(stage, field)
        if isinstance(value, dict):
            yield from value.items()
        elif isinstance(value, Schedule):
            yield field, value


_LEVEL_IDS: dict[str, str] = {"domain": "domain_ids", "document": "segment_ids"}


def signals_read(steps: Sequence[Step]) -> frozenset[str]:
    """Return the fields of `Signals` that some steps read, columns as "columns.name"."""
    read = (step.stage.reads() for step in steps if isinstance(step.stage, Source))
    levels = {step.level for step in steps} | {step.stage.inside() for step in steps}
    ids = {_LEVEL_IDS[level] for level in levels if level in _LEVEL_IDS}
    return frozenset(ids).union(*read)


def is_identity(steps: Sequence[Step]) -> bool:
    """Tell whether every weight is one by construction."""
    rest = [step.stage for step in steps]
    while isinstance(rest[-1], Constrain):  # which keep the mean, and so a weight of one
        rest.pop()
    return rest[-1].always_one


def is_token_local(steps: Sequence[Step]) -> bool:
    """Tell whether a token's weight is known from that token alone, but for a common scale."""
    *rest, last = [step.stage for step in steps]
    all_on_tokens = all(step.level == "token" for step in steps)
    scaled_last = isinstance(last, Weigh) and last.deferred_scale() is not None
    return all_on_tokens and all(x.pointwise for x in rest) and (scaled_last or last.pointwise)


def on_tokens(steps: Sequence[Step]) -> list[range]:
    """Return where the stages on tokens stand that lead to each pool, from a source on."""
    found: list[range] = []
    for index, step in enumerate(steps):
        if step.level != "token":
            continue
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


def pools_each_token_alone(steps: Sequence[Step]) -> bool:
    """Tell whether a domain is weighed, and each token alone decides whether it counts in it."""
    if steps[-1].level != "domain" or any(x.level not in {"token", "domain"} for x in steps):
        return False
    return all(steps[i].stage.pointwise for part in on_tokens(steps) for i in part)


def weighs_domains(steps: Sequence[Step]) -> bool:
    """Tell whether a pipeline has a weight for each domain that is known between batches."""
    source, *rest = [step.stage for step in steps]
    assert isinstance(source, Source)
    if any(stage.inside() for stage in rest):
        return False
    if steps[-1].level == "domain":
        return _known_between_batches(steps)
    if any(isinstance(stage, Combine) or stage.signed for stage in rest):
        return False
    of_domain = source.known_between_batches or source.reads() <= {"domain_ids"}
    all_on_tokens = all(step.level == "token" for step in steps)
    return of_domain and all_on_tokens and not has_state(steps[1:])


def _known_between_batches(steps: Sequence[Step]) -> bool:
    """Tell whether all that reaches the end of a pipeline per domain comes from what it remembers.

    Numbers after a stage that remembers are made of its state alone, until one has another state.
    """
    known: list[bool] = []
    for stage, *_ in steps:
        if isinstance(stage, Source):
            known.append(False)
        elif isinstance(stage, Combine):
            other = known.pop()
            known[-1] = known[-1] and other
        elif stage.known_between_batches:
            known[-1] = True
        elif stage.initial_state(("",)):
            known[-1] = False
    return known[-1]


def has_cap(steps: Sequence[Step]) -> bool:
    """Tell whether a stage bounds the largest weight."""
    constrains = (step.stage for step in steps if isinstance(step.stage, Constrain))
    return any(stage.cap(torch.tensor(0)) is not None for stage in constrains)


def has_state(steps: Sequence[Step]) -> bool:
    """Tell whether a stage remembers something between batches."""
    return any(step.stage.initial_state(("",)) for step in steps)


def has_state_of_batches(steps: Sequence[Step]) -> bool:
    """Tell whether a batch changes what a stage remembers, and not only feedback between them."""
    stages = (step.stage for step in steps)
    return any(stage.initial_state(("",)) and not stage.listens_to for stage in stages)


def has_schedule(steps: Sequence[Step]) -> bool:
    """Tell whether a number of a stage changes over training."""
    found = (number for step in steps for _, number in numbers(step.stage))
    return any(not isinstance(number, Constant | ShareOfN) for number in found)


def _without_sugar(stage: Stage) -> Iterator[Stage]:
    parts = stage.expand()
    if parts == (stage,):
        yield stage
    else:
        for part in parts:
            yield from _without_sugar(part)

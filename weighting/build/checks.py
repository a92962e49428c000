"""What keeps a spec from being built: order, levels, targets, domains; every problem at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.build.targets import drawing, target_problems, targets_of
from weighting.contract import Combine, Pool, Source, Stage
from weighting.errors import Problem
from weighting.pipeline import expand, is_token_local, signals_read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weighting.spec import Spec


def order_problems(spec: Spec) -> list[Problem]:
    """Return every place where the stages of a spec do not fit together."""
    problems: list[Problem] = []
    for factor, pipeline in spec.factors.items():
        for index, message in _misfits(pipeline):
            place, where = spec.place(factor, index), ""
            if place is None:
                where = f"{factor}, stage {index + 1}: "
            problems.append(Problem(where + message, place))
        steps = expand(pipeline)
        alone = all(step.stage.pointwise for step in steps)
        level = steps[-1].level
        draws = spec.scope == "running" and targets_of(spec).get(factor) == "sampling"
        if spec.scope == "running" and level in {"token", "domain"} and not (alone or draws):
            message = (
                f"{factor} weighs per {level}, and scope: running remembers documents and "
                "sequences: tokens are too many, domains return in every batch; "
                "leave scope out, or pool to sequences"
            )
            problems.append(Problem(message, spec.place(factor, len(pipeline) - 1)))
        pooled = sum(isinstance(step.stage, Pool) for step in steps)
        parted = any(step.stage.inside() and step.level != "token" for step in steps)
        if spec.scope == "running" and parted:
            message = (
                f"{factor} works within domains, and scope: running remembers no domain of earlier "
                "units; leave scope out"
            )
            problems.append(Problem(message, spec.place(factor, len(pipeline) - 1)))
        combined = any(isinstance(step.stage, Combine) for step in steps)
        if spec.scope == "running" and combined and pooled > 1:
            message = (
                f"{factor} pools {pooled} scores, and scope: running remembers one; combine "
                "tokens before they are pooled, or leave scope out"
            )
            problems.append(Problem(message, spec.place(factor, len(pipeline) - 1)))
        for stage, index, _ in steps:
            if spec.start > 1 and stage.listens_to == "gradients":
                message = (
                    f"{stage.name} weighs the gradients of domains, which start: does not turn "
                    "off; leave start out"
                )
                problems.append(Problem(message, spec.place(factor, index)))
    return problems or target_problems(spec)


def domain_problems(spec: Spec, domains: Sequence[str] | None) -> list[Problem]:
    """Return where a spec does not fit the domains of the data; None when they are not known."""
    needed = "needs domain names; give build(spec, domains=[...])"
    if spec.reduction == "domain_mean" and not domains:
        return [Problem(f"reduction: domain_mean {needed}")]
    if {*targets_of(spec).values()} != {"loss"} and not domains:
        return [Problem(f"to draw by domain {needed}")]
    problems: list[Problem] = []
    for factor, pipeline in spec.factors.items():
        for step in expand(pipeline):
            if "domain_ids" not in signals_read([step]):
                continue
            place = spec.place(factor, step.index)
            if not domains:
                return [Problem(f"{factor} {needed}", place)]
            reason = isinstance(step.stage, Source) and step.stage.problem_with(tuple(domains))
            if reason:
                problems.append(Problem(reason, place))
    drawn = drawing(targets_of(spec))
    sources = [expand(spec.factors[name])[0].stage for name in drawn]
    never = {name for x in sources if isinstance(x, Source) for name in x.always_zero()}
    if domains and never >= {*domains} and not problems:
        message = f"nothing can be drawn: every domain has weight 0 in {' or '.join(drawn)}"
        problems.append(Problem(message, spec.place(drawn[0], 0)))
    return problems


def _misfits(pipeline: tuple[Stage, ...], *, inside: str = "") -> Iterator[tuple[int, str]]:
    """Yield (index, message) for every stage that cannot stand where it is written.

    Args:
        pipeline: The stages.
        inside: The stage that takes this pipeline's score as its second, if one does.
    """
    sound: list[Stage] = []
    for index, stage in enumerate(pipeline):
        if isinstance(stage, Combine):
            yield from ((index, text) for _, text in _misfits(stage.other, inside=stage.name))
        if message := _misfit(stage, sound, inside):
            yield index, message
        else:
            sound.append(stage)  # a misfit is passed over, lest it make others
    if len(sound) < len(pipeline):
        return
    if inside:
        return
    steps, may_be_signed = expand(pipeline), pipeline[-1].signed
    alone = may_be_signed and is_token_local(steps)
    for step in steps:
        below = sorted(step.stage.below_zero()) if isinstance(step.stage, Source) else []
        if step.stage.signed and step.stage is pipeline[step.index] and not alone:
            yield step.index, _SIGNED.format(step.stage.name)
        elif below and not may_be_signed:
            yield step.index, _BELOW_ZERO.format(step.stage.name, ", ".join(below))
        elif step.level not in step.stage.levels:
            fits = " or ".join(f"mean({level})" for level in step.stage.levels if level != "token")
            message = f"{step.stage.name} cannot weigh units of level {step.level}"
            yield step.index, f"{message}; put {fits} before it"
        if isinstance(step.stage, Combine):
            level = expand(step.stage.other)[-1].level
            if level != step.level:
                yield step.index, _TWO_LEVELS.format(step.stage.name, step.level, level)
        inside_of = step.stage.inside()
        units = {"token", "document", "sequence"} if inside_of == "domain" else {"token"}
        if inside_of and step.level not in units:
            fits = " and ".join(f"{level}s" for level in sorted(units, reverse=True))
            message = f"{step.stage.name} works within each {inside_of} on {fits} only"
            yield step.index, f"{message}, and this score is per {step.level}"
    if sound[-1].gives != "weight":
        yield len(pipeline) - 1, f"the pipeline ends in a score; {_TO_WEIGHT} at its end"


def _misfit(stage: Stage, earlier: list[Stage], inside: str) -> str | None:
    """Return why a stage cannot follow the earlier ones, or begin a pipeline, or None."""
    if inside and stage.gives == "weight" and not isinstance(stage, Source):
        return f"{inside} takes a score, and {stage.name} weighs; leave {stage.name} out of it"
    if not earlier:
        if stage.takes == "weight":
            return f"{stage.name} changes weights and cannot come first; {_TO_WEIGHT} before it"
        return None
    before = earlier[-1]
    if stage.takes is None:
        return f"{stage.name} starts a pipeline and cannot follow {before.name}"
    if stage.takes == "weight" and before.gives == "score":
        return (
            f"{stage.name} takes a weight, but {before.name} gives a score; {_TO_WEIGHT} before it"
        )
    if stage.takes == "score" and before.gives == "weight" and not inside:
        message = f"{stage.name} takes a score, but {before.name} has already made weights of it"
        return f"{message}; a pipeline weighs once, at its end"
    if isinstance(stage, Pool):
        if any(isinstance(other, Pool) for other in earlier):
            return f"{stage.name}({stage.level}) pools tokens, but they are already pooled"
        first = earlier[0]
        if first.takes == "score":
            stands = f"{first.name} at the head stands for loss -> mean(sequence) -> {first.name}"
            return f"{stands}; put {stage.name}({stage.level}) before it"
    return None


_TWO_LEVELS = (
    "{0} takes two scores of one level, and the first is per {1}, the one in its brackets per {2}; "
    "pool both alike, as in mean(sequence) -> over(ref_loss -> mean(sequence))"
)
_SIGNED = "{0} ends a factor whose score each token decides alone; weigh and cap in another factor"
_BELOW_ZERO = "{0}: {1} must be at least 0, unless signed ends the factor, to unlearn"
_TO_WEIGHT = "put temperature(...) or mean_one"

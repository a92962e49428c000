"""`weighting explain`: what a spec means, in full."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING

import click
import torch

from weighting import arrow, calls
from weighting.cli.common import allow_plugins, read_or_exit
from weighting.schedules import Constant, Piecewise, Schedule, ShareOfN, Step
from weighting.spec import arrow_text, dumps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weighting.build import Step as PlannedStage
    from weighting.build import Weighting
    from weighting.spec import Spec

_SPANS = {
    "token": "all tokens",
    "document": "all documents",
    "sequence": "all sequences",
    "domain": "all domains",
}
_SCOPES = {
    "rank": "the rank's own part of the microbatch; ranks weigh differently",
    "microbatch": "the microbatch, on all data-parallel ranks",
    "running": "the microbatch, on all data-parallel ranks, and the 1,024 units before it",
    "step": "all microbatches of the optimizer step, on all data-parallel ranks",
}


@click.command()
@click.argument("spec", metavar="SPEC")
@click.option("--steps", type=click.IntRange(1), help="Length of the run schedules are shown for.")
@allow_plugins
def explain(spec: str, steps: int | None, *, allow_plugins: bool) -> None:
    """Print what a spec means: sugar expanded, defaults filled in, scopes, schedules, signals.

    \b
    Examples:
      weighting explain specs/linupper.yaml
      weighting explain "temperature(step(100, 0.4, at=500))" --steps 2000
    """  # noqa: D301
    read_spec, fn = read_or_exit(spec, plugins=allow_plugins)
    click.echo("\n".join(explanation(read_spec, fn, steps)))


def explanation(spec: Spec, fn: Weighting, steps: int | None = None) -> list[str]:
    """Return the lines of an explanation, at most 80 columns wide where words allow."""
    lines = [f"{spec.name}  (version {spec.version}, hash {spec.hash})"]
    for name, planned in fn.plans.items():
        lines += ["", f"{name}: one weight per {planned[-1].level}"]
        lines += _wrapped("written", arrow_text(spec.factors[name]).split(" -> "))
        lines += _wrapped("means", [_in_full(step) for step in planned])
        lines += ["", f"  {'stage':25} {'gives':19} statistics"]
        lines += [_row(step) for step in planned]
    lines += ["", *_ending(spec, fn), "", *_schedules(fn, steps)]
    lines += ["as a YAML list:", ""]
    lines += [f"  {line}" for line in dumps(spec, "yaml").splitlines()]
    return lines


def _in_full(step: PlannedStage) -> str:
    return arrow.to_text((calls.stage_call(step.stage, defaults=True),))


def _row(step: PlannedStage) -> str:
    stage = step.stage
    over = "none"
    if stage.kind == "pool":
        over = f"over the tokens of the {step.level}"
    elif inside := stage.inside():
        over = f"{stage.statistics} in each {inside}"
    elif stage.statistics:
        over = f"{stage.statistics} over {_SPANS[step.level]}"
    text = _in_full(step)
    text = text if len(text) <= 25 else text[:22] + "..."  # noqa: PLR2004 - the column's width
    return f"  {text:25} {f'{stage.gives} per {step.level}':19} {over}"


def _ending(spec: Spec, fn: Weighting) -> Iterator[str]:
    yield f"scope: {spec.scope}, statistics run over"
    yield f"  {_SCOPES[spec.scope]}"
    product = " x ".join(fn.plans) if len(fn.plans) > 1 else "the weights"
    if fn.identity:
        yield "final: every weight is one; the loss is the trainer's own, bitwise"
    elif spec.normalize == "none":
        yield f"final: {product}, not normalised"
    else:
        yield f"final: {product},"
        yield "  scaled to mean one over the valid tokens of the scope"
    unit = spec.reduction.removesuffix("_mean")
    yield f"reduction: {spec.reduction}, every {unit} counts alike before weighting"
    action = {
        "error": "reported at the next log step, which ends the run",
        "drop": "dropped: its unit weighs 0 and is counted",
    }
    yield f"a non-finite signal is {action[spec.on_nonfinite]}"
    yield f"signals: {', '.join(sorted(fn.needs)) or 'none'}"


def _schedules(fn: Weighting, steps: int | None) -> list[str]:
    """Return a table of every number that changes, at telling steps of the run."""
    moving = [
        (f"{name}.{step.stage.name}.{field}", value)
        for name, planned in fn.plans.items()
        for step in planned
        for field, value in _numbers(step)
        if not isinstance(value, Constant | ShareOfN)
    ]
    if not moving:
        return ["schedules: none, every number is constant", ""]
    turns = sorted({turn for _, schedule in moving for turn in _turns(schedule)})
    last = steps or max(2 * turns[-1], 10)
    between = [(a + b) // 2 for a, b in pairwise([1, *(t for t in turns if 1 < t < last), last])]
    shown = sorted({1, last, *between, *(t for t in turns if 1 <= t <= last)})[:12]
    lines = [f"schedules over {last} steps:", "", f"  {'step':32} value"]
    for label, schedule in moving:
        lines.append(f"  {label}")
        lines += [f"  {step:>32} {schedule(torch.tensor(step)).item():g}" for step in shown]
    return [*lines, ""]


def _numbers(step: PlannedStage) -> Iterator[tuple[str, Schedule]]:
    for field in type(step.stage).model_fields:
        value = getattr(step.stage, field)
        if isinstance(value, dict):
            yield from value.items()
        elif isinstance(value, Schedule):
            yield field, value


def _turns(schedule: Schedule) -> list[int]:
    """Return the steps at which a schedule starts, jumps or ends."""
    if isinstance(schedule, Step):
        return [max(schedule.at - 1, 0), schedule.at]
    if isinstance(schedule, Piecewise):
        return [turn for at in schedule.values for turn in (max(at - 1, 0), at)]
    begin = getattr(schedule, "begin", 0)
    return [begin, begin + getattr(schedule, "over", 0)]


def _wrapped(label: str, stages: list[str]) -> list[str]:
    """Return a pipeline over as many lines as it takes."""
    return textwrap.wrap(
        " -> ".join(stages),
        80,
        initial_indent=f"  {label:8} ",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )

"""What `weighting explain` prints: what a spec means, in full."""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from weighting.build import build, plan_of
from weighting.build.domains import domain_weights, proportions
from weighting.build.shares import over_steps, share_problems
from weighting.build.trace import statistics_of
from weighting.cli.common import WIDTH
from weighting.contract import Alone, Combine, Source, Weigh
from weighting.errors import SpecError
from weighting.language import arrow, calls
from weighting.language.plugins import imported
from weighting.loss.path import LLAMA3_8B, matrix_products, path_of
from weighting.pipeline import has_state, numbers, weighs_domains
from weighting.schedules import Constant
from weighting.simulate import changing, turns
from weighting.spec import arrow_text, dumps
from weighting.stages import Table
from weighting.stages.ref_loss import OfReference
from weighting.testing.subject import as_subject

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weighting.build import Plan
    from weighting.pipeline import Step as PlannedStage
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


def explanation(spec: Spec, plan: Plan, steps: int | None = None) -> list[str]:
    """Return the lines of an explanation, at most 80 columns wide where words allow."""
    lines = [f"{spec.name}  (version {spec.version}, hash {spec.hash})"]
    if share_problems(spec):
        steps = steps or 100  # so that a step is a percent
        whole, plan = over_steps(spec, steps), plan_of(spec, steps=steps)
    else:
        whole = spec
    for name, planned in plan.factors.items():
        lines += ["", f"{name}: one weight per {planned[-1].level}"]
        lines += _wrapped("written", arrow_text(spec.factors[name]).split(" -> "))
        lines += _wrapped("means", [_in_full(step) for step in _outer(planned)])
        lines += ["", f"  {'stage':25} {'gives':19} statistics"]
        lines += [line for step in planned for line in _row(step)]
    lines += [
        "",
        *_ending(whole, plan),
        *_domains(whole, plan),
        "",
        *_loss_path(whole, plan),
        *_exchanges(whole),
        "",
    ]
    lines += _schedules(plan, steps)
    lines += ["as a YAML list:", ""]
    lines += [piece for line in dumps(spec, "yaml").splitlines() for piece in _yaml(line)]
    return lines


def _yaml(line: str) -> list[str]:
    """Return a line of YAML over as many as it takes; what goes on is indented further."""
    before = len(line) - len(line.lstrip())
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * (before + 6),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _outer(planned: Sequence[PlannedStage]) -> Iterator[PlannedStage]:
    """Yield the stages that stand in no other stage's brackets."""
    depth = 0
    for step in planned:
        depth += isinstance(step.stage, Source) - isinstance(step.stage, Combine)
        if depth == 1:
            yield step


def _in_full(step: PlannedStage) -> str:
    return arrow.to_text((calls.stage_call(step.stage, defaults=True),))


def _row(step: PlannedStage) -> list[str]:
    stage = step.stage
    over, found = "none", statistics_of(stage, step.level)
    if stage.kind == "pool":
        over = f"over the tokens of the {step.level}"
    elif inside := stage.inside():
        over = f"{found} in each {inside}"
    elif found:
        over = f"{found} over {_SPANS[step.level]}"
    text = _in_full(step)
    text = text if len(text) <= 25 else text[:22] + "..."  # noqa: PLR2004 - the column's width
    return textwrap.wrap(
        over,
        WIDTH,
        initial_indent=f"  {text:25} {f'{stage.gives} per {step.level}':19} ",
        subsequent_indent=" " * 48,
    )


def _ending(spec: Spec, plan: Plan) -> Iterator[str]:
    yield f"scope: {spec.scope}, statistics run over"
    yield f"  {_SCOPES[spec.scope]}"
    if spec.scope == "step" and not plan.identity:
        yield "  if there are several, each goes forward twice: a step of two took 1.18 of one"
    multiplied = [name for name in plan.factors if plan.targets[name] != "sampling"]
    product = " x ".join(multiplied) if len(multiplied) > 1 else "the weights"
    if plan.identity:
        yield "final: every weight is one; the loss is the trainer's own, bitwise"
    elif spec.normalize == "none":
        yield f"final: {product}, not normalised"
    else:
        yield f"final: {product},"
        yield "  scaled to mean one over the valid tokens of the scope"
    if plan.signed:
        yield f"  in size; the sign is that of {' x '.join(plan.signed)},"
        yield "  and the loss of tokens of negative weight is climbed"
    if spec.start > 1:
        yield f"before step {spec.start:,} every token weighs one (start)"
    unit = spec.reduction.removesuffix("_mean")
    yield f"reduction: {spec.reduction}, every {unit} counts alike before weighting"
    action = {
        "error": "reported at the next log step, which ends the run",
        "drop": "dropped: its unit weighs 0 and is counted",
    }
    yield f"a non-finite signal is {action[spec.on_nonfinite]}"
    yield f"signals: {', '.join(sorted(plan.needs)) or 'none'}"
    yield from _references(plan)
    if spec.plugins:
        yield f"plugins: {imported(spec)}"


def _references(plan: Plan) -> Iterator[str]:
    """Say what the models cost that are compared with, beside the one that trains."""
    stages = [step.stage for steps in plan.factors.values() for step in steps]
    told = {x.signal: x for x in stages if isinstance(x, OfReference) and x.signal in plan.needs}
    names = {stage.of for stage in told.values()}
    if not names:
        return
    yield f"  by --weighting.reference: {_models(len(names))} forward beside the one"
    yield "  that trains, and a step with one took 1.24 of one without; each keeps its"
    yield "  parameters, cut over ranks as the model's are, and no gradients or optimizer"
    yield "  state"
    if any(stage.takes_model for stage in told.values()):
        yield "  kl: the model itself goes forward once more, and the logits of both meet,"
        yield "  a chunk at a time: a step of a small model took 1.5 of one with the reference"
        yield "  alone"
    if any(stage.tells == "ref_loss" for stage in told.values()):
        yield "  ref_loss as a column of the data, by weighting score, costs no time"


def _models(number: int) -> str:
    return "a second model goes" if number == 1 else f"{number} models go"


def _domains(spec: Spec, plan: Plan) -> Iterator[str]:
    """Say where the weights of domains act, and what comes of drawing and multiplying."""
    weighing = [
        name
        for name, steps in plan.factors.items()
        if plan.targets[name] != "loss" or steps[-1].level == "domain" or _is_told(name, plan)
    ]
    if not weighing:
        return
    acts = {
        "loss": "multiplies the loss by w",
        "sampling": "draws by w",
        "both": "multiplies the loss by w / p",
    }
    yield from ["", "domains: p_d, the share drawn, and w_d, a factor's weight"]
    for name in weighing:
        draws = (
            " and draws by w" if plan.sampling == (name,) and plan.targets[name] == "both" else ""
        )
        yield f"  {name:12} {plan.targets[name]:9} {acts[plan.targets[name]]}{draws}"
    both = [name for name in weighing if plan.targets[name] == "both"]
    drawn: list[str] = [f"w[{name}]" for name in (both or plan.sampling)]
    drawn = drawn or ["p, as the data comes,"]
    multiplied = [f"w[{name}]" for name in weighing if plan.targets[name] == "loss"]
    if spec.reduction == "domain_mean":  # every domain counts alike, whatever there is of it
        drawn = ["1 / K"]
    yield f"  effective    {' x '.join([*drawn, *multiplied])}"
    if any(has_state(plan.factors[name]) for name in plan.sampling):
        yield "  what is remembered draws a step late: step t by the state after step t - 2,"
        yield "  so that no step waits for the device"
    yield from _shares(spec, weighing)


def _is_told(name: str, plan: Plan) -> bool:
    """Tell whether a factor weighs domains, and not all of them alike."""
    source = plan.factors[name][0].stage
    assert isinstance(source, Source)
    return weighs_domains(plan.factors[name]) and "domain_ids" in source.reads()


def _shares(spec: Spec, weighing: list[str]) -> Iterator[str]:
    """Yield the numbers, where all of them are written in the spec."""
    stages = [stage for name in weighing for stage in spec.factors[name]]
    names = {key for stage in stages if isinstance(stage, Table) for key in stage.weights}
    if not names:
        return
    try:
        fn = build(spec, domains=sorted(names))
    except SpecError:  # tables of different domains: said when the data is there
        return
    if fn.state_dict():
        return
    told = domain_weights(fn, 1)
    even = torch.full((len(names),), 1 / len(names))
    p = proportions(fn, 1).float() if fn.plan.sampling else even
    effective = even if spec.reduction == "domain_mean" else p
    for name in weighing:
        if fn.plan.targets[name] == "loss":
            effective = effective * told[name]
    for name in [name for name in weighing if fn.plan.targets[name] == "both"]:
        effective = effective * told[name] / p
    effective = effective / effective.sum()
    width = max(len("domain"), *map(len, names))
    note = "" if fn.plan.sampling else "  (if the data has as much of each)"
    moves = any(not isinstance(x, Constant) for stage in stages for _, x in numbers(stage))
    note += "  (at step 1)" if moves else ""
    yield f"    {'domain':{width}}   drawn  effective{note}"
    for name, *values in zip(fn.domains, p.tolist(), effective.tolist(), strict=True):
        yield f"    {name:{width}}  {values[0]:6.4f}  {values[1]:9.4f}"


def _loss_path(spec: Spec, plan: Plan) -> Iterator[str]:
    """Say which weights are known when, and what it takes to wait for the others."""
    if plan.identity:
        yield "loss path: the trainer's own loss, nothing added"
        return
    yield "loss path: how weights meet the output layer, width D x vocabulary V"
    known = ", ".join(plan.token_local)
    yield from _wrapped("local", [f"{known}: known token by token" if known else "nothing"])
    yield from _wrapped("late", [_comes_late(spec, plan)])
    yield f"  {'memory':11}{'products':10}more memory, in elements"
    extra = {
        "late": "none",
        "keep": "(T - c) x V, T tokens on a rank, c in a chunk",
        "recompute": "none",
    }
    if plan.deferred_level == "sequence":
        extra["late"] = "(n - 1) x D x V, n sequences on a rank"
    by_domain = "domain" in (plan.deferred_level or "")
    of_one = plan.sampling or "gradients" in plan.listens_to
    if by_domain:
        units = "the fewer of domains and sequences"
        if plan.deferred_level != "domain":
            units = "sequences on a rank"
        where = "" if of_one else "; only where each row is of one domain"
        extra["late"] = f"(n - 1) x D x V, n {units}{where}"
    if plan.deferred_level == "token":
        del extra["late"]
    share = plan.max_active_fraction()
    skips = {"keep": "1 + 2k", "recompute": "1 + 3k"} if share < 1 else {}
    products = {memory: f"{matrix_products(memory):g}" for memory in extra} | skips
    for memory, elements in extra.items():
        label = f"  {memory:11}{products[memory]:10}"
        yield from textwrap.wrap(
            elements, 80, initial_indent=label, subsequent_indent=" " * len(label)
        )
    if skips:
        yield f"  k = {share:g} of the tokens can weigh more than 0{_elsewhere(spec, plan)}"
    tokens, _, vocabulary, width, *_ = LLAMA3_8B
    sizes = f"D {width}, V {vocabulary}, bfloat16, {tokens} tokens a sequence, 80 GB"
    yield f"  auto takes, for {sizes}:"
    for rows in (1, 2):
        domains = rows if by_domain and of_one else 0
        path = path_of(plan, LLAMA3_8B._replace(tokens=rows * tokens, rows=rows, domains=domains))
        label = f"    {rows} sequence{'s' * (rows > 1):2}  "
        yield from textwrap.wrap(
            f"{path}", 80, initial_indent=label, subsequent_indent=" " * len(label)
        )


def _comes_late(spec: Spec, plan: Plan) -> str:
    """Say what is known only with the whole batch, and in which units."""
    if plan.deferred_level is None:
        scaled = [
            plan.factors[name][-1].stage for name in plan.token_local if spec.normalize == "none"
        ]
        if scaled and all(stage.pointwise for stage in scaled):
            return "nothing"
        return "one number, which scales all weights to mean one"
    levels = [
        f"{name} per {plan.factors[name][-1].level}"
        for name in plan.factors
        if name not in plan.token_local and plan.targets[name] != "sampling"
    ]
    if spec.reduction != "token_mean":
        levels.append(f"reduction per {spec.reduction.removesuffix('_mean')}")
    return f"{', '.join(levels)}: a number for each {plan.deferred_level}"


def _elsewhere(spec: Spec, plan: Plan) -> str:
    """Say where a selection leaves a rank no smaller share, as it spans ranks."""
    last = (steps[-1].stage for steps in plan.factors.values())
    selecting = (
        stage for stage in last if isinstance(stage, Weigh) and stage.max_active_fraction() < 1
    )
    on_rank = spec.scope == "rank" or all(x.inside() == "sequence" for x in selecting)
    return "" if on_rank else "; more on some of several ranks"


def _exchanges(spec: Spec) -> Iterator[str]:
    """Say how many collectives a batch takes, counted on a small one."""
    counted = _Counted()
    try:
        subject = as_subject(spec)
        subject.built("spec", counted)(subject.batch())
    except SpecError:  # only other domains would do, and those are unknown here
        return
    number = _in_words(counted.calls)
    yield f"collectives: {number} per batch" if number else "collectives: none"
    if number := _in_words(counted.parts.calls):
        yield f"  {number} more where sequences are cut over ranks"


class _Counted(Alone):
    """One of two equal ranks, which counts what it asks of the other."""

    size = 2

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._parts: _Counted | None = None

    @property
    @override
    def parts(self) -> _Counted:
        self._parts = self._parts or _Counted()
        return self._parts

    @override
    def gather(self, x: Tensor) -> Tensor:
        self.calls["gather"] += 1
        return torch.stack([x, x])

    @override
    def sum(self, x: Tensor) -> Tensor:
        self.calls["sum"] += 1
        return super().sum(x)

    @override
    def max(self, x: Tensor) -> Tensor:
        self.calls["maximum"] += 1
        return super().max(x)


def _in_words(calls: Counter[str]) -> str:
    """Return counts as one says them: "1 gather, 2 sums"."""
    plural = {"gather": "gathers", "maximum": "maxima", "sum": "sums"}
    texts = (f"{n} {plural[kind] if n > 1 else kind}" for kind, n in sorted(calls.items()))
    return ", ".join(texts)


def _schedules(plan: Plan, steps: int | None) -> list[str]:
    """Return a table of every number that changes, at telling steps of the run."""
    moving = [(found.label, found.schedule) for found in changing(plan)]
    if not moving:
        return ["schedules: none, every number is constant", ""]
    moments = sorted({turn for _, schedule in moving for turn in turns(schedule)})
    last = steps or max(2 * moments[-1], 10)
    between = [(a + b) // 2 for a, b in pairwise([1, *(t for t in moments if 1 < t < last), last])]
    shown = sorted({1, last, *between, *(t for t in moments if 1 <= t <= last)})[:12]
    lines = [f"schedules over {last} steps:", "", f"  {'step':32} value"]
    for label, schedule in moving:
        lines.append(f"  {label}")
        lines += [f"  {step:>32} {schedule(torch.tensor(step)).item():g}" for step in shown]
    return [*lines, ""]


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

"""What `weighting simulate` prints: what specs do to given losses."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING

import click
import torch

from weighting.build.domains import proportions
from weighting.cli.common import (
    WIDTH,
    give_up,
    wrapped,
)
from weighting.cli.named import Named, cut
from weighting.errors import printable
from weighting.runs.loss_files import recorded
from weighting.simulate import (
    DOMAIN,
    changing,
    columns_of,
    last_turn,
    missing,
    simulate_recorded,
    turns,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weighting.build import Plan
    from weighting.runs.loss_files import Recorded
    from weighting.simulate import Simulated

_ALL = 20
"""So many units are shown one by one, more in so many groups."""
_SIDE_BY_SIDE = 4


def simulate(
    named: list[Named],
    losses: str,
    step: int | None,
    over: tuple[int, int] | None,
    per: str,
) -> None:
    """Print what the command does; on an error print it and exit with status 2."""
    try:
        given = read_losses(losses, named)
        at, why = chosen_step(named, given, step)
        steps = _points(named, given, *over) if over else []
        lines = [*_report(named, given, at, why, per), *_over(named, given, steps, per)]
    except ValueError as error:
        give_up(str(error))
    say(lines)


def read_losses(text: str, named: Sequence[Named]) -> Recorded:
    """Return recorded losses with the columns that specs read.

    Raises:
        ValueError: They cannot be read, or lack such a column.
    """
    wanted = {column for each in named for column in columns_of(each.plan).values()}
    given = recorded(text, wanted | {DOMAIN})
    lacking = [missing(each.label, each.plan, given) for each in named]
    if messages := [message for message in lacking if message]:
        raise ValueError("\n".join(messages))
    return given


def chosen_step(
    named: Sequence[Named], given: Recorded | None, step: int | None
) -> tuple[int, str]:
    """Return the step to look at, and why this one."""
    recorded_at = given.steps() if given else []
    if step is not None:
        return step, "as asked for"
    if recorded_at:
        return recorded_at[-1], "the last that was recorded"
    turned = [
        (last_turn(number.schedule), number.label, each.label)
        for each in named
        for number in changing(each.plan)
    ]
    if not turned:
        return 1, "no number changes over the run"
    at, label, spec = max(turned, key=lambda found: found[0])
    return max(at, 1), f"the last change of {label} in {spec}"


def remarks(each: Named, per: str) -> Iterator[str]:
    """Yield what one must know to read a spec's weights of a single batch."""
    plan, name = each.plan, cut(each.label, 32)
    steps = [step for factor in plan.factors.values() for step in factor]
    inside = sorted({within for step in steps if (within := step.stage.inside())})
    if per == "sequence" and {*inside} & {"sequence", "document"}:
        yield f"{name} works inside each sequence, and each is one token here; see --per token"
    if per == "token" and any(step.level in {"sequence", "document"} for step in steps):
        yield f"{name} weighs sequences, and all losses are one here"
    told = {"gradients": "of gradients", "validation": "how validation went"}
    for kind in sorted(plan.listens_to):
        yield f"{name} waits to be told {told[kind]} between batches; nobody does here"
    if plan.has_state:
        yield f"{name} remembers earlier batches; this is its first"
    if "both" in plan.targets.values():
        yield f"{name} divides by the shares in which domains are drawn, here all alike"


def _report(named: list[Named], given: Recorded, step: int, why: str, per: str) -> Iterator[str]:
    """Yield what the specs make of the losses at a step."""
    here = given.at(step)
    units = "a sequence of one token" if per == "sequence" else "a token of one sequence"
    count = f"{len(here)} losses" if len(here) > 1 else "1 loss"
    yield f"{count} of {cut(given.name, 36)}, each {units}"
    yield cut(f"step {step}, {why}", WIDTH)
    yield from (cut(each.label, WIDTH) for each in named if re.match(r"\d+: ", each.label))
    done = [
        simulate_recorded(each.spec, each.plan, given, step, one_sequence=per == "token")
        for each in named
    ]
    weighing = [
        (each.label, found)
        for each, found in zip(named, done, strict=True)
        if not only_draws(each.plan)
    ]
    loss = torch.tensor(here.numbers("loss"))
    for start in range(0, len(weighing), _SIDE_BY_SIDE):
        yield ""
        yield from _weights(loss, weighing[start : start + _SIDE_BY_SIDE], weighing)
    if len(weighing) > 1:
        yield ""
        yield from _top(loss, weighing)
    if any("domain_ids" in each.plan.needs and not only_draws(each.plan) for each in named):
        for start in range(0, len(weighing), _SIDE_BY_SIDE):
            yield ""
            yield from _by_domain(here.words(DOMAIN), weighing[start : start + _SIDE_BY_SIDE])
    for each, found in zip(named, done, strict=True):
        if each.plan.sampling:
            yield ""
            yield from _draws(each, found, step)
    notes = [note for each in named for note in remarks(each, per)]
    yield from [""] * bool(notes)
    for note in notes:
        yield from wrapped(note)


def only_draws(plan: Plan) -> bool:
    """Tell whether a spec leaves the loss alone."""
    return {*plan.targets.values()} == {"sampling"}


def _weights(
    loss: Tensor,
    shown: Sequence[tuple[str, Simulated]],
    every: Sequence[tuple[str, Simulated]],
) -> Iterator[str]:
    """Yield the weight of each loss, or of groups of losses, lowest first; then the statistics."""
    order = loss.argsort(stable=True)
    few = len(loss) <= _ALL
    groups = [*order.tensor_split(min(_ALL, len(loss)))]
    heading = "loss" if few else "loss from        to"
    rows = [_span(loss[group], few=few) for group in groups]
    columns = [[found.weight[group].mean().item() for group in groups] for _, found in shown]
    highest = max(found.weight[group].mean().item() for _, found in every for group in groups)
    left = len(rows[0])
    labels = [label for label, _ in shown]
    if not few:
        sizes = sorted({len(group) for group in groups})
        yield f"mean weight of each twentieth of the losses, {' or '.join(map(str, sizes))} units"
    yield from _table(heading, rows, labels, columns, highest)
    yield ""
    statistics = [_statistics(found, few=few) for _, found in shown]
    names = [*statistics[0]]
    cells = [[*column.values()] for column in statistics]
    yield from _table("", [f"{name:>{left}}" for name in names], labels, cells, None)[1:]


def _span(loss: Tensor, *, few: bool) -> str:
    low, high = loss.min().item(), loss.max().item()
    return number(low) if few else f"{number(low)} {number(high)}"


def _statistics(found: Simulated, *, few: bool) -> dict[str, float | None]:
    """Return what a spec's weights are like, by name."""
    weight = found.weight
    quantiles = {f"{q} %": torch.quantile(weight, q / 100).item() for q in (10, 50, 90)}
    return {
        "min": weight.min().item(),
        **({} if few else quantiles),
        "mean": weight.mean().item(),
        "max": weight.max().item(),
        "ESS/n": found.ess_frac,
        "at cap": found.capped_frac,
    }


def _table(
    heading: str,
    rows: Sequence[str],
    labels: Sequence[str],
    columns: Sequence[Sequence[float | None]],
    highest: float | None,
) -> list[str]:
    """Return lines of a table: rows, a number for each label, and its bar where one is highest."""
    left = max(len(heading), *map(len, rows))
    width = (WIDTH - left) // len(labels)
    names = "".join(f"  {cut(label, width - 3):{width - 2}}" for label in labels)
    lines = [f"{heading:>{left}}{names}".rstrip()]
    for row, *values in zip(rows, *columns, strict=True):
        cells = (_cell(value, width, highest) for value in values)
        lines.append(f"{row:>{left}}{''.join(cells)}".rstrip())
    return lines


def _cell(value: float | None, width: int, highest: float | None) -> str:
    text = number(value) if value is not None else "-"
    bar = _bar(value, highest, width - 13) if value is not None and highest else ""
    return f"  {text:>9} {bar}".ljust(width)


def _bar(value: float, highest: float, width: int) -> str:
    """Return a bar of eighths of a character, as long as the value's part of the highest."""
    eighths = round(8 * width * max(value, 0) / highest) if highest > 0 else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[rest].strip()


def _top(loss: Tensor, weighing: Sequence[tuple[str, Simulated]]) -> Iterator[str]:
    """Yield who is among the tenth that weighs most, against the first spec."""
    (first, found), *others = weighing
    before = _top_tenth(found.weight)
    yield f"the tenth that weighs most, ties included: {int(before.sum())} by {cut(first, 32)}"
    yield f"  {'against it':32}         units  losses"
    for label, other in others:
        now = _top_tenth(other.weight)
        groups = {"stay": before & now, "leave": before & ~now, "join": now & ~before}
        for name, (what, members) in zip((label, "", ""), groups.items(), strict=True):
            who = loss[members]
            ends = (
                dict.fromkeys(number(x.item()).strip() for x in who.aminmax()) if len(who) else ()
            )
            yield f"  {cut(name, 32):32} {what:>5} {len(who):>7}  {' to '.join(ends)}".rstrip()


def _top_tenth(weight: Tensor) -> Tensor:
    """Return which units are among the highest tenth, at least one, ties included."""
    k = max(1, math.ceil(len(weight) / 10))
    return weight >= weight.topk(k).values[-1]


def _by_domain(domain: list[str], shown: Sequence[tuple[str, Simulated]]) -> Iterator[str]:
    """Yield the mean weight of each domain's units."""
    yield "mean weight of each domain"
    names = sorted({*domain})
    ids = torch.tensor([names.index(name) for name in domain])
    columns = [
        [found.weight[ids == i].mean().item() for i in range(len(names))] for _, found in shown
    ]
    rows = [f"{cut(name, 20):20}" for name in names]
    highest = max(value for column in columns for value in column)
    yield from _table(f"{DOMAIN:20}", rows, [label for label, _ in shown], columns, highest)


def _draws(each: Named, found: Simulated, step: int) -> Iterator[str]:
    """Yield in which proportions a spec draws, where the domains are known."""
    fn, name = found.fn, cut(each.label, 32)
    alone = ", and leaves the loss alone" if only_draws(fn.plan) else ""
    if fn.domains == ("all",):
        yield f"{name} draws data by domain{alone};"
        yield f"a column {DOMAIN} tells of which domains, and the proportions"
        return
    yield f"{name} draws data by domain{alone}"
    shares = proportions(fn, step).tolist()
    rows = [f"{cut(name, 20):20}" for name in fn.domains]
    yield from _table(f"{DOMAIN:20}", rows, ["proportion"], [shares], max(shares))


def _points(named: list[Named], given: Recorded, first: int, last: int) -> list[int]:
    """Return telling steps of a run: its ends, where schedules turn, and between them.

    Raises:
        ValueError: Steps were recorded, and none of these.
    """
    steps = [step for step in given.steps() if first <= step <= last]
    if given.steps():
        if not steps:
            there = f"{given.steps()[0]} to {given.steps()[-1]}"
            msg = f"{given.name}: nothing from step {first} to {last}, but from {there}"
            raise ValueError(msg)
        return _some(steps, 9)
    turned = {
        turn for each in named for found in changing(each.plan) for turn in turns(found.schedule)
    }
    inside = sorted(turn for turn in turned if first < turn < last)
    parts = 4 if inside else 8
    even = {first + (last - first) * i // parts for i in range(parts + 1)}
    return sorted({*even, *_some(inside, 4)})


def _some(steps: list[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly spread, both ends among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _over(named: list[Named], given: Recorded, steps: list[int], per: str) -> Iterator[str]:
    """Yield effective sample size, maximum and share at the cap at steps of a run."""
    weighing = [each for each in named if not only_draws(each.plan)]
    if not steps or not weighing:
        return
    pairs = [weighing[i : i + 2] for i in range(0, len(weighing), 2)]
    for pair in pairs:
        yield ""
        yield f"{'':10}" + "  ".join(f"   {cut(each.label, 25):25}" for each in pair).rstrip()
        yield f"{'step':>10}" + "  ".join(f"{'ESS/n':>8}{'max':>10}{'at cap':>10}" for _ in pair)
        for step in steps:
            cells: list[str] = []
            for each in pair:
                found = simulate_recorded(
                    each.spec, each.plan, given, step, one_sequence=per == "token"
                )
                capped = "-" if found.capped_frac is None else f"{found.capped_frac:.4f}"
                highest = number(found.weight.max().item())
                cells.append(f"{found.ess_frac:8.4f} {highest}{capped:>10}")
            yield f"{step:>10}" + "  ".join(cells)


def number(value: float) -> str:
    """Return a number as nine characters: four decimals, or three digits and a power of ten."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e4  # noqa: PLR2004 - what four decimals show
    return f"{value:9.4f}" if plain else f"{value:9.2e}"


def say(lines: Sequence[str]) -> None:
    """Print lines, in plainer characters where the terminal knows no others."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    text = "\n".join(map(printable, lines))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.translate({ord("█"): "#", ord("…"): "~", **dict.fromkeys(map(ord, "▏▎▍▌▋▊▉"))})
        text = plain.encode(encoding, "replace").decode(encoding)
    click.echo(text)

"""What specs would have done to the sequences, or documents, that a run recorded.

A record has the mean of each signal over the tokens of a unit, a sequence or a document, so a spec
can be replayed as far as it asks for no more than that.  Units then weigh as if each were one
token; what tokens count for in the run, in scaling to mean one and in `reduction`, is put right by
their number.  Only the mean over a domain is that of its units, alike however long they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from weighting.build import build
from weighting.build.domains import proportions
from weighting.build.statistics import MOMENTS
from weighting.columns import HIDDEN, plain_name
from weighting.contract import Combine, Pool, Source
from weighting.loss.cross_entropy import signals_of
from weighting.simulate import capped_factors
from weighting.spec import SINGLE
from weighting.stages import (
    Column,
    ContextGain,
    Entropy,
    ErrorNorm,
    ExcessLoss,
    Loss,
    Mean,
    TargetProb,
    TopkEntropy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from weighting.build import Plan, Weighting
    from weighting.contract import Level
    from weighting.pipeline import Step as PlannedStage
    from weighting.runs.record_reader import Record
    from weighting.spec import Spec

_AT_ONCE = 512
"""Batches that are weighed in one call."""
_MEANS = (
    Column,
    ContextGain,
    Entropy,
    ErrorNorm,
    ExcessLoss,
    Loss,
    TargetProb,
    TopkEntropy,
)
"""Sources whose mean over tokens is what they make of the signals' means."""


def unit_of(plan: Plan) -> Level:
    """Return of what a record must be for a spec, "document" if a factor weighs per document."""
    levels = {
        steps[-1].level for name, steps in plan.factors.items() if plan.targets[name] != "sampling"
    }
    by_document = "document" in levels or plan.spec.reduction == "document_mean"
    return "document" if by_document else "sequence"


def left_out(record: Record) -> tuple[int, int]:
    """Return how many documents were not recorded, and of how many."""
    step, start = record.each(record.numbers), torch.tensor([-1])
    begins = (record.row.diff(prepend=start) != 0) | (step.diff(prepend=start) != 0)
    there = int(record.documents[begins].sum())
    return there - len(record.row), there


def obstacle(plan: Plan, record: Record) -> str | None:
    """Return why a record cannot tell what a spec would have done, or None.

    Args:
        plan: The spec's.
        record: What was recorded.
    """
    if HIDDEN in plan.needs:
        return "it reads hidden states, which no record holds; train with it"
    for name, steps in plan.factors.items():
        if plan.targets[name] == "sampling":
            continue
        who = "it" if name == SINGLE else name
        feedback = [step.stage.listens_to for step in steps if step.stage.listens_to]
        if feedback:
            return f"{who} waits for {feedback[0]}, and only batches were recorded"
        if reason := _too_fine(steps, record.level):
            return f"{who} {reason}"
    needed = {name for name in plan.needs if not name.endswith("_ids")}
    lacking = sorted(plain_name(name) for name in needed - record.known)
    if lacking:
        if lacking[0] == "loss":
            return "it reads loss, which uniform records only with --loss.memory late"
        names = " and ".join(lacking)
        return f"it reads {names}, which the run's own spec did not; record one that does"
    return None


class Replayed(NamedTuple):
    """What a spec made of a record: weights of all its units, and the share of units at a cap."""

    weight: Tensor
    capped: float | None


def replay(spec: Spec, record: Record) -> Replayed:
    """Return the weight that a spec gives to each recorded unit, step by step.

    What it remembers moves with the recorded steps alone.

    Args:
        spec: One without an `obstacle`.
        record: What was recorded.

    Raises:
        SpecError: The spec does not fit the domains.
    """
    fn = build(spec, domains=record.domains or None)
    capping = [[*fn.plan.factors].index(name) for name in capped_factors(fn.plan)]
    moments = torch.zeros(len(fn.plan.factors) + 1, len(MOMENTS))
    found = torch.zeros_like(record.tokens)
    for places, steps in _together(fn.plan, record):
        if "both" in fn.plan.targets.values():
            fn.get_buffer("drawn").copy_(proportions(fn, steps[0]))
        weights, own = _weighed(fn, _signals(record, places), steps)
        found[places] = _scaled(spec, weights, record, places)
        moments += own
    count, at_cap = (moments[capping, MOMENTS.index(name)] for name in ("count", "capped"))
    capped = (at_cap / count.clamp(min=1)).max().item() if capping else None
    return Replayed(found, capped)


def _signals(record: Record, places: Tensor) -> dict[str, Tensor]:
    """Return the signals of the units at some places, by name, each of the places' shape."""
    signals = {name: record.signals[name][places] for name in record.known}
    signals.setdefault("loss", torch.zeros(places.shape))
    signals["valid"] = record.tokens[places] > 0
    signals["domain_ids"] = record.domain[places]
    return {**signals, "segment_ids": torch.zeros_like(signals["domain_ids"])}


def _together(plan: Plan, record: Record) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places of units that are weighed together, [k, n], and their steps, [k].

    Batches of as many units come several at once where no batch changes the next.
    """
    places, sizes, steps = record.batches(plan.spec.scope)
    if plan.has_state or "both" in plan.targets.values():
        for own, step in zip(places.split(sizes.tolist()), steps.split(1), strict=True):
            yield own[None], step
        return
    starts = sizes.cumsum(0) - sizes
    for count in sizes.unique().tolist():
        alike = sizes == count
        some = places[starts[alike, None] + torch.arange(count)]
        yield from zip(some.split(_AT_ONCE), steps[alike].split(_AT_ONCE), strict=True)


def _weighed(fn: Weighting, signals: dict[str, Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of some batches of as many units, [k, n], and the sum of their moments."""

    def weigh(signals: dict[str, Tensor], step: Tensor) -> tuple[Tensor, Tensor]:
        out = fn(signals_of({name: x[:, None] for name, x in signals.items()}), step)
        return out.token[:, 0], out.moments

    if len(steps) > 1:
        try:
            weights, moments = torch.vmap(weigh)(signals, steps)
        except RuntimeError:  # a stage asks for a number in Python
            pass
        else:
            return weights, moments.sum(0)
    each = [{name: x[i] for name, x in signals.items()} for i in range(len(steps))]
    apart = [weigh(own, step) for own, step in zip(each, steps, strict=True)]
    return torch.stack([x for x, _ in apart]), torch.stack([x for _, x in apart]).sum(0)


class Summary(NamedTuple):
    """What the sizes of weights come to.

    Attributes:
        ess: Effective sample size over n, (sum w)^2 / (n * sum w^2), the mean over steps.
        largest: The largest weight.
        top: Share of each step's tenth of highest weight that the recorded weights put there too.
        shares: Of each domain, the part of all weight, that of a unit counted for its tokens.
    """

    ess: float
    largest: float
    top: float
    shares: list[float]


def summary(record: Record, weight: Tensor) -> Summary:
    """Return what weights of all recorded units, [n], come to."""
    ess: list[Tensor] = []
    top: list[Tensor] = []
    there = record.tokens > 0
    of_step = record.each(torch.arange(len(record.sizes)))
    counts = torch.zeros_like(record.sizes).index_add(0, of_step, there.long())
    starts = counts.cumsum(0) - counts
    both = torch.stack([weight, record.weight]).abs()[:, there]
    for count in counts.unique().tolist():  # steps of as many units at once
        places = starts[counts == count, None] + torch.arange(count)
        own, recorded = both[:, places]
        squares = count * (own * own).sum(1)
        ess.append(torch.where(squares > 0, own.sum(1) ** 2 / squares.clamp(min=1e-30), 0))
        top.append(torch.minimum(_in_top(own), _in_top(recorded)).sum(1) / _tenth(count))
    mass = torch.zeros(max(len(record.domains), 1)).double()
    mass.index_add_(0, record.domain, (weight.abs() * record.tokens).double())
    shares = mass / mass.sum().clamp(min=1e-30)
    means = (torch.cat(x).mean().item() for x in (ess, top))
    return Summary(next(means), weight.max().item(), next(means), shares.tolist())


def _too_fine(steps: Sequence[PlannedStage], unit: Level) -> str | None:
    """Return what a factor asks of tokens beyond the mean over each unit, or None."""
    source, *rest = [step.stage for step in steps]
    assert isinstance(source, Source)
    if any(isinstance(stage, Combine) for stage in rest):
        return "combines two scores, and the means over each unit were recorded"
    level = steps[-1].level
    if source.reads() <= {"domain_ids"} and level == "token" and not any(x.inside() for x in rest):
        return None
    if level == "document" and unit == "sequence":
        fix = "record documents too: --weighting.record every=10,documents=8"
        return f"weighs per document, and sequences were recorded; {fix}"
    if level == "sequence" and unit == "document":
        return "weighs per sequence and another factor per document, and a replay is of one"
    if level == "token":
        return f"weighs per token, and {unit}s were recorded"
    pool = next(i for i, stage in enumerate(rest) if isinstance(stage, Pool))
    if not isinstance(rest[pool], Mean):
        return f"takes the {rest[pool].name} over tokens, and their mean was recorded"
    if pool or not isinstance(source, _MEANS):
        shaped = rest[0].name if pool else source.name
        return f"takes {shaped} of each token, and the means over {unit}s were recorded"
    return None


def _scaled(spec: Spec, weights: Tensor, record: Record, places: Tensor) -> Tensor:
    """Return what weights of units of one token become where they have more, [k, n]."""
    tokens = record.tokens[places]
    if spec.reduction != "token_mean":
        each = zip(weights, tokens, record.row[places], record.domain[places], strict=True)
        weights = torch.stack([_reduced(spec, *of) for of in each])
    if spec.normalize == "mean_one" and spec.scope != "running":
        total = (weights.abs() * tokens).sum(1, keepdim=True)
        scaled = weights * tokens.sum(1, keepdim=True) / total
        weights = torch.where(total > 0, scaled, weights)
    return weights


def _reduced(spec: Spec, weight: Tensor, tokens: Tensor, row: Tensor, domain: Tensor) -> Tensor:
    """Return the weights of a batch, [n], by whose tokens the reduction counts its units alike."""
    all_tokens, there = tokens.sum(), (tokens > 0).float()
    if spec.reduction == "sequence_mean":
        of = row.unique(return_inverse=True)[1]
        counted = weight.new_zeros(len(of)).index_add(0, of, tokens)
        weight = weight * all_tokens / (counted > 0).sum() / counted[of].clamp(min=1)
    elif spec.reduction == "document_mean":
        weight = weight * all_tokens / there.sum() / tokens.clamp(min=1)
    elif spec.reduction == "domain_mean":
        number = int(domain.max()) + 1
        units, counted = (
            weight.new_zeros(number).index_add(0, domain, x)[domain] for x in (there, tokens)
        )
        weight = weight * all_tokens / there.sum() * units / counted.clamp(min=1)
    return weight


def _tenth(count: int) -> int:
    return max(1, -(-count // 10))


def _in_top(weight: Tensor) -> Tensor:
    """Return how far weights are among the highest tenth of their row, [k, n].

    That is 1, 0, or a share where it ties.
    """
    if not weight.shape[1]:
        return weight
    k = _tenth(weight.shape[1])
    edge = weight.topk(k, 1).values[:, -1:]
    slack = 1e-4 * edge  # records are rounded
    above, level = weight > edge + slack, (weight - edge).abs() <= slack
    return above + level * (k - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)

"""Which values of a number keep what a recorded run would have weighed within what is asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from weighting.build import plan_of
from weighting.runs.replay import replay, summary
from weighting.runs.vary import varied
from weighting.simulate import DOMAIN, simulate_recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weighting.runs.loss_files import Recorded
    from weighting.runs.record_reader import Record
    from weighting.runs.vary import Number, Values
    from weighting.spec import Spec

_HALVINGS = 10
"""So often the way between a value that keeps within and its neighbour that does not is halved."""


class Measured(NamedTuple):
    """What the weights of recorded units come to.

    Attributes:
        ess: Effective sample size over n, the mean over steps.
        capped: Share of units at a cap; None where nothing is capped.
        largest: The largest weight.
        shares: Part of all weight by domain.
    """

    ess: float
    capped: float | None
    largest: float
    shares: dict[str, float]


class Wish(NamedTuple):
    """What is asked for: that a quantity is from `low` to `high`.

    Attributes:
        label: What it is called.
        low: The least.
        high: The most.
        domain: Whose share of the weight it is; None for one of the names of `Measured`.
    """

    label: str
    low: float
    high: float
    domain: str | None = None

    def of(self, found: Measured) -> float:
        """Return the quantity; the share at a cap is 0 where nothing is capped."""
        if self.domain is not None:
            return found.shares[self.domain]
        return getattr(found, self.label) or 0.0

    def is_met(self, found: Measured) -> bool:
        """Tell whether the quantity is in the range."""
        return self.low <= self.of(found) <= self.high


class Point(NamedTuple):
    """A value of the number, what the weights come to, and whether all that is asked for is met."""

    value: float
    found: Measured
    met: bool


class Scan(NamedTuple):
    """What came of the values of a number.

    Attributes:
        points: Of each value, ascending.
        spans: First and last value of each stretch that keeps within what is asked for, ascending.
    """

    points: Sequence[Point]
    spans: Sequence[tuple[float, float]]


def scan(
    spec: Spec,
    number: Number,
    values: Values,
    wishes: Sequence[Wish],
    measure: Callable[[Spec], Measured],
) -> Scan:
    """Return what weights come to over values of a number, and which keep within what is asked for.

    The ends of a stretch are found by halving, to a thousandth of the way between two values.
    Between two neighbours that both keep within, it is taken to be kept.

    Raises:
        ValueError: The number cannot be such a value, or the spec cannot weigh.
    """

    def at(value: float) -> Point:
        found = measure(varied(spec, number, value))
        return Point(value, found, all(wish.is_met(found) for wish in wishes))

    points = [at(value) for value in values.grid(whole=number.whole)]
    exact = bool(values.listed) or number.whole
    spans: list[tuple[float, float]] = []
    for i, point in enumerate(points):
        if not point.met:
            continue
        before, after = points[i - 1] if i else None, points[i + 1] if i + 1 < len(points) else None
        if before is None or not before.met:
            low = point.value
            if before is not None and not exact:
                low = _edge(point.value, before.value, values, lambda x: at(x).met)
            spans.append((low, low))
        high = point.value
        if after is not None and not after.met and not exact:
            high = _edge(point.value, after.value, values, lambda x: at(x).met)
        spans[-1] = (spans[-1][0], high)
    return Scan(points, spans)


def _edge(inside: float, outside: float, values: Values, met: Callable[[float], bool]) -> float:
    """Return the last value that is met on the way from one that is to one that is not."""
    for _ in range(_HALVINGS):
        middle = values.between(inside, outside)
        if met(middle):
            inside = middle
        else:
            outside = middle
    return inside


def of_record(spec: Spec, record: Record) -> Measured:
    """Return what a spec without an `obstacle` makes of a run's record."""
    found = replay(spec, record)
    total = summary(record, found.weight)
    shares = dict(zip(record.domains, total.shares, strict=False))
    return Measured(total.ess, found.capped, total.largest, shares)


def of_losses(spec: Spec, losses: Recorded, *, one_sequence: bool) -> Measured:
    """Return what a spec makes of the units of a file, the units of each step by themselves.

    Raises:
        ValueError: It lacks a column, or a value is none.
    """
    plan = plan_of(spec)
    done = [
        (losses.at(step), simulate_recorded(spec, plan, losses, step, one_sequence=one_sequence))
        for step in losses.steps() or [1]
    ]
    capped = [found.capped_frac for _, found in done if found.capped_frac is not None]
    shares: dict[str, float] = {}
    if DOMAIN in losses.has:
        for here, found in done:
            for name, weight in zip(here.words(DOMAIN), found.weight.tolist(), strict=True):
                shares[name] = shares.get(name, 0.0) + weight
        total = math.fsum(shares.values()) or 1.0
        shares = {name: weight / total for name, weight in sorted(shares.items())}
    ess = torch.tensor([found.ess_frac for _, found in done]).mean().item()
    largest = max(found.weight.max().item() for _, found in done)
    return Measured(ess, sum(capped) / len(capped) if capped else None, largest, shares)


def told(spans: Sequence[tuple[float, float]], *, inward: bool) -> Iterator[str]:
    """Yield the stretches as texts: "from 0.42 to 4", or "0.4" for a single value.

    Args:
        spans: First and last value of each.
        inward: Round ends to three digits towards the middle of their stretch.
    """
    for low, high in spans:
        texts = [_short(low, up=True), _short(high, up=False)] if inward else []
        if not texts or float(texts[0]) > float(texts[1]):
            texts = [f"{low:.6g}", f"{high:.6g}"]
        yield texts[0] if texts[0] == texts[1] else f"from {texts[0]} to {texts[1]}"


def _short(x: float, *, up: bool) -> str:
    """Return a number to three digits, not below it or not above it."""
    if x == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(x))) - 2)
    count = math.ceil(x / unit - 1e-9) if up else math.floor(x / unit + 1e-9)
    return f"{count * unit:.3g}"

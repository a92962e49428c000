"""What a run came to, in a few lines: each number at its first and last step, and over the run."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.runs.files import Lines

_ROWS = {
    "loss (nats)": ("unweighted_loss", ".4f"),
    "weighted loss (nats)": ("weighted_loss", ".4f"),
    "largest weight (mean 1)": ("weight/max", ".3f"),
    "effective sample size (share)": ("weight/ess_frac", ".3f"),
    "share at the cap": ("", ".3f"),
    "tokens per second": ("tps", ",.0f"),
}
"""Label, name in the metrics, and form of each row; the share at the cap is made of several."""
_HEAD = ("first", "last", "minimum", "mean", "maximum")
_WIDTH, _CELL = 29, 10
_RANGES = 6
"""So many stretches of steps at the cap are written out."""


def summary(lines: Lines) -> str:
    """Return the table of a run, and the steps at which a cap held weights down.

    Minimum, mean and maximum are over the finite values.
    """
    if not lines:
        return "no steps were logged"
    steps, shares = lines.steps, [capped(line) for line in lines]
    rows = [f"{'':{_WIDTH}}" + "".join(f"{word:>{_CELL}}" for word in _HEAD)]
    for label, (name, form) in _ROWS.items():
        values = lines.column(name) if name else shares
        rows.append(f"{label:{_WIDTH}}" + "".join(f"{x:{_CELL}{form}}" for x in _five(values)))
    bound = [step for step, share in zip(steps, shares, strict=True) if share > 0]
    rows += ["", f"steps logged: {len(steps):,}, from {steps[0]:,} to {steps[-1]:,}"]
    where = f"a cap held weights down at {len(bound):,} of these: {_stretches(bound, steps)}"
    return "\n".join([*rows, where if bound else "no cap held a weight down"])


def capped(line: dict[str, float]) -> float:
    """Return the largest share of units at their cap among the factors of one line."""
    suffix = "/capped_frac"
    shares = (v for k, v in line.items() if k.endswith(suffix) and k != f"weight{suffix}")
    return max(shares, default=0.0)


def _five(values: Sequence[float]) -> tuple[float, ...]:
    """Return the first and last value, and minimum, mean and maximum of the finite ones."""
    finite = [x for x in values if math.isfinite(x)] or [math.nan]
    return (values[0], values[-1], min(finite), fmean(finite), max(finite))


def _stretches(some: Sequence[int], steps: Sequence[int]) -> str:
    """Return some of the logged steps, those that follow one another as first-last."""
    place = {step: i for i, step in enumerate(steps)}
    found: list[list[int]] = []
    for step in some:
        if found and place[step] == place[found[-1][-1]] + 1:
            found[-1].append(step)
        else:
            found.append([step])
    words = [f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in found]
    return ", ".join(words[:_RANGES]) + ", ..." * (len(words) > _RANGES)

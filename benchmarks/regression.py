"""Repeat the regression experiments of LinUpper's paper with the shipped specs: speed and outliers.

    python benchmarks/regression.py [--quick] [--out benchmarks/regression.md]

Writes the report, a .svg and a .json beside it; the .json and the specs are all that the report is
made from.
Models are linear, trained on a stream of small batches, and measured against the truth:

    y = x . truth + noise e + size z b     x, e, z normal; b = 1 for a share of all samples, else 0
    l_i = (x_i . theta - y_i)^2 / 2,   theta <- theta - rate / n sum_i w_i grad l_i
    test loss = |theta - truth|^2 / 2      the mean of l over clean samples without noise, exactly
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor

import weighting as wt
from weighting.language.read import resolve

mpl.use("svg")
import itertools

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, BATCH = 20, 32
"""Parameters of a model, and samples of a step."""
SPECS = ("uniform", "linupper", "quadratic", "extremes", "dro-kl")
SHAPES = SPECS[:4]
"""The specs that the paper's Figure 7 compares."""
RATES = tuple(round(0.0125 * 2 ** (k / 2), 4) for k in range(13))
"""Learning rates, each the root of two times the one before; tables show every second."""
TOO_LARGE = 1e6
"""A run whose test loss passes this, from 0.5, is stopped and counts as diverged."""
SMALL = 1e-30
"""A test loss below this counts as this: float32 losses end not far below."""
BUDGETS = (50, 200)
"""Steps after which models are compared, each spec at its own rate."""
# Okabe and Ito's colours, told apart by colour-blind readers; dashes help in print.
STYLES = {
    "uniform": ("#000000", "-"),
    "linupper": ("#0072B2", "-"),
    "quadratic": ("#009E73", "--"),
    "extremes": ("#CC79A7", "-."),
    "prop1": ("#D55E00", ":"),
    "dro-kl": ("#E69F00", (0, (5, 1))),
    "dro-kl, small rate": ("#56B4E9", (0, (1, 1))),
}


class Data(NamedTuple):
    """How labels are made; standard deviations are in units of the signal's, which is one."""

    noise: float
    share: float
    size: float

    @property
    def words(self) -> str:
        """How a table calls it."""
        if not self.noise:
            return "no noise, no outliers"
        return f"{self.share * 100:g} % of size {self.size:g}" if self.share else "noise only"


DATA = (
    Data(0, 0, 0),
    Data(0.1, 0, 0),
    *(Data(0.1, share, size) for share in (0.05, 0.25) for size in (1.0, 3.0, 10.0)),
)
FIGURE_7 = (Data(0.1, 0.05, 1.0), 0.05)
"""Data and rate of experiment A."""
FIGURE_8 = (Data(0.1, 0.25, 1.0), 0.2, 0.0125)
"""Data, the rate that all share, and DRO-KL's smaller one of experiment B."""


class Draws(NamedTuple):
    """What chance decides in the runs of each seed; the same for every spec, rate and data.

    Attributes:
        x: [seeds, steps, n, size]
        noise: [seeds, steps, n], normal.
        outlier: [seeds, steps, n], normal.
        lot: [seeds, steps, n], uniform; an outlier where it is below the share.
        start: [seeds, size], theta - truth at first, of length one.
    """

    x: Tensor
    noise: Tensor
    outlier: Tensor
    lot: Tensor
    start: Tensor


def main() -> None:
    """Run the experiments, and write numbers, report and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, 50 steps, six cells, to try it"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/regression.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums of another order would change last digits
    found = measured(2, 50, quick=True) if args.quick else measured(24, max(BUDGETS))
    args.out.with_suffix(".json").write_text(as_json(found), encoding="utf-8")
    args.out.write_text(report(found), encoding="utf-8")
    picture(found, args.out.with_suffix(".svg"))
    print(args.out)


def weigher(spec: str) -> Callable[[Tensor], Tensor]:
    """Return what maps losses of batches, [batches, n], to weights of mean one each."""
    fn = wt.build(resolve(spec))

    def weights(loss: Tensor) -> Tensor:
        return fn(wt.Signals(loss=loss[:, None])).token[:, 0]  # one token per sequence

    return torch.vmap(weights)


def draws(seeds: int, steps: int) -> Draws:
    """Return the draws of seeds 0, 1, ..., float64."""
    parts: list[tuple[Tensor, ...]] = []
    for seed in range(seeds):
        chance = torch.Generator().manual_seed(seed)
        start = torch.randn(SIZE, generator=chance, dtype=torch.float64)
        normal = torch.randn(steps, BATCH, SIZE + 2, generator=chance, dtype=torch.float64)
        lot = torch.rand(steps, BATCH, generator=chance, dtype=torch.float64)
        x, noise, outlier = normal.split([SIZE, 1, 1], -1)
        parts.append((x, noise.squeeze(-1), outlier.squeeze(-1), lot, start / start.norm()))
    return Draws(*(torch.stack(part) for part in zip(*parts, strict=True)))


def descend(spec: str, cells: list[tuple[Data, float]], chance: Draws) -> Tensor:
    """Return test losses [steps + 1, seeds, cells], before and after each step.

    Args:
        spec: What weighs.
        cells: Data and rate of each run.
        chance: The draws.
    """
    weights = weigher(spec)
    noise, share, size = (
        torch.tensor([getattr(data, name) for data, _ in cells], dtype=torch.float64)[:, None]
        for name in Data._fields
    )
    rate = torch.tensor([rate for _, rate in cells], dtype=torch.float64)[:, None]
    off = chance.start[:, None].expand(-1, len(cells), -1)  # theta - truth
    losses = [off.square().sum(-1) / 2]
    for step in range(chance.x.shape[1]):
        x = chance.x[:, step]
        e, z, lot = (part[:, step, None] for part in chance[1:4])
        residual = off @ x.mT - noise * e - size * z * (lot < share)
        loss = residual.square() / 2
        w = weights(loss.reshape(-1, BATCH).float()).reshape_as(loss)
        moved = off - rate * ((w * residual) @ x) / BATCH
        off = torch.where(losses[-1][..., None] <= TOO_LARGE, moved, off)
        losses.append(off.square().sum(-1) / 2)
    return torch.stack(losses)


def measured(seeds: int, steps: int, *, quick: bool = False) -> dict[str, Any]:
    """Return the numbers that report and picture are made from."""
    cells = [(data, rate) for data in DATA for rate in RATES]
    if quick:
        cells = [
            (data, rate) for data in (FIGURE_7[0], FIGURE_8[0]) for rate in (0.0125, 0.05, 0.2)
        ]
    chance = draws(seeds, steps)
    runs = {spec: descend(spec, cells, chance) for spec in SPECS}
    found: dict[str, Any] = {"seeds": seeds, "steps": steps, "cells": [], "curves": {}, "soft": []}
    for index, (data, rate) in enumerate(cells):
        for spec, losses in runs.items():
            found["cells"].append(summary(spec, data, rate, losses[:, :, index]))
    for spec in SHAPES:
        text = spec if spec == "uniform" else pipeline(spec).replace("0.4", "1")
        losses = descend(text, [FIGURE_7], chance)[:, :, 0]
        found["soft"].append({"text": text, **summary(spec, *FIGURE_7, losses)})
    data, rate, small = FIGURE_8
    shown = {f"A: {spec}": (spec, FIGURE_7) for spec in SHAPES}
    shown |= {f"B: {spec}": (spec, (data, rate)) for spec in ("uniform", "linupper", "dro-kl")}
    shown["B: dro-kl, small rate"] = ("dro-kl", (data, small))
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for name, (spec, cell) in shown.items():
        bands = runs[spec][:, :, cells.index(cell)].quantile(levels, 1)
        found["curves"][name] = [rounded(band) for band in bands]
    return found


def summary(spec: str, data: Data, rate: float, losses: Tensor) -> dict[str, Any]:
    """Return what is kept of the runs [steps + 1, seeds] of a cell, a number for each seed.

    to_tenth, to_hundredth: steps until the test loss was a tenth, a hundredth of the first; one
    more than all where it never was.  after_N: geometric mean over the last tenth of N steps, or of
    as many where there are fewer.
    """
    steps = torch.arange(len(losses))[:, None]
    kept: dict[str, Any] = {"spec": spec, **data._asdict(), "rate": rate}
    for name, part in (("to_tenth", 0.1), ("to_hundredth", 0.01)):
        if name == "to_hundredth" and (data, rate) != FIGURE_7:
            continue  # no table asks
        there = losses <= part * losses[0]
        kept[name] = torch.where(there, steps, len(losses)).amin(0).tolist()
    for budget in BUDGETS:
        end = min(budget + 1, len(losses))
        last = losses[end - budget // 10 : end].clamp(min=SMALL)
        kept[f"after_{budget}"] = rounded(last.log().mean(0).exp())
    return kept


def rounded(x: Tensor) -> list[float]:
    """Return numbers with three digits, which a file of them keeps."""
    return [float(f"{value:.2e}") for value in x.tolist()]


def as_json(found: dict[str, Any]) -> str:
    """Return the numbers as JSON, a line for each cell and curve."""
    lines: list[str] = []
    for key, value in found.items():
        if isinstance(value, list):
            inner = ",\n".join(dense(item) for item in value)
            lines.append(f'"{key}": [\n{inner}\n]')
        elif isinstance(value, dict):
            inner = ",\n".join(f"{json.dumps(k)}:{dense(v)}" for k, v in value.items())
            lines.append(f'"{key}": {{\n{inner}\n}}')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def dense(value: object) -> str:
    """Return JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def pipeline(spec: str) -> str:
    """Return a shipped spec as the arrow text it is."""
    return wt.dumps(wt.load(spec)).partition("pipeline: ")[2].strip()


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval, by drawing seeds anew 2,000 times."""

    mean: float
    low: float
    high: float

    @property
    def says(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0


def interval(values: Tensor) -> Interval:
    """Return the mean of one number per seed and its interval."""
    values = values.double()
    chance = torch.Generator().manual_seed(0)
    again = torch.randint(len(values), (2000, len(values)), generator=chance)
    ends = values[again].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(values.mean().item(), *ends.tolist())


class Cells:
    """The numbers of all runs, by spec, data and rate."""

    def __init__(self, cells: list[dict[str, Any]]) -> None:
        self.cells = {(x["spec"], key_of(x)): x for x in cells}
        self.data = list(dict.fromkeys(data for _, (data, _) in self.cells))
        self.rates = sorted({rate for _, (_, rate) in self.cells})

    def of(self, spec: str, data: Data, rate: float, name: str) -> Tensor:
        """Return a number of each seed, [seeds]."""
        return torch.tensor(self.cells[spec, (data, rate)][name], dtype=torch.float64)

    def less(self, spec: str, other: str, cell: tuple[Data, float], name: str) -> Interval:
        """Return the interval of a number minus that of another spec, seed by seed."""
        return interval(self.of(spec, *cell, name) - self.of(other, *cell, name))

    def ratio(self, spec: str, other: str, cell: tuple[Data, float], name: str) -> Interval:
        """Return the interval of the logarithm of a ratio, seed by seed."""
        return interval((self.of(spec, *cell, name) / self.of(other, *cell, name)).log())


def key_of(cell: dict[str, Any]) -> tuple[Data, float]:
    """Return the data and the rate of a cell of the file."""
    return Data(cell["noise"], cell["share"], cell["size"]), cell["rate"]


def report(found: dict[str, Any]) -> str:
    """Return the report in Markdown, made from the numbers alone."""
    cells = Cells(found["cells"])
    lines = [*_introduction(found), "In short:", "", *in_short(found), ""]
    lines += [*_experiment_a(found, cells), *_experiment_b(found, cells)]
    return "\n".join([*lines, *_over_the_grid(found, cells), *_own_rates(cells), ""])


def _introduction(found: dict[str, Any]) -> list[str]:
    texts = [f"| `{spec}` | `{pipeline(spec)}` |" for spec in SPECS]
    return [
        "# Regression with outliers: how fast, and where to",
        "",
        (
            "Written by `python benchmarks/regression.py` from `regression.json`, whose numbers the"
            " same command makes; two runs on one machine give the same bits."
        ),
        "",
        (
            "Appendix B of [Sow et al. 2025](https://arxiv.org/abs/2502.06733) compares weightings"
            " on linear regression: in Figure 7 LinUpper is the fastest to learn, with Quadratic"
            " also ahead of uniform weights; in Figure 8, with 25 % outliers, DRO-KL diverges at"
            " the learning rate that LinUpper uses."
        ),
        "The paper's dimensions, noise, outliers and rates are not known to us; these are ours:",
        "",
        (
            f"- {SIZE} parameters, {BATCH} new samples a step, {found['steps']} steps,"
            f" {found['seeds']} seeds; x is standard normal, and so the signal has size (standard"
            " deviation) 1."
        ),
        (
            "- Labels carry noise of size 0.1; outliers are labels with a further normal error, of"
            " the size and on the share of samples said."
        ),
        (
            "- Plain gradient steps on half squared errors, weighted within each batch by the"
            " shipped specs, built and called as in training, without a burn-in or other schedule:"
        ),
        "",
        "| spec | text |",
        "|---|---|",
        *texts,
        "",
        (
            "The test loss is the mean half squared error on clean samples without noise, computed"
            " exactly; it is 0.5 at first."
        ),
        (
            "Intervals are 95 %, of means over seeds of differences between runs on the same draws,"
            " by bootstrap; a difference counts where its interval excludes 0 (**bold**)."
        ),
        "",
        "![test loss over steps and rates](regression.svg)",
        "",
        "Lines are medians over seeds, bands 10 to 90 %.",
        "",
    ]


def in_short(found: dict[str, Any]) -> list[str]:
    """Return what was found, a line each."""
    cells = Cells(found["cells"])
    data, rate, _ = FIGURE_8
    steps = cells.less("linupper", "uniform", FIGURE_7, "to_tenth")
    ends = cells.ratio("linupper", "uniform", FIGURE_7, "after_200")
    gone = int((cells.of("dro-kl", data, rate, "after_200") > TOO_LARGE).sum())
    stable = [largest_stable(cells, spec, data) for spec in ("dro-kl", "linupper")]
    own = [own_ratio(cells, "linupper", kind, n)[0] for kind in cells.data for n in BUDGETS]
    worse = sum(x.low > 0 for x in own)
    better = sum(x.high < 0 for x in own)
    every = [(kind, x) for kind in cells.data for x in cells.rates]
    ahead = sum(faster(cells, "linupper", "uniform", cell) for cell in every)
    behind = sum(faster(cells, "uniform", "linupper", cell) for cell in every)
    return [
        (
            "- **Figure 7** repeats where all take one rate and outliers are modest."
            f"  LinUpper's steps to a tenth of the loss, minus uniform's: {words(steps)}."
            f"  But its loss settles at {times(ends)} times uniform's."
        ),
        (
            "- The lead is lost as outliers or the rate grow."
            f"  Of {len(every)} settings LinUpper is faster than uniform in {ahead}, slower in"
            f" {behind}."
        ),
        (
            "- With each at its own best rate there is no lead.  LinUpper's loss is"
            f" higher than uniform's in {worse} of {len(own)} comparisons, lower in {better}."
        ),
        (
            f"- **Figure 8** repeats.  At rate {rate:g} DRO-KL diverges for {gone} of"
            f" {found['seeds']} seeds and LinUpper for none.  The largest stable rate of DRO-KL is"
            f" {stable[0]}, that of LinUpper {stable[1]}."
        ),
    ]


def _experiment_a(found: dict[str, Any], cells: Cells) -> list[str]:
    data, rate = FIGURE_7
    soft = Cells(found["soft"])
    lines = [
        f"## A (Figure 7): {data.words}, rate {rate:g}",
        "",
        (
            "This cell of the grid below was picked after seeing it, as one where the paper's order"
            " shows; the grid says where it does not."
        ),
        "",
    ]
    fast = [order(cells, FIGURE_7, name) for name in ("to_tenth", "to_hundredth")]
    lines += [
        (
            f"To a tenth of the first loss: {fast[0]}.  To a hundredth: {fast[1]}."
            "  (`<` where the paired difference of neighbours counts, `~` where it does not.)"
        ),
        "",
        *_speeds(cells, found["steps"]),
        "",
        (
            "The same with r = 1, whose shapes the paper's Figure 7 shows, by the text"
            f" `{found['soft'][1]['text']}` and its like:"
        ),
        "",
        *_speeds(soft, found["steps"]),
        "",
    ]
    return lines


def _speeds(cells: Cells, steps: int) -> list[str]:
    lines = [
        (
            "| | steps to a tenth | less uniform's | to a hundredth | less uniform's"
            " | loss at the end | / uniform's |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for spec in SHAPES:
        row = [f"`{spec}`"]
        for name in ("to_tenth", "to_hundredth"):
            row += [median(cells.of(spec, *FIGURE_7, name), steps)]
            row += [words(cells.less(spec, "uniform", FIGURE_7, name)) if spec != "uniform" else ""]
        row.append(f"{cells.of(spec, *FIGURE_7, 'after_200').median():.2g}")
        ends = cells.ratio(spec, "uniform", FIGURE_7, "after_200")
        row.append(times(ends) if spec != "uniform" else "")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _experiment_b(found: dict[str, Any], cells: Cells) -> list[str]:
    data, rate, small = FIGURE_8
    lines = [
        f"## B (Figure 8): {data.words}",
        "",
        "| | rate | diverged | test loss after 200 steps, median over seeds (10 to 90 %) |",
        "|---|---|---|---|",
    ]
    for spec, at in (("uniform", rate), ("linupper", rate), ("dro-kl", rate), ("dro-kl", small)):
        ends = cells.of(spec, data, at, "after_200")
        low, mid, high = ends.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        gone = int((ends > TOO_LARGE).sum())
        range_of = "" if gone else f"{mid:.2g} ({low:.2g} to {high:.2g})"
        lines.append(f"| `{spec}` | {at:g} | {gone} of {found['seeds']} | {range_of} |")
    lines += [
        "",
        (
            "The largest rates of the grid at which no seed diverges.  LinUpper lets no sample have"
            " more than 2/n of a step; DRO-KL may give a whole step to one:"
        ),
        "",
        f"| | {' | '.join(f'`{spec}`' for spec in SPECS)} |",
        f"|---|{'---|' * len(SPECS)}",
    ]
    for kind in cells.data:
        row = [largest_stable(cells, spec, kind) for spec in SPECS]
        lines.append(f"| {kind.words} | {' | '.join(row)} |")
    return [*lines, ""]


def largest_stable(cells: Cells, spec: str, data: Data) -> str:
    """Return the largest rate below the first at which a seed diverges."""
    stable = "none"
    for rate in cells.rates:
        if (cells.of(spec, data, rate, "after_200") > TOO_LARGE).any():
            return stable
        stable = f"{rate:g}"
    return f"{stable} or more"


def _over_the_grid(found: dict[str, Any], cells: Cells) -> list[str]:
    lines = [
        "## Where the order holds",
        "",
        (
            "Steps to a tenth of the first loss less uniform's, over data (outliers, by share and"
            f" size) and rates; runs that never get there count {found['steps'] + 1}."
        ),
        "No correction for the number of cells: one in twenty would be bold by chance.",
    ]
    shown = cells.rates[::2]
    heads = [f"{rate:g}" for rate in shown]
    for spec in ("linupper", "quadratic"):
        lines += ["", f"| `{spec}` | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        for data in cells.data:
            row = [sooner(cells, spec, (data, rate)) for rate in shown]
            lines.append(f"| {data.words} | {' | '.join(row)} |")
    every = [(data, rate) for data in cells.data for rate in cells.rates]
    counts = [
        sum(all(faster(cells, "linupper", x, cell) for x in others) for cell in every)
        for others in (("uniform", "quadratic", "extremes"), ("uniform",))
    ]
    behind = sum(faster(cells, "uniform", "linupper", cell) for cell in every)
    ahead = sum(faster(cells, "quadratic", "uniform", cell) for cell in every)
    lines += [
        "",
        (
            f"Of all {len(every)} pairs of data and rate, those between the columns too, LinUpper"
            f" is faster than uniform in {counts[1]}, than each of the other three in {counts[0]},"
            f" and slower than uniform in {behind}; Quadratic is faster than uniform in {ahead}."
        ),
        "",
        "Where it settles: the test loss after 200 steps at the same rate, LinUpper's / uniform's:",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for data in cells.data:
        row = [settles(cells, (data, rate)) for rate in shown]
        lines.append(f"| {data.words} | {' | '.join(row)} |")
    return [*lines, ""]


def faster(cells: Cells, spec: str, other: str, cell: tuple[Data, float]) -> bool:
    """Tell whether a spec gets to a tenth before another, beyond chance."""
    return cells.less(spec, other, cell, "to_tenth").high < 0


def sooner(cells: Cells, spec: str, cell: tuple[Data, float]) -> str:
    """Return how many steps less than uniform a spec takes to a tenth, or that neither does."""
    found = [cells.of(x, *cell, "to_tenth") for x in (spec, "uniform")]
    if torch.equal(*found) and (found[0] == found[0][0]).all():
        return "neither does"
    return words(cells.less(spec, "uniform", cell, "to_tenth"))


def settles(cells: Cells, cell: tuple[Data, float]) -> str:
    """Return LinUpper's loss at the end over uniform's, or that it diverges."""
    name = f"after_{max(BUDGETS)}"
    if all((cells.of(x, *cell, name) <= SMALL).all() for x in ("linupper", "uniform")):
        return "both 0"
    if (cells.of("linupper", *cell, name) > TOO_LARGE).any():
        return "diverges"
    return times(cells.ratio("linupper", "uniform", cell, name), brief=True)


def _own_rates(cells: Cells) -> list[str]:
    lines = [
        "## Each at its own rate",
        "",
        "A weighting that favours large losses also lengthens the step.",
        (
            "So here each spec has the rate of the grid that suits it best: the one with the lowest"
            " test loss after the budget on half of the seeds, judged on the other half, and the"
            " other way round."
        ),
        (
            f"Test loss / uniform's, losses below {SMALL:g} taken as that; in brackets the rate or"
            " rates chosen, uniform's first."
        ),
        (
            f"Where a spec chose {cells.rates[0]:g} or {cells.rates[-1]:g}, the ends of the grid,"
            " rates beyond might suit it better; rates do not decay here, as they would in"
            " practice."
        ),
    ]
    for budget in BUDGETS:
        heads = [f"`{spec}`" for spec in SPECS if spec != "uniform"]
        lines += ["", f"| after {budget} steps | {' | '.join(heads)} |"]
        lines += [f"|---|{'---|' * len(heads)}"]
        for data in cells.data:
            row: list[str] = []
            for spec in SPECS[1:]:
                ratio, chosen = own_ratio(cells, spec, data, budget)
                both_end = ratio == (0, 0, 0)
                row.append(f"{'both 0' if both_end else times(ratio)} [{chosen}]")
            lines.append(f"| {data.words} | {' | '.join(row)} |")
    return lines


def own_ratio(cells: Cells, spec: str, data: Data, budget: int) -> tuple[Interval, str]:
    """Return the logarithm of a loss over uniform's, each at its own rate, and the rates."""
    own, chosen = at_own_rate(cells, spec, data, budget)
    plain, rates = at_own_rate(cells, "uniform", data, budget)
    return interval((own / plain).log()), f"{rates}; {chosen}"


def at_own_rate(cells: Cells, spec: str, data: Data, budget: int) -> tuple[Tensor, str]:
    """Return the loss of each seed at the rate that the other half of the seeds chose."""
    name = f"after_{budget}"
    losses = torch.stack([cells.of(spec, data, rate, name) for rate in cells.rates])
    own = torch.empty_like(losses[0])
    chosen: list[float] = []
    for half in (0, 1):
        best = int(losses[:, 1 - half :: 2].log().mean(1).argmin())
        own[half::2] = losses[best, half::2]
        chosen.append(cells.rates[best])
    return own, " or ".join(f"{rate:g}" for rate in dict.fromkeys(chosen))


def order(cells: Cells, cell: tuple[Data, float], name: str) -> str:
    """Return the specs from fastest to slowest, with what is between neighbours."""
    ranked = sorted(SHAPES, key=lambda spec: cells.of(spec, *cell, name).mean().item())
    text = ranked[0]
    for before, after in itertools.pairwise(ranked):
        text += f" {'<' if cells.less(before, after, cell, name).says else '~'} {after}"
    return text


def median(values: Tensor, steps: int) -> str:
    """Return the median of steps, or that it lies beyond the last."""
    mid = values.median().item()
    return f"{mid:.0f}" if mid <= steps else f"> {steps}"


def words(x: Interval) -> str:
    """Return an interval as text, bold where it says something."""
    text = f"{x.mean:+.1f} ({x.low:+.1f} to {x.high:+.1f})"
    return f"**{text}**" if x.says else text


def times(x: Interval, *, brief: bool = False) -> str:
    """Return an interval of a logarithm as that of a ratio, bold where it excludes one."""
    mean, low, high = (number(torch.tensor(y).exp().item()) for y in x)
    text = mean if brief else f"{mean} ({low} to {high})"
    return f"**{text}**" if x.says else text


def number(x: float) -> str:
    """Return a ratio with two or three digits."""
    return f"{x:.2f}" if 0.1 <= x < 100 else f"{x:.1e}"  # noqa: PLR2004 - readable otherwise


def picture(found: dict[str, Any], out: Path) -> None:
    """Draw experiments A and B over their steps, and A at all rates."""
    mpl.rcParams["svg.hashsalt"] = "weighting"  # the same bits at every run
    mpl.rcParams["svg.fonttype"] = "none"
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for name, (low, mid, high) in found["curves"].items():
        letter, _, spec = name.partition(": ")
        axis = a if letter == "A" else b
        colour, dash = STYLES[spec]
        label = spec.replace("small rate", f"rate {FIGURE_8[2]:g}")
        axis.plot(mid, color=colour, linestyle=dash, label=label, linewidth=1.6)
        axis.fill_between(range(len(mid)), low, high, color=colour, alpha=0.15, linewidth=0)
    data, rate, _ = FIGURE_8
    a.set(title=f"A: outliers {FIGURE_7[0].words}, rate {FIGURE_7[1]:g}")
    b.set(title=f"B: outliers {data.words}, rate {rate:g}", ylim=(3e-3, 10))
    for axis in (a, b):
        axis.set(xlabel="step", ylabel="test loss (half squared error)", yscale="log")
    cells = Cells(found["cells"])
    for spec in SHAPES:
        ends = [cells.of(spec, FIGURE_7[0], x, "after_50") for x in cells.rates]
        mids = [x.median().item() for x in ends]
        bands = torch.stack(ends).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), 1)
        colour, dash = STYLES[spec]
        c.plot(cells.rates, mids, color=colour, linestyle=dash, marker="o", markersize=3)
        c.fill_between(cells.rates, *bands.tolist(), color=colour, alpha=0.15, linewidth=0)
    c.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(3e-4, 1))
    c.set(ylabel="test loss (half squared error)", title="A after 50 steps, by rate")
    c.set_xticks(cells.rates[::2], [f"{x:g}" for x in cells.rates[::2]])
    c.minorticks_off()
    handles, labels = a.get_legend_handles_labels()
    for handle, label in zip(*b.get_legend_handles_labels(), strict=True):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    fig.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    fig.savefig(out, metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    main()

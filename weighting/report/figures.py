"""Which charts there are of some runs, and the numbers that are compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from weighting.build import plan_of
from weighting.contract import Constrain
from weighting.errors import SpecError
from weighting.report.charts import Chart, Line, line_chart
from weighting.report.points import Points
from weighting.stages.clamp import Clamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weighting.report.read import Run

_SHOWN = 12
"""The most domains drawn as lines in one chart."""
_MULTIPLES = 24
"""The most domains with a chart of their own."""
_QUANTILES = {"100 %": 1.0, "90 %": 0.9, "50 %": 0.5, "10 %": 0.1, "0 %": 0.0}
_BOUND = (2.0, "2/n, twice the mean: the theorem's bound")


def losses(runs: Sequence[Run]) -> list[Chart]:
    """Return both losses over steps, and how far the unweighted ones are from the first run's."""
    plain, weighted = "unweighted_loss", "weighted_loss"
    charts = [
        _of_runs("Unweighted loss", "loss (nats)", runs, plain, "What runs are compared by."),
        _of_runs("Weighted loss", "loss (nats)", runs, weighted, "What the gradient is taken of."),
        line_chart(
            "Weighted minus unweighted loss",
            "weighted − unweighted (nats)",
            [Line(run.name, loss_shift(run), i) for i, run in enumerate(runs)],
            level=(0.0, "equal weights"),
            note="With weights of mean one, it is above zero where tokens of higher loss "
            "weigh more, and below zero where they weigh less.",
        ),
        line_chart(
            f"Unweighted loss, difference to {runs[0].name}",
            "difference (nats)",
            [
                Line(run.name, paired(run, runs[0]), i)
                for i, run in enumerate(runs)
                if run is not runs[0]
            ],
            level=(0.0, runs[0].name),
            note="Step by step, at the steps that both logged; below zero is better. "
            "The same step is the same text only if data, seed and mixture are the same.",
        ),
    ]
    return _nonempty(charts)


def by_domain(runs: Sequence[Run]) -> list[Chart]:
    """Return charts of each domain's loss and their mean: of validations, else of training."""
    validated = any(run.validations for run in runs)
    if validated and all(len(run.validations) <= 1 for run in runs):
        return []  # the table has all there is
    losses = [_domain_losses(run, validated=validated) for run in runs]
    names = list(dict.fromkeys(name for of_run in losses for name in of_run))
    shown, what = names[:_MULTIPLES], "Validation" if validated else "Training"
    note = f"The first {_MULTIPLES} of {len(names)} are drawn." if len(names) > _MULTIPLES else ""
    return _nonempty(
        [
            line_chart(
                f"{what} loss: {name}",
                "loss (nats)",
                [
                    Line(run.name, of_run.get(name, Points.pairs([])), i)
                    for i, (run, of_run) in enumerate(zip(runs, losses, strict=True))
                ],
                exp_label="perplexity",
                note=note if name == shown[-1] else "",
            )
            for name in shown
        ]
    )


def weights(runs: Sequence[Run]) -> list[Chart]:
    """Return the largest weight against the bound, ESS, the share at the cap, and the spread."""
    tops = [
        (_label(run, name, f"{run.name}: {name}"), run.series(f"{name}/max"))
        for run in runs
        for name in _weighing(run)
    ]
    caps = [cap for run in runs for cap in _caps(run)]
    highest = [Line(label, points, i) for i, (label, points) in enumerate([*tops, *caps])]
    capped = [
        Line(_label(run, name, f"{run.name}: {name}"), run.series(f"{name}/capped_frac"), i)
        for i, (run, name) in enumerate((run, name) for run in runs for name in _weighing(run))
    ]
    charts = [
        line_chart(
            "Maximum weight",
            "largest weight (mean = 1)",
            highest,
            level=_BOUND,
            note="The largest weight of a unit of each factor, 1 being the mean of its n units. "
            "The convergence theorem asks that no weight exceed 2/n of the total.",
        ),
        _of_runs(
            "Effective sample size",
            "ESS (share of tokens)",
            runs,
            "weight/ess_frac",
            "(sum w)² / (n sum w²) of the final token weights: 1 when all weigh alike.",
            zero=True,
        ),
        line_chart(
            "Share at the cap",
            "share of units",
            capped,
            note="Of each factor's units, those whose weight its clamp holds down.",
            zero=True,
        ),
        *map(_spread, runs),
    ]
    return _nonempty(charts)


def _spread(run: Run) -> Chart | None:
    """Return how the weights of recorded sequences are spread, step by step."""
    if run.record is None:
        return None
    there = run.record.tokens > 0
    steps, counts = run.record.each(run.record.numbers)[there].unique_consecutive(
        return_counts=True
    )
    starts, weight = counts.cumsum(0) - counts, run.record.weight[there]
    asked = torch.tensor([*_QUANTILES.values()])
    spread = torch.empty(len(asked), len(steps))
    for count in counts.unique().tolist():  # steps of as many sequences at once
        alike = counts == count
        spread[:, alike] = weight[starts[alike, None] + torch.arange(count)].quantile(asked, dim=1)
    lines = [
        Line(label, Points(steps.double(), values.double()), i)
        for i, (label, values) in enumerate(zip(_QUANTILES, spread, strict=True))
    ]
    return line_chart(
        f"Distribution of weights, {run.name}",
        "mean weight of a sequence",
        lines,
        note="Of the recorded sequences of a step, so many weigh no more.",
        level=(1.0, "equal weights"),
        zero=True,
    )


def throughput(runs: Sequence[Run]) -> list[Chart]:
    """Return tokens per second."""
    note = "Of the first rank, between two log steps."
    return _nonempty([_of_runs("Throughput", "tokens/s", runs, "tps", note, zero=True)])


def domains(run: Run) -> list[Chart]:
    """Return the shares by which a run drew its domains, as they moved."""
    charts = list[Chart | None]()
    kinds = {
        "mixture": "Mixture as it stands",
        "average": "Mixture, averaged so far",
        "drawn": "Drawn by",
    }
    for kind, title in kinds.items():
        shares = {name: run.series(f"domain/{name}/{kind}") for name in run.domains(kind)}
        if kind == "drawn" and not any(_moves(points) for points in shares.values()):
            continue  # fixed proportions are in the table
        most = sorted(shares, key=lambda name: -max(shares[name].values.tolist(), default=0.0))
        shown = [name for name in shares if name in most[:_SHOWN]]
        lines = [Line(name, shares[name], i) for i, name in enumerate(shown)]
        left = f"The {_SHOWN} largest of {len(shares)} domains." if len(shares) > _SHOWN else ""
        level = (1 / len(shares), "equal shares") if shares else None
        charts.append(
            line_chart(f"{title}, {run.name}", "share", lines, zero=True, level=level, note=left)
        )
    return _nonempty(charts)


def domain_mass(run: Run, name: str) -> tuple[float, float]:
    """Return a domain's share of the tokens, and share x weight, each a mean over the lines."""
    share, weight = f"domain/{name}/share", f"domain/{name}/weight"
    shares = run.series(share)
    if not len(shares):
        return math.nan, math.nan
    weights, there = run.series(weight).at(shares.steps)
    mass = (shares.values * weights)[there].sum() / len(shares)
    return shares.values.mean().item(), mass.item()


def loss_shift(run: Run) -> Points:
    """Return the weighted minus the unweighted loss by step, nats."""
    return run.series("weighted_loss").minus(run.series("unweighted_loss"))


def paired(run: Run, first: Run) -> Points:
    """Return how far a run's unweighted loss is from another's at the steps of both, nats."""
    return run.series("unweighted_loss").minus(first.series("unweighted_loss"))


def speed(run: Run) -> float:
    """Return the median of the tokens per second; NaN if none were logged."""
    rates = run.series("tps").values.sort().values
    if not len(rates):
        return math.nan
    return (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]).item() / 2


def _weighing(run: Run) -> list[str]:
    """Return the factors that do not weigh all units alike; the final weights where none is."""
    factors = [n for n in run.factors() if (run.series(f"{n}/max").values != 1).any()]
    return factors or ["weight"]


def _label(run: Run, name: str, label: str) -> str:
    """Return a shorter label where a run has only one factor that weighs."""
    return run.name if _weighing(run) == [name] else label


def _caps(run: Run) -> list[tuple[str, Points]]:
    """Return what the spec's clamps allow at most by step, where that is not just 2/n."""
    if run.spec is None:
        return []
    try:
        plans = plan_of(run.spec).factors
    except SpecError:
        return []
    found: list[tuple[str, Points]] = []
    for name, steps in plans.items():
        for stage in (step.stage for step in steps if isinstance(step.stage, Constrain)):
            points = _cap(stage, torch.frombuffer(run.lines.steps, dtype=torch.int64))
            if (points.values != _BOUND[0]).any():
                found.append((f"{run.name}: cap of {name}", points))
    return found


def _cap(stage: Constrain, steps: Tensor) -> Points:
    """Return what a stage allows at most at some steps, [n]."""
    if type(stage) is Clamp:
        # Schedules are made of operations on single numbers, a constant is one for all.
        return Points(steps.double(), stage.max(steps).double().expand(len(steps)))
    each = [(float(step), stage.cap(step)) for step in steps]
    return Points.pairs([(step, cap.item()) for step, cap in each if cap is not None])


def _of_runs(
    title: str, y_label: str, runs: Sequence[Run], key: str, note: str = "", *, zero: bool = False
) -> Chart | None:
    lines = [Line(run.name, run.series(key), i) for i, run in enumerate(runs)]
    return line_chart(title, y_label, lines, note=note, zero=zero)


def _domain_losses(run: Run, *, validated: bool) -> dict[str, Points]:
    lines, prefix = (run.validations, "") if validated else (run.lines, "domain/")
    keys = dict.fromkeys(key for line in (*lines[:1], *lines[-1:]) for key in line)
    found = {
        key.removeprefix(prefix).removesuffix("/loss"): Points.of(lines, key)
        for key in keys
        if key.startswith(prefix) and key.endswith("/loss")
    }
    means = Points.of(lines, "domain_mean_loss")
    return {"mean over domains": means, **found} if len(means) else found


def _moves(points: Points) -> bool:
    return bool((points.values != points.values[:1]).any())


def _nonempty(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart]

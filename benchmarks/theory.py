"""Follow the terms of LinUpper's convergence bound along runs, and its cap, step by step.

    python benchmarks/theory.py [--quick] [--out benchmarks/theory.md]

Writes the report, a .svg and a .json beside it; the .json and the specs are all that the report is
made from.
The data are those of `regression.py` without noise or outliers, so that all samples share a
minimiser, the truth: the setting of the paper's Theorem 1.  All its terms are known there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from regression import BATCH, STYLES, Draws, as_json, draws, rounded, weigher
from torch import Tensor

mpl.use("svg")
import matplotlib.pyplot as plt

MONOTONE = ("uniform", "linupper", "prop1", "dro-kl")
"""Specs whose weight never falls as the loss rises."""
SPECS = (*MONOTONE, "quadratic", "extremes")
RATES = (0.0125, 0.2)
ENDS = (1e-10, 1e6)
"""A run is followed while its test loss, from 0.5, lies between these."""
CAP = 2
"""The largest weight, of mean one, that 2/n allows."""
HIGH = (0.0, 1.0, 2.0, 2.0, 2.0)
"""Losses of which most are the highest."""
TEMPERATURES = (0.1, 0.4, 1.0, 1.4, 2.0)
ROUNDING = 1e-5
"""Weights are float32; sums over a batch of them are as good as this."""


def main() -> None:
    """Run the models, and write numbers, report and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 steps, to try it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/theory.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(*((2, 20) if args.quick else (24, 200)))
    args.out.with_suffix(".json").write_text(as_json(found), encoding="utf-8")
    args.out.write_text(report(found), encoding="utf-8")
    picture(found, args.out.with_suffix(".svg"))
    print(args.out)


class Terms(NamedTuple):
    """The terms of the bound at every step, each [steps, seeds].

    Attributes:
        live: The run is still followed.
        gain: G / mean loss, of which the sum over 1/n of the weights alone is 0.
        slack: Bound less squared distance after the step, / squared distance before it.
        slack_sharp: The same with the smoothness of the weighted loss.
        smooth: Smoothness of the weighted loss / that of the mean loss.
        promised: The bound says that the step comes nearer.
        promised_sharp: The same with the smoothness of the weighted loss.
        tighter: The bound so sharpened promises more than that of equal weights from there.
        nearer: The step does come nearer than that of equal weights from there.
        largest: The largest weight, in units of 1/n.
    """

    live: Tensor
    gain: Tensor
    slack: Tensor
    slack_sharp: Tensor
    smooth: Tensor
    promised: Tensor
    promised_sharp: Tensor
    tighter: Tensor
    nearer: Tensor
    largest: Tensor


def follow(spec: str, rate: float, chance: Draws) -> Terms:
    """Return the terms of the bound along the run of each seed."""
    weights = weigher(spec)
    off = chance.start  # theta - truth
    rows: list[tuple[Tensor, ...]] = []
    for step in range(chance.x.shape[1]):
        x = chance.x[:, step]
        residual = (x @ off[..., None]).squeeze(-1)
        loss = residual.square() / 2  # above its minimum, which is 0
        w = weights(loss.float()).double()
        before = off.square().sum(-1)
        live = (before / 2 > ENDS[0]) & (before / 2 < ENDS[1])
        moved = off - rate * ((w * residual)[:, None] @ x).squeeze(1) / BATCH
        equal = off - rate * (residual[:, None] @ x).squeeze(1) / BATCH
        mean = (w * loss).mean(-1)
        each = x.square().sum(-1).amax(-1)
        curvature = torch.linalg.eigvalsh((w[..., None] * x).mT @ x / BATCH)[:, -1]
        plain = torch.linalg.eigvalsh(x.mT @ x / BATCH)[:, -1]
        slacks = [
            (before - 2 * rate * (1 - rate * smooth) * mean - moved.square().sum(-1)) / before
            for smooth in (each, curvature)
        ]
        gain = ((w - 1) * loss).mean(-1) / loss.mean(-1)
        promised = (rate * each < 1, rate * curvature < 1)
        tighter = (1 - rate * curvature) * mean > (1 - rate * plain) * loss.mean(-1)
        nearer = moved.square().sum(-1) < equal.square().sum(-1)
        ratio, largest = curvature / plain, w.amax(-1)
        rows.append((live, gain, *slacks, ratio, *promised, tighter, nearer, largest))
        off = torch.where(live[:, None], moved, off)
    return Terms(*(torch.stack(part) for part in zip(*rows, strict=True)))


def measured(seeds: int, steps: int) -> dict[str, Any]:
    """Return the numbers that report and picture are made from."""
    chance = draws(seeds, steps)
    found: dict[str, Any] = {"seeds": seeds, "steps": steps, "bounds": [], "caps": [], "gains": {}}
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for rate in RATES:
        for spec in SPECS:
            terms = follow(spec, rate, chance)
            found["bounds"].append({"spec": spec, "rate": rate} | kept(terms))
            if rate == RATES[0]:
                bands = terms.gain.quantile(levels, 1)
                found["gains"][spec] = [rounded(band) for band in bands]
    for tau in TEMPERATURES:
        for shape in ("linupper(alpha=1) -> ", ""):
            text = f"normalize -> {shape}temperature({tau:g})"
            found["caps"].append({"text": text, "r": tau} | capped(text, chance))
    return found


def kept(terms: Terms) -> dict[str, Any]:
    """Return what is kept of a run's terms, over all followed steps of all seeds."""
    live = terms.live
    gain, smooth = terms.gain[live], terms.smooth[live]
    slack, sharp = terms.slack[live], terms.slack_sharp[live]
    return {
        "followed": int(live.sum()),
        "broken": int((slack < -ROUNDING).sum()),
        "broken_sharp": int((sharp < -ROUNDING).sum()),
        "least_slack": rounded(slack.amin()[None])[0],
        "least_slack_sharp": rounded(sharp.amin()[None])[0],
        "promised": int(terms.promised[live].sum()),
        "promised_sharp": int(terms.promised_sharp[live].sum()),
        "tighter": int(terms.tighter[live].sum()),
        "nearer": int(terms.nearer[live].sum()),
        "gain": rounded(gain.median()[None])[0],
        "least_gain": rounded(gain.amin()[None])[0],
        "negative": int((gain < -ROUNDING).sum()),
        "smooth": rounded(smooth.median()[None])[0],
        "most_smooth": rounded(smooth.amax()[None])[0],
        "largest": rounded(terms.largest[live].amax()[None])[0],
        "over": int((terms.largest[live] > CAP * (1 + ROUNDING)).sum()),
    }


def capped(text: str, chance: Draws) -> dict[str, Any]:
    """Return how often a spec goes over 2/n with and without its clamp, and how far at worst."""
    with_clamp = f"{text} -> clamp(2/n)"
    result: dict[str, Any] = {}
    for name, spec in (("free", text), ("clamped", with_clamp)):
        terms = follow(spec, RATES[0], chance)
        result[name] = kept(terms)
        result[name]["worst"] = rounded(weigher(spec)(one_stands_out())[0].max()[None])[0]
    return result


def one_stands_out() -> Tensor:
    """Return the losses for which the largest weight is largest, [1, n]."""
    return torch.cat([torch.ones(1), torch.zeros(BATCH - 1)])[None]


def worst_case(tau: float, n: int = BATCH) -> float:
    """Return the largest weight, in units of 1/n, that scores of width one can give.

    n / (1 + (n - 1) exp(-1 / r)) for LinUpper, whose scores lie in [0, 1].
    """
    return n / (1 + (n - 1) * math.exp(-1 / tau))


def guaranteed(tau: float, n: int = BATCH) -> bool:
    """Tell whether LinUpper at a temperature can never exceed 2/n: exp(-1/r) >= (n/2-1)/(n-1)."""
    return math.exp(-1 / tau) >= (n / 2 - 1) / (n - 1)


def threshold(n: int = BATCH) -> float:
    """Return the temperature from which LinUpper can never exceed 2/n."""
    return -1 / math.log((n / 2 - 1) / (n - 1))


DERIVATION = """\
For convex f_i with L-Lipschitz gradients g_i, a common minimiser t* (interpolation) and weights
w_i >= 0 of sum one, the step t' = t - rate sum_i w_i g_i(t) has

    |t' - t*|^2 = |t - t*|^2 - 2 rate sum_i w_i g_i . (t - t*) + rate^2 |sum_i w_i g_i|^2.

Convexity gives g_i . (t - t*) >= f_i - f_i*; Jensen's inequality and smoothness give
|sum_i w_i g_i|^2 <= sum_i w_i |g_i|^2 <= 2 L sum_i w_i (f_i - f_i*).  Together

    |t' - t*|^2 <= |t - t*|^2 - 2 rate (1 - rate L) sum_i w_i (f_i - f_i*),                     (1)

and what weights add to the decrease that equal ones are promised is 2 rate (1 - rate L) G, with

    G = sum_i (w_i - 1/n) (f_i - f_i*).

Where weights rise with the loss, and so with f_i - f_i* when all minima are alike, Chebyshev's sum
inequality says G >= 0.  L is the smoothness of the worst single sample.  The weighted loss, whose
minimiser is t* too, has a smoothness L_w of its own, by which |sum_i w_i g_i|^2 <=
2 L_w sum_i w_i (f_i - f_i*), so (1) holds with L_w for L.  If w_i <= 2/n, L_w is at most twice the
smoothness of the mean loss, whatever the losses are: that is what the cap buys.  Without it L_w can
be that of one sample.
"""


def report(found: dict[str, Any]) -> str:
    """Return the report in Markdown, made from the numbers alone."""
    lines = [
        "# The bound behind LinUpper, step by step",
        "",
        (
            "Written by `python benchmarks/theory.py` from `theory.json`, whose numbers the same"
            " command makes; two runs on one machine give the same bits."
        ),
        "",
        (
            "Theorem 1 of [Sow et al. 2025](https://arxiv.org/abs/2502.06733) bounds convergence"
            " for convex smooth losses under interpolation, and asks that no weight exceed 2/n."
        ),
        "Its exact constants are not known to us; what follows is derived here, in that setting.",
        "",
        DERIVATION,
        (
            "The models are those of `regression.md` without noise or outliers:"
            f" {found['seeds']} seeds, up to {found['steps']} steps of {BATCH} samples, f_i* = 0, L"
            " the largest |x_i|^2 of a batch."
        ),
        f"A run is followed while its test loss lies between {ENDS[0]:g} and {ENDS[1]:g}.",
        "",
        "![gain over steps, largest weight over r](theory.svg)",
        "",
        "Left: medians over seeds, bands 10 to 90 %.  Right: all followed steps of all seeds.",
        "",
        "## The inequality",
        "",
        (
            "Steps at which (1) fails, with L and with L_w, and the least of (right side - left"
            " side) / |t - t*|^2; then the share of steps at which (1) promises to come nearer."
        ),
        "",
        "| | rate | steps | fails | least | fails, L_w | least | promised | promised, L_w |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in found["bounds"]:
        cells = [f"`{x['spec']}`", f"{x['rate']:g}", f"{x['followed']:,}", f"{x['broken']}"]
        cells += [f"{x['least_slack']:.1e}", f"{x['broken_sharp']}"]
        cells += [f"{x['least_slack_sharp']:.1e}"]
        cells += [share(x[name], x["followed"]) for name in ("promised", "promised_sharp")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## The gain, and what the weighting does to smoothness",
        "",
        f"G / mean loss; negative means below {-ROUNDING:g}, what float32 weights may be off by.",
        f"`{'`, `'.join(MONOTONE)}` are monotone in the loss, so their G cannot be negative.",
        (
            "Quadratic's is not on these runs, whose losses lie mostly near the bottom of their"
            f" range; for a batch of losses {', '.join(f'{x:g}' for x in HIGH)} it is"
            f" {gain_of('quadratic', HIGH):+.3f} of the mean."
        ),
        (
            "`linupper` and `prop1` coincide where the clamp reaches every sample above the middle"
            " of the range, as it does on these runs."
        ),
        (
            "Where rate L > 1, as at 0.2, (1) with L promises nothing, and G > 0 no more than that;"
            " the last two columns therefore compare with equal weights from the same point: the"
            " bound with L_w promises more, and the step does come nearer."
        ),
        "",
        (
            "| | rate | median G / mean loss | least | G < 0 | L_w / L of the mean loss | most"
            " | largest w, of 1/n | steps over 2/n | tighter | nearer |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in found["bounds"]:
        cells = [f"`{x['spec']}`", f"{x['rate']:g}", signed(x["gain"]), signed(x["least_gain"])]
        cells += [share(x["negative"], x["followed"]), f"{x['smooth']:.2f}"]
        cells += [f"{x['most_smooth']:.2f}", f"{x['largest']:.2f}", share(x["over"], x["followed"])]
        cells += [share(x[name], x["followed"]) for name in ("tighter", "nearer")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## The cap",
        "",
        (
            "LinUpper's scores lie in [0, 1], so its largest weight is at most n / (1 + (n - 1)"
            " exp(-1/r)) of 1/n, and 2/n is kept without a clamp for every batch if and only if"
            f" exp(-1/r) >= (n/2 - 1)/(n - 1): for n = {BATCH}, r >= {threshold():.3f}."
        ),
        "`linupper` ships with r = 0.4 and needs its clamp.",
        (
            "Without LinUpper's own cap, normalised losses span [-1, 1], twice as much, which takes"
            f" r >= {2 * threshold():.3f}."
        ),
        f"Rate {RATES[0]:g}; the worst batch has one sample above all others, which are alike.",
        "",
        (
            "| | guaranteed | worst batch: formula | found | with clamp | steps over 2/n"
            " | largest w | with clamp: over | largest w |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in found["caps"]:
        width = 1 if "linupper" in x["text"] else 2
        free, clamped = x["free"], x["clamped"]
        cells = [f"`{x['text']}`", "yes" if guaranteed(x["r"] / width) else "no"]
        cells += [f"{worst_case(x['r'] / width):.2f}", f"{free['worst']:.2f}"]
        cells += [f"{clamped['worst']:.2f}", share(free["over"], free["followed"])]
        cells += [f"{free['largest']:.2f}", share(clamped["over"], clamped["followed"])]
        cells += [f"{clamped['largest']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def gain_of(spec: str, losses: tuple[float, ...]) -> float:
    """Return G / mean loss of one batch whose losses are 0 at the minimum."""
    loss = torch.tensor(losses)
    return (((weigher(spec)(loss[None])[0] - 1) * loss).mean() / loss.mean()).item()


def signed(x: float) -> str:
    """Return a number with its sign, and no sign where it rounds to 0."""
    return f"{round(x, 3) + 0.0:+.3f}" if round(x, 3) else "0"


def share(part: int, whole: int) -> str:
    """Return a share in per cent, and 0 or 100 only where it is none or all."""
    if part in {0, whole}:
        return "0" if not part else "100 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def picture(found: dict[str, Any], out: Path) -> None:
    """Draw the gain over the steps, and the largest weight over temperatures."""
    mpl.rcParams["svg.hashsalt"] = "weighting"  # the same bits at every run
    mpl.rcParams["svg.fonttype"] = "none"
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for spec, (low, mid, high) in found["gains"].items():
        colour, dash = STYLES[spec]
        left.plot(mid, color=colour, linestyle=dash, label=spec, linewidth=1.4)
        left.fill_between(range(len(mid)), low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="G / mean loss", title=f"what weights add, rate {RATES[0]:g}")
    grid = [0.1 * 1.05**k for k in range(66)]
    right.plot(grid, [worst_case(r) for r in grid], color="#000000", label="worst batch, formula")
    linupper = [x for x in found["caps"] if "linupper" in x["text"]]
    for name, colour, mark, words in (
        ("free", "#E69F00", "o", "linupper without clamp, along runs"),
        ("clamped", "#0072B2", "s", "linupper with clamp(2/n), along runs"),
    ):
        largest = [x[name]["largest"] for x in linupper]
        style = {"color": colour, "linestyle": "none", "markersize": 5 + 4 * (name == "free")}
        right.plot([x["r"] for x in linupper], largest, mark, label=words, **style)
    right.axhline(CAP, color="#888888", linewidth=0.8, linestyle=":", label="2/n")
    right.axvline(threshold(), color="#009E73", linewidth=0.8, linestyle="--")
    right.text(threshold() * 1.03, 20, f"r = {threshold():.3f}", color="#009E73")
    right.set(xscale="log", yscale="log", xlabel="temperature r")
    right.set(ylabel="largest weight, of 1/n", title=f"the cap, n = {BATCH}")
    right.set_xticks(TEMPERATURES, [f"{r:g}" for r in TEMPERATURES])
    right.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    right.minorticks_off()
    left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    fig.savefig(out, metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    main()

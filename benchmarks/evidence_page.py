"""What `evidence.py` found, as a table in Markdown and a figure.

    python benchmarks/evidence_page.py outputs/evidence/evidence

reads that name with .parquet and writes it with .md and .svg.
"""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq

mpl.use("svg")
import matplotlib.pyplot as plt

BUCKETS = ("frequent", "medium", "rare")
BASE = "uniform"
RESAMPLES = 2_000
LEVEL = 95
"""Per cent that an interval covers."""
COLOURS = {"better": "#0072B2", "worse": "#D55E00", "neither": "#777777"}


class Interval(NamedTuple):
    """A number, and what nineteen of twenty repetitions give."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def verdict(self) -> str:
        """Whether it is below zero, which is better, above, or neither."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "neither"


class Found:
    """Losses in nats by method, seed and document.

    Attributes:
        about: How it was made.
        methods: Names, the baseline first.
        domains: Names, in alphabetical order.
        nats: [methods, seeds, documents, buckets], sums.
        tokens: [documents, buckets].
        size: [documents], bytes.
        rate: [methods, seeds], tokens per second in training.
    """

    def __init__(self, path: Path) -> None:
        """Read what `evidence.py` wrote."""
        table = pq.read_table(path)
        rows = table.to_pylist()
        self.about: dict[str, Any] = json.loads((table.schema.metadata or {})[b"about"])
        self.methods = [*dict.fromkeys(row["method"] for row in rows)]
        seeds = sorted({row["seed"] for row in rows})
        documents = {row["document"]: row for row in rows}
        self.domains = sorted({row["domain"] for row in rows})
        self.domain = np.array([self.domains.index(x["domain"]) for x in documents.values()])
        self.size = np.array([x["bytes"] for x in documents.values()], float)
        kinds = [f"{x}_tokens" for x in BUCKETS]
        self.tokens = np.array([[x[k] for k in kinds] for x in documents.values()], float)
        shape = (len(self.methods), len(seeds))
        self.nats = np.full((*shape, len(documents), len(BUCKETS)), np.nan)
        self.rate = np.zeros(shape)
        at = {number: i for i, number in enumerate(documents)}
        for row in rows:
            place = self.methods.index(row["method"]), seeds.index(row["seed"])
            self.nats[(*place, at[row["document"]])] = [row[f"{x}_nats"] for x in BUCKETS]
            self.rate[place] = row["tokens_per_second"]
        assert not np.isnan(self.nats).any(), "each method has met each document with each seed"

    def by_domain(self, weight: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the mean loss of each domain, [methods, seeds, domains]; documents may weigh."""
        weight = np.broadcast_to(weight, len(self.domain))
        inside = np.eye(len(self.domains))[self.domain] * weight[:, None]
        return self.nats.sum(-1) @ inside / (self.tokens.sum(-1) @ inside)

    def bits(self, weight: np.ndarray | float = 1.0) -> np.ndarray:
        """Return bits per byte over all text, [methods, seeds]."""
        weight = np.broadcast_to(weight, len(self.domain))
        return self.nats.sum(-1) @ weight / math.log(2) / (self.size @ weight)

    def by_bucket(self, weight: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the mean loss of each bucket of words, [methods, seeds, buckets]."""
        weight = np.broadcast_to(weight, len(self.domain))
        nats = np.einsum("msdb,d->msb", self.nats, weight)
        return nats / (weight @ self.tokens)


def all_of(found: Found, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Return every number of the tables, [methods, seeds, columns].

    Columns: mean over domains of the mean loss, bits per byte, the buckets, the domains.
    """
    domains = found.by_domain(weight)
    first = [domains.mean(-1, keepdims=True), found.bits(weight)[..., None]]
    return np.concatenate([*first, found.by_bucket(weight), domains], axis=-1)


@cache
def differences(found: Found) -> list[list[Interval]]:
    """Return each method's numbers minus the baseline's, with intervals.

    Seeds are drawn with replacement, and within each domain documents; both methods of a pair meet
    the same draw.
    """
    base = found.methods.index(BASE)
    numbers = all_of(found)
    exact = (numbers - numbers[base]).mean(1)
    random = np.random.default_rng(0)
    groups = [np.flatnonzero(found.domain == d) for d in range(len(found.domains))]
    drawn = np.empty((RESAMPLES, *exact.shape))
    for i in range(RESAMPLES):
        picked = np.concatenate([random.choice(group, len(group)) for group in groups])
        weight = np.bincount(picked, minlength=len(found.domain)).astype(float)
        seeds = random.integers(numbers.shape[1], size=numbers.shape[1])
        some = all_of(found, weight)[:, seeds]
        drawn[i] = (some - some[base]).mean(1)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return [
        [Interval(*map(float, x)) for x in zip(*row, strict=True)]
        for row in zip(exact, low, high, strict=True)
    ]


def page(found: Found, picture: str) -> str:
    """Return the report in Markdown."""
    diffs = differences(found)
    parts = [
        "# Does it help? A small language model, method by method",
        f"`{found.about['command']}`",
        made(found),
        f"![differences to {BASE}]({picture})",
        (
            "Each number is a mean over seeds; beside it stands how far it is from that of "
            f"`{BASE}` (below zero is better), in brackets the {LEVEL} % interval of a bootstrap "
            "over seeds and documents. With few seeds such intervals are rather too narrow."
        ),
        overall(found, diffs),
        (
            "Time: that of a training step, as the median over seeds of its ratio to "
            f"`{BASE}`; several runs shared the machine."
        ),
        by_frequency(found.about),
        by_bucket(found, diffs),
        (
            f"Log-perplexity by domain: that of `{BASE}`, and differences to it; a star marks "
            "those whose interval leaves out zero."
        ),
        by_domain(found, diffs),
    ]
    return "\n\n".join(parts) + "\n"


def by_frequency(about: dict[str, Any]) -> str:
    """Return in a sentence what the buckets of words are."""
    # Numbers that do not say it are older than the paper's shares here.
    first, second = (round(100 * x) for x in about.get("buckets", (0.5, 0.9)))
    return (
        "Loss on words by how frequent they are in training, in nats: those that make up "
        f"{first} % of all tokens, the next {second - first} %, and the rest."
    )


def summary(found: Found) -> str:
    """Return the table of results, and in words which differences are beyond their intervals."""
    diffs = dict(zip(found.methods, differences(found), strict=True))
    rows = [[name, str(diff[0]), str(diff[4])] for name, diff in diffs.items() if name != BASE]
    head = ["minus uniform, nats", "log-perplexity, mean over domains", "loss on rare words"]
    told = []
    for verdict, words in (("better", "Better"), ("worse", "Worse"), ("neither", "Undecided")):
        names = [x for x, diff in diffs.items() if x != BASE and diff[0].verdict == verdict]
        told += [f"{words}: {', '.join(names)}."] if names else []
    return f"{table_of(head, rows)}\n\n{' '.join(told)}\n"


def made(found: Found) -> str:
    """Return what the numbers were made with, in a sentence."""
    about, plan = found.about, found.about["plan"]
    tokens = plan["steps"] * tokens_a_step(plan["flags"])
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items())
    seeds = "1 seed" if plan["seeds"] == 1 else f"{plan['seeds']} seeds"
    return (
        f"{plan['config']}, {plan['steps']} steps ({tokens:,} tokens) a run, {seeds}, each with "
        "one seed checkpoint and one order of the data for all methods; "
        f"{len(found.domain)} validation documents, {int(found.tokens.sum()):,} tokens. "
        f"Machine: {about['machine']}; {versions}."
    )


def overall(found: Found, diffs: list[list[Interval]]) -> str:
    """Return the table of the means over all text."""
    head = ("method", "log-perplexity, mean over domains", "difference")
    rows = []
    base = found.rate[found.methods.index(BASE)]
    for name, row, diff, rate in zip(found.methods, all_of(found), diffs, found.rate, strict=True):
        mean = row.mean(0)
        cells = [name, f"{mean[0]:.3f}", str(diff[0]), f"{mean[1]:.3f}", str(diff[1])]
        if name == BASE:
            cells[2] = cells[4] = ""
        rows.append([*cells, f"{float(np.median(base / rate)):.2f}"])
    return table_of([*head, "bits per byte", "difference", "time"], rows)


def by_bucket(found: Found, diffs: list[list[Interval]]) -> str:
    """Return the table of losses by how frequent words are."""
    rows = []
    for name, row, diff in zip(found.methods, all_of(found), diffs, strict=True):
        columns = range(2, 2 + len(BUCKETS))
        is_base = name == BASE
        rows.append(
            [name, *(f"{row.mean(0)[i]:.3f}" if is_base else str(diff[i]) for i in columns)]
        )
    return table_of(["method", *BUCKETS], rows)


def by_domain(found: Found, diffs: list[list[Interval]]) -> str:
    """Return the table of losses by domain."""
    rows = []
    for i, domain in enumerate(found.domains, 2 + len(BUCKETS)):
        cells = [
            f"{row.mean(0)[i]:.3f}" if name == BASE else starred(diff[i])
            for name, row, diff in zip(found.methods, all_of(found), diffs, strict=True)
        ]
        rows.append([domain, *cells])
    return table_of(["domain", *found.methods], rows)


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def starred(difference: Interval) -> str:
    """Return a difference, with a star if its interval leaves out zero."""
    return f"{difference.value:+.3f}{'' if difference.verdict == 'neither' else '*'}"


def tokens_a_step(flags: list[str]) -> int:
    """Return the tokens of a step by the flags of a run."""
    given = dict(flag.split("=", 1) for flag in flags if "=" in flag)
    return int(given["--training.seq_len"]) * int(given["--training.local_batch_size"])


def figure(found: Found, path: Path) -> None:
    """Draw each method's difference to the baseline: the mean over domains, and each domain."""
    diffs = differences(found)
    shown = [i for i, name in enumerate(found.methods) if name != BASE]
    first = 2 + len(BUCKETS)
    mpl.rcParams["svg.hashsalt"] = "weighting"
    mpl.rcParams["svg.fonttype"] = "none"
    fig, axes = plt.subplots(
        1, 2, figsize=(9.5, 0.36 * len(shown) + 1.9), layout="constrained", width_ratios=(2, 3)
    )
    left, right = axes
    for y, i in enumerate(shown):
        x = diffs[i][0]
        colour = COLOURS[x.verdict]
        left.plot([x.low, x.high], [y, y], color=colour, linewidth=2)
        left.plot(x.value, y, "o", color=colour, markersize=6)
    left.axvline(0, color="#888888", linewidth=0.8)
    left.set_yticks(range(len(shown)), [found.methods[i] for i in shown])
    left.invert_yaxis()
    left.set(xlabel=f"less that of {BASE} (nats)", title="log-perplexity, mean over domains")
    values = np.array(
        [[diffs[i][first + d].value for d in range(len(found.domains))] for i in shown]
    )
    most = float(np.abs(values).max()) or 1.0
    image = right.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    right.set_yticks([])
    right.set_xticks(range(len(found.domains)), found.domains, rotation=45, ha="right")
    right.set(title="by domain", xlabel="domain of the validation text")
    for (y, x), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * most else "black"
        text = f"{value:+.2f}".replace("+0.", "+.").replace("-0.", "−.")
        right.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
    fig.colorbar(image, ax=right, label="nats; below zero is better")
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def write_page(base: Path) -> Path:
    """Write report and figure beside the numbers, and return the report's path."""
    found = Found(base.with_suffix(".parquet"))
    out = base.with_suffix(".md")
    out.write_text(page(found, base.with_suffix(".svg").name), encoding="utf-8")
    figure(found, base.with_suffix(".svg"))
    return out


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1])))

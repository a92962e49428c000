"""What `evidence_long.py` found so far, as a page and figures.

    python benchmarks/evidence_long_page.py benchmarks/evidence-long

reads that name with .parquet and writes it with .md and .svg.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
from evidence_page import BUCKETS, Interval, by_frequency, starred, table_of

mpl.use("svg")
import matplotlib.pyplot as plt

TEXTS = ("as it is", "repeated", "noisy")
SOW = ("linupper-r0.4", "linupper-r1")
CURVE = ("uniform", *SOW, "mile", "prop1")
"""With three seeds; the others with one."""
OTHERS = ("linupper-r2", "quadratic", "extremes", "dro-kl", "focal", "rho-1")
BASE, JUDGE = "uniform", "reference"
LEVELS = ("easy", "medium", "hard")
RESAMPLES, LEVEL = 1_000, 95
TABLE_1 = {
    "book": -0.05,
    "web": -0.06,
    "wiki": -0.02,
    "code": +0.05,
    "qa": +0.01,
    "latex": +0.01,
}
"""LinUpper less uniform in Sow et al., Table 1, Mini, by the domain here that is most like theirs:
Book, C4 and Common Crawl, Wikipedia, GitHub, Stack Exchange, arXiv."""
SEEDS = 3
MANY = 4
"""So many methods before anything is said of what goes with a gain."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888", "#333333")


class Run(NamedTuple):
    """One model: which text, weighted how, and which seed."""

    text: str
    method: str
    seed: int


class Study:
    """Losses in nats by run, step and row of the validation text.

    Attributes:
        about: How it was made.
        nats: (text, method, seed) -> step -> [rows, buckets], sums.
        ess: (text, method, seed) -> the mean effective sample size of logged steps, as a share.
        bound: (text, method, seed) -> the mean of weighted loss / unweighted loss - 1, which is
            what weights add to the bound of Sow et al., Theorem 1, at a common minimum of 0.
        shift: (text, method, seed) -> how far domains' mean weights are from one, on average.
        tokens: [rows, buckets].
        domains: Names, in alphabetical order.
        domain: [rows], as an index.
        document: [rows].
    """

    def __init__(self, path: Path) -> None:
        """Read what `evidence_long.py` wrote."""
        table = pq.read_table(path)
        self.about: dict[str, Any] = json.loads((table.schema.metadata or {})[b"about"])
        text = self.about["text"]
        self.domains = sorted(set(text["domain"]))
        self.domain = np.array([self.domains.index(x) for x in text["domain"]])
        self.document = np.array(text["document"])
        self.tokens = np.array([text[name] for name in BUCKETS], float).T
        self.nats: dict[Run, dict[int, np.ndarray]] = {}
        self.ess: dict[Run, float] = {}
        self.bound: dict[Run, float] = {}
        self.shift: dict[Run, float] = {}
        each: dict[Run, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            each.setdefault(Run(row["text"], row["method"], row["seed"]), []).append(row)
        for run, rows in each.items():
            self.nats[run] = {
                row["step"]: np.array([row[name] for name in BUCKETS]).T for row in rows
            }
            self.ess[run] = float(np.mean([row["ess"] for row in rows]))
            self.bound[run] = float(np.mean([row["bound"] for row in rows]))
            weights = np.array([row["domain_weights"] for row in rows], float)
            self.shift[run] = float(np.nanmean(np.abs(weights - 1)))
        self.last = self.about["steps"]

    def seeds(self, text: str, method: str) -> list[int]:
        """Return the seeds with which a method and the baseline have been trained."""
        have = [{s for t, m, s in self.nats if (t, m) == (text, x)} for x in (method, BASE)]
        return sorted(have[0] & have[1])

    def methods(self, text: str) -> list[str]:
        """Return the methods that can be compared to the baseline."""
        return [x for x in (*CURVE[1:], *OTHERS) if self.seeds(text, x)]

    def pairs(self, text: str, method: str) -> list[tuple[Run, Run]]:
        """Return runs of a method, each with the baseline's of its seed; the judge's with any."""
        if method != JUDGE:
            return [(Run(text, method, s), Run(text, BASE, s)) for s in self.seeds(text, method)]
        judges, bases = ([run for run in self.nats if run[:2] == (text, x)] for x in (JUDGE, BASE))
        return list(zip(judges, bases[:1], strict=False))

    def difficulty(self, pair: tuple[Run, Run], by: str) -> np.ndarray:
        """[rows]: in which third of its domain a row is, by a loss at the end.

        Args:
            pair: A run and its baseline.
            by: Of the judge, for `difficulty`; of the run itself, for `own difficulty`.
        """
        judge = next((run for run in self.nats if run[1] == JUDGE), None)
        run = judge if by == "difficulty" else pair[0]
        assert run is not None
        loss = self.nats[run][self.last].sum(1) / self.tokens.sum(1)
        third = np.empty(len(loss), int)
        for d in range(len(self.domains)):
            rows = np.flatnonzero(self.domain == d)
            rank = np.argsort(np.argsort(loss[rows], kind="stable"))
            third[rows] = rank * len(LEVELS) // len(rows)
        return third

    @cache  # noqa: B019 - one study a process
    def draws(self) -> np.ndarray:
        """[resamples, documents]: how often each is drawn; within each domain as many as it has."""
        random = np.random.default_rng(0)
        count = self.document.max() + 1
        home = np.zeros(count, int)
        home[self.document] = self.domain
        drawn = np.zeros((RESAMPLES + 1, count))
        drawn[0] = 1  # as they are
        for d in range(len(self.domains)):
            own = np.flatnonzero(home == d)
            drawn[1:, own] = random.multinomial(len(own), [1 / len(own)] * len(own), RESAMPLES)
        return drawn

    def losses(self, nats: np.ndarray, tokens: np.ndarray, group: np.ndarray) -> np.ndarray:
        """[resamples + 1, groups]: the loss of each group of rows, as they are and resampled.

        Args:
            nats: [rows].
            tokens: [rows].
            group: [rows], as an index.
        """
        shape = (self.document.max() + 1, group.max() + 1)
        above, below = np.zeros(shape), np.zeros(shape)
        np.add.at(above, (self.document, group), nats)
        np.add.at(below, (self.document, group), tokens)
        with np.errstate(invalid="ignore"):  # a draw may leave a group empty
            return (self.draws() @ above) / (self.draws() @ below)

    def difference(self, text: str, method: str, step: int, by: str) -> list[Interval]:
        """Return a method's losses less the baseline's, with intervals over documents and seeds.

        Args:
            text: What was trained on.
            method: Which.
            step: When.
            by: `mean` of domains, `domain`, `bucket` of words; or `difficulty` or
                `own difficulty`, thirds of each domain, mean of domains.
        """
        each = []
        for pair in self.pairs(text, method):
            level = self.difficulty(pair, by) if "difficulty" in by else None
            own, base = (self.of(self.nats[run][step], by, level) for run in pair)
            each.append(own - base)
        each = np.array(each)
        picked = np.random.default_rng(1).integers(len(each), size=(RESAMPLES, len(each)))
        drawn = each[picked, np.arange(1, RESAMPLES + 1)[:, None]].mean(1)
        tail = (100 - LEVEL) / 2
        low, high = np.nanpercentile(drawn, [tail, 100 - tail], axis=0)
        exact = each[:, 0].mean(0)
        return [Interval(*map(float, x)) for x in zip(exact, low, high, strict=True)]

    def of(self, nats: np.ndarray, by: str, level: np.ndarray | None = None) -> np.ndarray:
        """[resamples + 1, columns]: losses of [rows, buckets] sums, by levels of rows if given."""
        if by == "bucket":
            kinds = range(len(BUCKETS))
            all_rows = np.zeros(len(nats), int)
            parts = [self.losses(nats[:, k], self.tokens[:, k], all_rows) for k in kinds]
            return np.concatenate(parts, axis=1)
        group, tokens = self.domain, self.tokens.sum(1)
        if level is not None:
            group = level * len(self.domains) + self.domain
        found = self.losses(nats.sum(1), tokens, group)
        if by == "domain":
            return found
        return np.nanmean(found.reshape(len(found), -1, len(self.domains)), axis=-1)


def page(study: Study, picture: str) -> str:
    """Return the report in Markdown."""
    parts = [
        "# Does it help in the papers' proportions?",
        made(study),
        *answers(study),
        f"![loss less that of {BASE} over training]({picture})",
    ]
    for text in TEXTS:
        if study.methods(text):
            parts += tables(study, text)
    parts += [gains(study)]
    return "\n\n".join(x for x in parts if x) + "\n"


def made(study: Study) -> str:
    """Return what the numbers were made with, and how much of it there is."""
    about = study.about
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items())
    tokens = about["steps"] * about["seq_len"] * about["rows"]
    return (
        f"`make evidence-long`: {about['steps']:,} steps of {about['rows']} rows of "
        f"{about['seq_len']} tokens, {tokens:,} tokens, {about['epochs']:.1f} epochs of the text "
        "as it is, and a model of 1.05 million parameters. Rate, schedule and decay are in "
        "`benchmarks/evidence_models.py`; weights of sequences "
        f"begin after {about['plain']:,} plain steps, those of tokens at once.\n"
        "All methods of a seed start from one model and read the text in one order.\n"
        f"{len(study.nats)} of {about['runs']} runs are there.\n"
        f"Validation: {len(study.domain):,} rows of {study.document.max() + 1} documents, "
        f"{int(study.tokens.sum()):,} tokens, the same for all.\n"
        f"Machine: {about['machine']}; {versions}.\n\n"
        f"Numbers are nats, less those of `{BASE}` of the same seed: below zero is better. "
        f"In brackets stands the {LEVEL} % interval of a bootstrap over documents and seeds; "
        "a star marks one that leaves out zero. With one seed it is over documents alone, and "
        f"says nothing of other seeds. The row `{called(JUDGE)}` shows how far two plain models "
        "are apart that start elsewhere and read in another order."
    )


def answers(study: Study) -> list[str]:
    """Return the three questions, each with what the runs say."""
    asked = (
        "**Does the sign of LinUpper change with the length of training or r?**",
        "**Where is anything gained or lost?**",
        "**Does dropping redundancy help where there is redundancy?**",
    )
    there = [x for x in SOW if study.seeds(TEXTS[0], x)]
    first = [f"{x}: {over_training(study, TEXTS[0], x)}{like_table_1(study, x)}." for x in there]
    second = [f"{x}: {by_sign(study, x)}." for x in there]
    third = [
        f"{text}, {x}: {told(study, text, x)}."
        for text in TEXTS[1:]
        for x in SOW
        if study.seeds(text, x)
    ]
    return [
        "\n".join([question, *(found or ["Not run yet."])])
        for question, found in zip(asked, (first, second, third), strict=True)
    ]


def told(study: Study, text: str, method: str) -> str:
    """Return the mean over domains at the end, and what may be said of it."""
    count = len(study.seeds(text, method))
    (mean,) = study.difference(text, method, study.last, "mean")
    verdict = {"neither": "undecided"}.get(mean.verdict, mean.verdict)
    few = "" if count >= SEEDS else f", with {count} of {SEEDS} seeds"
    return f"{verdict} ({mean}{few})"


def over_training(study: Study, text: str, method: str) -> str:
    """Return a method's mean at the end, and how often its sign turned before."""
    steps = sorted(study.nats[text, method, study.seeds(text, method)[0]])
    values = [study.difference(text, method, step, "mean")[0].value for step in steps]
    turned = [f"{b:,}" for (a, x), (b, y) in pairwise(zip(steps, values, strict=True)) if x * y < 0]
    signs = f"its sign turned at step {', '.join(turned)}" if turned else "its sign never turned"
    return f"{told(study, text, method)}; {signs}"


def like_table_1(study: Study, method: str) -> str:
    """Return on how many domains the sign at the end is that of the paper's Table 1."""
    found = study.difference(TEXTS[0], method, study.last, "domain")
    both = [
        (TABLE_1[name], x.value)
        for name, x in zip(study.domains, found, strict=True)
        if name in TABLE_1
    ]
    agree = sum(theirs * ours > 0 for theirs, ours in both)
    like = "By the domains most alike, its sign is that of the paper's Table 1, for the Mini size"
    return f". {like}, on {agree} of {len(both)}" if both else ""


def by_sign(study: Study, method: str) -> str:
    """Return where a method is better and where worse, as far as the intervals say."""
    found = list(zip(study.domains, study.difference(TEXTS[0], method, study.last, "domain")))  # noqa: B905
    if study.pairs(TEXTS[0], JUDGE):
        rows = study.difference(TEXTS[0], method, study.last, "difficulty")
        found += [(f"{x} rows", d) for x, d in zip(LEVELS, rows, strict=True)]
    parts = [
        f"{verdict} on {', '.join(names)}"
        for verdict in ("better", "worse")
        if (names := [name for name, x in found if x.verdict == verdict])
    ]
    return "; ".join(parts) or "nowhere beyond its interval"


def tables(study: Study, text: str) -> list[str]:
    """Return the tables of one training text."""
    methods, last = study.methods(text), study.last
    heads = {
        TEXTS[0]: "## The text as it is",
        TEXTS[1]: "## A third of the documents eight times",
        TEXTS[2]: "## A third of the documents noise",
    }
    columns: list[tuple[str, list[str]]] = [("bucket", [*BUCKETS]), ("domain", study.domains)]
    if study.pairs(TEXTS[0], JUDGE):
        columns = [("difficulty", [*LEVELS]), ("own difficulty", [*LEVELS]), *columns]
    rows = []
    scale = [JUDGE] if study.pairs(text, JUDGE) else []
    for method in [*methods, *scale]:
        (mean,) = study.difference(text, method, last, "mean")
        pairs = study.pairs(text, method)
        ess = f"{study.ess[pairs[0][0]]:.2f}"
        rows.append([called(method), f"{len(pairs)}", f"{mean}", ess])
    parts = [heads[text], table_of(["method", "seeds", "mean over domains", "ESS"], rows)]
    captions = {
        "difficulty": (
            f"By difficulty: each domain's rows in thirds by the loss of a {BASE} model of another "
            f"seed; mean over domains. What is hard for {BASE} is so by chance, too, and less so "
            "for any other method."
        ),
        "own difficulty": (
            "The same by the losses of the method itself, which errs to the other side: what holds "
            "in both tables is no chance of the thirds."
        ),
        "bucket": by_frequency(study.about),
        "domain": "By domain.",
    }
    for by, names in columns:
        some = methods if "difficulty" in by else [*methods, *scale]
        found = {called(x): study.difference(text, x, last, by) for x in some}
        rows = [[x, *map(starred, diffs)] for x, diffs in found.items()]
        parts += [captions[by], table_of(["method", *names], rows)]
    return parts


def called(method: str) -> str:
    """Return what a table calls a method; the judge shows how far two seeds are apart."""
    return f"{BASE}, another seed" if method == JUDGE else method


def gains(study: Study) -> str:
    """Return how far what a run's weights did goes with the difference at the end."""
    runs = [run for run in study.nats if run[1] not in {BASE, JUDGE}]
    runs = [run for run in runs if (run[0], BASE, run[2]) in study.nats]
    methods = {run[1] for run in runs}
    if len(methods) < MANY:
        return ""
    final = [float(self_of(study, run) - self_of(study, (run[0], BASE, run[2]))) for run in runs]
    told = [
        f"{name} {correlation([of[run] for run in runs], final)}"
        for name, of in (
            ("effective sample size", study.ess),
            ("term of the bound", study.bound),
            ("domain shift", study.shift),
        )
    ]
    return (
        "## What goes with a gain?\n\n"
        f"Correlation with the final difference over {len(runs)} runs of {len(methods)} methods, "
        f"with the {LEVEL} % interval that holds if runs were drawn one by one: "
        f"{', '.join(told)}. The term of the bound is the weighted loss over the unweighted one, "
        "less 1 (Sow et al., Theorem 1, with losses whose minimum is 0). Domain shift is how far "
        "the mean weights of domains are from 1."
    )


def correlation(x: list[float], y: list[float]) -> Interval:
    """Return Pearson's correlation with Fisher's interval, tanh(artanh r ± 1.96 / sqrt(n - 3))."""
    r = float(np.corrcoef(x, y)[0, 1])
    off = 1.96 / (len(x) - 3) ** 0.5
    return Interval(r, *(float(np.tanh(np.arctanh(r) + side)) for side in (-off, off)))


def self_of(study: Study, run: Run) -> float:
    """Return a run's last loss, the mean over domains."""
    return float(study.of(study.nats[run][study.last], "mean")[0, 0])


def figure(study: Study, path: Path) -> None:
    """Draw differences to the baseline over training: the mean over domains, and each domain."""
    methods = [x for x in study.methods(TEXTS[0]) if x in CURVE]
    panels = ["mean over domains", *study.domains]
    across = 4
    down = -(-len(panels) // across)
    mpl.rcParams["svg.hashsalt"] = "weighting"
    mpl.rcParams["svg.fonttype"] = "none"
    fig, axes = plt.subplots(
        down, across, figsize=(10, 2.1 * down), sharex=True, layout="constrained", squeeze=False
    )
    for colour, method in zip(COLOURS, methods, strict=False):
        seed = study.seeds(TEXTS[0], method)[0]
        steps = sorted(study.nats[TEXTS[0], method, seed])
        found = [
            [
                *study.difference(TEXTS[0], method, step, "mean"),
                *study.difference(TEXTS[0], method, step, "domain"),
            ]
            for step in steps
        ]
        for panel, axis in enumerate(axes.flat[: len(panels)]):
            some = [row[panel] for row in found]
            lows, highs = [x.low for x in some], [x.high for x in some]
            axis.plot(steps, [x.value for x in some], color=colour, label=method)
            axis.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    for name, axis in zip(panels, axes.flat, strict=False):
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower right")
    fig.supxlabel("step")
    fig.supylabel(f"nats less that of {BASE}")
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def write_page(base: Path) -> Path:
    """Write page and figure beside the numbers, and return the page's path."""
    study = Study(base.with_suffix(".parquet"))
    out = base.with_suffix(".md")
    out.write_text(page(study, base.with_suffix(".svg").name), encoding="utf-8")
    figure(study, base.with_suffix(".svg"))
    return out


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1])))

"""Does weighting help in the papers' proportions?  Small models trained for 20,000 steps.

    python benchmarks/evidence_long.py --data FOLDER --tokenizer FOLDER

FOLDER holds `train/` and `valid/` with .parquet or .jsonl files of the columns `text` and `domain`.
Steps, burn-in, schedule and sequences a step are those of Sow et al., ICLR 2025, Table 7; the model
is a hundred times smaller.  Three texts are trained on: the one in the folder, one in which a third
of the documents stands eight times, and one in which a third has its characters in random order.
Every model meets the same validation text, which is the folder's.

There is one run a core at a time, and each takes the better part of an hour.  Stopped, the same
command goes on; what is found is kept after every run, and a run whose numbers are kept is not made
again, on another machine either.  `evidence_long_page.py` makes the page and the figures of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evidence
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from evidence_long_page import BASE, CURVE, JUDGE, OTHERS, SEEDS, SOW, TEXTS, Run, write_page
from evidence_page import BUCKETS

import weighting as wt
from titan_integration.commands import run_queue as series
from titan_integration.host.checkpoints import step_folders
from weighting.runs.files import read_lines, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS, EVERY, PLAIN, WARMUP = 20_000, 2_000, 1_000, 500
SEQ_LEN, ROWS = 32, 32
WINDOWS = 4
"""Rows of a validation document that the models meet, evenly spaced in it."""
REPEATED, TIMES = 3, 8
"""One document of so many stands so often, or is noise."""
PIPELINES = {
    "linupper-r0.4": "normalize -> linupper(alpha=1) -> temperature(0.4) -> clamp(2/n)",
    "linupper-r1": "normalize -> linupper(alpha=1) -> temperature(1) -> clamp(2/n)",
    "linupper-r2": "normalize -> linupper(alpha=1) -> temperature(2) -> clamp(2/n)",
    "prop1": "normalize -> temperature(0.4) -> clamp(2/n)",
    "quadratic": "normalize -> quadratic -> temperature(0.4) -> clamp(2/n)",
    "extremes": "normalize -> extremes -> temperature(0.4) -> clamp(2/n)",
    "dro-kl": "temperature(1)",
}
"""Weights of sequences; they begin after so many plain steps.  The others begin at once."""


def queue() -> list[Run]:
    """Return the runs in the order in which they are made."""
    curves = [[Run(TEXTS[0], name, seed) for name in CURVE] for seed in range(SEEDS)]
    judge = Run(TEXTS[0], JUDGE, evidence.REFERENCE_SEED)
    changed = [
        [Run(text, name, seed) for text in TEXTS[1:] for name in (BASE, *SOW)]
        for seed in range(SEEDS)
    ]
    others = [Run(TEXTS[0], name, 0) for name in OTHERS]
    # One seed of each question first, then what may turn an answer over.
    parts = [curves[0], [judge], changed[0], *curves[1:], others, *changed[1:]]
    return [run for part in parts for run in part]


def by_need(runs: list[Run]) -> Iterator[list[Run]]:
    """Yield the runs that can be made at once: rho-1 is last, as it scores with the reference."""
    yield [run for run in runs if run.method != "rho-1"]
    yield [run for run in runs if run.method == "rho-1"]


def main() -> None:
    """Train what is not there yet, and keep what is found after each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with train/ and valid/")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with the model's vocabulary")
    parser.add_argument("--folder", type=Path, default=Path("outputs/evidence-long"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evidence-long"))
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer only try it out")
    parser.add_argument("--runs", type=int, help="end after so many that were not there")
    args = parser.parse_args()
    folder = args.folder.absolute()  # the host takes no other paths of checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # one run a core, and the same sums in the same order
    own = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, own))  # for the model's config
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with series.alone(folder):
            study = Study(folder, args.data.absolute(), args.tokenizer, args.steps, args.out)
            for some in by_need(study.missing()[: args.runs]):
                evidence.at_once([lambda run=run: study.make(run) for run in some])
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.out.with_suffix(".parquet").exists():
        print(write_page(args.out))


class Study:
    """The runs in a folder."""

    def __init__(
        self, folder: Path, data: Path, tokenizer: str | None, steps: int, out: Path
    ) -> None:
        """Write the specs, and read which runs have numbers.

        Raises:
            ValueError: The folder, or the file of numbers, holds runs of something else.
        """
        flags = [f"--training.seq_len={SEQ_LEN}", f"--training.local_batch_size={ROWS}"]
        every = max(steps * EVERY // STEPS, 1)
        flags += [f"--metrics.log_freq={min(100, every)}", "--metrics.disable_color_printing"]
        flags += [f"--hf_assets_path={Path(tokenizer).absolute()}"] if tokenizer else []
        orders = {"data": str(data), "flags": flags, "steps": steps}
        if (noted := folder / "orders.json").exists():
            series.refuse_changed(noted, orders, "runs")
        series.note(noted, orders)
        self.folder, self.steps, self.every = folder, steps, every
        self.numbers = out.with_suffix(".parquet")
        self.plans = {}
        for text in TEXTS:
            path = f"--dataloader.dataset_path={data if text == TEXTS[0] else self.place(text)}"
            self.plans[text] = evidence.Plan(
                steps, [], 3, "llama3_1m", [*flags, path], 10**9, "evidence_models"
            )
            specs = self.place(text) / "specs"
            specs.mkdir(parents=True, exist_ok=True)
            for name in dict.fromkeys((*CURVE, *OTHERS)):
                write_whole(specs / f"{name}.yaml", spec_text(name, steps))
        self._validation: Windows | None = None
        self._alone = threading.Lock()  # around all but training
        self._kept = self._read_kept()

    def _read_kept(self) -> pa.Table:
        if not self.numbers.exists():
            return SCHEMA.empty_table()
        kept = pq.read_table(self.numbers)
        theirs = json.loads((kept.schema.metadata or {})[b"about"])
        theirs["columns"] = kept.schema.names
        for key, ours in (self.about() | {"columns": SCHEMA.names}).items():
            if key in COMPARED and theirs[key] != ours:
                msg = (
                    f"{self.numbers} holds numbers of another study: its {key!r} differs; "
                    "name another file with --out, or take data, steps and versions as before"
                )
                raise ValueError(msg)
        return kept.replace_schema_metadata(None)

    def _runs(self) -> list[Run]:
        """Return of each row of numbers whose it is."""
        return [Run(*x.values()) for x in self._kept.select(Run._fields).to_pylist()]

    def missing(self) -> list[Run]:
        """Return the runs to make: those without numbers, and the reference where rho-1 is one."""
        there = {*self._runs()}
        judge = next(run for run in queue() if run.method == JUDGE)
        saved = evidence.run_of(self.place(judge.text), *judge[1:]) / "checkpoint"
        if not saved.exists() and any(run.method == "rho-1" for run in {*queue()} - there):
            there.discard(judge)
        return [run for run in queue() if run not in there]

    def place(self, text: str) -> Path:
        """Return the folder of a text and its runs."""
        return self.folder / text.replace(" ", "-")

    @property
    def validation(self) -> Windows:
        """The validation text."""
        if self._validation is None:
            self._validation = Windows(self.plans[TEXTS[0]])
        return self._validation

    def make(self, run: Run) -> None:
        """Train a model, let every checkpoint meet the validation text, and keep the last one."""
        folder, plan = self.place(run.text), self.plans[run.text]
        with self._alone:
            print(f"{run.text}, {run.method}, seed {run.seed}", flush=True)
            if run.text != TEXTS[0]:
                write_text(self.validation.config, folder, run.text)
            if run.method != JUDGE:
                evidence.seed_checkpoint(folder, plan, run.seed)
        keep = ["--checkpoint.keep_latest_k=0", f"--checkpoint.interval={self.every}"]
        keep += [f"--lr_scheduler.warmup_steps={max(self.steps * WARMUP // STEPS, 2)}"]
        evidence.train(folder, plan, run.method, run.seed, *keep)
        with self._alone:
            dumped = evidence.run_of(folder, run.method, run.seed)
            saved = dict(sorted(step_folders(dumped / "checkpoint").items()))
            self.keep(run, self.look(run, dumped, saved))
            for step, path in saved.items():
                if step != self.steps:
                    shutil.rmtree(path)

    def look(self, run: Run, dumped: Path, saved: dict[int, Path]) -> list[dict[str, Any]]:
        """Return a row of numbers for every checkpoint, which meets the validation text."""
        lines = read_lines(dumped / "weighting" / "metrics.jsonl")
        return [
            run._asdict()
            | {"step": step}
            | weights_in(lines, step - self.every, step, self.validation.domains)
            | self.validation.met_at(path)
            for step, path in saved.items()
            if step % self.every == 0 and step
        ]

    def keep(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """Add what was found of a run to the file of numbers."""
        others = pa.array([x != run for x in self._runs()], pa.bool_())
        found = pa.Table.from_pylist(rows, SCHEMA)
        self._kept = pa.concat_tables([self._kept.filter(others), found])
        self.numbers.parent.mkdir(parents=True, exist_ok=True)
        part = self.numbers.with_suffix(".part")
        whole = self._kept.replace_schema_metadata({"about": json.dumps(self.about())})
        # Half the size for floats that never repeat.
        packed = [f"{name}.list.element" for name in BUCKETS]
        how = {"compression": "zstd", "use_dictionary": False, "use_byte_stream_split": packed}
        pq.write_table(whole, part, **how)
        part.rename(self.numbers)

    def about(self) -> dict[str, Any]:
        """Return how the numbers are made, and what the validation text is."""
        return {
            "steps": self.steps,
            "seq_len": SEQ_LEN,
            "rows": ROWS,
            "plain": self.steps * PLAIN // STEPS,
            "epochs": self.steps * SEQ_LEN * ROWS / self.validation.training_tokens,
            "machine": f"{platform.machine()}, one core a run, no accelerator used",
            "versions": {x: version(x) for x in ("torch", "torchtitan")},
            "buckets": [evidence.FREQUENT, evidence.MEDIUM],
            "runs": len(queue()),
            "text": self.validation.about(),
        }


def spec_text(name: str, steps: int) -> str:
    """Return a method's spec; weights of sequences begin after the plain steps."""
    if name not in PIPELINES:
        return evidence.spec_text(name)
    begin = steps * PLAIN // STEPS + 1
    return wt.dumps(
        wt.loads(
            f"version: 1\nname: {name}\n"
            f"pipeline: {PIPELINES[name]} -> interpolate(step(1, 0, at={begin}))\n"
        )
    )


def write_text(config: Any, folder: Path, text: str) -> None:  # noqa: ANN401 - the host's
    """Write training and validation text of a study, unless they are there."""
    from dataclasses import replace  # noqa: PLC0415

    from titan_integration.data.loader import load_documents  # noqa: PLC0415

    if (folder / "train").exists():
        return
    for split, name in (("validation", "valid"), ("train", "train")):
        documents = load_documents(replace(config.dataloader, split=split))
        rows = [documents[i] for i in range(len(documents))]
        changed = rows if name == "valid" else [*of_text(text, rows)]
        table = pa.table({"text": [x[0] for x in changed], "domain": [x[1] for x in changed]})
        part = folder / f".{name}.part"
        part.mkdir(exist_ok=True)
        pq.write_table(table, part / "text.parquet", compression="zstd")
        part.rename(folder / name)


def of_text(text: str, rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield documents and their domains, a third of them again and again, or made noise."""
    draw = random.Random(0)  # noqa: S311 - not for secrets
    for words, domain in rows:
        chosen = draw.randrange(REPEATED) == 0
        if chosen and text == "noisy":
            yield "".join(draw.sample(words, len(words))), domain
        else:
            yield from [(words, domain)] * (TIMES if chosen and text == "repeated" else 1)


class Windows(evidence.Validation):
    """Rows of the validation text, evenly spaced in each document, each met by itself."""

    def __init__(self, plan: evidence.Plan) -> None:
        """Read the text, and take the rows."""
        super().__init__(plan)
        whole, self.documents, self.document = self.documents, [], []
        for number, (domain, _, tokens) in enumerate(whole):
            starts = range(0, max(len(tokens) - SEQ_LEN, 1), SEQ_LEN)
            some = np.linspace(0, len(starts) - 1, min(WINDOWS, len(starts))).round().astype(int)
            for i in some:
                row = tokens[starts[i] : starts[i] + SEQ_LEN + 1]
                self.documents.append((domain, 0, row))
                self.document.append(number)
        self.kinds = [self.bucket[torch.tensor(tokens[1:])] for *_, tokens in self.documents]

    @property
    def domains(self) -> list[str]:
        """Names, in alphabetical order."""
        return sorted({domain for domain, *_ in self.documents})

    def about(self) -> dict[str, list[Any]]:
        """Return of every row its domain, its document, and tokens by how frequent they are."""
        tokens = {
            name: [int((kinds == kind).sum()) for kinds in self.kinds]
            for kind, name in enumerate(BUCKETS)
        }
        return {"domain": [x[0] for x in self.documents], "document": self.document} | tokens

    def met_at(self, checkpoint: Path) -> dict[str, list[float]]:
        """Return the nats of every row, by how frequent its tokens are."""
        losses = self.losses(checkpoint)
        return {
            name: [
                float(nll[kinds == kind].sum())
                for nll, kinds in zip(losses, self.kinds, strict=True)
            ]
            for kind, name in enumerate(BUCKETS)
        }


def weights_in(
    lines: list[dict[str, float]], after: int, to: int, domains: list[str]
) -> dict[str, Any]:
    """Return means over the steps of a run: sample size, term of the bound, domains' weights."""
    some = [x for x in lines if after < x["step"] <= to]
    each = {
        name: [x[key] for x in some if (key := f"domain/{name}/weight") in x] for name in domains
    }
    return {
        "ess": float(np.mean([x["weight/ess_frac"] for x in some])),
        "bound": float(np.mean([x["weighted_loss"] / x["unweighted_loss"] - 1 for x in some])),
        "domain_weights": [float(np.mean(x)) if x else None for x in each.values()],
    }


COMPARED = ("steps", "seq_len", "rows", "plain", "versions", "buckets", "text", "columns")
"""What all runs of a study have in common; `about` holds all but the columns."""
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "method": pa.string(),
        "seed": pa.int32(),
        "step": pa.int32(),
        "ess": pa.float32(),
        "bound": pa.float32(),
        "domain_weights": pa.list_(pa.float32()),
        **dict.fromkeys(BUCKETS, pa.list_(pa.float32())),
    }
)


if __name__ == "__main__":
    main()

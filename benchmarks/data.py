"""What our loader costs beside torchtitan's own and `datasets.interleave_datasets`: data.md.

    python benchmarks/data.py [--domains 3 300 5000] [--runs 3]

One file of JSON lines, of as many domains, is opened, read for some batches, and resumed in a new
loader.  Torchtitan's loader knows no domains and reads what comes, as ours does with mixed rows;
Hugging Face's interleaves one data set a domain, drawn alike, and the same packing is put behind
it.  Both convert the file when they see it first, which is not timed: their openings are of later
runs.  All use one tokenizer, which counts the texts that it is given.  Times are CPU seconds of
this process; loaders take turns, ratios are within a round, and the medians of some rounds count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig, text_datasets

from titan_integration.data.builtin_text import stdlib_text
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent
BATCHES, ROWS, SEQ_LEN, DOCUMENTS = 8, 8, 512, 30_000
SHORTEST, LONGEST = 100, 1000
"""Characters of a text: short beside a row, as a domain's first row takes whole ones."""
WARM = 24
"""Batches before those that are timed: by then each of our 192 shards is in a document."""
HOSTS, INTERLEAVED = "torchtitan's", "`interleave_datasets`"
SLOWEST = 300
"""Domains beyond which `interleave_datasets` is run only once."""


Build = Callable[[], Any]


class Cost(NamedTuple):
    """CPU seconds: opening, a batch, the first batch of a state; its bytes; texts of a batch."""

    opening: float
    batch: float
    resume: float
    state: float
    texts: float


class Counting(HuggingFaceTokenizer):
    """Counts the texts that it is given."""

    count = 0

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return token ids."""
        self.count += 1
        return super().encode(text, add_bos=add_bos, add_eos=add_eos)


def write(path: Path, domains: int) -> None:
    """Write documents of the standard library's text, in turn of so many domains."""
    rng = random.Random(0)  # noqa: S311
    texts = [t.text for t in stdlib_text("train")]
    with path.open("w") as file:
        for i in range(DOCUMENTS):
            text = f"{i} " + rng.choice(texts)[: rng.randint(SHORTEST, LONGEST)]
            file.write(json.dumps({"text": text, "domain": f"d{i % domains:04d}"}) + "\n")


def measured(build: Build, tokenizer: Counting) -> Cost:
    """Open a loader, read batches of it, and resume it in another."""
    start = time.process_time()
    loader = build()
    opened = time.process_time()
    batches = iter(loader)
    for _ in range(WARM):
        next(batches)
    before, warm = tokenizer.count, time.process_time()
    for _ in range(BATCHES):
        next(batches)
    read, texts = time.process_time(), tokenizer.count - before
    state = loader.state_dict()
    resumed = build()
    begin = time.process_time()
    resumed.load_state_dict(state)
    next(iter(resumed))
    size = len(json.dumps(state, default=str))
    took = time.process_time() - begin
    return Cost(opened - start, (read - warm) / BATCHES, took, size, texts / BATCHES)


class Interleaved:
    """Hugging Face's interleaving of a data set a domain, packed into rows."""

    def __init__(self, path: Path, domains: int, tokenizer: HuggingFaceTokenizer) -> None:
        """Open all."""
        whole = datasets.load_dataset("json", data_files=str(path), split="train")
        parts = [
            whole.select(range(i, len(whole), domains)).to_iterable_dataset()
            for i in range(domains)
        ]
        self._rows = datasets.interleave_datasets(
            parts, [1 / domains] * domains, seed=0, stopping_strategy="all_exhausted"
        )
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield batches."""
        tokens: list[int] = []
        need = ROWS * (SEQ_LEN + 1)
        for record in self._rows:
            tokens += self._tokenizer.encode(record["text"], add_bos=True, add_eos=True)
            while len(tokens) >= need:
                yield torch.tensor(tokens[:need]).reshape(ROWS, -1)
                tokens = tokens[need:]

    def state_dict(self) -> dict[str, Any]:
        """Return where it is."""
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._rows.load_state_dict(state)


def builders(path: Path, domains: int, tokenizer: HuggingFaceTokenizer) -> dict[str, Build]:
    """Return what builds each loader, by its name."""
    shared = {
        "dp_world_size": 1,
        "dp_rank": 0,
        "tokenizer": tokenizer,
        "seq_len": SEQ_LEN,
        "local_batch_size": ROWS,
    }
    text_datasets.DATASETS["file"] = DatasetConfig(
        path=str(path),
        loader=lambda path: datasets.load_dataset("json", data_files=path, split="train"),
        sample_processor=lambda record: record["text"],
    )
    ours = DomainTextDataLoader.Config
    names = [f"d{i:04d}" for i in range(domains)]
    host = text_datasets.HuggingFaceTextDataLoader.Config(dataset="file", dataset_path=str(path))
    return {
        HOSTS: lambda: host.build(**shared),
        "ours, mixed rows": lambda: ours(dataset=str(path)).build(**shared),
        INTERLEAVED: lambda: Interleaved(path, domains, tokenizer),
        "ours, drawn": lambda: ours(dataset=str(path), rows="drawn").build(**shared),
        "ours, drawn, as a stream": lambda: ours(
            dataset=str(path), rows="drawn", streaming=True, domains=names
        ).build(**shared),
    }


def ratios(path: Path, domains: int, runs: int) -> tuple[Cost, dict[str, Cost]]:
    """Return what torchtitan's loader costs, and what the others cost, as multiples of it."""
    tokenizer = Counting(tokenizer_path=str(ensure_tokenizer()))
    builds = builders(path, domains, tokenizer)
    found: dict[str, list[Cost]] = {name: [] for name in builds}
    for run in range(runs):
        for name, build in builds.items():
            if not (run and name == INTERLEAVED and domains > SLOWEST):
                found[name].append(measured(build, tokenizer))
                print(domains, name, found[name][-1], flush=True)
    base, *_ = found.values()
    shown = {
        name: Cost(
            *(
                statistics.median(
                    mine[i] / host[i] for mine, host in zip(costs, base, strict=False)
                )
                for i in range(len(Cost._fields))
            )
        )
        for name, costs in found.items()
    }
    return Cost(*map(statistics.median, zip(*base, strict=True))), shown


def two(number: float) -> str:
    """Return a number with two digits that count."""
    return f"{float(f'{number:.2g}'):,g}"


def page(measured: dict[int, tuple[Cost, dict[str, Cost]]], runs: int, took: float) -> str:
    """Return the page."""
    hosts = [cost for cost, _ in measured.values()]
    rate = ROWS * SEQ_LEN / statistics.median(x.batch for x in hosts)
    absolute = ", ".join(
        f"{1e3 * statistics.median(getattr(x, name) for x in hosts):.1f} ms {what}"
        for name, what in [("opening", "to open"), ("batch", "a batch"), ("resume", "to resume")]
    )
    table = "\n".join(
        f"| {domains:,} | {name} | {two(1 / cost.batch)} | {two(cost.opening)} "
        f"| {two(cost.resume)} | {two(cost.state)} | {two(cost.texts)} |"
        for domains, (_, rows) in measured.items()
        for name, cost in rows.items()
        if name != HOSTS
    )
    return f"""# What loaders cost

Written by `python benchmarks/data.py`; edit the script, not this page.

One file of {DOCUMENTS:,} texts of {SHORTEST} to {LONGEST:,} characters, in batches of {ROWS} rows of {SEQ_LEN} tokens: {WARM} are read, then {BATCHES} timed.
Process-CPU time on one thread ({platform.machine()}, {os.cpu_count()} cores with other work on them, torch {torch.__version__}).
Ratios are within a round, in which the loaders take turns, and medians of {runs} rounds; `interleave_datasets` of more than {SLOWEST} domains ran once.
The whole took {took / 60:.1f} minutes of CPU.

torchtitan's own loader takes {absolute}, {rate:,.0f} tokens a second, and {statistics.median(x.state for x in hosts):,.0f} bytes of state.
The table has multiples of that: of tokens a second more is better, of all others less.

| domains | loader | tokens a second | opening | resume | state | texts tokenized a batch |
|---|---|---|---|---|---|---|
{table}

- Opening by index reads and checks every record once, and tokenizes a text of each domain where rows are drawn; torchtitan's file has been converted before.
- The first row of a domain takes whole texts, of which some is left for its next row. So of 5,000 domains {(WARM + BATCHES) * ROWS} rows tokenize a few more texts a batch.
- To resume is to open, which is not in its column, and to yield a batch. A stream reads on from the first place that any domain needs.
"""  # noqa: E501 - of a page


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 300, 5000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER / "data.md")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    torch.set_num_threads(1)
    measured: dict[int, tuple[Cost, dict[str, Cost]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        for domains in given.domains:
            path = Path(folder, f"{domains}.jsonl")
            write(path, domains)
            datasets.load_dataset("json", data_files=str(path), split="train")  # converts it
            measured[domains] = ratios(path, domains, given.runs)
    given.out.write_text(page(measured, given.runs, time.process_time()), encoding="utf-8")


if __name__ == "__main__":
    main()

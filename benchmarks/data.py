"""What our loader costs beside torchtitan's own and `datasets.interleave_datasets`, as ratios.

    python benchmarks/data.py [--domains 3 300 5000]

One file of JSON lines, of as many domains, is opened, read for some batches, and resumed in a new
loader.  Torchtitan's loader knows no domains and reads what comes, as ours does with mixed rows;
Hugging Face's interleaves one data set a domain, drawn alike, and the same packing is put behind
it.  Both convert the file when they see it first, which is not timed: their openings are of later
runs.  All use one tokenizer.  Times are CPU seconds of this process, medians of a few runs that
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
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

BATCHES, ROWS, SEQ_LEN, DOCUMENTS = 16, 8, 512, 10_000
WARM = 24
"""Batches before those that are timed: by then each of our 192 shards is in a document."""


Build = Callable[[], Any]


class Cost(NamedTuple):
    """CPU seconds: opening, a batch, the first batch of a state; and the bytes of the state."""

    opening: float
    batch: float
    resume: float
    state: float


def write(path: Path, domains: int) -> None:
    """Write documents of the standard library's text, in turn of so many domains."""
    rng = random.Random(0)  # noqa: S311
    texts = [t.text for t in stdlib_text("train")]
    with path.open("w") as file:
        for i in range(max(DOCUMENTS, 2 * domains)):
            text = f"{i} " + rng.choice(texts)[: rng.randint(300, 3000)]
            file.write(json.dumps({"text": text, "domain": f"d{i % domains:04d}"}) + "\n")


def measured(build: Build) -> Cost:
    """Open a loader, read batches of it, and resume it in another."""
    start = time.process_time()
    loader = build()
    opened = time.process_time()
    batches = iter(loader)
    for _ in range(WARM):
        next(batches)
    warm = time.process_time()
    for _ in range(BATCHES):
        next(batches)
    read = time.process_time()
    state = loader.state_dict()
    resumed = build()
    begin = time.process_time()
    resumed.load_state_dict(state)
    next(iter(resumed))
    size = len(json.dumps(state, default=str))
    return Cost(opened - start, (read - warm) / BATCHES, time.process_time() - begin, size)


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
        "torchtitan's": lambda: host.build(**shared),
        "ours, mixed": lambda: ours(dataset=str(path)).build(**shared),
        "interleave_datasets": lambda: Interleaved(path, domains, tokenizer),
        "ours, drawn": lambda: ours(dataset=str(path), rows="drawn").build(**shared),
        "ours, drawn, streamed": lambda: ours(
            dataset=str(path), rows="drawn", streaming=True, domains=names
        ).build(**shared),
    }


def main() -> None:
    """Print a table for each number of domains, as ratios to torchtitan's loader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 300, 5000])
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {BATCHES} batches of")
    print(f"{ROWS} x {SEQ_LEN} tokens; ratios to torchtitan's loader, whose own are absolute")
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        for domains in given.domains:
            path = Path(folder, f"{domains}.jsonl")
            write(path, domains)
            datasets.load_dataset("json", data_files=str(path), split="train")  # converts it
            base: Cost | None = None
            for name, build in builders(path, domains, tokenizer).items():
                runs = [measured(build) for _ in range(given.runs)]
                cost = Cost(*map(min, zip(*runs, strict=True)))
                if base is None:
                    base = cost
                    print(f"\n{domains} domains".ljust(24), *[f"{x:>9}" for x in Cost._fields])
                    shown = [f"{1e3 * x:7.1f}ms" for x in base[:3]] + [f"{base.state:8.0f}B"]
                else:
                    shown = [f"{a / b:9.2f}" for a, b in zip(cost, base, strict=True)]
                print(name.ljust(23), *shown, flush=True)


if __name__ == "__main__":
    main()

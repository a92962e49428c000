"""How time grows with tokens, sequences, documents, domains and ranks: seconds and exponents.

    python benchmarks/growth.py [--quick]

Each row is one kind of work over sizes up to three decades apart; a time is the median of a few
calls, in CPU seconds of one thread.  The exponent is the slope of log time over log size, fitted by
least squares to the larger half of the sizes, where fixed costs no longer count.  Of the ranks one
exists, which works as if the others had what it has; what they take to answer is not there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

import weighting as wt
from weighting.contract import Alone

CALLS = 3
Work = Callable[[], object]


def selecting(tokens: int) -> Work:
    """Return the weighting of Rho-1 over so many tokens."""
    fn = wt.build(wt.load("rho-1"))
    shape = (max(tokens // 1024, 1), min(tokens, 1024))
    signals = wt.Signals(loss=torch.rand(shape), ref_loss=torch.rand(shape))
    return lambda: fn(signals, 1)


def selecting_within(tokens: int) -> Work:
    """Return a selection inside each sequence of 1,024 tokens."""
    fn = wt.build(wt.loads("loss -> select(0.6, within=sequence)"))
    signals = wt.Signals(loss=torch.rand(max(tokens // 1024, 1), min(tokens, 1024)))
    return lambda: fn(signals, 1)


def ranking(sequences: int) -> Work:
    """Return a weighting by rank among so many sequences of four tokens."""
    fn = wt.build(wt.loads("rank -> mean_one"))
    signals = wt.Signals(loss=torch.rand(sequences, 4))
    return lambda: fn(signals, 1)


def capping(sequences: int) -> Work:
    """Return LinUpper with its cap over so many sequences of four tokens."""
    fn = wt.build(wt.load("linupper"))
    signals = wt.Signals(loss=torch.rand(sequences, 4))
    return lambda: fn(signals, 1)


def weighing_domains(domains: int) -> Work:
    """Return domain weights over 65,536 tokens of so many domains."""
    names = [f"d{i}" for i in range(domains)]
    fn = wt.build(wt.loads("mean(domain) -> exponentiated(0.5)"), domains=names)
    ids = torch.arange(65_536).reshape(64, 1024) % domains
    signals = wt.Signals(loss=torch.rand(64, 1024), domain_ids=ids)
    return lambda: fn(signals, 1)


PER_DOCUMENT = wt.loads("mean(document) -> normalize -> temperature(0.5)")


def weighing_documents(documents: int) -> Work:
    """Return a weighting by document over 65,536 tokens of so many documents."""
    fn = wt.build(PER_DOCUMENT)
    segments = torch.arange(1024).expand(64, -1) // max(65_536 // documents, 1)
    signals = wt.Signals(loss=torch.rand(64, 1024), segment_ids=segments)
    return lambda: fn(signals, 1)


class Alike(Alone):
    """Ranks that all have what this one has."""

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    @override
    def parts(self) -> Alone:
        return Alone()

    @override
    def gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    @override
    def sum(self, x: Tensor) -> Tensor:
        return x * self.size


def over_ranks(spec: wt.Spec, ranks: int) -> Work:
    """Return the weighting of a rank's eight sequences of 1,024 tokens among so many ranks."""
    fn = wt.build(spec, collectives=Alike(ranks))
    segments = torch.arange(1024).expand(8, -1) // 64
    signals = wt.Signals(loss=torch.rand(8, 1024), segment_ids=segments)
    return lambda: fn(signals, 1)


def opening(documents: int) -> Work:
    """Return the opening of a JSONL file of so many short documents."""
    from titan_integration.data.documents import local_documents  # noqa: PLC0415 - needs torchtitan
    from titan_integration.data.records import Columns  # noqa: PLC0415

    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "data.jsonl"
    lines = (json.dumps({"text": f"{i} " * 20, "domain": f"d{i % 7}"}) for i in range(documents))
    file.write_text("\n".join(lines), encoding="utf-8")

    def work(kept: object = folder) -> object:
        del kept  # the folder goes with the work
        return local_documents(file, "train", Columns())

    return work


def building(stages: int) -> Work:
    """Return the building of so many stages, 100 a factor at most."""
    parts = [min(stages - start, 100) for start in range(0, stages, 100)]
    texts = [" -> ".join(["normalize", *["abs"] * (n - 2), "mean_one"]) for n in parts]
    lines = [f"  f{i}: {text}" for i, text in enumerate(texts)]
    spec = "\n".join(["version: 1", "factors:", *lines])
    return lambda: wt.build(wt.loads(spec))


def drawing(domains: int) -> Work:
    """Return a batch of eight rows drawn from so many domains."""
    from titan_integration.data.documents import Documents  # noqa: PLC0415 - needs torchtitan
    from titan_integration.data.packing import Cut, PackedRows  # noqa: PLC0415

    count = 4 * domains
    ids = [i % domains for i in range(count)]
    names = tuple(f"d{i}" for i in range(domains))
    texts = Documents([f"{i}" * 50 for i in range(count)], ids, names)
    cut = Cut(128, 8, 0, 1)
    encode = lambda text: [*map(ord, text)]  # noqa: E731
    rows = iter(PackedRows(texts, encode, cut, rows="drawn", seed=1, infinite=True))
    return lambda: next(rows)


ROWS: dict[str, tuple[Callable[[int], Work], tuple[int, ...]]] = {
    "rho-1, tokens": (selecting, (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)),
    "select within sequences, tokens": (selecting_within, (2**10, 2**12, 2**14, 2**16, 2**18)),
    "rank, sequences": (ranking, (32, 128, 512, 2048, 8192, 32_768)),
    "linupper, sequences": (capping, (32, 128, 512, 2048, 8192, 32_768)),
    "weights per document, documents": (weighing_documents, (64, 512, 4096, 32_768)),
    "linupper, ranks": (partial(over_ranks, wt.load("linupper")), (8, 64, 512, 4096)),
    "weights per document, ranks": (partial(over_ranks, PER_DOCUMENT), (8, 64, 512, 4096)),
    "opening a file, documents": (opening, (100, 1000, 10_000, 100_000)),
    "domain weights, domains": (weighing_domains, (10, 100, 1000, 10_000)),
    "a drawn batch, domains": (drawing, (10, 100, 1000, 5000)),
    "parse and build, stages": (building, (10, 100, 1000, 5000)),
}


def seconds(work: Work) -> float:
    """Return the median CPU time of a call, after one that does not count."""
    work()
    times: list[float] = []
    for _ in range(CALLS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """Return the slope of log time over log size, over the larger half of the sizes."""
    half = len(sizes) // 2
    x = [math.log(size) for size in sizes[half - 1 :]]
    y = [math.log(max(t, 1e-9)) for t in times[half - 1 :]]
    return statistics.linear_regression(x, y).slope


def table(*, quick: bool = False) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| what grows | sizes | seconds | exponent |"
    yield "|---|---|---|---|"
    for name, (prepare, every) in ROWS.items():
        sizes = every[:2] if quick else every
        times = [seconds(prepare(size)) for size in sizes]
        shown = ", ".join(f"{size:,}" for size in (sizes[0], sizes[-1]))
        ends = f"{times[0]:.2g}, {times[-1]:.2g}"
        yield f"| {name} | {shown} | {ends} | {exponent(sizes, times):.2f} |"


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread, torch {torch.__version__}\n")
    for line in table(quick=args.quick):
        print(line, flush=True)


if __name__ == "__main__":
    main()

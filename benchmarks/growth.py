"""How time grows with tokens, sequences, domains and draws: a table of seconds and exponents.

    python benchmarks/growth.py [--quick]

Each row is one kind of work over sizes up to three decades apart; a time is the median of a few
calls, in CPU seconds of one thread.  The exponent is the slope of log time over log size, fitted by
least squares to the larger half of the sizes, where fixed costs no longer count.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import weighting as wt

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

"""How time and memory grow with tokens, sequences, documents, domains, ranks and stages.

    python benchmarks/growth.py [--package FOLDER] [--quick]

Each row is one kind of work over sizes up to three decades apart; a time is the median of a few
calls, in CPU seconds of one thread, memory the most that a call takes.  Exponents are slopes of the
logarithms over that of the size, fitted by least squares to the larger half of the sizes, where
fixed costs no longer count.  Of the ranks one exists, which works as if the others had what it has;
what they take to answer is not there.

`--package` names a checkout of another version, which does the same in the same run, as far as it
has what the work is made of.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peak import free_at_once, peak_of

import weighting as wt

CALLS = 3
MOST = 1.1
"""What grows by more is to be explained."""
SMALL = 2**20
"""Of less memory no exponent is told: pages and small objects are most of it."""
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


PER_DOCUMENT = "mean(document) -> normalize -> temperature(0.5)"


def weighing_documents(documents: int) -> Work:
    """Return a weighting by document over 65,536 tokens of so many documents."""
    fn = wt.build(wt.loads(PER_DOCUMENT))
    segments = torch.arange(1024).expand(64, -1) // max(65_536 // documents, 1)
    signals = wt.Signals(loss=torch.rand(64, 1024), segment_ids=segments)
    return lambda: fn(signals, 1)


def alike(size: int) -> Any:  # noqa: ANN401 - of a class that not every version has
    """Return ranks that all have what this one has."""
    from weighting.contract import Alone  # noqa: PLC0415 - not in every version

    class Alike(Alone):
        parts = Alone()
        gather = staticmethod(lambda x: x.expand(size, *x.shape))
        sum = staticmethod(lambda x: x * size)

    ranks = Alike()
    ranks.size = size
    return ranks


def capping_over(ranks: int) -> Work:
    """Return LinUpper on a rank's eight sequences among so many ranks."""
    return over_ranks(wt.load("linupper"), ranks)


def documents_over(ranks: int) -> Work:
    """Return a weighting by document on one of so many ranks."""
    return over_ranks(wt.loads(PER_DOCUMENT), ranks)


def over_ranks(spec: wt.Spec, ranks: int) -> Work:
    """Return the weighting of a rank's eight sequences of 1,024 tokens among so many ranks."""
    fn = wt.build(spec, collectives=alike(ranks))
    segments = torch.arange(1024).expand(8, -1) // 64
    signals = wt.Signals(loss=torch.rand(8, 1024), segment_ids=segments)
    return lambda: fn(signals, 1)


def opening(documents: int) -> Work:
    """Return the opening of a JSONL file of so many short documents."""
    from titan_integration.data.documents import local_documents  # noqa: PLC0415 - needs torchtitan
    from titan_integration.data.records import Columns  # noqa: PLC0415

    folder = tempfile.mkdtemp()
    file = Path(folder) / "data.jsonl"
    lines = (json.dumps({"text": f"{i} " * 20, "domain": f"d{i % 7}"}) for i in range(documents))
    file.write_text("\n".join(lines), encoding="utf-8")

    def work() -> object:
        return local_documents(file, "train", Columns())

    weakref.finalize(work, shutil.rmtree, folder)
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
    "linupper, ranks": (capping_over, (8, 64, 512, 4096)),
    "weights per document, ranks": (documents_over, (8, 64, 512, 4096)),
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


class Found(NamedTuple):
    """CPU seconds and bytes of a kind of work, by size; nothing where a version lacks the work."""

    times: list[float]
    memory: list[int]


def found(*, quick: bool) -> dict[str, Found]:
    """Do all work at all sizes, first for its time and then for its memory."""
    rows = {name: (work, every[:2] if quick else every) for name, (work, every) in ROWS.items()}
    lacking, times = set[str](), dict[str, list[float]]()
    for name, (prepare, sizes) in rows.items():
        try:
            times[name] = [seconds(prepare(size)) for size in sizes]
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            lacking.add(name)
            print(f"{name}: not in this version: {error}", file=sys.stderr)
    memory: dict[str, list[int]] = {}
    free_at_once()
    for name, (prepare, sizes) in rows.items():
        if name not in lacking:
            memory[name] = [most_bytes(prepare(size)) for size in sizes]
    return {name: Found(times.get(name, []), memory.get(name, [])) for name in rows}


def most_bytes(work: Work) -> int:
    """Return the memory that a call takes at most, after one that does not count."""
    work()
    return peak_of(work)


def exponent(sizes: tuple[int, ...], values: list[float] | list[int]) -> float:
    """Return the slope of the logarithms of values and sizes, over the larger half of the sizes."""
    half = len(values) // 2
    x = [math.log(size) for size in sizes[half - 1 : len(values)]]
    y = [math.log(max(value, 1e-9)) for value in values[half - 1 :]]
    return statistics.linear_regression(x, y).slope


def table(now: dict[str, Found], before: dict[str, Found]) -> Iterator[str]:
    """Yield the lines of the table, and what grows faster than its size."""
    then = " | before: s | exponent | MiB | exponent | times as fast" if before else ""
    yield f"| what grows | sizes | s at most | exponent | MiB | exponent{then} |"
    yield "|---|---|---|---|---|---|" + "---|" * 5 * bool(before)
    steep: list[str] = []
    for name, (_, every) in ROWS.items():
        sizes = every[: len(now[name].times)]
        cells = [name, f"{sizes[0]:,} to {sizes[-1]:,}", *cells_of(sizes, now[name])]
        if before and before[name].times:
            ratio = before[name].times[-1] / now[name].times[-1]
            cells += [*cells_of(sizes, before[name]), f"{ratio:.1f}"]
        elif before:
            cells += ["?"] * 5
        yield f"| {' | '.join(cells)} |"
        slopes = {"time": exponent(sizes, now[name].times)}
        if now[name].memory[-1] >= SMALL:
            slopes["memory"] = exponent(sizes, now[name].memory)
        steep += [f"{what} of {name}: {x:.2f}" for what, x in slopes.items() if x > MOST]
    yield f"\nAbove {MOST}: {'; '.join(steep) or 'nothing'}."


def cells_of(sizes: tuple[int, ...], some: Found) -> list[str]:
    """Return time and memory at the largest size, each with its exponent."""
    large = some.memory[-1] >= SMALL
    memory = [f"{some.memory[-1] / 2**20:.0f}", f"{exponent(sizes, some.memory):.2f}"]
    time = [f"{some.times[-1]:.2g}", f"{exponent(sizes, some.times):.2f}"]
    return [*time, *(memory if large else ["under 1", ""])]


def found_by(package: Path, *, quick: bool) -> dict[str, Found]:
    """Return what another version takes for the same work, in a process of its own."""
    paths = [str(package.resolve()), str(Path(__file__).parent)]
    command = [sys.executable, __file__, "--raw", *["--quick"] * quick]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(  # noqa: S603 - ours
        command, cwd=package, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return {name: Found(*x) for name, x in json.loads(done.stdout).items()}


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all?")
    parser.add_argument("--package", type=Path, help="a checkout of another version")
    parser.add_argument("--raw", action="store_true", help="numbers alone, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.raw:
        print(json.dumps(found(quick=args.quick)))
        return
    print(f"{platform.machine()}, one thread, torch {torch.__version__}\n")
    before = found_by(args.package, quick=args.quick) if args.package else {}
    for line in table(found(quick=args.quick), before):
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""Time and peak memory of the loss part of a step: torchtitan's, ours, torch's and others'.

    python benchmarks/loss_path.py [--tokens N] [--sequences B] [--width D] [--vocabulary V]
        [--dtype float32] [--device cpu] [--rounds 7] [--out FILE] [--quick]
        [--only NAME ...] [--package FOLDER] [--no-memory]

The loss part goes from hidden states and the output layer's weight to the gradients of both.  Every
way is first checked, loss and gradients, against float64 autograd of

    sum_t u_t * nll_t / number of valid labels

with the weights u it used held fixed; one that is wrong gets no number.  Then all run once in each
round, every other round backwards, and are compared with the first of the same round: torchtitan's
chunked cross entropy, unweighted.  The last row is the three matrix products alone, in as many
chunks.  Peak memory counts what is allocated beside the inputs, the gradients included, in a
process of its own on CPU; U counts matrix products, in units of one product of the output layer.

`--package` names a checkout of another version, whose ways stand beside ours in the same rounds.
`--only` takes rows by name, those of the other version as "before: linupper late".
"""

import argparse
import contextlib
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from loss_ways import (
    BEFORE,
    CCE,
    FLOOR,
    IGNORED,
    STOCK,
    Batch,
    Setting,
    Variant,
    batch_of,
    products_alone,
    variants,
    with_other,
)
from peak import free_at_once, peak_of
from torch import Tensor

from weighting.loss.path import CHUNKS, chunk_of

# In 16 bits, the rounding of logits and of up to a hundred chunks that add up: 6 eps.  In float32,
# sums of many terms: 40 eps.  A token that weighs what it should not is off by about one.
TOLERANCE = {"float32": 5e-6, "float16": 6e-3, "bfloat16": 5e-2}
"""Largest error of a right gradient, relative to the largest one of a token or word."""

ON_CPU = Setting(4096, 4, 512, 32768, "float32", "cpu", 7)
ON_CUDA = Setting(8192, 2, 4096, 128256, "bfloat16", "cuda", 7)
QUICK = Setting(256, 4, 64, 1024, "float32", "cpu", 2)


class Outcome(NamedTuple):
    """A loss, the weight of each token in it, and its gradients."""

    loss: Tensor
    token: Tensor
    hidden: Tensor
    weight: Tensor


class Row(NamedTuple):
    """What came of a variant.

    Attributes:
        variant: The variant.
        error: Largest relative error, of loss, gradient of hidden states or of the weight.
        products: U.
        reason: Why there are no numbers, if there are none.
        wall: Seconds of each round.
        cpu: Seconds of all cores in each round.
        peak: Bytes beside the inputs.
    """

    variant: Variant
    error: float = math.nan
    products: float = 0.0
    reason: str = ""
    wall: Sequence[float] = ()
    cpu: Sequence[float] = ()
    peak: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Measure as the flags say and print the table and the goals."""
    args = _parse(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts products chats
    default = QUICK if args.quick else ON_CUDA if args.device.startswith("cuda") else ON_CPU
    asked = {name: getattr(args, name) for name in Setting._fields}
    setting = default._replace(**{name: x for name, x in asked.items() if x is not None})
    said = shlex.join(sys.argv[1:] if arguments is None else arguments)
    title = f"# The loss path in {setting.dtype}\n\n`python benchmarks/loss_path.py {said}`\n\n"
    batch = batch_of(setting)
    head = title + "  \n".join(heading(setting, int(batch.count)))
    print(head, flush=True)
    candidates = variants(batch)
    if args.package:
        candidates = with_other(candidates, args.package.resolve())
    if args.only:
        candidates = [x for x in candidates if x.name in {STOCK, *args.only}]
    rows = measured(setting, batch, candidates, memory=not args.no_memory)
    lines = ["", *table(rows), "", *goals(rows, setting), ""]
    found = "\n".join([*lines, f"At the end: {_load()}."])
    print(found)
    if args.out:
        args.out.write_text(f"{head}\n{found}\n", encoding="utf-8")
    return 0


def measured(
    setting: Setting, batch: Batch, candidates: list[Variant], *, memory: bool = True
) -> list[Row]:
    """Return a row for each variant; those whose gradient is wrong, or that fail, get no number."""
    exact = Exact(batch)
    rows = []
    for variant in candidates:
        _say(f"checking {variant.name}")
        rows.append(checked(variant, batch, exact, TOLERANCE[setting.dtype]))
    del exact
    rows.append(Row(Variant(FLOOR, products_alone, "no loss"), products=3))
    right = [row.variant for row in rows if not row.reason]
    times = timed(right, batch, setting.rounds)
    peaks = {}
    # Another version's modules cannot be handed to another process.
    for variant in [x for x in right if memory and not x.name.startswith((BEFORE, FLOOR))]:
        _say(f"memory of {variant.name}")
        peaks[variant.name] = peak_on_device(variant, batch, setting)
    _say("")
    return [
        row
        if row.reason
        else row._replace(
            wall=times[row.variant.name][0],
            cpu=times[row.variant.name][1],
            peak=peaks.get(row.variant.name, 0),
        )
        for row in rows
    ]


def _say(what: str) -> None:
    """Say what is being done, to whoever watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what}")
        sys.stderr.flush()


# Checks


class Exact:
    """The loss of a batch and its gradients in float64, for any weights."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._token: Tensor | None = None
        self._outcome: Outcome | None = None

    def of(self, token: Tensor) -> Outcome:
        """Return them for token weights [B, L]; those of the last call are kept."""
        token = torch.where(self._batch.labels == IGNORED, 0, token.detach())
        if self._token is None or self._outcome is None or not torch.equal(token, self._token):
            self._token, self._outcome = token, self._computed(token)
        return self._outcome

    def _computed(self, token: Tensor) -> Outcome:
        hidden, weight, labels, *_, count = self._batch
        hidden = hidden.detach().flatten(0, 1).double().requires_grad_()
        weight = weight.detach().double().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        size = max(1, _REFERENCE // weight.shape[0])
        parts = (x.split(size) for x in (hidden, labels.flatten(), token.flatten().double()))
        for x, label, u in zip(*parts, strict=True):
            logits = x @ weight.T
            nll = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="none")
            part = (u * nll).sum() / count
            part.backward()
            loss += part.detach()
        return Outcome(loss, token, hidden.grad, weight.grad)


_REFERENCE = 2**24
"""Logits of the float64 reference that exist at a time."""


def gradients(variant: Variant, batch: Batch) -> Outcome:
    """Go there once, forward and backward."""
    hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
    loss, token = variant.way(batch, hidden, weight)
    loss.backward()
    return Outcome(loss.detach(), token, hidden.grad, weight.grad)


def checked(variant: Variant, batch: Batch, exact: Exact, tolerance: float) -> Row:
    """Run a variant once; return its error and products, or the reason why it gets no number."""
    # Whatever goes wrong in one of the many ways is the reason it has no number.
    try:
        with limited(FIRST_CALL):  # compiled here, as under a profiler that takes ten times as long
            gradients(variant, batch)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            outcome = gradients(variant, batch)
    except ModuleNotFoundError as error:
        return Row(variant, reason=f"not installed: {error.name}")
    except Exception as error:  # noqa: BLE001
        first, *_ = str(error).splitlines() or [""]
        return Row(variant, reason=f"{type(error).__name__}: {first}")
    error = worst(outcome, exact.of(outcome.token))
    if not error <= tolerance:
        return Row(variant, error, reason=f"WRONG: error {error:.1e}, more than {tolerance:.0e}")
    one = 2 * batch.hidden.numel() * batch.weight.shape[0]
    return Row(variant, error, products(profile) / one)


FIRST_CALL = 120
"""Seconds that the first call of a way may take, compiling included."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """End what takes longer.

    Raises:
        TimeoutError: It did.
    """

    def end(*_: object) -> None:
        msg = f"did not compile and run in {seconds} s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def worst(found: Outcome, exact: Outcome) -> float:
    """Return the largest error of loss and gradients, relative to the largest token or word."""
    errors = [
        (found.loss.double() / exact.loss - 1).abs().item(),
        _apart(found.hidden.flatten(0, -2), exact.hidden),
        _apart(found.weight, exact.weight),
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _apart(found: Tensor, exact: Tensor) -> float:
    differences = (found.double() - exact).norm(dim=-1)
    return (differences.max() / exact.norm(dim=-1).max()).item()


def products(profile: torch.profiler.profile) -> int:
    """Return the FLOPs of matrix products, as torch's FLOP counter misses those of its own loss.

    0 if there are none to see, or some that a compiled kernel does not tell about.
    """
    total = 0
    for event in profile.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is None:
            continue
        shapes = event.input_shapes[first : first + 2]
        if not all(shapes):
            return 0
        (rows, inner), (_, columns) = shapes
        total += 2 * rows * inner * columns
    return total


# Measures


def timed(
    candidates: list[Variant], batch: Batch, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Return by name the seconds of each round, by the clock and of all cores."""
    found: dict[str, tuple[list[float], list[float]]] = {v.name: ([], []) for v in candidates}
    for number in range(rounds):
        _say(f"round {number + 1} of {rounds}")
        gc.collect()
        for variant in candidates if number % 2 else reversed(candidates):
            _wait(batch)
            wall, cpu = time.perf_counter(), time.process_time()
            outcome = gradients(variant, batch)
            _wait(batch)
            found[variant.name][0].append(time.perf_counter() - wall)
            found[variant.name][1].append(time.process_time() - cpu)
            del outcome
    return found


def _wait(batch: Batch) -> None:
    if batch.hidden.is_cuda:
        torch.cuda.synchronize()


def peak_on_device(variant: Variant, batch: Batch, setting: Setting) -> int:
    """Return the most bytes a variant has allocated beside its inputs; on CPU in a new process.

    0 where that cannot be told: without Linux, which forgets the peak when asked to, and where the
    machine has too little memory.
    """
    if batch.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome = gradients(variant, batch)
        _wait(batch)
        del outcome
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weighting", "torchtitan.components.loss"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(peak_here, variant, setting, torch.get_num_threads()).result()
        except (OSError, BrokenProcessPool):
            return 0


def peak_here(variant: Variant, setting: Setting, threads: int) -> int:
    """Return how far this process's resident memory rises above what it has with its inputs."""
    torch.set_num_threads(threads)
    free_at_once()
    # What is loaded or built at the first call does not count.
    gradients(variant, batch_of(QUICK._replace(sequences=setting.sequences, dtype=setting.dtype)))
    batch = batch_of(setting)
    return peak_of(lambda: gradients(variant, batch))


# What is printed


def heading(setting: Setting, counted: int) -> list[str]:
    """Return what was run on what; so many tokens have a label that counts."""
    tokens, rows, width, vocabulary, dtype, *_ = setting
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchtitan", "liger-kernel", "cut-cross-entropy"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    where = _cpu_name()
    if setting.device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(setting.device)}, {where}"
    sizes = f"B={rows} sequences, D={width}, V={vocabulary}, {dtype}"
    return [
        f"N={tokens} tokens, of which {counted} count, in {sizes}",
        f"{CHUNKS} chunks of {tokens // CHUNKS} tokens, ours of {chunk_of(tokens, CHUNKS)}",
        f"{setting.rounds} rounds; {', '.join(versions)}; commit {_commit()}",
        f"{where}; {torch.get_num_threads()} of {os.cpu_count()} threads; {_load()}",
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = text.partition("model name")[2].partition("\n")[0].lstrip("\t: ")
    return name or platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _load() -> str:
    return f"load average {', '.join(f'{x:.1f}' for x in os.getloadavg())}"


def table(rows: list[Row]) -> list[str]:
    """Return the Markdown table of all rows."""
    first = rows[0]
    lines = [
        "| loss part | U | time [quartiles] | least | CPU time | peak memory | MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        note = f" ({row.variant.note})" if row.variant.note else ""
        name = f"{row.variant.name}{note}"
        if row.reason or first.reason:
            lines.append(f"| {name} | no number: {row.reason or first.reason} | | | | | | |")
            continue
        wall, cpu = ratios(row, first, "wall"), ratios(row, first, "cpu")
        low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
        u = f"{row.products:.2f}" if row.products else "?"
        memory = "? | ?"
        if row.peak and first.peak:
            memory = f"{row.peak / first.peak:.2f} | {row.peak / 2**20:.3g}"
        lines.append(
            f"| {name} | {u} | {middle:.2f} [{low:.2f}, {high:.2f}] | "
            f"{min(row.wall) / min(first.wall):.2f} | {statistics.median(cpu):.2f} | "
            f"{memory} | {'' if math.isnan(row.error) else f'{row.error:.0e}'} |"
        )
    if not first.reason:
        size = f" and {first.peak / 2**20:.0f} MiB" if first.peak else ""
        lines += ["", f"1.00 is {statistics.median(first.wall) * 1e3:.0f} ms{size}."]
    return lines


def ratios(row: Row, to: Row, by: str) -> list[float]:
    """Return a row's seconds in each round as ratios to another row's in the same round."""
    return [a / b for a, b in zip(getattr(row, by), getattr(to, by), strict=True)]


def goals(rows: list[Row], setting: Setting) -> list[str]:
    """Return for each goal whether it was met, by medians, and by how much."""
    named = {row.variant.name: row for row in rows}
    kept = {row.variant.name for row in rows if row.variant.note == "auto"}
    authors, specs = "full logits, MiLe", ("linupper", "mile", "linupper-x-mile", "rho-1")
    taken = [name for name in sorted(kept) if name.rpartition(" ")[0] in specs]
    selection = next((name for name in taken if "rho-1" in name), "rho-1 recompute")
    asked = [
        ("uniform late", "time", "<=", 0.95, STOCK),
        ("uniform late", "memory", "<=", 0.60, STOCK),
        ("linupper late", "time", "<=", 1.00, STOCK),
        ("linupper late", "gradients", "<=", setting.sequences, "uniform late"),
        ("mile late", "time", "<=", 1.05, STOCK),
        (selection, "time", "<=", 0.90, STOCK),
        (authors, "memory", ">=", 5.0, "mile late"),
        (authors, "time", ">=", 1.0, "mile late"),
        *((name, "time", "<=", 1.05, CCE) for name in taken),
        *((name, "time", "<=", 1.5, FLOOR) for name in taken if setting.dtype == "bfloat16"),
    ]
    torchs = [x for x in named if x.startswith("torch,") and x.endswith("given weights")]
    asked += [(name, "time", ">=", 1.8, "given late") for name in torchs]
    lines = ["Goals, by medians:", ""]
    for name, what, sign, limit, other in asked:
        if name not in named or other not in named:
            continue
        value = compared(named[name], named[other], what, setting)
        met = value <= limit if sign == "<=" else value >= limit
        verdict = "not measured" if math.isnan(value) else "PASS" if met else "MISS"
        text = WHAT[what].format(other)
        lines.append(f"- {verdict}: {name}, {text}: {value:.2f}, asked {sign} {limit:g}")
    return lines


WHAT = {
    "time": "time relative to {}",
    "memory": "peak memory relative to {}",
    "gradients": "peak memory beyond {}, in gradients of the output layer",
}


def compared(row: Row, to: Row, what: str, setting: Setting) -> float:
    """Return a row's number as a goal compares it with another's; NaN where one has none."""
    if what == "time" and row.wall and to.wall:
        return statistics.median(ratios(row, to, "wall"))
    if what == "memory" and row.peak and to.peak:
        return row.peak / to.peak
    if what == "gradients" and row.peak and to.peak:
        item = getattr(torch, setting.dtype).itemsize
        return (row.peak - to.peak) / (setting.vocabulary * setting.width * item)
    return math.nan


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("tokens", "sequences", "width", "vocabulary", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=list(TOLERANCE))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--out", type=Path, help="also write it there")
    parser.add_argument("--quick", action="store_true", help="tiny, on CPU: does it run at all?")
    parser.add_argument("--only", nargs="+", help="rows to measure beside the first, by name")
    parser.add_argument("--package", type=Path, help="a checkout of another version of ours")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    args = parser.parse_args(arguments)
    if args.quick:
        args.device = "cpu"
    if args.rounds is not None and args.rounds < 2:  # noqa: PLR2004
        parser.error("--rounds: quartiles take two")
    return args


if __name__ == "__main__":
    sys.exit(main())

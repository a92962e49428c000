"""Does a long run stay as it began?  Memory, open files, threads, compilations and time of a step.

    python benchmarks/soak.py [--steps 20000] [--out benchmarks/soak.md] [-- torchtitan flags]

The real trainer trains a model of one layer in this process, on CPU, with all that a weighting can
keep: domains against an average of the model, documents, a history of sequences, entropies,
schedules that never rest; recorded, logged, saved, and compared with itself.  Beside the report are
written a .json with what was read in /proc, and a .svg.  Exit status 1 when a bound is broken.
Further flags come last and win: `-- --weighting.spec=uniform` tells the host's leaks from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from titan_integration.trainer.trainer import WeightedTrainer

ROOT = Path(__file__).resolve().parent.parent
SPEC = """\
version: 1
name: soak
factors:
  domain: doremi(step_size=linear(1, 0.1, over={steps}), smoothing=1e-3)
  document: mean(document) -> normalize -> temperature(cosine(4, 1, over={steps}))
  sequence: rank(history=1024) -> temperature(step(2, 0.5, at={half})) -> clamp(2/n)
  token: entropy(gamma=linear(0, 1, over={steps})) -> token_scale
"""
FLAGS = [
    "--module=soak",
    "--config=tiny",
    "--training.seq_len=32",
    "--training.local_batch_size=4",
    "--weighting.reference=ema:0.999",
    "--weighting.record=every=10,tokens=8",
    "--compile.enable",
    "--checkpoint.enable",
    "--checkpoint.keep_latest_k=2",
    "--metrics.enable_tensorboard",
    "--metrics.disable_color_printing",
    "--debug.seed=1",
]
SAMPLES = 200
"""How often is looked, logged and agreed; a checkpoint is saved a tenth as often."""
WARM_UP = 0.2
"""Share of the run that is not judged: the history fills, the allocators find their size, and the
first checkpoints are saved and removed."""
PARTS = 10
KEPT = ("files open", "threads", "children", "compiles")
"""What may not be more at the end than after the warm-up."""
COLUMNS = ("step", "rss", "blocks", *KEPT, "files", "bytes")
"""Of a sample; rss in bytes, blocks as the interpreter counts them, files and bytes on disk."""
RESAMPLES, RUN_OF_SAMPLES = 2_000, 8

BYTES = 256.0
"""A step may keep: less than any tensor takes, object and storage, were one of a step kept."""
BLOCKS = 0.05
"""A step may keep: less than one object of each recorded step, every tenth."""
SLOWER = 1.2
"""Times the first tenth's a step may take in the last: work that grows with the run, such as a
history that is never cut, is far above; what else the machine does moves it by a tenth or so."""


class Slope(NamedTuple):
    """What a step adds, by least squares, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+,.3g} ({self.low:+,.3g} to {self.high:+,.3g})"


def main(arguments: list[str] | None = None) -> int:
    """Train, and write numbers, report and picture; status 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "soak.md")
    parser.add_argument("flags", nargs="*", help="further torchtitan flags, after --")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soaked(Path(folder), args.steps, args.flags)
    args.out.with_suffix(".json").write_text(as_json(found), encoding="utf-8")
    text = report(found)
    args.out.write_text(text, encoding="utf-8")
    picture(found, args.out.with_suffix(".svg"))
    print(text)
    return int(bool(broken(found)))


def tiny() -> WeightedTrainer.Config:
    """One layer of width 32 on the built-in text; what only costs time at this size is off."""
    from dataclasses import replace  # noqa: PLC0415 - with the trainer's own

    from titan_integration.config_registry import llama3_proxy  # noqa: PLC0415
    from titan_integration.paper import resized  # noqa: PLC0415

    config = llama3_proxy()
    assert config.model_spec is not None
    config.model_spec = resized(config.model_spec, layers=1, heads=2, width=32)
    config.model_spec = replace(config.model_spec, flavor="tiny")
    config.activation_checkpoint = None
    config.loss.num_chunks = 1  # pyrefly: ignore[missing-attribute]
    config.compile.components = ["loss"]  # the weighting's is compiled with it
    return config


def soaked(folder: Path, steps: int, flags: list[str]) -> dict[str, Any]:
    """Train in this process and return what was seen, and with what."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", OMP_NUM_THREADS="1")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from torchtitan.config import ConfigManager  # noqa: PLC0415 - judging needs no trainer
    from torchtitan.tools.logging import init_logger  # noqa: PLC0415

    init_logger()
    every = max(1, steps // SAMPLES)
    spec = SPEC.format(steps=steps, half=steps // 2)
    (folder / "soak.yaml").write_text(spec, encoding="utf-8")
    often = [f"--metrics.log_freq={every}", f"--weighting.agree_every={every}"]
    often += [f"--checkpoint.interval={10 * every}", f"--training.steps={steps}"]
    where = [f"--weighting.spec={folder / 'soak.yaml'}", f"--dump_folder={folder / 'run'}"]
    trainer = ConfigManager().parse_args([*FLAGS, *often, *where, *flags]).build()
    seconds = np.full((steps, 2), np.nan, np.float32)  # touched now, so that it does not grow
    samples = np.full((steps // every, len(COLUMNS)), -1, np.int64)
    train_step = trainer.train_step

    def watched_step(data_iterator: object) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        train_step(data_iterator)
        step = trainer.step
        seconds[step - 1] = time.perf_counter() - wall, time.process_time() - cpu
        if step % every == 0:
            samples[step // every - 1] = sample(step, folder)

    trainer.train_step = watched_step
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    minutes = (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60
    trainer.close()
    return {
        "command": " ".join(["python benchmarks/soak.py", f"--steps {steps}", *flags]),
        "flags": [*FLAGS, *often, *flags],
        "spec": spec,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no accelerator used",
        "versions": {name: version(name) for name in ("torch", "torchtitan")},
        "load": [round(x, 1) for x in os.getloadavg()],
        "steps": steps,
        "minutes": [round(x, 2) for x in minutes],
        "milliseconds": tenths(seconds),
        "samples": {name: x.tolist() for name, x in zip(COLUMNS, samples.T, strict=True)},
    }


def sample(step: int, folder: Path) -> tuple[int, ...]:
    """Return what this process holds, in the order of `COLUMNS`."""
    from torch._dynamo.utils import counters  # noqa: PLC0415 - after the trainer is built

    process = Path("/proc/self")
    pages = int((process / "statm").read_text().split()[1])
    tasks = list((process / "task").iterdir())
    children = sum(len(read(task / "children").split()) for task in tasks)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return (
        step,
        pages * os.sysconf("SC_PAGE_SIZE"),
        sys.getallocatedblocks(),
        len([*(process / "fd").iterdir()]),
        len(tasks),
        children,
        counters["stats"]["unique_graphs"],
        len(sizes),
        sum(sizes),
    )


def read(path: Path) -> str:
    """Return a file's text; that of a thread that has just ended is empty."""
    try:
        return path.read_text()
    except OSError:
        return ""


def tenths(seconds: np.ndarray) -> dict[str, list[float]]:
    """Return milliseconds of a step in each tenth of the run, [steps, (by the clock, CPU)].

    Medians, and what the fastest tenth of steps took at most: other load only makes steps slower.
    """
    parts = np.array_split(1e3 * seconds, PARTS)
    named = {
        "by the clock": [np.median(part[:, 0]) for part in parts],
        "CPU": [np.median(part[:, 1]) for part in parts],
        "CPU, fastest tenth": [np.quantile(part[:, 1], 0.1) for part in parts],
    }
    return {name: [round(float(x), 2) for x in values] for name, values in named.items()}


def after(found: dict[str, Any], name: str, start: float = WARM_UP, end: float = 1) -> np.ndarray:
    """Return a column of the samples between two shares of the run."""
    values = np.array(found["samples"][name], float)
    return values[int(start * len(values)) : int(np.ceil(end * len(values)))]


def floors(found: dict[str, Any], name: str) -> tuple[float, float]:
    """Return the least of a column in the first tenth after the warm-up and in the last.

    A file is open for a moment while it is written; what leaks stays open.
    """
    values = after(found, name)
    tenth = -(-len(values) // PARTS)
    return values[:tenth].min(), values[-tenth:].min()


def slope(step: np.ndarray, y: np.ndarray) -> Slope:
    """Return what a step adds to y.

    Memory moves in jumps that last, so that residuals are drawn anew in runs of several samples.
    """
    x = step - step.mean()
    fit = float(x @ y / (x @ x))
    rest = y - y.mean() - fit * x
    random = np.random.default_rng(0)
    length = min(RUN_OF_SAMPLES, len(y))
    runs = -(-len(y) // length)
    starts = random.integers(len(y) - length + 1, size=(RESAMPLES, runs, 1))
    drawn = rest[(starts + np.arange(length)).reshape(RESAMPLES, -1)[:, : len(y)]]
    low, high = np.percentile(fit + drawn @ x / (x @ x), [2.5, 97.5])
    return Slope(fit, float(low), float(high))


def slopes(found: dict[str, Any], name: str) -> dict[str, Slope]:
    """Return what a step adds after the warm-up, and in each half of that."""
    middle = (1 + WARM_UP) / 2
    spans = {"all": (WARM_UP, 1), "first half": (WARM_UP, middle), "second half": (middle, 1)}
    return {
        span: slope(after(found, "step", *ends), after(found, name, *ends))
        for span, ends in spans.items()
    }


def slower(found: dict[str, Any]) -> float:
    """Return how many times the first tenth's a step takes in the last, in CPU time."""
    first, *_, last = found["milliseconds"]["CPU, fastest tenth"]
    return last / first


def broken(found: dict[str, Any]) -> list[str]:
    """Return the bounds that a run broke, with its numbers.

    A slope breaks its bound where the whole of its interval is beyond it, in the second half too:
    what an allocator takes once and keeps is no leak.
    """
    said: list[str] = []
    for name, bound in (("rss", BYTES), ("blocks", BLOCKS)):
        steep = slopes(found, name)
        if min(steep["all"].low, steep["second half"].low) > bound:
            said.append(f"{name} grows by {steep['all']} a step, more than {bound:g}")
    for name in KEPT:
        first, last = floors(found, name)
        if last > first:
            said.append(f"{name}: {last:.0f} at the end, {first:.0f} after the warm-up")
    if (ratio := slower(found)) > SLOWER:
        said.append(f"a step takes {ratio:.2f} times the first tenth's in the last")
    return said


def as_json(found: dict[str, Any]) -> str:
    """Return the numbers as JSON, a line for each column."""
    lines: list[str] = []
    for key, value in found.items():
        if isinstance(value, dict) and any(isinstance(x, list) for x in value.values()):
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f'"{key}": {{\n{inner}\n}}')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def report(found: dict[str, Any]) -> str:
    """Return the report in Markdown, made from the numbers alone."""
    said = broken(found)
    wall, cpu = found["minutes"]
    versions = ", ".join(f"{name} {x}" for name, x in found["versions"].items())
    load = ", ".join(map(str, found["load"]))
    lines = [
        "# A long run stays as it began",
        "",
        (
            f"`{found['command']}`: {found['steps']:,} steps in {wall:.1f} minutes by the clock, "
            f"{cpu:.1f} of CPU time."
        ),
        f"Machine: {found['machine']}; load average at the end {load}; {versions}.",
        "One layer of width 32 in the real trainer, 4 sequences of 32 tokens a step, with:",
        "",
        f"```yaml\n{found['spec']}```",
        "",
        f"`{' '.join(found['flags'])}`",
        "",
        *(f"**BROKEN**: {x}." for x in said or ()),
        *([] if said else ["No bound is broken."]),
        "",
        "![memory, what is held, and time of a step over the run](soak.svg)",
        "",
        (
            f"After the first {WARM_UP:.0%} of the run, by least squares; 95 % intervals from "
            f"residuals drawn anew in runs of {RUN_OF_SAMPLES} samples."
        ),
        "",
        "| a step adds | all | first half | second half | bound |",
        "|---|---|---|---|---|",
    ]
    for name, words, bound in (
        ("rss", "bytes of resident memory", BYTES),
        ("blocks", "blocks of the interpreter", BLOCKS),
    ):
        cells = [str(x) for x in slopes(found, name).values()]
        lines.append(f"| {words} | {' | '.join(cells)} | {bound:g} |")
    lines += [
        "",
        "| least, by tenths | after warm-up | at the end | most | bound |",
        "|---|---|---|---|---|",
    ]
    for name, unit, bound in (
        ("rss", 2**20, ""),
        *((name, 1, "no more") for name in KEPT),
        ("files", 1, "none: records"),
        ("bytes", 2**20, "none: records"),
    ):
        words = {"rss": "resident, MiB", "files": "files on disk", "bytes": "on disk, MiB"}
        cells = [f"{x / unit:,.0f}" for x in (*floors(found, name), after(found, name).max())]
        lines.append(f"| {words.get(name, name)} | {' | '.join(cells)} | {bound} |")
    lines += ["", f"| ms of a step, by tenths of the run |{' |' * PARTS} last / first | bound |"]
    lines.append("|---" * (PARTS + 3) + "|")
    for name, values in found["milliseconds"].items():
        judged = f"{SLOWER:g}" if name == "CPU, fastest tenth" else ""
        cells = [*(f"{x:.0f}" for x in values), f"{values[-1] / values[0]:.2f}", judged]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        (
            "Medians, and what the fastest tenth of steps took at most: other load makes steps "
            "slower, in CPU time too where cores share caches, so that one is judged."
        ),
        "",
        (
            "The bounds: a step that kept one tensor would add more bytes, one object of each "
            "recorded step more blocks."
        ),
        "Compiles are the graphs that `torch.compile` has made: the weighting's, once.",
    ]
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any], path: Path) -> None:
    """Draw memory, what is held, and the time of a step over the run."""
    mpl.rcParams["svg.hashsalt"] = "weighting"
    mpl.rcParams["svg.fonttype"] = "none"
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained")
    samples = found["samples"]
    step = np.array(samples["step"])
    memory = np.array(samples["rss"]) / 2**20
    left.plot(step, memory, color="#0072B2", linewidth=1)
    left.set(title="resident memory (MiB)", xlabel="step", ylim=(0, 1.2 * memory.max()))
    for name, colour in zip(KEPT, ("#0072B2", "#D55E00", "#009E73", "#000000"), strict=True):
        middle.plot(step, samples[name], color=colour, linewidth=1, label=name)
    middle.set(title="held", xlabel="step", ylim=(0, None))
    middle.legend(fontsize=7)
    tenth = (np.arange(PARTS) + 0.5) * found["steps"] / PARTS
    for (name, values), style in zip(found["milliseconds"].items(), ("-", "--", ":"), strict=True):
        right.plot(tenth, values, f"k{style}", linewidth=1, label=name)
    right.set(title="ms of a step, by tenths", xlabel="step", ylim=(0, None))
    right.legend(fontsize=7)
    for ax in (left, middle):
        ax.axvspan(0, WARM_UP * found["steps"], color="#eeeeee")
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    sys.exit(main())

"""What reading runs costs: CPU seconds and memory of a report, and of a replay, of made-up runs.

    python benchmarks/reports.py [--quick] [--package FOLDER]

Runs have 25 numbers a line.  Imports do not count: seconds and memory are those beyond them.  Each
number is the median of three processes.  `--package` names a checkout of another version, which is
measured beside this one, and the last column has the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import weighting as wt
from weighting.runs.layout import FOLDER, METRICS, RECORD, SEQUENCES
from weighting.runs.layout import RUN as ABOUT_RUN
from weighting.runs.record_reader import ABOUT

HERE = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "prose", "math")
MEASURED = """
import sys, time
from pathlib import Path
from weighting.cli.explanation import explanation
from weighting.report.page import page
from weighting.report.read import read_runs
from weighting.runs.record_reader import read_record
from weighting.runs.replay import replay, summary
import weighting as wt
import pyarrow.json, pyarrow.parquet
# Not getrusage's, which begins at the peak of the process that started this one.
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
what, *folders = sys.argv[1:]
before, start = peak(), time.process_time()
if what == "report":
    page(read_runs([Path(folder) for folder in folders]), explanation)
else:
    record = read_record(Path(folders[0]))
    summary(record, replay(wt.load("linupper"), record).weight)
print(time.process_time() - start, peak() - before)
"""


def line(chance: random.Random, step: int) -> dict[str, float]:
    """Return a line of metrics: 25 numbers."""
    loss = 3 + 5 / (1 + step) + chance.random() / 10
    told = {"step": step, "unweighted_loss": loss, "weighted_loss": loss + chance.random() / 20}
    for name in ("pipeline", "weight"):
        told |= {f"{name}/{key}": chance.random() for key in ("min", "ess_frac", "capped_frac")}
        told[f"{name}/max"] = 1 + chance.random()
    for name in DOMAINS:
        told |= {f"domain/{name}/{key}": chance.random() for key in ("share", "weight", "loss")}
    return told | {key: chance.random() for key in ("tps", "mfu", "lr", "memory", "grad_norm")}


def write_run(folder: Path, seed: int, steps: int, rows: int = 0) -> None:
    """Write a run of so many steps, which recorded so many sequences at each of them."""
    chance, spec = random.Random(seed), wt.load("linupper")  # noqa: S311 - no secret
    told = folder / FOLDER
    told.mkdir(parents=True)
    with (told / METRICS).open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line(chance, step))}\n" for step in range(1, steps + 1))
    named = {"name": spec.name, "hash": spec.hash}
    about = {"spec": {**named, "text": str(spec)}, "config": {}, "starts": [{"step": 1}]}
    (told / ABOUT_RUN).write_text(json.dumps(about), encoding="utf-8")
    if not rows:
        return
    count = steps * rows
    whole, floats = pa.int32(), pa.float32()
    columns = {
        "step": pa.array([step for step in range(1, steps + 1) for _ in range(rows)], whole),
        "row": pa.array([*range(rows)] * steps, whole),
        "domain": chance.choices(DOMAINS, k=count),
        "tokens": pa.array([512] * count, whole),
        "mean_weight": pa.array([2 * chance.random() for _ in range(count)], floats),
        "loss": pa.array([4 * chance.random() for _ in range(count)], floats),
    }
    counts = {"ranks": 1, "rank_rows": rows, "batch_rows": rows}
    said = {**named, "spec": str(spec), "domains": [*DOMAINS], **counts}
    (folder / RECORD).mkdir()
    table = pa.table(columns)
    with pq.ParquetWriter(folder / RECORD / f"{SEQUENCES}-000001.parquet", table.schema) as to:
        to.write_table(table)
        to.add_key_value_metadata({ABOUT: json.dumps(said)})


def measured(package: Path, what: str, folders: list[Path], times: int) -> tuple[float, float]:
    """Return the medians of CPU seconds and MiB of some processes with a version of ours."""
    found: list[list[float]] = []
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, what, *map(str, folders)]
    for _ in range(times):
        done = subprocess.run(  # noqa: S603 - ours
            command, cwd=package, env=environment, check=True, capture_output=True, text=True
        )
        found.append([float(word) for word in done.stdout.split()])
    seconds, memory = map(statistics.median, zip(*found, strict=True))
    return seconds, memory


def main() -> None:
    """Print the machine and a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all?")
    parser.add_argument("--package", type=Path, help="a checkout of another version")
    args = parser.parse_args()
    runs, steps, recorded, times = (2, 50, 10, 1) if args.quick else (20, 20_000, 20_000, 3)
    print(f"{platform.machine()}, one thread, Python {platform.python_version()}\n")
    print("| what | s | MiB | before: s | MiB | times as fast |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / f"run{i}" for i in range(runs)]
        for seed, folder in enumerate(folders):
            write_run(folder, seed, steps)
        replayed = Path(root) / "recorded"
        write_run(replayed, runs, recorded, 128)
        for label, what, given in (
            (f"report of {runs} runs of {steps:,} steps", "report", folders),
            (f"replay of {recorded:,} steps x 128 sequences", "replay", [replayed]),
        ):
            now = measured(HERE, what, given, times)
            cells = [f"{now[0]:.2f}", f"{now[1]:.0f}", "", "", ""]
            if args.package:
                before = measured(args.package.resolve(), what, given, times)
                cells[2:] = [f"{before[0]:.2f}", f"{before[1]:.0f}", f"{before[0] / now[0]:.1f}"]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

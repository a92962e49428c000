"""How long each command takes to answer, in CPU seconds, beside Python alone and `import torch`.

    python benchmarks/cli.py [--runs 7] [--json FILE]

The median of some runs of each, started afresh, files in the cache.  What needs no tensor must not
import torch; a test holds that without a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPLETE = {"_WEIGHTING_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
COMMANDS = "check explain list schema simulate plot new-stage train compare mix score report"
COMMANDS += " export tokens replay tune doctor completion"
LINES = [
    "--version",
    "--help",
    *(f"{name} --help" for name in COMMANDS.split()),
    "list",
    "schema",
    "check missing.yaml",
    "check broken.yaml",
    "check linupper",
    "explain linupper",
    "simulate linupper --losses 1,2,3,5",
]


def seconds(words: list[str], runs: int, folder: str, more: dict[str, str] | None = None) -> float:
    """Return the median CPU seconds, of user and system, that Python takes for some words."""
    taken = []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled files
    for _ in range(runs + 1):  # the first fills caches
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(  # noqa: S603 - our own commands
            [sys.executable, *words],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="Write the seconds here as well.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "broken.yaml").write_text("version: 1\npipeline: [uniform\n", "utf-8")
        python = seconds(["-c", "pass"], args.runs, folder)
        torch = seconds(["-c", "import torch"], args.runs, folder)
        found = {"python -c pass": python, "import torch": torch}
        found["import weighting"] = seconds(["-c", "import weighting"], args.runs, folder)
        for line in LINES:
            words = ["-m", "weighting", *line.split()]
            found[f"weighting {line}"] = seconds(words, args.runs, folder)
        for start in ("check lin", "train linupper --"):
            more = {**COMPLETE, "COMP_WORDS": f"weighting {start}"}
            found[f"<TAB> after {start}"] = seconds(["-m", "weighting"], args.runs, folder, more)
    print(f"{'':40} {'CPU s':>7} {'x python':>9} {'x import torch':>15}")
    for name, taken in found.items():
        print(f"{name:40} {taken:7.3f} {taken / python:9.1f} {taken / torch:15.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

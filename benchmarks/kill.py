"""Kill a rank of a real training at random moments, again and again: the run always resumes.

    python benchmarks/kill.py [--kills 20] [--ranks 2] [--seed 0] [-- torchtitan flags]

The debug model trains under torchrun with a checkpoint every two steps.  Every start is the same
command in the same folder, and the next victim; every second one dies while it saves.  It must go
on right after the latest finished checkpoint, and every step trained twice must give the same
numbers, bit for bit.  Exit status 1 with the reason at the first failure.  Finds the ranks in
/proc, so on Linux only.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

AFTER = 4.0
"""Seconds after the first step of a start within which its rank is killed."""
WRITE = 0.3
"""Seconds that a save takes, about: the second moment is chosen within it."""
PATIENCE = 300.0
"""Seconds for anything that is waited for; it takes a hundredth of that."""
FLAGS = [
    "--module=titan_integration",
    "--config=llama3_debugmodel",
    "--weighting.spec=selective-backprop",
    "--training.steps=100000",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--debug.seed=1",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.keep_latest_k=3",
    "--metrics.disable_color_printing",
]

T = TypeVar("T")


class KillError(Exception):
    """What went wrong."""


def main(arguments: list[str] | None = None) -> int:
    """Kill and resume; print a table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("flags", nargs="*", help="further torchtitan flags, after --")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        try:
            chance = random.Random(args.seed)  # noqa: S311 - nothing secret
            kill_and_resume(folder, args.kills, args.ranks, chance, args.flags)
            again = trained_twice(folder)
        except KillError as error:
            logs = sorted(folder.glob("start-*.log"), key=lambda path: path.stat().st_mtime)
            tail = logs[-1].read_text()[-4000:] if logs else ""
            print(f"{tail}\n\nfailed: {error}")
            return 1
    print(f"{args.kills} kills, always resumed; {again} steps trained again, with the same numbers")
    return 0


def kill_and_resume(
    folder: Path, kills: int, ranks: int, chance: random.Random, flags: list[str]
) -> None:
    """Start, kill and start again in a folder; print a line for each kill.

    Raises:
        KillError: A start did not go on where it should.
    """
    print("kill  rank  after s  at step  finished      torn  resumed")
    line = ""
    for number in range(kills + 1):
        expected = max(checkpoints(folder), default=0) + 1
        log = folder / f"start-{number}.log"
        process = start(folder, log, ranks, flags)
        try:
            found = until(lambda log=log: steps(log, "Training starts at step"), process)
            if line:
                print(f"{line}  {found[0]:7}", flush=True)
            if found[0] != expected:
                msg = f"start {number} went on at step {found[0]}, not {expected}"
                raise KillError(msg)
            until(lambda log=log: steps(log, "step:"), process)
            if number == kills:
                until(lambda at=expected: max(checkpoints(folder), default=0) > at, process)
                return
            begun = time.monotonic()
            time.sleep(chance.uniform(0, AFTER))
            if number % 2:
                before = saves(log)
                until(lambda log=log, before=before: saves(log) > before, process)
                time.sleep(chance.uniform(0, WRITE))
            after = time.monotonic() - begun
            alive = ranks_of(process.pid)
            if len(alive) < ranks:
                msg = "a rank ended by itself"
                raise KillError(msg)
            rank, pid = chance.choice(sorted(alive.items()))
            os.kill(pid, signal.SIGKILL)
            process.wait(PATIENCE)
        finally:
            end(process)
        last = max(steps(log, "step:"))
        whole, torn = checkpoints(folder), checkpoints(folder, finished=False)
        state = f"{max(whole, default='none')!s:>8}  {max(torn, default='none')!s:>8}"
        line = f"{number + 1:4}  {rank:4}  {after:7.2f}  {last:7}  {state}"


def start(folder: Path, log: Path, ranks: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start the training under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", "-m", "torchtitan.train", *FLAGS]
    paths = filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("wb") as file:
        return subprocess.Popen(  # noqa: S603 - our own command
            [*command, f"--dump_folder={folder}", *flags],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, and it its ranks, if it has not ended."""
    process.terminate()
    process.wait(PATIENCE)


def ranks_of(torchrun: int) -> dict[int, int]:
    """Return the process id of every rank of a torchrun, which starts them in their order."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return dict(enumerate(map(int, children)))


def until(condition: Callable[[], T], process: subprocess.Popen[bytes]) -> T:
    """Wait until a condition holds and return its value.

    Raises:
        KillError: The process has ended, or it takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if process.poll() is not None:
            msg = f"the training ended by itself, with status {process.returncode}"
            raise KillError(msg)
        if time.monotonic() > deadline:
            msg = f"nothing happened for {PATIENCE:.0f} s"
            raise KillError(msg)
        time.sleep(0.02)
    return value


def steps(log: Path, what: str) -> list[int]:
    """Return the numbers a log gives after some words."""
    return [int(n) for n in re.findall(rf"{what} +(\d+)\b", log.read_text(errors="replace"))]


def saves(log: Path) -> int:
    """Return how many checkpoints a log says were begun."""
    return len(re.findall(r"(Saving|Staging) the checkpoint", log.read_text(errors="replace")))


def checkpoints(folder: Path, *, finished: bool = True) -> list[int]:
    """Return the steps of the checkpoints that were, or were not, written to the end."""
    return [
        int(path.name.removeprefix("step-"))
        for path in (folder / "checkpoint").glob("step-*")
        if (path / ".metadata").exists() == finished
    ]


def trained_twice(folder: Path) -> int:
    """Return how many steps have been trained more than once.

    Raises:
        KillError: One of them did not give the same numbers.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for file in (folder / "weighting").glob("metrics.jsonl*"):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            del line["tps"]  # tokens per second are chance
            found.setdefault(line["step"], []).append(line)
    twice = {step: lines for step, lines in found.items() if len(lines) > 1}
    for step, lines in twice.items():
        if any(line != lines[0] for line in lines):
            msg = f"step {step} did not give the same numbers again: {lines}"
            raise KillError(msg)
    return len(twice)


if __name__ == "__main__":
    sys.exit(main())

"""Starts the trainer in real processes, for the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from forked import start, start_launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import ForkServerProcess

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SMALL = ["--training.seq_len=64", "--training.steps=5", "--metrics.disable_color_printing"]


def environment() -> dict[str, str]:
    """Return the environment of a child: one thread a rank, this checkout first."""
    # An empty entry would be the working folder.
    paths = filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def torchrun(ranks: int, *command: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    """Run a command line of torchrun on some ranks and return what came of it.

    Ended by force if it takes longer than so many seconds.
    """
    return _ended(lambda files: start(ranks, command, files, environment()), command, timeout)


def accelerate_launch(
    *lines: Sequence[str], timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run command lines of `accelerate launch` one after another; stop where one fails.

    Ended by force if they take longer than so many seconds.
    """
    return _ended(lambda files: start_launcher(lines, files, environment()), lines, timeout)


def _ended(
    started: Callable[[tuple[Path, Path]], ForkServerProcess], command: Any, timeout: int
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        agent = started(files)
        agent.join(timeout)
        out, err = (x.read_text(errors="replace") if x.exists() else "" for x in files)
        if agent.exitcode is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.join()
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, agent.exitcode, out, err)


def seed_checkpoint(folder: Path, *flags: str) -> Path:
    """Write a checkpoint of step 0 of the small model, and return the folder it is in."""
    entry = ["--module=small", "--config=debugmodel", f"--dump_folder={folder}"]
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--training.steps=1"]
    fixed = ["--weighting.spec=uniform", "--debug.seed=1"]
    command = ["-m", "torchtitan.train", *entry, *fixed, *seed, *flags]
    done = torchrun(1, *command)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "checkpoint"


def drive(out: Path, ranks: int, module: str, config: str, *flags: str) -> list[dict[str, Any]]:
    """Train through `drive.py`; return what each rank wrote down, and fail if a rank did."""
    flags = ("--module", module, "--config", config, f"--dump_folder={out}/dump", *SMALL, *flags)
    done = torchrun(ranks, str(HERE / "drive.py"), str(out), *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(ranks)]

"""Starts the trainer in real processes, for the tests."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SMALL = ["--training.seq_len=64", "--training.steps=5", "--metrics.disable_color_printing"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torchtitan.train", "titan_integration.trainer"])


def environment() -> dict[str, str]:
    """Return the environment of a child: one thread a rank, this checkout first."""
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def torchrun(ranks: int, *command: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run a command line of torchrun on some ranks and return what came of it.

    The ranks are processes under torchrun's own agent, but forked, with the agent, from one that
    has imported all they need: that saves each of them ten seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        given = (ranks, command, environment(), Path.cwd(), files)
        agent = FORKS.Process(target=_be_agent, args=given)
        agent.start()
        agent.join(timeout)
        out, err = (x.read_text(errors="replace") if x.exists() else "" for x in files)
        if agent.exitcode is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.join()
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, agent.exitcode, out, err)


def seed_checkpoint(folder: Path, *flags: str) -> Path:
    """Write a checkpoint of step 0 of the debug model, and return the folder it is in."""
    entry = ["--module=titan_integration", "--config=llama3_debugmodel", f"--dump_folder={folder}"]
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--training.steps=1"]
    command = ["-m", "torchtitan.train", *entry, "--weighting.spec=uniform", *seed, *flags]
    done = torchrun(1, *command)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "checkpoint"


def drive(out: Path, ranks: int, module: str, config: str, *flags: str) -> list[dict[str, Any]]:
    """Train through `drive.py`; return what each rank wrote down, and fail if a rank did."""
    flags = ("--module", module, "--config", config, f"--dump_folder={out}/dump", *SMALL, *flags)
    done = torchrun(ranks, str(HERE / "drive.py"), str(out), *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(ranks)]


def _be_agent(
    ranks: int,
    command: tuple[str, ...],
    environment: dict[str, str],
    cwd: Path,
    files: tuple[Path, ...],
) -> None:
    """Be torchrun: leave what is said in two files, and end with status 1 if a rank failed."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, _be_rank)(command)
    except ChildFailedError:
        traceback.print_exc()
        sys.exit(1)


def _be_rank(command: tuple[str, ...]) -> None:
    """Be Python with a command line: a script, or -m and a module."""
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.filterwarnings("ignore", "'torchtitan.train' found in sys.modules")  # imported before
    first, *sys.argv = command
    try:
        if first == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*command]
            runpy.run_path(first, run_name="__main__")
    except Exception:  # noqa: BLE001 - as Python does, whatever it is
        traceback.print_exc()
        sys.exit(1)

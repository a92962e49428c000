"""Ranks of real runs, forked with torchrun's own agent from a process that has imported it all.

Real processes and gloo, without the ten seconds that each of them takes to import torch.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.context import ForkServerProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["imports"])


def start(
    ranks: int,
    command: Sequence[str],
    files: tuple[Path, Path],
    environment: Mapping[str, str],
    first: Callable[[], None] | None = None,
    *,
    nodes: int = 1,
    node: int = 0,
    meeting: str = "localhost:0",
) -> ForkServerProcess:
    """Start a command line of torchrun, and return its agent, the first of a process group.

    Its status will be 0, or the largest of the ranks that failed.

    Args:
        ranks: How many.
        command: A script or `-m` and a module, and their arguments.
        files: Where what they say goes, and their errors; may be one file.
        environment: The agent's, and theirs.
        first: What each rank calls before; can be pickled.
        nodes: How many agents there will be, each started by a call of its own.
        node: Which of them this is; the first serves the meeting, and so should end last.
        meeting: Where they meet, a host and a port.
    """
    given = (ranks, [*command], files, {**environment}, Path.cwd(), first)
    agent = process(_be_agent, *given, nodes=nodes, node=node, meeting=meeting)
    agent.start()
    return agent


def start_launcher(
    lines: Sequence[Sequence[str]], files: tuple[Path, Path], environment: Mapping[str, str]
) -> ForkServerProcess:
    """Start command lines of `accelerate launch`, one after another; return the first process.

    Accelerate's launcher reads its arguments and starts the ranks, which are forked after the
    imports.
    """
    launcher = process(
        _be_launcher, [[*line] for line in lines], files, {**environment}, Path.cwd()
    )
    launcher.start()
    return launcher


def process(function: Callable[..., None], *given: object, **named: object) -> ForkServerProcess:
    """Return a process that is to call a function, forked where all has been imported."""
    start_server()
    return FORKS.Process(target=function, args=given, kwargs=named)


def start_server() -> None:
    """Start what processes are forked from, if it has not been, where it finds what it imports.

    Python up to 3.13 does not hand sys.path on to it, and it says nothing of a failed import.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def _settle(files, environment, cwd):
    importlib.import_module("imports")  # as the server has, unless its import failed
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _be_launcher(lines, files, environment, cwd):
    _settle(files, environment, cwd)
    importlib.import_module("tiny_trainer")  # once, for all ranks
    importlib.import_module("weighting.integrations.transformers")
    agent = importlib.import_module("torch.distributed.run")
    gc.freeze()  # a Trainer collects garbage at the start of each run

    def forking(config, entrypoint):
        assert entrypoint == sys.executable
        config = dataclasses.replace(config, start_method="fork", monitor_interval=0.1)
        return lambda _unbuffered, *command: elastic_launch(config, _be_rank)(command, None)

    agent.elastic_launch = forking
    for line in lines:
        if status := be_python(["-m", "accelerate.commands.launch", *line]):
            sys.exit(status)


def _be_agent(ranks, command, files, environment, cwd, first, *, nodes, node, meeting):
    _settle(files, environment, cwd)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=str(os.getpid()) if nodes == 1 else meeting,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        rdzv_configs={"is_host": node == 0},
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, _be_rank)(command, first)
    except ChildFailedError as error:
        sys.exit(max(failure.exitcode for failure in error.failures.values()) or 1)


def _be_rank(command, first):
    if first is not None:
        first()
    if status := be_python(command):
        sys.exit(status)


def be_python(command: Sequence[str]) -> int:
    """Do what Python does with a command line, a script or `-m` and a module; return the status."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # handlers of who was forked
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.filterwarnings("ignore", "'torchtitan.train' found in sys.modules")  # imported before
    what, *rest = command
    sys.argv = rest if what == "-m" else [*command]
    status = 0
    try:
        if what == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except Exception:  # noqa: BLE001 - as Python does, whatever it is
        traceback.print_exc()
        status = 1
    threading._shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return status

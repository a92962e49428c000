"""Ranks of the trainer under torchrun's own agent, forked from a process that has imported it all.

Real processes and gloo, without the ten seconds that each of them takes to import torch.
"""

import functools
import multiprocessing
import os
import pkgutil
import signal
import sys
import time

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchtitan.train import main

from titan_integration import launch, tokenizer
from titan_integration.config_registry import llama3_debugmodel
from titan_integration.paper import resized
from titan_integration.stdlib_text import stdlib_text

FLAGS = [
    "--module=forked",
    "--config=tiny",
    "--training.seq_len=32",
    "--metrics.disable_color_printing",
    "--debug.seed=1",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked"])
stdlib_text()  # read once, for all who are forked


def tiny():
    """Return the debug model's config with one layer of width 32."""
    config = llama3_debugmodel()
    config.model_spec = resized(config.model_spec, layers=1, heads=2, width=32)
    return config


class Run:
    """A training that was started, first of a process group; its ranks speak to a file.

    Args:
        log: That file.
        ranks: How many.
        flags: Of torchtitan, after those above.
        first: What each rank calls before it trains; can be pickled.
    """

    def __init__(self, log, ranks, *flags, first=None):
        self.log = log
        given = (str(log), ranks, [*FLAGS, *map(str, flags)], first)
        self.agent = FORKS.Process(target=_launch, args=given)
        self.agent.start()

    def ended(self, patience):
        """Wait until it has ended; return its status and what was said."""
        self.agent.join(patience)
        assert self.agent.exitcode is not None, f"still there after {patience} s: {self.said()}"
        return self.agent.exitcode, self.said()

    def said(self):
        """Return what has been said by now, without torchrun's words."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "".join(x for x in text.splitlines(keepends=True) if "torch/distributed/el" not in x)


class Before:
    """Does something on the first rank before a certain call of a function.

    Args:
        place: The function, as "package.module:name.name".
        number: Which call, from 1 on.
        action: What is done; can be pickled.
    """

    def __init__(self, place, number, action):
        self.place, self.number, self.action = place, number, action

    def __call__(self):
        """Put a counting function in the place of the other."""
        if os.environ["RANK"] != "0":
            return
        module, _, path = self.place.partition(":")
        owner, _, name = path.rpartition(".")
        owner = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
        function, calls = getattr(owner, name), []

        @functools.wraps(function)
        def counting(*args, **kwargs):
            calls.append(1)
            if len(calls) == self.number:
                self.action()
            return function(*args, **kwargs)

        setattr(owner, name, counting)


def launched(log, words):
    """Be `weighting train` in a process of its own."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(launch.main(words))


def use_first(cache, meeting, number, *, die):
    """Make a tokenizer in a cache as so many others do, or die in the middle of that.

    Each leaves a file in a folder when it has begun to write, and waits for the others'.
    """
    os.environ["WEIGHTING_CACHE"] = str(cache)
    tokenizer.SAMPLE_CHARS = 10_000
    fsync = os.fsync

    def held(file):
        os.fsync = fsync
        (meeting / str(os.getpid())).touch()
        while len([*meeting.iterdir()]) < number:
            time.sleep(0.02)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = held
    tokenizer.ensure_tokenizer(300)


def _launch(log, ranks, flags, first):
    """Be torchrun; end with the status of the rank that failed."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
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
        elastic_launch(config, _train)(flags, first)
    except ChildFailedError as error:
        sys.exit(max(failure.exitcode for failure in error.failures.values()) or 1)


def _train(flags, first):
    if first is not None:
        first()
    sys.argv = ["train", *flags]
    main()

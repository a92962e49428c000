"""Start torchtitan's trainer through torchrun with what this machine needs; say where results are.

What `weighting train` calls.  The flags a user gives come last and win.  `weighting score` starts
its ranks with the same functions.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as torchrun

from titan_integration.commands.closing import Given, closing, left_by
from titan_integration.commands.configs import OURS, family_named, refuse_unknown
from titan_integration.commands.screen import screen
from titan_integration.host.nodes import Nodes, meeting
from titan_integration.host.quiet import quiet
from titan_integration.host.run_dir import refuse_unwritable
from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN_MODULE = "titan_integration.host.run_module"
"""What starts each rank's module."""
_FOR_CPU = {"llama3_debugmodel", "llama3_proxy"}
_ON_CPU = {
    "--training.steps": "60",
    "--training.seq_len": "128",
    "--training.local_batch_size": "16",
}
"""What a laptop can train in minutes: 16 sequences of 128 tokens a step."""


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What all commands that run a model are given.

    Attributes:
        module: Where the config function is.
        config: Its name.
        data: A file, a folder, or a name of Hugging Face's.
        ranks: Processes; one per accelerator for None.
        flags: The user's further flags for torchtitan, which come last and win.
    """

    module: str
    config: str
    data: str | None = None
    ranks: int | None = None
    flags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """What a run is given.

    Attributes:
        spec: What weighs, as the user gave it.
        name: The spec's name.
        mixture: A spec by which data is drawn.
        allow_plugins: Whether the modules that specs name are imported.
        nodes: How the launchers of several nodes find each other.
    """

    spec: str
    name: str
    mixture: str | None = None
    allow_plugins: bool = False
    nodes: Mapping[str, Any] = field(default_factory=dict)


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Run the trainer; return the exit status: 0, or the ranks'.

    Raises:
        ValueError: The config function or the folder is not as it must be.
    """
    given = Options(**options)
    check_config(given.module, given.config)
    launcher, told = meeting(Nodes(**given.nodes))
    flags = run_flags(given)
    folder = Path(value_of(flags, "--dump_folder") or ".")
    refuse_unwritable(folder)
    if told:
        print(told, flush=True)  # noqa: T201 - before the host's log
    before = left_by(folder)
    with screen(folder):
        code = on_ranks(given.ranks, "torchtitan.train", flags, launcher)
    if code == 0 and "--checkpoint.create_seed_checkpoint" not in flags:
        ran = Given(given.spec, given.name, given.config, given.module, given.allow_plugins)
        print(f"\n{closing(ran, folder, before)}")  # noqa: T201 - the result
    return code


def print_help(module: str, config: str) -> None:
    """Print what flags torchtitan takes for a config.

    Raises:
        SystemExit: They are printed.
    """
    check_config(module, config)
    from titan_integration.host.flags import parse  # noqa: PLC0415 - takes seconds

    with quiet():
        parse(["--module", module, "--config", config, "--help"])


def check_config(module: str, config: str) -> None:
    """Check that there is a config function of this name, if it is to be one of ours.

    Raises:
        ValueError: There is none; says which there are.
    """
    refuse_unknown(module, config)


def run_flags(options: Options) -> list[str]:
    """Return torchtitan's command line of a run: ours first, the user's after it."""
    flags = host_flags(options, options.spec, f"outputs/{options.name}")
    flags += ["--weighting.mixture", options.mixture] if options.mixture else []
    flags += ["--weighting.allow_plugins"] if options.allow_plugins else []
    return [*flags, *options.flags]


def host_flags(options: HostOptions, spec: str, folder: str) -> list[str]:
    """Return torchtitan's flags for what all commands are given, but for the user's own flags.

    Those are to follow; where they are, defaults are left out, as `folder` for `--dump_folder`.
    """
    module = OURS if family_named(options.module) else options.module
    flags = ["--module", module, "--config", options.config, "--weighting.spec", spec]
    defaults = {"--dump_folder": folder}
    small = options.config in _FOR_CPU or (module == OURS and "debug" in options.config)
    if not torch.accelerator.is_available() and small:
        defaults |= _ON_CPU
    for flag, value in defaults.items():
        if value_of(options.flags, flag) is None:
            flags += [flag, value]
    if not sys.stdout.isatty():
        flags.append("--metrics.disable_color_printing")
    if options.data is not None:  # an empty name is refused, and no other text taken for it
        is_local = Path(options.data).exists() or any(c in options.data for c in "*?[")
        flags += ["--dataloader.dataset_path" if is_local else "--dataloader.dataset", options.data]
    return flags


def value_of(flags: Sequence[str], flag: str) -> str | None:
    """Return what a command line gives for a flag, in either spelling; the last one counts."""
    found = None
    names = {flag, flag.replace("_", "-")}
    for index, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else flags[index + 1] if index + 1 < len(flags) else None
    return found


def on_ranks(
    ranks: int | None, module: str, flags: list[str], launcher: Sequence[str] = ("--standalone",)
) -> int:
    """Run a module on ranks of this machine, by default one per accelerator; return the status.

    The first rank's output is shown, and what ended another one alone; the status is 0, that of the
    rank that failed, or 128 + n for signal n.  `launcher` tells torchrun of other nodes.
    """
    ranks = ranks or max(1, torch.accelerator.device_count())
    if not torch.accelerator.is_available():
        # Ranks share the cores; more threads than that only get in each other's way.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ["PYTHONSAFEPATH"] = "1"  # as -P, which torchrun does not hand on
    if any(option.startswith("--max-restarts") for option in launcher):
        # Else ranks of one attempt read at torchrun's store where those of an earlier one, now
        # dead, were to be reached.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = [*launcher, f"--nproc-per-node={ranks}", "--local-ranks-filter=0"]
    # The ranks have said what was wrong, so torchrun adds nothing of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun passes on what ends it, and an interrupted rank would show where that met it.
    options.append("--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT")
    signal.signal(signal.SIGINT, _end_ranks)
    with tempfile.TemporaryDirectory() as logs:
        options += ["--role=rank", "--tee=3", f"--log-dir={logs}"]
        try:
            torchrun(get_args_parser().parse_args([*options, "-m", RUN_MODULE, module, *flags]))
        except ChildFailedError as error:
            # A rank that fails first decides; the others are stopped by a signal.
            codes = {x.local_rank: x.exitcode for x in error.failures.values() if x.exitcode > 0}
            if codes and 0 not in codes:
                sys.stderr.write(_last_words(Path(logs), min(codes)))
            sys.stderr.write(_killed(error, alone="--standalone" in launcher))
            return max(codes.values(), default=1)
        except RendezvousError as error:
            why = str(error.__cause__ or error) or type(error).__name__
            sys.stderr.write(f"error: {socket.gethostname()} met no other node: {why}\n")
            return 1
        except SignalException as stopped:  # the ranks have been ended
            by = signal.SIGINT if isinstance(stopped, _Interrupted) else stopped.sigval
            sys.stderr.write(f"stopped by {by.name}\n")
            return 128 + by
    return 0


class _Interrupted(SignalException):
    """An interrupt, which ranks are told as a termination: that ends them without a word."""

    def __init__(self) -> None:
        super().__init__("interrupted", signal.SIGTERM)


def _end_ranks(*_: object) -> NoReturn:
    raise _Interrupted


def _killed(error: ChildFailedError, *, alone: bool = True) -> str:
    """Say which rank was ended by a signal, if one was; torchrun ends the others by SIGTERM."""
    signals = {rank: -x.exitcode for rank, x in error.failures.items() if x.exitcode < 0}
    killed = {rank: number for rank, number in signals.items() if number != signal.SIGTERM}
    if not killed:
        return ""
    rank = min(killed)
    name = signal.Signals(killed[rank]).name
    short = ", as when memory runs short" if name == "SIGKILL" else ""
    where = "" if alone else f" on {socket.gethostname()}"
    return f"error: rank {rank}{where} was ended by {name}{short}\n"


def _last_words(logs: Path, rank: int) -> str:
    """Return the error that ended a rank which is not shown, or its last lines."""
    files = logs.glob(f"*/attempt_*/{rank}/stderr.log")
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    _, error, message = text.rpartition("\nerror: ")
    lines = (error + message).strip().splitlines() if error else text.splitlines()[-_TAIL:]
    return "".join(f"[rank{rank}]:{printable(line)}\n" for line in lines)


_TAIL = 30
"""Lines of a traceback that say where it comes from."""

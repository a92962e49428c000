"""Several runs of one command: what they were asked for, what starts one, and what it has done.

`weighting mix` and `weighting compare` train one run after the other.  Cut off, the same command
goes on: what is whole is not made again, and the rest goes on from its own checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

from titan_integration.host.checkpoints import flaw, step_folders
from titan_integration.host.run_dir import HeldError, locked, sign
from weighting.runs.files import json_text, read_line, write_whole
from weighting.runs.layout import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from titan_integration.commands.train import HostOptions

LOCK = ".lock"
"""What keeps two commands apart, in the folder of their runs."""
_POLL, _PATIENCE = 0.5, 60.0
"""Seconds between looks at a run, and those it may take to end when it is told to."""


def command(
    options: HostOptions,
    spec: str,
    folder: Path,
    steps: int,
    more: Sequence[str],
    *,
    plugins: bool,
) -> list[str]:
    """Return what trains with a spec, or goes on where that was cut off.

    Args:
        options: What the user gave; those flags come last and win.
        spec: What weighs.
        folder: The run's dump folder.
        steps: Optimizer steps in all.
        more: Further flags of torchtitan.
        plugins: Whether the modules that specs name are imported.
    """
    words = [sys.executable, "-P", "-m", "weighting", "train", spec]
    words += ["--config", options.config, "--module", options.module]
    words += ["--data", options.data] if options.data else []
    words += ["--ranks", str(options.ranks)] if options.ranks else []
    words += ["--allow-plugins"] if plugins else []
    flags = ["--dump_folder", str(folder), "--training.steps", str(steps), "--checkpoint.enable"]
    return [*words, "--", *flags, *more, *options.flags]


def begun(folder: Path) -> bool:
    """Tell whether a run has begun to save checkpoints."""
    return (folder / CHECKPOINTS).exists()


def last_saved(folder: Path) -> int:
    """Return the step of a run's latest whole checkpoint; -1 without one."""
    found = step_folders(folder / CHECKPOINTS).items()
    return next((step for step, path in found if flaw(path) is None), -1)


def refuse_changed(
    path: Path, orders: Mapping[str, Any], what: str, binding: Collection[str] | None = None
) -> None:
    """Refuse what the runs in a folder are asked for if they were asked for something else.

    Args:
        path: The file that says what they were asked for, in their folder.
        orders: What they are asked for now, as JSON has it.
        what: What the folder holds.
        binding: The orders that runs have begun to follow; all of them by default.

    Raises:
        ValueError: One of them is another now; says which.
    """
    before = _noted(path)
    for name in orders if binding is None else binding:
        if before.get(name) != orders[name]:
            msg = (
                f"{path.parent} holds {what} with {name} = {before.get(name)!r}, and now it is "
                f"{orders[name]!r}; take another --folder, or remove that one"
            )
            raise ValueError(msg)


def note(path: Path, orders: Mapping[str, Any]) -> None:
    """Note what runs are asked for, beside what was noted before of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json_text({**_noted(path), **orders}, indent=1) + "\n")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[IO[str]]:
    """Keep a folder to this process and those it passes the yielded file on to.

    A trainer that outlives the command which started it keeps the folder until it ends, so that no
    two of them write there.

    Raises:
        ValueError: Another process has it; says which.
    """
    try:
        file = locked(folder / LOCK, inherited=True)
    except HeldError as held:
        pid = next((pid for pid in held.holder.split() if _runs(int(pid))), "unknown")
        msg = (
            f"{folder}: process {pid} is at work there; wait until it is done, or end it: "
            f"kill {pid}"
        )
        raise ValueError(msg) from None
    with file:
        sign(file, f"{os.getpid()}")
        yield file


def logged(words: list[str], log: Path, lock: IO[str], look: Callable[[], None]) -> int:
    """Run a command, its output at the end of a file; return its status, 128 + n for signal n.

    Args:
        words: The command.
        log: The file.
        lock: What `alone` yielded; the command keeps the folder as well.
        look: Called about twice a second and once more after the end; if it raises, or this
            process is interrupted, the command is told to end and waited for first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        # In a session of its own it is told to end once, by us, not by the terminal as well.
        process = subprocess.Popen(  # noqa: S603 - our own module
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    try:
        sign(lock, f"{os.getpid()} {process.pid}")
        while process.poll() is None:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
        look()
    finally:
        end(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a process end, if it has not; nothing interrupts that."""
    if process.poll() is not None:
        return
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stopping}
    process.terminate()  # torchrun ends the ranks first
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)


def new_lines(path: Path) -> Iterator[list[dict[str, float]]]:
    """Yield the lines of metrics that were added to a file since the last time; never ends.

    What is there at the first time is passed over, but not in a file that takes its place.
    """
    known, offset = _inode(path), path.stat().st_size if path.exists() else 0
    while True:
        if (now := _inode(path)) != known:
            known, offset = now, 0
        found = b""
        if now is not None:
            with path.open("rb") as file:
                file.seek(offset)
                found, newline, _ = file.read().rpartition(b"\n")
                offset += len(found) + len(newline)
        yield [read_line(line) for line in found.splitlines()]


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _noted(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so there is one
        return True
    return True

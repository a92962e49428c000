"""`weighting` as a user starts it, without the seconds that each process takes to import torch.

Real processes, torchrun and pipes; but where Python would be started with `-m` and a module, the
process that starts it is forked, which has imported everything.
"""

from __future__ import annotations

import importlib
import inspect
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from forked import process
from runs import environment

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

EXECUTE = subprocess.Popen._execute_child


def weighting(*words: object, cwd: Path | None = None, timeout: int = 300):
    """Run a command line of `weighting` to its end; return its status and what it printed.

    Ended by force if it takes longer than so many seconds.
    """
    return python("weighting", *words, cwd=cwd, timeout=timeout)


def python(module: str, *words: object, cwd: Path | None = None, timeout: int = 300):
    """Run a module as `python -m` does, to its end, as `weighting` is run."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        running = started(*words, files=files, cwd=cwd, module=module)
        running.join(timeout)
        if running.exitcode is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.join()
        out, err = (x.read_text(errors="replace") if x.exists() else "" for x in files)
        command = [module, *map(str, words)]
        if running.exitcode == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, running.exitcode, out, err)


def started(
    *words: object,
    files: tuple[Path, Path],
    cwd: Path | None = None,
    module: str = "weighting",
) -> ForkServerProcess:
    """Start a command line of `weighting`, the first of a process group, and return its process.

    Args:
        words: The command line.
        files: Where its output and its errors go.
        cwd: Its working folder; this one's by default.
        module: Which is run, as `python -m` does.
    """
    given = (module, [*map(str, words)], files, environment(), cwd or Path.cwd())
    command = process(_be_weighting, *given)
    command.start()
    return command


def be_warm():
    """Fork, from now on, where this process would start Python with a module."""
    importlib.import_module("imports")  # as the server has, unless its import failed
    subprocess.Popen._execute_child = _execute_child


def _be_weighting(module, words, files, environ, cwd):
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    be_warm()
    sys.exit(_be_python(module, words))


def _execute_child(process, *given):
    """Fork where a process of Python with a module was to be started."""
    call = inspect.signature(EXECUTE).bind(process, *given).arguments
    words = [*map(str, call["args"])] if not isinstance(call["args"], (str, bytes)) else []
    if words[:1] != [sys.executable] or "-m" not in words:
        return EXECUTE(process, *given)
    module, *arguments = words[words.index("-m") + 1 :]
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if process.pid != 0:
        process._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(call[name] for name in pipes))
        return None
    try:
        if call["start_new_session"]:
            os.setsid()
        for number, end in enumerate(call[x] for x in ("p2cread", "c2pwrite", "errwrite")):
            if end != -1:
                os.dup2(end, number)
        if call["cwd"]:
            os.chdir(call["cwd"])
        if call["env"] is not None:
            os.environ.clear()
            os.environ.update(call["env"])
        status = _be_python(module, arguments)
    except BaseException:  # noqa: BLE001 - nothing may go on as the parent
        traceback.print_exc()
        status = 1
    os._exit(status)


def _be_python(module, arguments):
    """Run a module as `python -m` does; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
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

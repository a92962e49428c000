"""`weighting` as a user starts it, without the seconds that each process takes to import torch.

Real processes, torchrun and pipes; but where Python would be started with `-m` and a module, the
process that starts it is forked, which has imported everything.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from forked import be_python, process
from runs import environment

EXECUTE = subprocess.Popen._execute_child


def weighting(*words: object, cwd: Path | None = None, timeout: int = 300):
    """Run a command line of `weighting` to its end; return its status and what it printed.

    Ended by force if it takes longer than so many seconds.
    """
    return python("-m", "weighting", *words, cwd=cwd, timeout=timeout)


def python(*words: object, cwd: Path | None = None, timeout: int = 300):
    """Run a command line of Python, a script or `-m` and a module, in the same way."""
    with tempfile.TemporaryDirectory() as folder:
        return Started(*words, folder=Path(folder), cwd=cwd).ended(timeout)


class Started:
    """A command line of Python that runs, the first of a process group.

    Args:
        words: A script or `-m` and a module, and their arguments.
        folder: Where its output and its errors are kept.
        cwd: Its working folder; this one's by default.
    """

    def __init__(self, *words: object, folder: Path, cwd: Path | None = None) -> None:
        self.words = [*map(str, words)]
        self._said = tempfile.mkdtemp(dir=folder)
        self._process = process(
            _be_command, self.words, self._files, environment(), cwd or Path.cwd()
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def _files(self):
        return Path(self._said, "out"), Path(self._said, "err")

    def said(self):
        """Return what it has printed by now, and its errors."""
        return [x.read_text(errors="replace") if x.exists() else "" for x in self._files]

    def until(self, condition, patience=600):
        """Wait until something holds, while it runs."""
        deadline = time.monotonic() + patience
        while not condition():
            assert self._process.is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def ended(self, patience):
        """Wait until it has ended; return its status and what it has printed."""
        self._process.join(patience)
        if late := self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
        out, err = self.said()
        if late:
            raise subprocess.TimeoutExpired(self.words, patience, out, err)
        return subprocess.CompletedProcess(self.words, self._process.exitcode, out, err)


def be_warm() -> None:
    """Fork, from now on, where this process would start Python with a module."""
    importlib.import_module("imports")  # as the server has, unless its import failed
    subprocess.Popen._execute_child = _execute_child


def _be_command(words, files, environ, cwd):
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    be_warm()
    sys.exit(be_python(words))


def _execute_child(process, *given):
    """Fork where a process of Python with a module was to be started."""
    call = inspect.signature(EXECUTE).bind(process, *given).arguments
    words = [*map(str, call["args"])] if not isinstance(call["args"], (str, bytes)) else []
    if words[:1] != [sys.executable] or "-m" not in words:
        return EXECUTE(process, *given)
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
        status = be_python(words[words.index("-m") :])
    except BaseException:  # noqa: BLE001 - nothing may go on as the parent
        traceback.print_exc()
        status = 1
    os._exit(status)

"""A run on a terminal: one live line of what it does; its log goes to a file.

Warnings, and what goes to standard error, are shown above that line.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import threading
import time
from datetime import timedelta
from typing import IO, TYPE_CHECKING

import click
from typing_extensions import override

from weighting.errors import printable
from weighting.runs.files import open_lock
from weighting.runs.layout import FOLDER, LOG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PREFIX = re.compile(r"^\[rank\d+\]:")
_RECORD = re.compile(r"^\[titan\] \S+ \S+ - \S+ - ([A-Z]+) - (.*)")
_TOTAL = re.compile(r"total steps (\d+)")
_STEP = re.compile(r"^step: +(\d+) ")
_LOSS = re.compile(r"unweighted loss: +([\d.]+|nan|inf)")
_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def screen(folder: Path) -> Iterator[None]:
    """Show what is printed within as one live line, if standard output is a terminal.

    Args:
        folder: The run's dump folder, where the log goes.
    """
    if not sys.stdout.isatty():
        yield
        return
    live = Live(sys.stdout, folder)
    above = _Lines(live.error)
    with contextlib.redirect_stdout(_Lines(live.line)), contextlib.redirect_stderr(above):
        try:
            yield
        finally:
            live.end()


class Live:
    """The live line, and the log.

    Args:
        out: The terminal.
        folder: The run's dump folder.
    """

    def __init__(self, out: IO[str], folder: Path) -> None:
        self._out, self._folder = out, folder
        self._lock = threading.Lock()  # torchrun prints from a thread for each stream
        self._text, self._hides = "", False
        self._total, self._step, self._begun = "?", 0, (0, 0.0)
        self._kept: list[str] = []

    def line(self, line: str) -> None:
        """Take in a line of the log: keep it, and show what it says."""
        plain = click.unstyle(_PREFIX.sub("", line))
        with self._lock:
            self._keep(plain)
            if record := _RECORD.match(plain):
                level, message = record.groups()
                self._hides = level in {"DEBUG", "INFO"}
                if self._hides:
                    self._look(message)
                else:
                    self._above(f"{level.lower()}: {message}")
            elif not self._hides:  # more of the record before
                self._above(plain)

    def error(self, line: str) -> None:
        """Show a line of standard error."""
        with self._lock:
            self._keep(click.unstyle(line))
            self._above(line)

    def end(self) -> None:
        """Leave the last text as a line, so that others can print."""
        with self._lock:
            self._out.write(f"{_CLEAR}{self._text}\n" if self._text else "")
            self._out.flush()
            self._text = ""

    def _look(self, message: str) -> None:
        if found := _TOTAL.search(message):
            self._total = found[1]
        if found := _STEP.match(message):
            self._step = int(found[1])
            self._begun = self._begun if self._begun[1] else (self._step, time.monotonic())
        elif found := _LOSS.search(message):
            self._show(f"step {self._step} of {self._total}  loss {found[1]}{self._left()}")
        elif not self._step:
            self._show(f"starts: {message}")

    def _left(self) -> str:
        """Return the time left at the pace since the first step that was logged."""
        step, at = self._begun
        if self._step == step or not self._total.isdigit():
            return ""
        pace = (time.monotonic() - at) / (self._step - step)
        seconds = max(int(self._total) - self._step, 0) * pace
        return f"  {timedelta(seconds=round(seconds))} left"

    def _show(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._text = printable(text)[:width]
        self._out.write(f"{_CLEAR}{self._text}")
        self._out.flush()

    def _above(self, line: str) -> None:
        self._out.write(f"{_CLEAR}{printable(line)}\n{self._text}")
        self._out.flush()

    def _keep(self, line: str) -> None:
        """Write a line to the log, once the run has made its folder."""
        self._kept.append(f"{line}\n")
        if (place := self._folder / FOLDER).is_dir():
            with open_lock(place / LOG) as file:
                file.writelines(self._kept)
            self._kept.clear()


class _Lines(io.TextIOBase):
    """A stream that hands on whole lines."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest = take, ""

    @override
    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(line.rstrip("\r"))
        return len(text)

"""How far a comparison is: a bar with the time left on a terminal, elsewhere plain lines."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Self

import click

from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from click._termui_impl import ProgressBar

SEED = "seed"
"""The run that makes the first weights."""
_NAME = 32
"""So many characters of a name are shown."""


class View:
    """How far a comparison is: one live line on a terminal, elsewhere one as a run begins or ends.

    Args:
        steps: Of each run.
        done: How many of them each run has saved before.
    """

    def __init__(self, steps: int, done: Sequence[int]) -> None:
        self._steps, self._to_go = steps, steps * len(done) - sum(done)
        self._unbegun = sum(x < steps for x in done)
        self._name, self._step, self._loss = "", 0, math.nan
        self._began, self._seen = time.monotonic(), 0.0
        self._starts: list[float] = []
        self._measured, self._seconds = 0, 0.0
        self._bar: ProgressBar[int] | None = None
        if sys.stdout.isatty():
            self._bar = click.progressbar(
                length=steps * len(done),
                width=16,
                show_eta=False,  # it would count the time that runs take to start
                item_show_func=lambda _: self.text(),
            )
            self._bar.update(sum(done))

    def __enter__(self) -> Self:
        """Show the live line."""
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End it, so that others can print."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """Print a line where there is no live one."""
        if self._bar is None:
            print(printable(text), flush=True)  # noqa: T201 - progress

    def seed(self, name: str = SEED) -> None:
        """Begin to make the first weights of the runs of a seed."""
        self._name = name
        self.say(f"{name}: makes the first weights, the same for all runs")

    def begin(self, name: str, step: int) -> None:
        """Begin a run, or go on with it after a step."""
        self._name, self._step, self._loss = name, step, math.nan
        self._began, self._seen = time.monotonic(), 0.0
        self._unbegun -= 1
        does = f"goes on after step {step} of" if step else "trains"
        self.say(f"{cut(name)}: {does} {self._steps} steps")

    def look(self, lines: Sequence[dict[str, float]]) -> None:
        """Take in what the run has logged since the last look."""
        now = time.monotonic()
        for line in lines[-1:]:
            ahead = max(int(line["step"]) - self._step, 0)
            if self._seen:
                self._measured += ahead
                self._seconds += now - self._seen
            else:
                self._starts.append(now - self._began)
            self._seen, self._loss = now, line["unweighted_loss"]
            self._step, self._to_go = self._step + ahead, self._to_go - ahead
            if self._bar is not None:
                self._bar.update(ahead)
        if self._bar is not None:
            self._bar.render_progress()

    def end(self, loss: float) -> None:
        """End a run, of which that is the last unweighted loss in nats."""
        seconds = round(time.monotonic() - self._began)
        self.say(f"{cut(self._name)}: unweighted loss {loss:.4f}, {seconds} s")

    def left(self) -> float | None:
        """Return the seconds left at the pace so far; None until a run has logged two steps."""
        if not self._measured:
            return None
        pace = self._seconds / self._measured
        return self._to_go * pace + self._unbegun * fmean(self._starts)

    def text(self) -> str:
        """Return what stands beside the bar."""
        name = cut(self._name, _NAME // 2)
        if not self._seen:
            return f"{name} starts" if name else ""
        left = self.left()
        until = "" if left is None else f"  {timedelta(seconds=round(left))} left"
        return f"{name} {self._step}/{self._steps}  loss {self._loss:.4f}{until}"


def cut(name: str, length: int = _NAME) -> str:
    """Return a name, printable, and shortened if it is longer than that."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 3]}..."

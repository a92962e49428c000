"""A run on a terminal: one live line, warnings above it, the log in a file."""

import io
import sys

import pytest

from titan_integration.commands import screen as module
from titan_integration.commands.screen import Live, screen

HEAD = "[rank0]:[titan] 2026-11-29 08:00:00,000 - root - "


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Say so."""
        return True


@pytest.fixture
def folder(tmp_path):
    """Return a dump folder that a run has begun to fill."""
    (tmp_path / "weighting").mkdir()
    return tmp_path


def step(live, number):
    """Log a step as the host and we do."""
    live.line(f"{HEAD}INFO - \x1b[31mstep: {number:2}  loss: 2.5\x1b[39m")
    live.line(f"{HEAD}INFO - weights: mile  unweighted loss:  2.12500  max: 1.0")


def test_the_time_left_follows_the_pace_since_the_first_step(folder, monkeypatch):
    """Starting takes long and is not counted; a run that goes on counts its own steps."""
    now = iter([100.0, 104.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    live = Live(out, folder)
    live.line(f"{HEAD}INFO - Trainer is initialized with ..., total steps 50 (warmup 2)")
    step(live, 10)
    assert out.getvalue().endswith("step 10 of 50  loss 2.12500")
    step(live, 12)
    assert out.getvalue().endswith("step 12 of 50  loss 2.12500  0:01:16 left")


def test_warnings_and_errors_stay_above_the_line(folder):
    """With all their lines; notes are in the log alone."""
    out = io.StringIO()
    live = Live(out, folder)
    step(live, 1)
    live.line(f"{HEAD}WARNING - a batch has one sequence\nand no other")
    live.line("[rank0]:which weighs one")
    live.line(f"{HEAD}INFO - a note")
    live.line("[rank0]:of two lines")
    live.error("error: \x1b[2Jno")
    live.end()
    whole = [x for x in out.getvalue().replace("\r\x1b[K", "\n").split("\n") if x]
    at = "step 1 of ?  loss 2.12500"
    warning = ["warning: a batch has one sequence", "which weighs one"]
    assert [x for x in whole if x != at][:2] == warning
    assert "note" not in out.getvalue()
    assert "of two lines" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert whole[-1] == at
    log = (folder / "weighting" / "train.log").read_text()
    assert "INFO - a note\nof two lines\n" in log
    assert "\x1b" not in log


def test_the_log_waits_for_the_folder(tmp_path):
    """A run that is refused leaves no folder; what was said before it began is kept then."""
    live = Live(io.StringIO(), tmp_path)
    live.line(f"{HEAD}INFO - first")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "weighting").mkdir()
    live.line(f"{HEAD}INFO - second")
    lines = (tmp_path / "weighting" / "train.log").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["first", "second"]


def test_both_streams_go_to_the_line_on_a_terminal_and_nowhere_else(folder, monkeypatch):
    """In a pipe the log is as it was; after the run both streams are back."""
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    with screen(folder):
        sys.stdout.write(f"{HEAD}INFO - as it is\n")
    assert piped.getvalue() == f"{HEAD}INFO - as it is\n"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with screen(folder):
        sys.stdout.write(f"{HEAD}INFO - Building\n")
        sys.stderr.write("error: torn\n")
    assert terminal.getvalue().endswith("\r\x1b[Kstarts: Building\n")
    assert "error: torn\n" in terminal.getvalue()
    assert sys.stdout is terminal

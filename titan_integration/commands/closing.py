"""What a run ends in: its summary, what it saved where, and what can be done with that."""

from __future__ import annotations

import keyword
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from titan_integration.host.checkpoints import flaw, step_folders
from weighting.build import plan_of
from weighting.cli.tokens import refusal
from weighting.errors import SpecError, printable
from weighting.language.read import resolve
from weighting.runs.files import read_lines
from weighting.runs.layout import CHECKPOINTS, FOLDER, METRICS, RECORD, VALIDATION
from weighting.runs.record_reader import read_record
from weighting.runs.summary import summary

_OTHERS = ("quadratic", "dro-kl", "linupper")
"""Specs that a record of losses is replayed under."""
_DEFAULT = ("llama3_debugmodel", "titan_integration")
"""Config and module that need not be named."""


class Given(NamedTuple):
    """What a run was given: a spec and its name, a config and its module, whether plugins too."""

    spec: str
    name: str
    config: str
    module: str
    allow_plugins: bool


def left_by(folder: Path) -> tuple[int, int, Path | None]:
    """Return what changes as a run trains: its metrics' file and size, and its last checkpoint."""
    path = folder / FOLDER / METRICS
    about = path.stat() if path.exists() else None
    saved = step_folders(folder / CHECKPOINTS).values()
    last = next((step for step in saved if flaw(step) is None), None)
    return (about.st_ino, about.st_size, last) if about else (0, 0, last)


def closing(given: Given, folder: Path, before: tuple[int, int, Path | None]) -> str:
    """Return the last words of a run that has ended well.

    Args:
        given: What it was given.
        folder: Its dump folder.
        before: What `left_by` returned before it began.
    """
    path = folder / FOLDER / METRICS
    if not path.exists():
        return ""
    lines = read_lines(path)
    said = [summary(lines)]
    after = left_by(folder)
    last = after[-1]
    if last and after == before:
        said.append(
            f"nothing was left to train, {last.name} was saved before; "
            "to go on take more --steps, to start afresh another --dump_folder"
        )
    if (found := folder / FOLDER / VALIDATION).exists() and (lines := read_lines(found)):
        loss, step = lines[-1].get("loss", math.nan), lines[-1]["step"]
        said.append(f"validation loss {loss:.4f} nats at step {step:.0f}")
    saved = {"metrics": path}
    if (record := folder / RECORD).is_dir():
        saved["record"] = record
    if last:
        saved["checkpoint"] = last
    said.append("\n".join(f"{what}: {place}" for what, place in saved.items()))
    following = _next(given, folder, saved)
    said.append("\n".join(["next:", *(f"  {shlex.join(x)}" for x in following)]))
    return printable("\n\n".join(said), keep="\n")


def _next(given: Given, folder: Path, saved: dict[str, Path]) -> list[list[str]]:
    """Return commands that work on what a run left."""
    me = _own_name()
    found = [[*me, "report", f"{folder}", "--out", f"{folder / 'report.html'}"]]
    if "record" in saved and _has_losses(folder):
        others = [name for name in _OTHERS if name != given.name][:2]
        found.append([*me, "replay", f"{folder}", "--spec", *others])
    if "checkpoint" in saved:
        text = "README.md" if Path("README.md").is_file() else keyword.__file__  # a short one
        spec = given.spec if _weighs_tokens(given) else "mile"
        words = [*me, "tokens", spec, "--checkpoint", f"{folder / CHECKPOINTS}", "--text", text]
        if (given.config, given.module) != _DEFAULT:
            words += ["--config", given.config, "--module", given.module]
        found.append([*words, *(["--allow-plugins"] if given.allow_plugins else [])])
    return found


def _own_name() -> list[str]:
    """Return how this command is called here: by its name, its path, or its module."""
    given = sys.argv[0]
    if Path(given).name != "weighting":
        return [Path(sys.executable).name, "-m", "weighting"]
    found = shutil.which("weighting")
    return ["weighting"] if found and Path(found).resolve() == Path(given).resolve() else [given]


def _weighs_tokens(given: Given) -> bool:
    """Tell whether a model and a text alone give weights of tokens under the spec of a run."""
    try:
        spec = resolve(given.spec, allow_plugins=given.allow_plugins)
    except SpecError:  # the file was changed while it trained
        return False
    plan = plan_of(spec)
    levels = {steps[-1].level for steps in plan.factors.values()}
    return "token" in levels and refusal(spec, plan) is None


def _has_losses(folder: Path) -> bool:
    """Tell whether the record of a run can be read, and has the loss of its sequences."""
    try:
        return "loss" in read_record(folder).known
    except ValueError:
        return False

"""The folders that runs leave: metrics, validations, and what the run says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weighting.errors import SpecError
from weighting.language.read import loads
from weighting.report.points import Points
from weighting.runs import evaluated
from weighting.runs.files import Lines, read_lines
from weighting.runs.layout import EVALUATION, FOLDER, METRICS, RECORD, VALIDATION
from weighting.runs.layout import RUN as ABOUT
from weighting.runs.record_reader import read_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weighting.runs.evaluated import Score
    from weighting.runs.record_reader import Record
    from weighting.spec import Spec


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: Its folder's name, longer where two are called alike.
        folder: Its dump folder.
        lines: What was logged, in step order; at least one line has a loss.
        validations: Likewise; empty when there were none.
        about: What `run.json` says; empty without one.
        spec: What weighed, where it is known and can be read.
        record: What it recorded of single sequences, if anything.
        scores: Of its checkpoint that was evaluated last, by task; empty when there was none.
        missing: Sentences about what is not there.
    """

    name: str
    folder: Path
    lines: Lines
    validations: Lines
    about: dict[str, Any]
    spec: Spec | None
    record: Record | None
    scores: dict[str, Score]
    missing: tuple[str, ...]

    def series(self, key: str) -> Points:
        """Return a number's finite values by step."""
        return Points.of(self.lines, key)

    def factors(self) -> list[str]:
        """Return the names of the factors, `weight`, the final token weights, being none."""
        suffix = "/ess_frac"
        found = (key.removesuffix(suffix) for key in self.lines[-1] if key.endswith(suffix))
        return [name for name in found if name != "weight"]

    def domains(self, kind: str = "share") -> list[str]:
        """Return the domains of which a number was logged."""
        keys = dict.fromkeys(key for line in (self.lines[0], self.lines[-1]) for key in line)
        prefix, suffix = "domain/", f"/{kind}"
        found = (k for k in keys if k.startswith(prefix) and k.endswith(suffix))
        return [key.removeprefix(prefix).removesuffix(suffix) for key in found]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in some folders.

    Raises:
        ValueError: A folder is no run's, a file is damaged, or nothing was logged.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"{twice} is given twice; name every run once"
        raise ValueError(msg)
    try:
        return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]
    except OSError as error:
        msg = f"{error.filename}: {error.strerror}; a report reads all of a run's metrics"
        raise ValueError(msg) from error


def _read_run(name: str, folder: Path) -> Run:
    path = folder / FOLDER / METRICS
    if not path.is_file():
        msg = f"{folder}: not the folder of a run, {path} is not there; give its --dump_folder"
        if not folder.exists():
            msg = f"{folder}: no such folder; give the --dump_folder of a run"
        raise ValueError(msg)
    lines = read_lines(path)
    if "unweighted_loss" not in lines.columns:
        msg = f"{path}: nothing was logged; a run logs every --metrics.log_freq steps"
        raise ValueError(msg)
    validated = folder / FOLDER / VALIDATION
    validations = read_lines(validated) if validated.is_file() else Lines()
    about = _read_about(folder / FOLDER / ABOUT)
    spec, missing = None, list[str]()
    if not validations:
        missing.append(f"No {VALIDATION}: the run was not validated (--validator.enable).")
    if about:
        try:
            spec = loads(about["spec"]["text"], source=f"{folder / FOLDER / ABOUT}")
        except SpecError as error:
            missing.append(f"The spec cannot be read here: {error}")
    else:
        missing.append(f"No {ABOUT}: spec, configuration and versions are unknown.")
    record = None
    if (folder / RECORD).is_dir():
        try:
            record = read_record(folder)
        except ValueError as error:
            missing.append(f"The record cannot be read here: {error}")
    else:
        more = "how its weights were spread is not known (--weighting.record every=10)"
        missing.append(f"No {RECORD}: {more}.")
    scores = [{}, *evaluated.read(folder / FOLDER / EVALUATION).values()][-1]
    return Run(name, folder, lines, validations, about, spec, record, scores, tuple(missing))


def _read_about(path: Path) -> dict[str, Any]:
    """Return what a run says of itself; nothing where it says nothing.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return {}
    msg = f"{path}: does not say what the run is; remove it to do without"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        texts = (about["spec"]["name"], about["spec"]["hash"], about["spec"]["text"])
        starts = [
            {**start, "versions": dict(start.get("versions") or {})} for start in about["starts"]
        ]
        if starts and all(isinstance(text, str) for text in texts):
            return {**about, "starts": starts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(msg) from error
    raise ValueError(msg)

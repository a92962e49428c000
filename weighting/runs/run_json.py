"""What a run is and when it was started, beside its metrics: `run.json`."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import weighting as wt
from weighting.runs import layout
from weighting.runs.files import json_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weighting import Weighting


def describe_start(
    folder: Path,
    fn: Weighting,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    **start: object,
) -> None:
    """Leave below a run's output folder what it is and that it starts; one rank may write.

    Args:
        folder: The output folder.
        fn: The built spec.
        config: What the run was told.
        versions: Of the packages it runs on.
        start: The `step` it begins with, `ranks`, `device`, and what else is known of it.

    Raises:
        OSError: It cannot be written.
    """
    spec = fn.spec
    facts = {
        "spec": {"name": spec.name, "hash": spec.hash, "text": str(spec)},
        "domains": list(fn.domains),
        "config": dict(config),
    }
    ours = {"python": platform.python_version(), "weighting-dsl": wt.__version__}
    begun = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "command": shlex.join(sys.orig_argv),
        "spec": spec.hash,
        **start,
        "versions": {**ours, **versions},
    }
    path = folder / layout.FOLDER / layout.RUN
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, about(path, facts, begun))


def about(path: Path, facts: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Return what `run.json` says from a start on: the first one's facts, and all starts.

    A start at step 1, a run's first, sets the file of another aside.

    Args:
        path: The file; nothing is written to it.
        facts: What the run is, if this is its first start.
        start: When, where and at which `step` it began.
    """
    before: dict[str, Any] = {}
    if start["step"] == 1:
        set_aside(path)
    elif path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
    whole = {**(before or facts), "starts": [*before.get("starts", []), start]}
    return json_text(whole, indent=1, default=repr, skipkeys=True) + "\n"


def set_aside(path: Path) -> Path | None:
    """Rename what is there to the first free `name.1`, `name.2`, ... and return that."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(target)
    return target

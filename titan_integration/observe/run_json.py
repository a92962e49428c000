"""What a run is and when it was started, beside its metrics."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

import weighting as wt
from titan_integration.host import versions
from titan_integration.host.run_dir import writing
from titan_integration.observe.metrics import set_aside
from weighting.runs import layout
from weighting.runs.files import json_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchtitan.trainer import Trainer

    from titan_integration.state.run import Run


def describe_start(
    run: Run,
    config: Trainer.Config,
    step: int,
    data: Mapping[str, Any] | None,
    device: str,
) -> None:
    """Leave beside the metrics what the run is and that it starts; the first rank writes.

    Args:
        run: The run.
        config: What it was told.
        step: The one it begins with.
        data: What rows are made from and which is next.
        device: Name of what it runs on.
    """
    if dist.get_rank() != 0:
        return
    spec = run.fn.spec
    facts = {
        "spec": {"name": spec.name, "hash": spec.hash, "text": str(spec)},
        "domains": list(run.fn.domains),
        "config": config.to_dict(),
    }
    ours = {"python": platform.python_version(), "weighting-dsl": wt.__version__}
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "command": shlex.join(sys.orig_argv),
        "step": step,
        "spec": spec.hash,
        "ranks": dist.get_world_size(),
        "data": data,
        "device": device,
        "versions": {**ours, **versions.found()},
    }
    path = Path(config.dump_folder) / layout.FOLDER / layout.RUN
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, about(path, facts, start))


def about(path: Path, facts: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Return what `run.json` says from a start on: the first one's facts, and all starts.

    A start at step 1, a run's first, sets the file of another aside.

    Args:
        path: The file; nothing is written to it.
        facts: What the run is, if this is its first start.
        start: When, where and at which `step` it began.
    """
    before: dict[str, Any] = {}
    if path.exists() and start["step"] == 1:
        set_aside(path)
    elif path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
    whole = {**(before or facts), "starts": [*before.get("starts", []), start]}
    return json_text(whole, indent=1, default=repr, skipkeys=True) + "\n"

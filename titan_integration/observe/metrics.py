"""The weighting's numbers at every log step: through the host's loggers, and as JSON lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.host.run_dir import writing
from weighting.runs import layout
from weighting.runs.files import json_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from titan_integration.state.run_state import RunState
    from weighting.contract import Collectives

FOLDER, FILE, ABOUT = layout.FOLDER, layout.METRICS, layout.RUN
"""Where a run's JSON lines are, below its dump folder, and beside them what the run is."""


class WeightedMetricsProcessor(MetricsProcessor):
    """The host's metrics processor; adds the weighting's statistics to every log step.

    Names are `weighting/<statistic>`: the unweighted cross entropy, the weighted loss, and for
    each factor and the final token weights the minimum, maximum, effective sample size and share
    at the cap.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The host's fields."""

    state: RunState | None = None
    """Set by the trainer before the first step."""
    collectives: Collectives | None = None
    """Reaches the ranks whose statistics add up."""
    dump_folder: str = ""
    """Set by the trainer as well; the JSON lines go below it."""

    @override
    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step; called on all ranks.

        Raises:
            NonFiniteSignalError: As `RunState.statistics`.
        """
        assert self.state is not None, "the trainer sets the state"
        first = self.state.warnings is None
        found = self.state.statistics(self.collectives)
        tokens, since = self.ntokens_since_last_log, self.time_last_log
        named = {f"weighting/{name}": value for name, value in found.items()}
        extra = {**(extra_metrics or {}), **named}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)
        seconds = max(self.time_last_log - since, 1e-9)
        name, plain = self.state.fn.spec.name, found["unweighted_loss"]
        logger.info(
            f"weights: {name}  unweighted loss: {plain:8.5f}  max: {found['weight/max']:.3f}  "
            f"ess: {found['weight/ess_frac']:.3f}  capped: {capped(found):.3f}"
        )
        if dist.get_rank() == 0:
            for warning in (first and self.state.warnings) or ():
                logger.warning(warning)
            line = {"step": step, **found, "grad_norm": grad_norm, "tps": tokens / seconds}
            append_line(Path(self.dump_folder) / FOLDER / FILE, line)


def capped(found: dict[str, float]) -> float:
    """Return the largest share of units at their cap among the factors of one line."""
    shares = [
        v for k, v in found.items() if k.endswith("/capped_frac") and k != "weight/capped_frac"
    ]
    return max(shares, default=0.0)


def table(lines: Sequence[dict[str, float]], rows: int = 8) -> str:
    """Return a small table of a run: step, losses, largest weight, ESS and share at the cap."""
    if not lines:
        return "no steps were logged"
    last = len(lines) - 1
    picked = sorted({round(i * last / max(rows - 1, 1)) for i in range(rows)})
    out = ["  step     loss  weighted  weight max    ESS  capped"]
    out += [
        f"{line['step']:6.0f} {line['unweighted_loss']:8.4f}  {line['weighted_loss']:8.4f}"
        f"  {line['weight/max']:10.3f} {line['weight/ess_frac']:6.3f}  {capped(line):6.3f}"
        for line in (lines[i] for i in picked)
    ]
    return "\n".join(out)


def append_line(path: Path, line: Mapping[str, float]) -> None:
    """Append a line of metrics; that of step 1, a run's first, sets the file of another aside.

    Raises:
        ValueError: It cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if line["step"] == 1 and path.exists():
            set_aside(path)
        with path.open("ab+") as file:
            _cut_torn_line(file)
            file.write((json_text(line) + "\n").encode())


def _cut_torn_line(file: IO[bytes]) -> None:
    """Take away a last line that has no end, as a full disk leaves it; its step comes again."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        # Most files end well, which one byte tells.
        start = max(end - (_BLOCK if end < size else 1), 0)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)


_BLOCK = 1 << 16
"""Bytes read at once of a torn line."""


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
    told = {**(before or facts), "starts": [*before.get("starts", []), start]}
    return json_text(told, indent=1, default=repr, skipkeys=True) + "\n"


def set_aside(path: Path) -> Path:
    """Rename a file to the first free `name.1`, `name.2`, ... and return that."""
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(target)
    return target

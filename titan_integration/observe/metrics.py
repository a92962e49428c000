"""The weighting's numbers at every log step: through the host's loggers, and as JSON lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.host.run_dir import writing
from titan_integration.observe.mixture import mixtures
from weighting.runs import layout
from weighting.runs.files import json_text
from weighting.runs.run_json import set_aside
from weighting.runs.summary import capped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from titan_integration.state.run import Run


class WeightedMetricsProcessor(MetricsProcessor):
    """The host's metrics processor; adds the weighting's statistics to every log step.

    Names are `weighting/<statistic>`: the unweighted cross entropy, the weighted loss, and for
    each factor and the final token weights the minimum, maximum, effective sample size and share
    at the cap.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The host's fields."""

    _run: Run | None = None
    _dump_folder: Path = Path()
    _bad_records: Callable[[], int] | None = None

    def bind(
        self, run: Run, dump_folder: str, bad_records: Callable[[], int] | None = None
    ) -> None:
        """Log a run's statistics from now on, and keep them as JSON lines below its folder.

        Args:
            run: The run.
            dump_folder: Its folder.
            bad_records: Tells how many records were passed over, where they may be.
        """
        self._run, self._dump_folder = run, Path(dump_folder)
        self._bad_records = bad_records

    def keep(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a file of the run's, on the first rank."""
        if dist.get_rank() == 0:
            append_line(self._dump_folder / layout.FOLDER / name, line)

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
            NonFiniteSignalError: As `StepStatistics.read`.
        """
        run = self._run
        assert run is not None, "the trainer binds the run"
        first = run.statistics.warnings is None
        found = run.read_statistics()
        for kind, shares in mixtures(run).items():
            found |= {f"domain/{name}/{kind}": share for name, share in shares.items()}
        if self._bad_records:
            found["bad_records"] = self._bad_records()
        tokens, since = self.ntokens_since_last_log, self.time_last_log
        named = {f"weighting/{name}": value for name, value in found.items()}
        extra = {**(extra_metrics or {}), **named}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)
        seconds = max(self.time_last_log - since, 1e-9)
        name, plain = run.fn.spec.name, found["unweighted_loss"]
        logger.info(
            f"weights: {name}  unweighted loss: {plain:8.5f}  max: {found['weight/max']:.3f}  "
            f"ess: {found['weight/ess_frac']:.3f}  capped: {capped(found):.3f}"
        )
        if dist.get_rank() == 0:
            for warning in (first and run.statistics.warnings) or ():
                logger.warning(warning)
        line = {"step": step, **found, "grad_norm": grad_norm, "tps": tokens / seconds}
        self.keep(layout.METRICS, line)


def append_line(path: Path, line: Mapping[str, float]) -> None:
    """Append a line of metrics; that of step 1, a run's first, sets the file of another aside.

    Raises:
        ValueError: It cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if line["step"] == 1:
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

"""What a run leaves below its output folder, for `weighting report` and `weighting replay`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import weighting as wt
from weighting.columns import HIDDEN
from weighting.integrations import versions
from weighting.runs import layout
from weighting.runs.files import json_text, writing_whole
from weighting.runs.record_reader import ABOUT, DOMAIN, ROW, STEP, VALID, WEIGHT
from weighting.runs.run_json import describe_start, set_aside

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from weighting.build import Weights
    from weighting.contract import Signals
    from weighting.integrations.hook import Hook

_ROOM = 4096
"""Numbers of sequences that each rank has for a batch."""


class RunFiles:
    """Writes `run.json`, `metrics.jsonl` and a record; the first rank does, and all must call."""

    def __init__(self, folder: Path, *, record: int = 0) -> None:
        """Take the output folder, and every so many steps to record; 0 for none."""
        self._dump_folder = folder
        self._folder = folder / layout.FOLDER
        self._record = folder / layout.RECORD
        self._every = record
        self._parts: list[Tensor] = []
        self._calls, self._step = 0, 0

    def start(self, hook: Hook, step: int, config: Mapping[str, Any]) -> None:
        """Say what the run is and that it starts with a step; a run's first sets others aside."""
        if hook.ranks().rank != 0:
            return
        if step == 1:
            for old in (self._folder / layout.METRICS, self._record):
                set_aside(old)
        device = str(torch.accelerator.current_accelerator() or "cpu")
        found, ranks = versions.found(), hook.ranks().size
        describe_start(
            self._dump_folder, hook.fn, config, found, step=step, ranks=ranks, device=device
        )

    def add_metrics(self, hook: Hook, line: Mapping[str, float]) -> None:
        """Append a line of metrics."""
        if hook.ranks().rank == 0:
            with (self._folder / layout.METRICS).open("a", encoding="utf-8") as file:
                file.write(json_text(line) + "\n")

    def add_batch(self, hook: Hook, signals: Signals, out: Weights) -> None:
        """Note the means of each sequence of a batch, where its step is recorded."""
        step = hook.step
        assert step is not None
        if not self._every or step % self._every:
            return
        self._calls = self._calls + 1 if step == self._step else 1
        self._step = step
        self._parts.append(_means(hook, signals, out, self._calls - 1).double())

    def end_step(self, hook: Hook) -> None:
        """Write the notes of a step; every rank must call it after each step."""
        if not self._every or hook.step is None or hook.step % self._every:
            return
        ranks = hook.ranks()
        mine = torch.cat(self._parts)
        self._parts.clear()
        every = ranks.gather(mine.T).mT.flatten(0, 1)  # zeros where a rank has fewer rows
        if ranks.rank == 0:
            rows = every[every[:, 1] > 0].cpu()
            self._write(hook, hook.step, rows[rows[:, 0].argsort(stable=True)], ranks.size)

    def _write(self, hook: Hook, step: int, rows: Tensor, ranks: int) -> None:
        try:
            import pyarrow as pa  # noqa: PLC0415 - the core does without it
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError:
            msg = "a record is a Parquet file, which needs pyarrow: pip install pyarrow"
            raise ValueError(msg) from None
        spec = hook.fn.spec
        about = {
            "name": spec.name,
            "hash": spec.hash,
            "spec": str(spec),
            "domains": list(hook.domains),
            "every": self._every,
            "ranks": ranks,
            "rank_rows": _ROOM,
            "batch_rows": _ROOM * ranks,
            "documents": 0,
        }
        place, tokens, domain, *means = rows.T
        names = [hook.domains[int(x)] for x in domain] if hook.domains else [None] * len(rows)
        columns = {
            STEP: torch.full_like(place, step).int().numpy(),
            ROW: place.int().numpy(),
            DOMAIN: pa.array(names, pa.string()).dictionary_encode(),
            VALID: tokens.int().numpy(),
            WEIGHT: means[0].float().numpy(),
        }
        columns |= {n: x.float().numpy() for n, x in zip(_signals(hook), means[1:], strict=True)}
        table = pa.table(columns).replace_schema_metadata({ABOUT: json_text(about)})
        self._record.mkdir(parents=True, exist_ok=True)
        with writing_whole(self._record / f"{layout.SEQUENCES}-{step:06}.parquet") as file:
            pq.write_table(table, file, compression="zstd")


def _signals(hook: Hook) -> tuple[str, ...]:
    """Return the signals that are recorded."""
    told = hook.reads - {"loss", HIDDEN}
    return ("loss", *sorted(x for x in told if not x.endswith("_ids")))


def _means(hook: Hook, signals: Signals, out: Weights, call: int) -> Tensor:
    """Return of each sequence its place, tokens, domain, weight and signals, [n, columns]."""
    valid = signals.valid
    assert valid is not None
    rows, length = valid.shape
    ids = torch.arange(rows, device=valid.device)[:, None].expand_as(valid)
    if signals.sequence_ids is not None:
        ids = torch.where(valid, signals.sequence_ids + ids * (length + 1), -1)
        ids = torch.where(valid, ids.unique(return_inverse=True)[1], 0)
    size = int(ids.max()) + 1
    if size > _ROOM:
        msg = (
            f"a batch of {size:,} sequences on a rank cannot be recorded; record=0, or smaller ones"
        )
        raise ValueError(msg)
    channels = [valid.float(), out.token]
    for name in _signals(hook):
        x = signals.columns.get(wt.columns.plain_name(name), getattr(signals, name, None))
        if x is None:
            assert name == "target_prob", name
            x = (-signals.loss).exp()
        if name == "loss" and hook.fn.plan.identity:
            x = torch.full_like(out.token, torch.nan)  # the host's own loss tells none of tokens
        channels.append(x.float())
    x = torch.where(valid, torch.stack(channels), 0).flatten(1)
    sums = x.new_zeros(len(x), size).index_add(1, ids.flatten(), x)
    domain = torch.zeros(size, device=valid.device)
    if signals.domain_ids is not None:
        number = len(hook.domains)
        of = (ids * number + torch.where(valid, signals.domain_ids, 0)).flatten()
        counts = x.new_zeros(size * number).index_add(0, of, x[0])
        domain = counts.view(size, number).argmax(1)
    ranks = hook.ranks()
    place = (call * ranks.size + ranks.rank) * _ROOM + torch.arange(size, device=valid.device)
    means = sums[1:] / sums[0].clamp(min=1)
    return torch.stack([place.double(), sums[0].double(), domain.double(), *means.double()], 1)

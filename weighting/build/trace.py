"""Which statistics over its scope a stage takes, found out by running it once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from weighting.columns import plain_name
from weighting.contract import (
    Combine,
    Constrain,
    Level,
    Pool,
    Scope,
    Shape,
    Signals,
    Source,
    Stage,
    Weigh,
)

_UNITS = 6


def statistics_of(stage: Stage, level: Level) -> str:
    """Return the statistics in words, as "max, sum"; "" if a unit's value needs no other unit.

    A stage that compares units without asking its scope, as by sorting, takes their "order".

    Args:
        stage: A stage that is no sugar.
        level: What its units are.
    """
    if isinstance(stage, Pool | Combine):
        return ""
    noted: list[str] = []
    x = torch.linspace(0.4, 1.6, _UNITS)
    before = _run(stage, level, x, noted)
    names = dict.fromkeys(noted)
    if not names and not isinstance(stage, Source):
        changed = x.clone()
        changed[-1] = 0.7
        if not torch.equal(_run(stage, level, changed, [])[:-1], before[:-1]):
            names["order"] = None
    return ", ".join(names)


@dataclass(frozen=True)
class _NotingScope(Scope):
    """A scope that notes which statistics it is asked for."""

    noted: list[str] = field(default_factory=list)

    @override
    def sum(self, x: Tensor) -> Tensor:
        self.noted.append("sum")
        return super().sum(x)

    @override
    def max(self, x: Tensor) -> Tensor:
        self.noted.append("max")
        return super().max(x)

    @override
    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.noted.extend(["min", "max"])
        return self._silent().range(x)

    @override
    def kth_largest(self, x: Tensor, k: Tensor) -> Tensor:
        self.noted.append("quantile")
        return self._silent().kth_largest(x, k)

    def _silent(self) -> Scope:
        """Return the same scope, for statistics that are made of others."""
        return Scope(self.level, self.step, self.valid, self.domains, state=self.state)


@torch.no_grad()
def _run(stage: Stage, level: Level, x: Tensor, noted: list[str]) -> Tensor:
    """Return what a stage makes of [U] values."""
    named = getattr(stage, stage.collects) if stage.collects else ()
    domains = tuple(str(name) for name in named) or ("a", "b")
    if level == "domain":
        x = x[: len(domains)] if len(domains) < _UNITS else torch.linspace(0.4, 1.6, len(domains))
    scope = _NotingScope(
        level=level,
        step=torch.tensor(1),
        valid=torch.ones_like(x, dtype=torch.bool),
        domains=domains,
        state={name: value.clone() for name, value in stage.initial_state(domains).items()},
        noted=noted,
    )
    if isinstance(stage, Source):
        signals = _signals(stage, x)
        after = stage.advance(signals, scope) if scope.state else {}
        return stage.read(signals, replace(scope, state=after))
    assert isinstance(stage, Shape | Weigh | Constrain)
    after = stage.advance(x, scope) if scope.state else {}
    return stage.apply(x, replace(scope, state=after))


def _signals(stage: Source, x: Tensor) -> Signals:
    """Return signals with all that a source reads."""
    columns = {plain_name(name): x.round() for name in stage.reads()}
    return Signals(
        loss=x,
        valid=torch.ones_like(x, dtype=torch.bool),
        entropy=x,
        target_prob=(-x).exp(),
        error_norm=x,
        ref_loss=x,
        domain_ids=torch.zeros_like(x, dtype=torch.int64),
        segment_ids=torch.zeros_like(x, dtype=torch.int64),
        sequence_ids=torch.zeros_like(x, dtype=torch.int64),
        columns=columns,
        hidden=x[:, None],
    )

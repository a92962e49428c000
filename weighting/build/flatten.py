"""Signals as a pipeline reads them: flat, float32, with 0 at ignored tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weighting.contract import Signals


def flatten(signals: Signals, needs: frozenset[str]) -> Signals:
    """Return the needed signals as flat float32, with 0 at invalid tokens."""
    loss = signals.loss
    valid = torch.ones_like(loss, dtype=torch.bool) if signals.valid is None else signals.valid
    flat: dict[str, Any] = {"columns": {}}
    for name in needs | {"loss", "valid"}:
        _, is_column, column = name.partition("columns.")
        value = signals.columns.get(column) if is_column else getattr(signals, name)
        value = valid if name == "valid" else value
        if value is None:
            if name == "target_prob":
                continue  # the stage derives it from the loss
            give = f"columns={{{column!r}: ...}}" if is_column else f"{name}=..."
            msg = f"this spec reads {name}; give Signals({give})"
            raise ValueError(msg)
        if value.shape != loss.shape:
            msg = f"{name} has shape {[*value.shape]}, the loss {[*loss.shape]}; they must agree"
            raise ValueError(msg)
        value = value.detach().reshape(-1)
        if name == "valid":
            flat[name] = value.bool()
            continue
        value = value.long() if name.endswith("_ids") else value.float()
        value = torch.where(valid.reshape(-1).bool(), value, 0)
        if is_column:
            flat["columns"][column] = value
        else:
            flat[name] = value
    return Signals(**flat)


def all_finite(flat: Signals, names: frozenset[str]) -> Tensor:
    """Return which tokens have finite values of all the named signals, those that are given."""
    ok = flat.loss.isfinite()
    for name in sorted(names):
        _, is_column, column = name.partition("columns.")
        value = flat.columns.get(column) if is_column else getattr(flat, name)
        if value is not None and value.is_floating_point():
            ok = ok & value.isfinite()
    return ok

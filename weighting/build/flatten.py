"""Signals as a pipeline reads them: flat, float32, with 0 at ignored tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weighting.columns import HIDDEN, column_of
from weighting.contract import Signals


def flatten(signals: Signals, needs: frozenset[str]) -> Signals:
    """Return the needed signals as flat float32, with 0 at invalid tokens."""
    loss = signals.loss
    valid = torch.ones_like(loss, dtype=torch.bool) if signals.valid is None else signals.valid
    flat: dict[str, Any] = {"columns": {}}
    for name in sorted(needs | {"loss", "valid"}):
        column = column_of(name)
        value = signals.columns.get(column) if column else getattr(signals, name)
        value = valid if name == "valid" else value
        if value is None:
            if name == "target_prob":
                continue  # the stage derives it from the loss
            give = f"columns={{{column!r}: ...}}" if column else f"{name}=..."
            msg = f"this spec reads {name}; give Signals({give})"
            raise ValueError(msg)
        width = value.shape[loss.dim() :]
        if value.shape[: loss.dim()] != loss.shape or len(width) != (name == HIDDEN):
            must = "it must have one more" if name == HIDDEN else "they must agree"
            msg = f"{name} has shape {[*value.shape]}, the loss {[*loss.shape]}; {must}"
            raise ValueError(msg)
        value = value.detach().reshape(-1, *width)
        if name == "valid":
            flat[name] = value.bool()
            continue
        value = value.long() if name.endswith("_ids") else value.float()
        value = torch.where(valid.reshape(-1, *(1 for _ in width)).bool(), value, 0)
        if column:
            flat["columns"][column] = value
        else:
            flat[name] = value
    return Signals(**flat)


def all_finite(flat: Signals, names: frozenset[str]) -> Tensor:
    """Return which tokens have finite values of all the named signals, those that are given."""
    ok = flat.loss.isfinite()
    for name in sorted(names):
        column = column_of(name)
        value = flat.columns.get(column) if column else getattr(flat, name)
        if value is not None and value.is_floating_point():
            ok = ok & (value.isfinite().all(-1) if name == HIDDEN else value.isfinite())
    return ok

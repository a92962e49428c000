"""What the tensors of a saved state must satisfy: rules for stages to name.

Each rule yields the keys of tensors that break it, with what those must be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

_SLACK = 1e-2
"""More than averages over a whole run are off by rounding."""


def not_finite(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the floating tensors with a NaN or an infinity."""
    for key, x in state.items():
        if x.is_floating_point() and not x.isfinite().all():
            yield key, "finite"


def not_between(
    state: Mapping[str, Tensor], low: float, high: float, *keys: str
) -> Iterator[tuple[str, str]]:
    """Yield those of the named tensors with a value below `low` or above `high`, but rounding."""
    for key in keys:
        if ((state[key] < low) | (state[key] > high + _SLACK)).any():
            bounds = f"at least {low:g}" if high == torch.inf else f"from {low:g} to {high:g}"
            yield key, bounds


def not_weights(state: Mapping[str, Tensor], *keys: str) -> Iterator[tuple[str, str]]:
    """Yield those of the named tensors with a negative value, or with none above 0."""
    for key in keys:
        if (state[key] < 0).any() or not (state[key] > 0).any():
            yield key, "weights, at least 0 and not all of them 0"


def not_shares(
    state: Mapping[str, Tensor], *keys: str, logs: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield those of the named tensors that are not weights with a sum of one.

    Args:
        state: Tensors by key.
        keys: Which of them.
        logs: Whether they are logarithms of weights.
    """
    for key in keys:
        x = state[key].double().exp() if logs else state[key].double()
        # A model in half precision rounds them, and logarithms most of all.
        halved = state[key].dtype in {torch.bfloat16, torch.float16}
        slack = 8 * torch.finfo(torch.bfloat16).eps if halved else _SLACK
        if (x < 0).any() or abs(x.sum() - 1) > slack:
            yield key, f"{'logarithms of ' * logs}weights that sum to one"


def shown(x: Tensor) -> str:
    """Return a saved tensor in few words: its values, or where it is not finite, or its range."""
    values = x.detach().flatten()
    if values.numel() <= 8:  # noqa: PLR2004 - as many as a line holds
        text = ", ".join(f"{value:g}" for value in values.tolist())
        return f"[{text}]" if x.dim() else text
    bad = [*(~values.isfinite()).nonzero().flatten().tolist()]
    if bad:
        return f"{values[bad[0]].item():g} at place {bad[0]} of {values.numel()}"
    return f"{values.numel()} numbers from {values.min().item():g} to {values.max().item():g}"

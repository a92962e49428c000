"""What the tensors of a saved state must satisfy: rules for stages to name.

A rule takes a tensor and returns what it must be if it breaks the rule, or else None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Rule = Callable[[Tensor], str | None]
_SLACK = 1e-2
"""More than averages over a whole run are off by rounding."""


def not_finite(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the floating tensors with a NaN or an infinity."""
    for key, x in state.items():
        if x.is_floating_point() and not x.isfinite().all():
            yield key, "finite"


def broken(state: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> Iterator[tuple[str, str]]:
    """Yield the keys of tensors that break their rule, with what those must be."""
    for key, rule in rules.items():
        if key in state and (must := rule(state[key])):
            yield key, must


def between(low: float, high: float = torch.inf) -> Rule:
    """Demand that no value is below `low` or above `high`, but rounding."""

    def rule(x: Tensor) -> str | None:
        if not ((x < low) | (x > high + _SLACK)).any():
            return None
        return f"at least {low:g}" if high == torch.inf else f"from {low:g} to {high:g}"

    return rule


count = between(0)
"""Demand a number of batches, units or the like."""


def weights(x: Tensor) -> str | None:
    """Demand that no value is negative, and that some are above 0."""
    wrong = (x < 0).any() or not (x > 0).any()
    return "weights, at least 0 and not all of them 0" if wrong else None


def shares(x: Tensor) -> str | None:
    """Demand weights with a sum of one."""
    return None if _are_shares(x.double(), x.dtype) else "weights that sum to one"


def log_shares(x: Tensor) -> str | None:
    """Demand logarithms of weights with a sum of one."""
    right = _are_shares(x.double().exp(), x.dtype)
    return None if right else "logarithms of weights that sum to one"


def _are_shares(x: Tensor, dtype: torch.dtype) -> bool:
    # A model in half precision rounds them, and logarithms most of all.
    halved = dtype in {torch.bfloat16, torch.float16}
    slack = 8 * torch.finfo(torch.bfloat16).eps if halved else _SLACK
    return not (x < 0).any() and not abs(x.sum() - 1) > slack


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

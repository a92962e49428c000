"""Statistics of weights: rows that add up over ranks and batches, and names for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weighting.errors import NonFiniteSignalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weighting.spec import Spec

MOMENTS = ("count", "sum", "square_sum", "negative", "capped", "nonfinite", "min", "max")
"""Columns of `Weights.moments`: the first six add up over ranks and batches; sums are of sizes."""


def summarize(moments: Tensor, factors: Sequence[str]) -> dict[str, Tensor]:
    """Return named statistics of `Weights.moments`, one set per factor and one for the tokens.

        ess_frac = (sum |w|)^2 / (n * sum w^2), from 1/n (one unit has it all) to 1 (equal sizes)

    Returns:
        For each factor and "weight" (the final token weights): `/min`, `/max`, `/ess_frac` and
        `/capped_frac` (the share of units at their cap); `weight/nonfinite_frac` is the share of
        tokens dropped for a non-finite signal, `weight/negative_frac` the share of the sum of all
        |w| that is of w < 0.
    """
    metrics: dict[str, Tensor] = {}
    for name, row in zip([*factors, "weight"], moments, strict=True):
        count, total, squares, negative, capped, nonfinite, low, high = row.unbind()
        none = count == 0
        n = torch.where(none, 1, count)
        metrics[f"{name}/min"] = torch.where(none, 0, low)
        metrics[f"{name}/max"] = torch.where(none, 0, high)
        ess = total * total / torch.where(squares > 0, n * squares, 1)
        metrics[f"{name}/ess_frac"] = ess.clamp(max=1)
        metrics[f"{name}/capped_frac"] = capped / n
        if name == "weight":
            metrics["weight/nonfinite_frac"] = nonfinite / (n + nonfinite)
            metrics["weight/negative_frac"] = negative / torch.where(total > 0, total, 1)
    return metrics


def moments(weight: Tensor, valid: Tensor, dropped: Tensor, largest: Tensor | None) -> Tensor:
    """Return the row of `MOMENTS` of one set of units."""
    at_cap = torch.zeros_like(valid) if largest is None else weight >= largest * (1 - 1e-5)
    return torch.stack(
        [
            valid.sum().float(),
            torch.where(valid, weight.abs(), 0).sum(),
            torch.where(valid, weight * weight, 0).sum(),
            torch.where(valid, -weight, 0).clamp(min=0).sum(),
            (valid & at_cap).sum().float(),
            dropped.sum().float(),
            torch.where(valid, weight, torch.inf).amin(),
            torch.where(valid, weight, -torch.inf).amax(),
        ]
    )


def raise_if_nonfinite(spec: Spec, tokens: int) -> None:
    """Raise when tokens had non-finite signals and the spec does not allow that.

    Raises:
        NonFiniteSignalError: Says how many tokens and what to do.
    """
    if tokens and spec.on_nonfinite == "error":
        msg = (
            f"{spec.name}: {tokens} tokens had a NaN or infinite signal; look for a diverging "
            "model or a bad data column, or write on_nonfinite: drop to leave such units out"
        )
        raise NonFiniteSignalError(msg)

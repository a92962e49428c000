"""What a spec does to given losses, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weighting.build import build
from weighting.contract import Signals
from weighting.spec import Spec, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    Values = Sequence[float] | Tensor


def simulate(
    spec: Spec | str,
    loss: Values | None = None,
    step: int = 0,
    *,
    entropy: Values | None = None,
    target_prob: Values | None = None,
    error_norm: Values | None = None,
    ref_loss: Values | None = None,
    domain: Sequence[str] | None = None,
) -> Tensor:
    """Return the weight of each unit, [n] mean one, for one loss per unit.

    Args:
        spec: A spec, the path or name of one, or arrow text.
        loss: Loss of each unit, nats; zeros when None, for specs that read something else.
        step: Optimizer step at which schedules are read.
        entropy: Entropy of each unit, nats.
        target_prob: Label probability of each unit; exp(-loss) when None.
        error_norm: Norm of prediction minus label of each unit.
        ref_loss: Reference loss of each unit, nats.
        domain: Domain name of each unit.

    Raises:
        SpecError: The spec is wrong.
        ValueError: No units, lengths that differ, or a missing or non-finite signal.
    """
    spec = resolve(spec) if isinstance(spec, str) else spec
    given: dict[str, Values | None] = {
        "loss": loss,
        "entropy": entropy,
        "target_prob": target_prob,
        "error_norm": error_norm,
        "ref_loss": ref_loss,
    }
    tensors: dict[str, Any] = {
        name: torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1)
        for name, value in given.items()
        if value is not None
    }
    lengths = {len(value) for value in tensors.values()} | ({len(domain)} if domain else set())
    if len(lengths) != 1 or 0 in lengths:
        msg = f"give one value per unit, equally many of each signal; got lengths {sorted(lengths)}"
        raise ValueError(msg)
    names = sorted(set(domain or ()))
    like = tensors.setdefault("loss", torch.zeros(lengths.pop(), 1))
    fn = build(spec, domains=names)
    ids = torch.tensor([[names.index(name)] for name in domain]) if domain else None
    one_document = torch.zeros_like(like, dtype=torch.long)
    out = fn(Signals(**tensors, domain_ids=ids, segment_ids=one_document), step)
    fn.check(out)
    return out.token[:, 0]

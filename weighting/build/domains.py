"""What a weighting says of domains between batches, and what it is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weighting.contract import Combine, Constrain, Pool, Scope, Shape, Signals, Source, Weigh
from weighting.pipeline import has_state

if TYPE_CHECKING:
    from weighting.build.weighting import Weighting
    from weighting.contract import Feedback


def domain_weights(fn: Weighting, step: int | Tensor = 0) -> dict[str, Tensor]:
    """Return the weight of each domain by the factors that know one between batches.

    Args:
        fn: A built spec.
        step: Optimizer step.

    Returns:
        For each such factor weights that sum to one, [K], in the order of `fn.domains`.
    """
    assert fn.domains, "without domains there is nothing to weigh"
    return {name: _weights_of(fn, name, step) for name in fn.plan.weighing_domains}


def live_weights(fn: Weighting, step: int | Tensor = 0) -> dict[str, Tensor]:
    """Return those of `domain_weights` whose factors remember, and so move."""
    found = domain_weights(fn, step)
    return {name: x for name, x in found.items() if has_state(fn.plan.factors[name])}


def average_weights(fn: Weighting) -> dict[str, Tensor]:
    """Return the averages over the run of domain weights, of the factors that keep one."""
    found: dict[str, Tensor] = {}
    for name in fn.plan.weighing_domains:
        for index in range(len(fn.plan.factors[name])):
            average = fn.state_of(name, index).get("average")
            if average is not None:
                found[name] = average / average.sum()
    return found


def proportions(fn: Weighting, step: int | Tensor = 0) -> Tensor:
    """Return in which proportions to draw the domains of the next batch, [K], sum one.

        p_d = prod_f w_fd / sum_e prod_f w_fe      f: the factors of `plan.sampling`

    Args:
        fn: A built spec that draws.
        step: Optimizer step of that batch.
    """
    assert fn.plan.sampling, "the spec draws nothing"
    found = domain_weights(fn, step)
    product = torch.stack([found[name] for name in fn.plan.sampling]).double().prod(0)
    return product / product.sum().clamp(min=torch.finfo(torch.float64).tiny)


def send_feedback(fn: Weighting, kind: Feedback, x: Tensor, step: int | Tensor = 0) -> None:
    """Move the state of the stages that listen to what happened between batches.

    Args:
        fn: A built spec.
        kind: What it is.
        x: As `Feedback` says.
        step: Optimizer step.
    """
    at = _beside_state(fn, step)
    everywhere = torch.ones(len(fn.domains), dtype=torch.bool, device=at.device)
    for name, steps in fn.plan.factors.items():
        for index, (stage, *_) in enumerate(steps):
            if stage.listens_to != kind:
                continue
            before = fn.state_of(name, index)
            scope = Scope("domain", at, everywhere, fn.domains, state=before)
            with torch.no_grad():
                after = stage.on_feedback(x.to(at.device, torch.float32), scope)
            assert after.keys() == before.keys(), f"{stage.name} must return its whole state"
            for key, value in after.items():
                before[key].copy_(value)


def _weights_of(fn: Weighting, factor: str, step: int | Tensor) -> Tensor:
    """Return a factor's weight of each domain as it stands, sum one."""
    at = _beside_state(fn, step)
    ids = torch.arange(len(fn.domains), device=at.device)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    x = torch.zeros_like(ids, dtype=torch.float32)
    steps = fn.plan.factors[factor]
    pooled = steps[-1].level == "domain"  # what a batch brings has gone into the state
    held: list[Tensor] = []
    with torch.no_grad():
        for index, (stage, *_) in enumerate(steps):
            scope = Scope("domain", at, everywhere, fn.domains, state=fn.state_of(factor, index))
            if isinstance(stage, Source):
                held.append(x)
                if not pooled:
                    x = stage.read(Signals(loss=x, domain_ids=ids), scope)
            elif not isinstance(stage, Pool):
                assert isinstance(stage, Shape | Weigh | Constrain | Combine)
                both = torch.stack([held.pop(), x]) if isinstance(stage, Combine) else x
                x = stage.apply(both, scope)
    return x / x.sum().clamp(min=torch.finfo(x.dtype).tiny)


def _beside_state(fn: Weighting, step: int | Tensor) -> Tensor:
    """Return a step, 0-D, on the device of the state."""
    device = next((buffer.device for buffer in fn.buffers()), None)
    return torch.as_tensor(step, device=device)

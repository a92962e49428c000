"""One gradient for each domain, from microbatches of one domain each, and what they say together.

A step takes one microbatch of every domain in turn.  After each, the gradient is copied and
cleared; after the last, the inner products of all of them move the weights, and the gradient of
the step becomes their weighted sum:

    g_d = gradient of the mean loss of domain d, no longer than max_norm
    G_de = g_d . g_e  ->  weights a;      gradient = sum_d a_d g_d

* **Memory**: one more copy of the gradients for each domain; under FSDP of a rank's shards.
* **Time**: the forward and backward passes of the microbatches, which a step without it would make
  of the same tokens as well; K (K + 1) / 2 inner products of the gradients; two small collectives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from weighting.build.domains import live_weights, send_feedback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn
    from torch.distributed.tensor import DeviceMesh, Placement

    from weighting import Weighting

Layout = tuple["DeviceMesh", tuple["Placement", ...]] | None
"""How a gradient is cut over ranks; None if it is whole."""


class DomainGradients:
    """The gradients of a step, domain by domain."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        domains: int,
        max_norm: float,
        *,
        weigh: Callable[[Tensor], Tensor],
        over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Take the parameters that train, and what weighs their gradients.

        Args:
            parameters: Of the model on this rank.
            domains: How many there are.
            max_norm: Length that a domain's gradient is clipped to; 0 for none.
            weigh: From inner products [K, K] to weights [K] that sum to one.
            over_ranks: Sums over the ranks that hold other rows.
        """
        self.weigh = weigh
        self._over_ranks = over_ranks
        self._turns: list[int] = []
        self._parameters = [p for p in parameters if p.requires_grad]
        self._domains = domains
        self._max_norm = max_norm
        self._kept: dict[int, list[Tensor]] = {}
        self._tokens: dict[int, Tensor] = {}

    def noting_turns(
        self, batches: Iterator[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the batches, and note whose turn each is while that is still on the CPU."""
        for inputs, labels in batches:
            self._turns.append(int(inputs["domain_ids"][0, 0]))
            yield inputs, labels

    @torch.no_grad()
    def take(self, tokens: Tensor, total: Tensor) -> None:
        """Copy and clear the gradient of the next domain; after the last, put their sum there.

        Args:
            tokens: Valid tokens of its microbatch on this rank, 0-D.
            total: What the host has divided losses by: valid tokens of the whole step, 0-D.
        """
        domain = self._turns.pop(0)
        assert domain not in self._tokens, "a domain has one turn a step"
        self._tokens[domain] = tokens
        gradients = [_local(p) for p in self._parameters]
        if domain not in self._kept:
            self._kept[domain] = [torch.empty_like(g) for g in gradients]
        for kept, gradient in zip(self._kept[domain], gradients, strict=True):
            kept.copy_(gradient)
            gradient.zero_()  # where it is: a captured graph goes on adding there
        if len(self._tokens) == self._domains:
            self._combine(total)

    def _combine(self, total: Tensor) -> None:
        """Put the weighted sum of the gradients where the optimizer looks for it."""
        counts = [self._tokens[domain] for domain in range(self._domains)]
        tokens = self._over_ranks(torch.stack(counts).to(total.device, torch.float32))
        scale = total / tokens.clamp(min=1)
        products = self._inner_products() * torch.outer(scale, scale)
        if self._max_norm > 0:
            lengths = products.diagonal().clamp(min=0).sqrt()
            clip = (self._max_norm / (lengths + 1e-6)).clamp(max=1)
            scale, products = scale * clip, products * torch.outer(clip, clip)
        factors = self.weigh(products) * scale
        for index, parameter in enumerate(self._parameters):
            gradient = _local(parameter)
            for domain, factor in enumerate(factors):
                gradient.add_(self._kept[domain][index] * factor.to(gradient.dtype))
        self._tokens.clear()

    def _inner_products(self) -> Tensor:
        """Return the inner products of the kept gradients over all parameters, [K, K]."""
        by_layout: dict[Layout, list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            by_layout.setdefault(_layout(parameter.grad), []).append(index)
        whole: Tensor | None = None
        for layout, indices in by_layout.items():
            mine: Tensor | None = None
            for index in indices:
                kept = (self._kept[domain][index] for domain in range(self._domains))
                rows = torch.stack([gradient.flatten().float() for gradient in kept])
                product = rows @ rows.T
                mine = product if mine is None else mine + product
            assert mine is not None
            found = _summed(mine, layout)
            whole = found if whole is None else whole + found
        assert whole is not None, "a model has parameters"
        return whole


def weigh_gradients(fn: Weighting, step: Tensor, products: Tensor) -> Tensor:
    """Send the weighting how the gradients of domains compare; return the domains' weights.

    Args:
        fn: A weighting that listens to gradients.
        step: Optimizer step, 0-D.
        products: Inner products of the gradients, [K, K].

    Returns:
        Weights that sum to one, [K].
    """
    send_feedback(fn, "gradients", products, step)
    live = live_weights(fn, step)
    listening = [
        live[name]
        for name, steps in fn.plan.factors.items()
        if any(step.stage.listens_to == "gradients" for step in steps)
    ]
    product = torch.stack(listening).prod(0)
    return product / product.sum()


def _local(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, or this rank's shard of it; zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _layout(gradient: Tensor | None) -> Layout:
    return (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None


def _summed(mine: Tensor, layout: Layout) -> Tensor:
    """Return the sum of a number over the shards it was computed on; copies count once."""
    if layout is None:
        return mine
    mesh, placements = layout
    partial = [Replicate() if p.is_replicate() else Partial() for p in placements]
    return DTensor.from_local(mine, mesh, partial, run_check=False).full_tensor()

"""Statistics of a step, added up in place where its batches are, and read at a log step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weighting.build.compared import MORE_UNITS, one_unit, tables_compared
from weighting.build.statistics import MOMENTS, raise_if_nonfinite, summarize
from weighting.contract.levels import sum_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from weighting.build.weighting import Weighting, Weights
    from weighting.contract import Collectives, Level

_ADDED = MOMENTS.index("min")
"""Columns of the moments before this one add up; from here on they are a minimum, a maximum."""
_BY_DOMAIN = ("tokens", "loss", "weight")
"""What is added up for each domain: valid tokens, their losses and their weights."""


class StepStatistics:
    """Sums over the tokens that this rank has weighed in a step.

    Attributes:
        moments: Of the weights, as `Weights.moments`.
        warnings: What to say once of batches that weigh all tokens alike; None until the first
            log step.
    """

    def __init__(
        self,
        fn: Weighting,
        device: torch.device,
        more_units: Mapping[Level, str] = MORE_UNITS,
    ) -> None:
        """Begin with nothing.

        Args:
            fn: The weighting.
            device: Where it weighs.
            more_units: What the warnings say to do where a batch has one unit of a level.
        """
        self._fn, self._more_units = fn, more_units
        rows = len(fn.plan.factors) + 1
        self._empty = torch.zeros(rows, len(MOMENTS), device=device)
        self._empty[:, _ADDED], self._empty[:, _ADDED + 1] = torch.inf, -torch.inf
        self.moments = self._empty.clone()
        self._by_domain = torch.zeros(len(_BY_DOMAIN), len(fn.domains), device=device)
        self._shares = torch.zeros(2, device=device)
        self._nonfinite = torch.zeros((), device=device)
        self._most_units = torch.zeros(len(fn.compares), device=device)
        self.warnings: list[str] | None = None

    def begin_step(self) -> None:
        """Forget the last step."""
        self.moments.copy_(self._empty)
        self._shares.zero_()
        self._by_domain.zero_()

    def add(self, out: Weights) -> None:
        """Add the weights of a batch."""
        self.moments[:, :_ADDED] += out.moments[:, :_ADDED]
        low, high = out.moments[:, _ADDED:].unbind(1)
        self.moments[:, _ADDED].copy_(torch.minimum(self.moments[:, _ADDED], low))
        self.moments[:, _ADDED + 1].copy_(torch.maximum(self.moments[:, _ADDED + 1], high))
        self._nonfinite += out.moments[-1, MOMENTS.index("nonfinite")]
        if out.compared:
            units = torch.stack([out.compared[name].float() for name in self._fn.compares])
            self._most_units.copy_(torch.maximum(self._most_units, units))

    def add_losses(self, unweighted: Tensor, weighted: Tensor) -> None:
        """Add a batch's shares of the step's mean cross entropy, nats, 0-D each."""
        self._shares += torch.stack([unweighted, weighted]).detach()

    def add_by_domain(
        self, losses: Tensor | None, token: Tensor, known: Mapping[str, Tensor]
    ) -> None:
        """Add a call's tokens, losses and weights to those of their domains.

        Args:
            losses: Nats, [B, L]; None where they are not known.
            token: Weights, [B, L].
            known: Its `valid` and, if the data has domains, `domain_ids`, [B, L].
        """
        if "domain_ids" not in known:
            return
        valid = known["valid"]
        losses = torch.zeros_like(token) if losses is None else losses.detach().float()
        rows = torch.stack([valid.float(), torch.where(valid, losses, 0), token]).flatten(1)
        ids = torch.where(valid, known["domain_ids"], 0).flatten()
        counted = torch.where(valid.flatten(), rows, 0)
        self._by_domain += sum_by(ids, len(self._fn.domains), counted)

    @property
    def weighted_share(self) -> Tensor:
        """This rank's share of the step's weighted mean cross entropy so far, nats, 0-D."""
        return self._shares[1].clone()

    def read(
        self, ranks: Collectives, from_last: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        """Return the statistics over all ranks, and forget the non-finite count.

        Every rank must call it.  The two losses are in nats; the others are those of
        `weighting.build.summarize`, and for each domain of the data, as `domain/<name>/`: `share`
        of the valid tokens, `loss`, the mean unweighted one in nats, and `weight`, the mean of its
        tokens.

        Args:
            ranks: Reaches the ranks whose statistics add up.
            from_last: Returns what the last stage of a pipeline has.

        Raises:
            NonFiniteSignalError: A signal was not finite since the last call and the spec says
                `on_nonfinite: error`.
        """
        added = [self.moments[:, :_ADDED].flatten(), self._shares, self._nonfinite[None]]
        added.append(self._by_domain.flatten())
        sums = from_last(ranks.sum(torch.cat(added)))
        counts, shares, nonfinite, by_domain = sums.split([len(x) for x in added])
        low, high = self.moments[:, _ADDED:].unbind(1)
        largest = from_last(ranks.max(torch.cat([-low, high, self._most_units])))
        lowest, highest, units = largest.split([len(low), len(high), len(self._most_units)])
        edges = torch.stack([-lowest, highest], dim=1)
        moments = torch.cat([counts.view(-1, _ADDED), edges], dim=1)
        self._nonfinite.zero_()
        named = summarize(moments, [*self._fn.plan.factors])
        # Read at once, as each look at a device waits for it.
        parts = [nonfinite, shares, torch.stack([*named.values()]), units, by_domain]
        read = torch.cat(parts).cpu().split([len(x) for x in parts])
        bad, means, values, units, by_domain = read
        raise_if_nonfinite(self._fn.spec, int(bad))
        by_domain = by_domain.view_as(self._by_domain)
        if self.warnings is None:
            self.warnings = _one_unit_warnings(self._fn, units, by_domain[0], self._more_units)
        unweighted, weighted = means.tolist()
        found = dict(zip(named, values.tolist(), strict=True))
        found |= _domain_means(self._fn, by_domain)
        return {"unweighted_loss": unweighted, "weighted_loss": weighted, **found}


def _one_unit_warnings(
    fn: Weighting, units: Tensor, tokens: Tensor, more_units: Mapping[Level, str]
) -> list[str]:
    """Say what the spec compares that came alone in every batch.

    Args:
        fn: The weighting.
        units: The most units in a batch, of each of `fn.compares`.
        tokens: Of each domain in a step.
        more_units: What to do, of each level.
    """
    alone: dict[str, Level] = {
        name: level
        for (name, level), most in zip(fn.compares.items(), units.tolist(), strict=True)
        if most == 1
    }
    if "domain" not in alone.values() and int((tokens > 0).sum()) == 1:
        for name in tables_compared(fn.plan):
            alone[name] = "domain"
    return [
        one_unit(fn.plan, name, level, "every batch so far had", more_units[level])
        for name, level in alone.items()
    ]


def _domain_means(fn: Weighting, sums: Tensor) -> dict[str, float]:
    """Return what is said of each domain; of one without tokens only that."""
    found: dict[str, float] = {}
    total = max(sums[0].sum().item(), 1.0) if sums.numel() else 1.0
    for name, (tokens, loss, weight) in zip(fn.domains, sums.T.tolist(), strict=True):
        found[f"domain/{name}/share"] = tokens / total
        if tokens:
            if not fn.plan.identity:  # the host's own loss tells no losses of tokens
                found[f"domain/{name}/loss"] = loss / tokens
            found[f"domain/{name}/weight"] = weight / tokens
    return found

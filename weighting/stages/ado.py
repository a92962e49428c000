"""Weights per domain by how fast a law fitted to its losses says that it is still learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from weighting import saved
from weighting.contract import Level, Scope, Weigh
from weighting.registry import stage

if TYPE_CHECKING:
    from torch import Tensor

_POWERS = 64
_LARGEST = 0.8
"""The powers tried: so many, evenly up to the largest."""
_LEAST_SHARE, _LEAST_POWER = 0.01, 0.05
_CREDIT, _NEW = 0.9, 0.1
"""How much of the credit stays, and how much of the draw follows the newest shares."""
_NOISE = 1e-6
"""Of the mean loss, what is no change of it: losses are float32."""


@stage("ado")
class Ado(Weigh):
    """Draw domains by how fast their losses fall, as a power law fitted to each foretells.

    L_d(t) = e_d + a_d / t^alpha_d   fitted to the losses after `warmup` batches, every `every`
    q_d ~ max(alpha_d, 0.05) (L_d(t) - e_d) / t * sqrt(h_d), no less than 0.01;   t: batches so far
    p = 0.9 r + 0.1 q;   r <- r + (q - r) / (t + 1);   h <- 0.9 h + 0.1 p;   w = K p

    All start equal, and stay so until the first fit.  Made for `apply: sampling`.  What is
    remembered are sums over the batches, from which the fit is exact: 64 powers from 0.0125 to 0.8,
    for each the least squares of e and a, neither below 0, and the power with the smallest error.

    Source: Jiang et al. (2024), "Adaptive Data Optimization", arXiv:2410.11820, and the authors'
    code, where t counts the sequences of all domains, and q has the share of each domain in the
    data as a factor: multiply by a table for that.
    Differs: theirs minimise a Huber loss of log L by L-BFGS from 512 starts, over every tenth of
    the losses, smoothed; their h follows the counts of what was drawn; an absent domain repeats
    its last loss, and here adds nothing.
    """

    levels: ClassVar[tuple[Level, ...]] = ("domain",)
    scaled: ClassVar[bool] = False  # over all domains, absent ones too
    known_between_batches: ClassVar[bool] = True
    state_rules: ClassVar[dict[str, saved.Rule]] = {
        **dict.fromkeys(("weights", "average", "credit"), saved.shares),
        **dict.fromkeys(("batches", "law"), saved.count),
    }
    every: int = Field(default=1000, ge=1, le=10**6)
    warmup: int = Field(default=1000, ge=0, le=10**9)

    @override
    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return equal shares, no batches, sums of none, and no law: a and alpha of 0."""
        count = max(len(domains), 1)
        equal = torch.full((count,), 1 / count, dtype=torch.float64)
        return {
            **{name: equal.clone() for name in ("weights", "average", "credit")},
            "batches": torch.zeros((), dtype=torch.int64),
            "sums": torch.zeros(count, 3, dtype=torch.float64),
            "power_sums": torch.zeros(count, 3, _POWERS, dtype=torch.float64),
            "law": torch.zeros(count, 2, dtype=torch.float64),
        }

    @override
    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Add the losses of the batch, fit where it is time, and say how to draw the next one."""
        state, batches = scope.state, scope.state["batches"] + 1
        t = batches.double()
        counts = scope.valid & (batches > self.warmup)
        loss, z = torch.where(counts, x, 0).double()[:, None], t ** -_powers(x)
        terms = torch.stack([torch.ones_like(loss), loss, loss * loss], 1).squeeze(-1)
        of_powers = torch.stack([z.expand(len(x), -1), (z * z).expand(len(x), -1), loss * z], 1)
        sums = state["sums"] + counts[:, None] * terms
        power_sums = state["power_sums"] + counts[:, None, None] * of_powers
        due = (batches > self.warmup) & (batches % self.every == 0)
        law = torch.where(due, fitted(sums, power_sums), state["law"])

        a, alpha = law.unbind(1)
        credit = _CREDIT * state["credit"] + (1 - _CREDIT) * state["weights"]
        speed = alpha.clamp(min=_LEAST_POWER) * a * t**-alpha  # times 1 / t, which all share
        falls = speed > _NOISE * sums[:, 1] / sums[:, 0].clamp(min=1)
        wanted = torch.where(falls, speed, 0) * credit.sqrt()
        total = wanted.sum()
        shares = torch.where(total > 0, wanted / torch.where(total > 0, total, 1), 1 / len(x))
        shares = shares.clamp(min=_LEAST_SHARE)
        shares = shares / shares.sum()
        average = state["average"]
        return {
            "weights": (1 - _NEW) * average + _NEW * shares,
            "average": average + (shares - average) / (t + 1),
            "credit": credit,
            "batches": batches,
            "sums": sums,
            "power_sums": power_sums,
            "law": law,
        }

    @override
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return K times the shares, mean one over all domains, present or not."""
        del x
        weights = scope.state["weights"]
        return (weights * weights.numel()).float()


def fitted(sums: Tensor, power_sums: Tensor) -> Tensor:
    """Return a and alpha of each domain, [K, 2]; a is 0 where a loss does not fall.

    Args:
        sums: Of 1, L and L^2 over the batches with the domain, [K, 3].
        power_sums: Of z, z^2 and L z, z = t^-alpha for each power, [K, 3, 64].
    """
    n, loss, squares = sums[:, :, None].unbind(1)
    z, zz, loss_z = power_sums.unbind(1)
    spread = n * zz - z * z
    a = torch.where(spread > 0, n * loss_z - z * loss, 0) / torch.where(spread > 0, spread, 1)
    through_zero = loss_z / torch.where(zz > 0, zz, 1)
    a = torch.where(loss - a * z < 0, through_zero, a).clamp(min=0)
    e = ((loss - a * z) / n.clamp(min=1)).clamp(min=0)
    error = squares + e * (n * e - 2 * loss) + a * (a * zz + 2 * e * z - 2 * loss_z)
    # Two points lie on the curve of any power; rounding must not choose among them.
    best = error <= error.amin(1, keepdim=True) + 1e-10 * squares
    place = torch.arange(_POWERS, device=a.device)
    first = torch.where(best, place, _POWERS - 1).amin(1, keepdim=True)
    return torch.cat([a.gather(1, first), _powers(a)[first]], 1)


def _powers(like: Tensor) -> Tensor:
    steps = torch.arange(1, _POWERS + 1, device=like.device, dtype=torch.float64)
    return steps * (_LARGEST / _POWERS)

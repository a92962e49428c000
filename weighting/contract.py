"""What flows through a pipeline, and the promises its parts make.

A pipeline reads **signals** (per token, float32, detached), forms a **score** per unit of its
**level** (any real number; higher matters more) and turns it into a **weight** per unit
(non-negative, mean one over its scope).  Stages are pure: same input, same output; they never
modify their input, never look at another unit except through the statistics of `Scope`, never
branch on a tensor's value, and return float32 of the shape they were given.  Masks are not their
business: invalid units are left out of every statistic by `Scope` and weigh zero afterwards.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import override

from weighting.saved import not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from weighting.levels import Groups

Level = Literal["token", "document", "sequence", "domain"]
Form = Literal["score", "weight"]
News = Literal["gradients", "validation"]
"""What a trainer may tell a stage between batches.

gradients: [K, K], inner products of the gradients of the domains' mean losses.
validation: [K], the domains' mean losses on held-out text, nats; NaN where there was none.
"""
Within = Literal["document", "sequence", "domain"]
"""A level inside whose units, instead of over all of them, a token-level statistic runs."""


@dataclass(frozen=True)
class Signals:
    """What the forward pass knows about each token, as tensors of one shape, [B, L] or [T].

    Only what a built pipeline `needs` has to be given.  Values at invalid tokens are never read.

    A sequence is what `sequence_ids` tell.  Without them it is a row of [B, L], whatever documents
    are packed into the row; [T] has no rows, and there a sequence is a document.  So a
    padding-free batch, whose samples follow each other in [1, T] or [T], needs `sequence_ids`:
    `weighting.levels.documents(position_ids)` makes them where positions restart.

    Attributes:
        loss: Negative log-likelihood, nats.
        valid: True where the label counts; all tokens when None.
        entropy: Entropy of the prediction, nats.
        target_prob: Probability given to the label; exp(-loss) when None.
        error_norm: Euclidean norm of prediction minus one-hot label.
        ref_loss: Loss of a reference model, nats.
        domain_ids: Index of each token's domain in the names given to `build`.
        segment_ids: Document of each token: from 0, below L in each row of [B, L] (below T
            for [T]); equal ids in one row are one document.
        sequence_ids: Sequence of each token, if it is not the row: from 0, below the number of
            tokens; equal ids in one row are one sequence, which does not go on in another row.
            They may begin at 0 in each row, or count on from row to row.
        columns: Columns of the dataset, by name.
    """

    loss: Tensor
    valid: Tensor | None = None
    entropy: Tensor | None = None
    target_prob: Tensor | None = None
    error_norm: Tensor | None = None
    ref_loss: Tensor | None = None
    domain_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    sequence_ids: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Collectives(Protocol):
    """How statistics reach the other ranks; injected, so that the core knows no ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, [ranks, *x.shape], in rank order; shapes are equal."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place in what `gather` returns."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks that `gather` reaches: those that hold other sequences."""
        ...

    @property
    def parts(self) -> Collectives:
        """Reaches the ranks that hold other parts of this rank's sequences.

        `sum` and `max` reach these as well, `gather` does not.
        """
        ...


class Alone:
    """The collectives of a single rank."""

    rank = 0
    size = 1

    @property
    def parts(self) -> Alone:
        """Nobody holds other parts of its sequences."""
        return self

    def gather(self, x: Tensor) -> Tensor:
        """Return x with a leading dimension of one."""
        return x.unsqueeze(0)

    def sum(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


@dataclass(frozen=True)
class Scope:
    """The units a statistic runs over, and the step.

    Attributes:
        level: What one unit is.
        step: Optimizer step, 0-D.
        valid: [U] bool; units that count.
        domains: Names of the domains, in the order of their ids.
        collectives: Reaches units held by other ranks; None when all units are here.
        state: What the stage at hand remembers, as it is for this batch.
    """

    level: Level
    step: Tensor
    valid: Tensor
    domains: tuple[str, ...] = ()
    collectives: Collectives | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x [..., U] over valid units; 0 if there are none."""
        total = torch.where(self.valid, x, 0).sum(-1)
        return total if self.collectives is None else self.collectives.sum(total)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of x [..., U] over valid units; 0 if there are none."""
        largest = torch.where(self.valid, x, -torch.inf).amax(-1)
        largest = largest if self.collectives is None else self.collectives.max(largest)
        return torch.where(largest == -torch.inf, 0, largest)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return minimum and maximum of x [U] over valid units, in one collective; 0 if none."""
        low, high = self.max(torch.stack([-x, x]))
        return -low, high

    def count(self) -> Tensor:
        """Return the number of valid units, 0-D float32."""
        return self.sum(torch.ones_like(self.valid, dtype=torch.float32))

    def within(self, groups: Groups) -> ScopeWithin:
        """Return the same scope with statistics inside each group of tokens."""
        return ScopeWithin(
            self.level, self.step, self.valid, self.domains, self.collectives, self.state, groups
        )

    def kth_largest(self, x: Tensor, k: Tensor) -> Tensor:
        """Return the k-th largest of x [U] over valid units, exactly; the smallest if k is more.

        The order of float32 numbers is that of their bits read as integers, so the answer is
        found digit by digit, by counting: static shapes, and only sums leave the rank.
        """
        keys = _sortable(x)
        low = torch.full_like(k, -(2**31), dtype=torch.int64)
        k = torch.minimum(k.to(torch.int64), self.count().to(torch.int64)).clamp(min=1)
        for shift in (26, 20, 14, 8, 4, 0):
            digits = 1 << (6 if shift >= 8 else 4)  # noqa: PLR2004 - 6+6+6+6+4+4 = 32 bits
            steps = torch.arange(digits, device=x.device) << shift
            points = low + steps.view(-1, *[1] * low.dim())
            against = points if low.dim() else points[:, None]
            reached = self.sum((keys >= against).float()) >= k
            low = low + ((reached.sum(0) - 1).clamp(min=0) << shift)
        return _from_sortable(low)


@dataclass(frozen=True)
class ScopeWithin(Scope):
    """A scope cut into groups of tokens: each statistic is that of the token's own group, [T]."""

    groups: Groups | None = None

    @override
    def sum(self, x: Tensor) -> Tensor:
        """Return for each token the sum over the valid tokens of its group."""
        assert self.groups is not None
        return self.groups.broadcast(self.groups.sum(torch.where(self.valid, x, 0)))

    @override
    def max(self, x: Tensor) -> Tensor:
        """Return for each token the maximum over the valid tokens of its group."""
        assert self.groups is not None
        masked = torch.where(self.valid, x, -torch.inf)
        rows = masked.unbind(0) if masked.dim() > 1 else (masked,)
        tops = torch.stack([self.groups.broadcast(self.groups.max(row)) for row in rows])
        tops = torch.where(tops == -torch.inf, 0, tops)
        return tops if masked.dim() > 1 else tops[0]


def _sortable(x: Tensor) -> Tensor:
    """Return int64 keys in the order of float32 numbers; -0 and 0 are one key."""
    bits = (x.float() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(2**31) - 1 - bits, bits)


def _from_sortable(key: Tensor) -> Tensor:
    """Return the number of a key."""
    bits = torch.where(key < 0, -(2**31) - 1 - key, key)
    return bits.to(torch.int32).view(torch.float32)


class Stage(BaseModel):
    """One step of a pipeline, as written: frozen, typed arguments and one pure method.

    Derive from `Source`, `Pool`, `Shape`, `Weigh` or `Constrain`, which say what goes in and out.
    Arguments that may change over training are annotated `Number` (or a ranged sibling) and are
    called with `scope.step` to get their value.
    """

    # Strict: "yes" is no truth value, and true no number.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, strict=True
    )
    name: ClassVar[str]
    """Its name in the language; set by `@stage(name)`."""
    kind: ClassVar[str]
    takes: ClassVar[Form | None]
    gives: ClassVar[Form]
    collects: ClassVar[str | None] = None
    """The field that holds arguments of free names, as in table(web=2, code=1)."""
    statistics: ClassVar[str] = ""
    """Which statistics over its scope it takes, for people to read."""
    pointwise: ClassVar[bool] = False
    """True promises that a unit's value depends on that unit and the step alone: no statistics, no
    state that batches move, no position.  Token weights made of such stages are known at once,
    chunk by chunk."""
    standing: ClassVar[bool] = False
    """True promises that the weight of each domain is in its state and the step alone, and so is
    known between batches: training data can be drawn by it."""
    hears: ClassVar[News | None] = None
    """What moves its state beside batches: see `hear`."""
    levels: ClassVar[tuple[Level, ...]] = ("token", "document", "sequence", "domain")
    """Where it can stand; units must fit in memory pair by pair for some."""

    def expand(self) -> tuple[Stage, ...]:
        """Return the stages this one stands for; itself unless it is sugar."""
        return (self,)

    def inside(self) -> Within | None:
        """Return the level inside whose units its statistics run; None for the whole scope."""
        return None

    def initial_state(self, domains: tuple[str, ...]) -> dict[str, Tensor]:
        """Return what it remembers before the first batch: named tensors, none by default."""
        del domains
        return {}

    def problems_with_state(
        self, state: Mapping[str, Tensor], domains: tuple[str, ...]
    ) -> Iterator[tuple[str, str]]:
        """Yield (key, what it must be) for tensors of a saved state that it cannot go on from.

        By default those that are not finite, but where `initial_state` is not either.

        Args:
            state: All that `initial_state` names, in those shapes; any numbers may be in it.
            domains: Those of `initial_state`.
        """
        start = self.initial_state(domains)
        yield from not_finite({key: x for key, x in state.items() if start[key].isfinite().all()})

    def hear(self, news: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Return the state after news, from `scope.state` before it; the same names.

        Args:
            news: What `News` says of `hears`.
            scope: All domains, and the step.
        """
        del news
        return dict(scope.state)


class Source(Stage):
    """– -> score per token: reads a signal."""

    kind: ClassVar[str] = "source"
    takes: ClassVar[Form | None] = None
    gives: ClassVar[Form] = "score"
    needs: ClassVar[frozenset[str]] = frozenset()
    """The fields of `Signals` it reads."""

    def reads(self) -> frozenset[str]:
        """Return what it reads: `needs`, and columns as "columns.name"."""
        return self.needs

    def problem_with(self, domains: tuple[str, ...]) -> str | None:
        """Return why it cannot work with these domain names, or None; asked when it is built."""
        del domains

    def advance(self, signals: Signals, scope: Scope) -> dict[str, Tensor]:
        """Return the state after this batch, from `scope.state` before it; the same names."""
        del signals, scope
        return {}

    @abstractmethod
    def read(self, signals: Signals, scope: Scope) -> Tensor:
        """Return a score per token, [T]; the signals are flat."""
        raise NotImplementedError


class Pool(Stage):
    """Score per token -> score per unit of another level."""

    kind: ClassVar[str] = "pool"
    takes: ClassVar[Form | None] = "score"
    gives: ClassVar[Form] = "score"
    level: Literal["document", "sequence", "domain"]

    @abstractmethod
    def pool(self, score: Tensor, valid: Tensor, groups: Groups) -> Tensor:
        """Return a score per unit, [U]; anything finite for units without a valid token."""
        raise NotImplementedError


class _Step(Stage):
    """One value per unit in, one out.

    A stage with state says in `advance` how a batch changes it; `apply` then finds the changed
    state in `scope.state`.  Both are pure, and the state must come out alike on every rank: use
    the statistics of the scope.
    """

    def advance(self, x: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Return the state after this batch, from `scope.state` before it; the same names."""
        del x, scope
        return {}

    @abstractmethod
    def apply(self, x: Tensor, scope: Scope) -> Tensor:
        """Return the new value of every unit, [U]."""
        raise NotImplementedError


class Shape(_Step):
    """Score -> score: says how much a unit matters, given how it compares."""

    kind: ClassVar[str] = "shape"
    takes: ClassVar[Form | None] = "score"
    gives: ClassVar[Form] = "score"


class Weigh(_Step):
    """Score -> weight: non-negative, and mean one over the scope unless `scaled` is False."""

    scaled: ClassVar[bool] = True

    kind: ClassVar[str] = "weigh"
    takes: ClassVar[Form | None] = "score"
    gives: ClassVar[Form] = "weight"

    def most(self) -> float:
        """Return the largest share of units it weighs above 0, but for ties at a threshold."""
        return 1.0


class Constrain(_Step):
    """Weight -> weight: keeps the mean."""

    kind: ClassVar[str] = "constrain"
    takes: ClassVar[Form | None] = "weight"
    gives: ClassVar[Form] = "weight"


class Sugar(Stage):
    """Stands for other stages: says which in `expand`, and needs no method of its own."""

    kind: ClassVar[str] = "shape"
    takes: ClassVar[Form | None] = "score"
    gives: ClassVar[Form] = "score"

    @override
    @abstractmethod
    def expand(self) -> tuple[Stage, ...]:
        """Return the stages this one stands for."""
        raise NotImplementedError

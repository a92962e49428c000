"""One step of a pipeline: frozen arguments and a pure method, and what each kind promises.

A pipeline reads **signals** (per token, float32, detached), forms a **score** per unit of its
**level** (any real number; higher matters more) and turns it into a **weight** per unit
(non-negative, mean one over its scope).  Stages are pure: same input, same output; they never
modify their input, never look at another unit except through the statistics of `Scope`, never
branch on a tensor's value, and return float32 of the shape they were given.  Masks are not their
business: invalid units are left out of every statistic by `Scope` and weigh zero afterwards.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    WithJsonSchema,
)
from typing_extensions import Unpack, override

from weighting.contract.levels import Groups, Level, Within
from weighting.saved import Rule, broken, not_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from weighting.contract.scope import Scope
    from weighting.contract.signals import Signals

Form = Literal["score", "weight"]
Feedback = Literal["gradients", "validation"]
"""What a trainer may send a stage between batches.

gradients: [K, K], inner products of the gradients of the domains' mean losses.
validation: [K], the domains' mean losses on held-out text, nats; NaN where there was none.
"""


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
    nests: ClassVar[str | None] = None
    """The field that holds another pipeline, as in over(ref_loss)."""
    always_one: ClassVar[bool] = False
    """True promises that every weight it gives is one, whatever it is given."""
    pointwise: ClassVar[bool] = False
    """True promises that a unit's value depends on that unit and the step alone: no statistics, no
    state that batches move, no position.  Token weights made of such stages are known at once,
    chunk by chunk."""
    signed: ClassVar[bool] = False
    """True lets its weights be negative: it ends a factor in which each token decides alone."""
    known_between_batches: ClassVar[bool] = False
    """True promises that the weight of each domain is in its state and the step alone, and so is
    known between batches: training data can be drawn by it."""
    listens_to: ClassVar[Feedback | None] = None
    """What moves its state beside batches: see `on_feedback`."""
    state_rules: ClassVar[dict[str, Rule]] = {}
    """What tensors of a saved state must satisfy beside being finite, by their names."""
    levels: ClassVar[tuple[Level, ...]] = ("token", "document", "sequence", "domain")
    """Where it can stand; units must fit in memory pair by pair for some."""

    # Of 0.1.0: the first has no use any more, the others have other names; see _RENAMED.
    statistics: ClassVar[str]
    standing: ClassVar[bool]
    hears: ClassVar[Feedback | None]

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

        By default those that are not finite, but where `initial_state` is not either, and those
        that break one of the `state_rules`.

        Args:
            state: All that `initial_state` names, in those shapes; any numbers may be in it.
            domains: Those of `initial_state`.
        """
        start = self.initial_state(domains)
        yield from not_finite({key: x for key, x in state.items() if start[key].isfinite().all()})
        yield from broken(state, self.state_rules)

    def on_feedback(self, feedback: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Return the state after feedback, from `scope.state` before it; the same names.

        Args:
            feedback: What `Feedback` says of `listens_to`.
            scope: All domains, and the step.
        """
        del feedback
        return dict(scope.state)

    def __init_subclass__(cls, **kwargs: Unpack[ConfigDict]) -> None:
        """Let a stage that was written for 0.1.0 keep the names of that version."""
        for old, new in _RENAMED.items():
            annotated = old in inspect.get_annotations(cls)
            is_argument = annotated and old not in cls.__class_vars__
            if old in cls.__dict__ and not is_argument:
                setattr(cls, new, cls.__dict__[old])
                msg = f"{cls.__qualname__}.{old} is now called {new}; rename it"
                warnings.warn(msg, DeprecationWarning, stacklevel=4)
        super().__init_subclass__(**kwargs)


_RENAMED = {
    "standing": "known_between_batches",
    "hears": "listens_to",
    "hear": "on_feedback",
    "most": "max_active_fraction",
}
"""Names that a stage may override, as they were in 0.1.0 and as they are now."""


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

    def always_zero(self) -> frozenset[str]:
        """Return the names of domains whose score is 0 at every step."""
        return frozenset()

    def below_zero(self) -> frozenset[str]:
        """Return the names of domains whose score is negative at some step."""
        return frozenset()

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

    def max_active_fraction(self) -> float:
        """Return the largest share of units it weighs above 0, but for ties at a threshold."""
        return 1.0

    def deferred_scale(self) -> DeferredScale | None:
        """Return the halves of `apply` if one sum is all it needs of the scope, else None.

        A weight per token is then known at once but for a number that scales all of them, and is
        met in one pass over the output layer.
        """
        return None


class DeferredScale(NamedTuple):
    """A weight in two halves: `apply(x, scope) == scale(raw(x), scope.sum(raw(x)), scope.count())`.

    Attributes:
        raw: From scores to weights that are not yet scaled; each from its own score alone.
        scale: From these, their sum and their number to weights.
    """

    raw: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor, Tensor, Tensor], Tensor]


class Constrain(_Step):
    """Weight -> weight: keeps the mean, and so a weight of one where all are."""

    kind: ClassVar[str] = "constrain"
    takes: ClassVar[Form | None] = "weight"
    gives: ClassVar[Form] = "weight"

    def cap(self, step: Tensor) -> Tensor | None:
        """Return the largest weight it lets through, in multiples of the mean; None without one.

        Units at the cap are counted in the metrics.
        """
        del step
        return None


PIPELINE_HERE = {"$comment": "a pipeline"}
"""Stands in a stage's JSON Schema where a pipeline may; `weighting.language.schema` defines it."""


MAX_NESTED = 4
"""Pipelines inside pipelines."""
MAX_INSIDE = 100
"""Stages of a pipeline inside another, with those inside it."""


def _bounded(pipeline: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Raise where pipelines are nested too deep, or hold too many stages."""
    rows, depth, stages = [pipeline], 0, 0
    while rows:
        depth, stages = depth + 1, stages + sum(map(len, rows))
        if depth > MAX_NESTED or stages > MAX_INSIDE:
            msg = f"at most {MAX_NESTED} pipelines inside one another, of {MAX_INSIDE} stages"
            raise ValueError(msg)
        rows = [x.other for row in rows for x in row if isinstance(x, Combine)]
    return pipeline


class Combine(_Step):
    """Two scores per unit -> one: the second is that of another pipeline of the same level.

    `apply` is given both, [2, U]: first that of the pipeline it stands in, then that of `other`.
    A unit counts where both do.
    """

    kind: ClassVar[str] = "shape"
    takes: ClassVar[Form | None] = "score"
    gives: ClassVar[Form] = "score"
    pointwise: ClassVar[bool] = True
    nests: ClassVar[str | None] = "other"
    other: Annotated[
        tuple[SerializeAsAny[Stage], ...],
        Field(min_length=1),
        AfterValidator(_bounded),
        WithJsonSchema(PIPELINE_HERE),
    ]


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

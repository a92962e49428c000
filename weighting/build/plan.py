"""What a spec means before any tensor exists: a frozen value to look at, print and build from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weighting.build.checks import order_problems
from weighting.build.shares import over_steps
from weighting.build.targets import drawing, targets_of
from weighting.contract import Alone, Pool, Weigh
from weighting.errors import SpecError
from weighting.pipeline import (
    expand,
    has_schedule,
    has_state,
    has_state_of_batches,
    is_identity,
    is_token_local,
    pools_each_token_alone,
    signals_read,
    weighs_domains,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weighting.contract import Collectives, Feedback, Level
    from weighting.pipeline import Step
    from weighting.spec import Apply, Spec

DeferredLevel = Literal["sequence", "domain", "sequence of a domain", "token"]


@dataclass(frozen=True)
class Plan:
    """A checked spec, spelled out.

    Attributes:
        spec: What it is of.
        factors: The steps of each factor.
        targets: Where each factor's weights act: loss, sampling or both.
        sampling: Factors by whose weights training data is to be drawn.
        needs: Fields of `Signals` that are read, columns as "columns.name".
        listens_to: The feedback its stages want between batches.
        identity: True when every weight is one by construction.
        token_local: Factors whose weight of a token is known from that token alone, but for one
            number that scales them all.
        domain_late: Factors that weigh domains where the rest of a weight is one number for each.
        deferred_level: The units in which the rest of a token's weight is the same for all tokens,
            known only when the whole batch is: sequences, domains, the tokens of a domain in each
            sequence, single tokens, or None for one number.
    """

    spec: Spec
    factors: Mapping[str, tuple[Step, ...]]
    targets: Mapping[str, Apply]
    sampling: tuple[str, ...]
    needs: frozenset[str]
    listens_to: frozenset[Feedback]
    identity: bool
    token_local: tuple[str, ...]
    domain_late: tuple[str, ...]
    deferred_level: DeferredLevel | None

    @property
    def has_state(self) -> bool:
        """Whether anything is remembered between batches."""
        return self.spec.scope == "running" or any(map(has_state, self.factors.values()))

    @property
    def signed(self) -> tuple[str, ...]:
        """Factors whose weights may be negative."""
        return tuple(name for name, steps in self.factors.items() if steps[-1].stage.signed)

    @property
    def weighing_domains(self) -> tuple[str, ...]:
        """Factors with a weight for each domain that is known between batches."""
        return tuple(name for name, steps in self.factors.items() if weighs_domains(steps))

    @property
    def moves_domains(self) -> bool:
        """Whether weights of domains move over training by what is remembered."""
        return any(has_state(self.factors[name]) for name in self.weighing_domains)

    @property
    def draws_live(self) -> bool:
        """Whether the proportions that data is drawn in may change from step to step."""
        drawn = [self.factors[name] for name in self.sampling]
        return any(has_state(steps) or has_schedule(steps) for steps in drawn)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a weight depends on more than its own document or sequence and the state."""
        steps = [step for pipeline in self.factors.values() for step in pipeline]
        statistics = any(not (x.stage.pointwise or isinstance(x.stage, Pool)) for x in steps)
        by_domain = any(step.level == "domain" for step in steps)
        scaled = self.spec.normalize == "mean_one" or self.spec.reduction != "token_mean"
        return not self.identity and (statistics or by_domain or scaled)

    def runs(self, factor: str) -> bool:
        """Tell whether a batch changes anything about a factor or by it."""
        return self.targets[factor] != "sampling" or has_state_of_batches(self.factors[factor])

    def max_active_fraction(self, collectives: Collectives | None = None) -> float:
        """Return the largest share of this rank's tokens that weigh more than 0, from 0 to 1.

        But for ties, and for one token more in each sequence.  A selection over several ranks
        bounds no rank's share.
        """
        ranks = collectives or Alone()
        if self.spec.start > 1:
            return 1.0
        fractions = [1.0]
        for steps in self.factors.values():
            stage, level = steps[-1].stage, steps[-1].level
            whole_rows = ranks.parts.size == 1
            own = isinstance(ranks, Alone) or (whole_rows and stage.inside() == "sequence")
            if isinstance(stage, Weigh) and level == "token" and own:
                fractions.append(stage.max_active_fraction())
        return min(fractions)

    def __str__(self) -> str:
        """Return a line for each thing that is decided before a batch is seen."""
        lines = [
            f"{name} -> {self.targets[name]}: "
            + " -> ".join(f"{step.stage.name}@{step.level}" for step in steps)
            for name, steps in self.factors.items()
        ]
        deferred = self.deferred_level or "one scale"
        lines += [
            f"reads {', '.join(sorted(self.needs)) or 'nothing'}",
            f"token-local: {', '.join(self.token_local) or 'none'}; deferred: {deferred}",
        ]
        if self.spec.start > 1:
            lines.append(f"every token weighs one before step {self.spec.start:,}")
        if self.listens_to:
            lines.append(f"listens to {', '.join(sorted(self.listens_to))}")
        if self.identity:
            lines.append("identity: every weight is one")
        return "\n".join(lines)


def plan_of(spec: Spec, *, steps: int | None = None) -> Plan:
    """Check how the stages of a spec fit together and return its plan; builds no module.

    Args:
        spec: The spec.
        steps: Optimizer steps of the run, by which shares of it become steps: `at=5%`.

    Raises:
        SpecError: They do not fit; every problem at once.
    """
    spec = spec if steps is None else over_steps(spec, steps)
    if problems := order_problems(spec):
        raise SpecError(problems)
    factors = {name: expand(pipeline) for name, pipeline in spec.factors.items()}
    targets = targets_of(spec)
    on_loss = {name: steps for name, steps in factors.items() if targets[name] != "sampling"}
    runs = {n: x for n, x in factors.items() if n in on_loss or has_state_of_batches(x)}
    corrected = "both" in targets.values()
    reduced = {"domain_mean": {"domain_ids"}, "document_mean": {"segment_ids"}}
    ids = reduced.get(spec.reduction, set()) | ({"domain_ids"} if corrected else set())
    stages = [step.stage for steps in factors.values() for step in steps]
    unscaled = spec.reduction == "token_mean" and spec.on_nonfinite == "error"
    identity = unscaled and all(
        targets[name] == "loss" and is_identity(steps) for name, steps in runs.items()
    )
    local = tuple(name for name, steps in on_loss.items() if is_token_local(steps))
    levels = {steps[-1].level for name, steps in on_loss.items() if name not in local}
    levels |= {"domain"} if corrected else set()
    levels |= {level} if (level := reduced_level(spec)) else set()
    by_domain = tuple(name for name, steps in on_loss.items() if steps[-1].level == "domain")
    late = None if identity else _late_level(levels)
    if not all(pools_each_token_alone(factors[name]) for name in by_domain):
        late = "token"
    return Plan(
        spec=spec,
        factors=factors,
        targets=targets,
        sampling=drawing(targets),
        needs=frozenset(ids).union(*map(signals_read, runs.values())),
        listens_to=frozenset(stage.listens_to for stage in stages if stage.listens_to),
        identity=identity,
        token_local=local,
        domain_late=() if late == "token" else by_domain,
        deferred_level=late,
    )


def reduced_level(spec: Spec) -> Level | None:
    """Return the level whose units the reduction counts alike; None where it is tokens."""
    levels: dict[str, Level] = {
        "sequence_mean": "sequence",
        "document_mean": "document",
        "domain_mean": "domain",
    }
    return levels.get(spec.reduction)


def _late_level(levels: set[str]) -> DeferredLevel | None:
    """Return the largest units of which none has tokens of two units of any of some levels."""
    if not levels:
        return None
    if levels in ({"sequence"}, {"domain"}):
        return "sequence" if "sequence" in levels else "domain"
    return "sequence of a domain" if levels == {"sequence", "domain"} else "token"

"""What a spec does to given losses, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from weighting.build import Weighting, Weights, build
from weighting.build.statistics import MOMENTS, raise_if_nonfinite
from weighting.columns import HIDDEN, plain_name
from weighting.language.read import resolve
from weighting.loss.cross_entropy import signals_of
from weighting.pipeline import expand, has_cap, numbers
from weighting.schedules import Constant, Piecewise, Schedule, ShareOfN, Step, known_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weighting.build import Plan
    from weighting.contract import Stage
    from weighting.runs.loss_files import Recorded
    from weighting.spec import Spec

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
    known = {name: value for name, value in given.items() if value is not None}
    return simulate_units(spec, known, step, domain=domain).weight


@dataclass(frozen=True)
class Simulated:
    """What a spec made of units.

    Attributes:
        fn: The built spec, whose state is that after them.
        out: Their weights.
    """

    fn: Weighting
    out: Weights

    @property
    def weight(self) -> Tensor:
        """The final weight of each unit, [n]."""
        return self.out.token.flatten()

    @property
    def ess_frac(self) -> float:
        """Effective sample size over n: (sum w)^2 / (n * sum w^2)."""
        return self.out.metrics["weight/ess_frac"].item()

    @property
    def capped_frac(self) -> float | None:
        """Share of units at their cap, of the factor with most; None where nothing is capped."""
        metrics = self.out.metrics
        shares = (metrics[f"{name}/capped_frac"].item() for name in capped_factors(self.fn.plan))
        return max(shares, default=None)


def simulate_units(
    spec: Spec,
    given: Mapping[str, Values],
    step: int = 0,
    *,
    domain: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    one_sequence: bool = False,
) -> Simulated:
    """Return what a spec makes of units given by any signals.

    Args:
        spec: The spec.
        given: Values of each unit by signal, columns as "columns.name".
        step: Optimizer step at which schedules are read.
        domain: Domain name of each unit.
        domains: Names of all domains; those of the units when None.
        one_sequence: Take the units as the tokens of one sequence; each is a sequence of one
            token otherwise.

    Raises:
        SpecError: The spec does not fit the domains.
        ValueError: No units, lengths that differ, or a missing or non-finite signal.
    """
    shape = (1, -1) if one_sequence else (-1, 1)
    tensors: dict[str, Any] = {
        name: torch.as_tensor(value, dtype=torch.float32).reshape(shape)
        for name, value in given.items()
    }
    lengths = {value.numel() for value in tensors.values()} | ({len(domain)} if domain else set())
    if len(lengths) != 1 or 0 in lengths:
        msg = f"give one value per unit, equally many of each signal; got lengths {sorted(lengths)}"
        raise ValueError(msg)
    names = sorted(set(domain or ())) if domains is None else [*domains]
    like = tensors.setdefault("loss", torch.zeros(lengths.pop()).reshape(shape))
    fn = build(spec, domains=names)
    if HIDDEN in fn.needs:
        raise ValueError(_NO_VECTORS.format(spec.name))
    if domain:
        index = {name: i for i, name in enumerate(names)}
        tensors["domain_ids"] = torch.tensor([index[name] for name in domain]).reshape(shape)
    tensors["segment_ids"] = torch.zeros_like(like, dtype=torch.long)  # one document
    out = fn(signals_of(tensors), step)
    raise_if_nonfinite(spec, int(out.moments[-1, MOMENTS.index("nonfinite")]))
    return Simulated(fn, out)


def simulate_recorded(
    spec: Spec, plan: Plan, losses: Recorded, step: int, *, one_sequence: bool = False
) -> Simulated:
    """Return what a spec makes of recorded units, of those of the step where steps were recorded.

    Args:
        spec: The spec.
        plan: Its plan.
        losses: The units, with the columns of `columns_of`.
        step: Optimizer step.
        one_sequence: As for `simulate_units`.

    Raises:
        SpecError: The spec does not fit the domains.
        ValueError: A column is missing or holds something else, or nothing was recorded then.
    """
    here = losses.at(step)
    given: dict[str, Values] = {"loss": here.numbers("loss")}
    for signal, column in columns_of(plan).items():
        derived = signal == "target_prob" and column not in here.has
        if signal != "domain_ids" and not derived:
            given[signal] = here.numbers(column)
    written = written_domains(spec)
    # Whoever only draws by a table of its own weighs any data alike.
    asks = "domain_ids" in plan.needs or (plan.sampling and not written)
    domain = here.words(DOMAIN) if asks and DOMAIN in here.has else None
    # A batch may lack some of the spec's domains; that it has others is the spec's to tell.
    known = domain is None or {*domain} <= {*written}
    names = sorted(written if known else {*(domain or ())}) or ["all"]
    return simulate_units(
        spec, given, step, domain=domain, domains=names, one_sequence=one_sequence
    )


_NO_VECTORS = (
    "{0} reads hidden states, and units here are numbers; weigh a batch by its built spec: "
    "wt.build(spec)(wt.Signals(loss=..., hidden=...))"
)
DOMAIN = "domain"
"""The column of domain names."""


def columns_of(plan: Plan) -> dict[str, str]:
    """Return the column of a file for each signal that a spec reads."""
    units = {"segment_ids", "sequence_ids"}
    named = {"domain_ids": DOMAIN}
    return {name: named.get(name, plain_name(name)) for name in sorted(plan.needs - units)}


def missing(label: str, plan: Plan, losses: Recorded) -> str | None:
    """Return which columns a spec reads that were not recorded, in a message, or None."""
    if HIDDEN in plan.needs:
        return _NO_VECTORS.format(label)
    lacking = [
        column
        for signal, column in columns_of(plan).items()
        if column not in losses.has and signal != "target_prob"  # which the loss tells
    ]
    if not lacking:
        return None
    what, has = ", ".join(lacking), ", ".join(losses.has)
    give = f"give a file with {'it' if len(lacking) == 1 else 'them'}, a value for each unit"
    return f"{label} reads {what}, and {losses.name} has {has}; {give}"


def written_domains(spec: Spec) -> tuple[str, ...]:
    """Return the names of domains that a spec itself tells, in their order."""
    steps = (step for pipeline in spec.factors.values() for step in expand(pipeline))
    named = (getattr(stage, stage.collects) for stage, *_ in steps if stage.collects)
    return tuple(dict.fromkeys(name for names in named for name in names))


def capped_factors(plan: Plan) -> list[str]:
    """Return the factors that cap their weights and multiply the loss by them."""
    return [
        name
        for name, steps in plan.factors.items()
        if plan.targets[name] != "sampling" and has_cap(steps)
    ]


class Changing(NamedTuple):
    """A number that changes over a run.

    Attributes:
        label: "factor.stage.argument".
        stage: The stage it belongs to.
        argument: Its name there.
        schedule: Its value at every step.
    """

    label: str
    stage: Stage
    argument: str
    schedule: Schedule


def changing(plan: Plan) -> Iterator[Changing]:
    """Yield the numbers of a built spec that change over a run."""
    for name, steps in plan.factors.items():
        for step in steps:
            for argument, value in numbers(step.stage):
                if not isinstance(value, Constant | ShareOfN):
                    label = f"{name}.{step.stage.name}.{argument}"
                    yield Changing(label, step.stage, argument, value)


def last_turn(schedule: Schedule) -> int:
    """Return the step from which a schedule no longer changes."""
    return max(turns(schedule))


def turns(schedule: Schedule) -> list[int]:
    """Return the steps at which a schedule starts, jumps or ends."""
    if isinstance(schedule, Step):
        at = known_steps(schedule.at)
        return [max(at - 1, 0), at]
    if isinstance(schedule, Piecewise):
        steps = map(known_steps, schedule.values)
        return [turn for at in steps for turn in (max(at - 1, 0), at)]
    begin = getattr(schedule, "begin", 0)
    return [begin, begin + getattr(schedule, "over", 0)]

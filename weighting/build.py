"""Spec -> one pure function from signals to weights; every check of order and level lives here."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from weighting.compared import compared_levels, one_unit
from weighting.contract import (
    Alone,
    Collectives,
    Constrain,
    Level,
    News,
    Pool,
    Scope,
    Shape,
    Signals,
    Source,
    Stage,
    Weigh,
)
from weighting.errors import NonFiniteSignalError, OneUnitWarning, Problem, SpecError
from weighting.html import weights_html
from weighting.levels import Groups, group
from weighting.saved import not_between, not_finite, shown
from weighting.schedules import Constant, Schedule, ShareOfN
from weighting.stages import Clamp, Loss, Mean, MeanOne, Table, Uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weighting.spec import Apply, Spec

MOMENTS = ("count", "sum", "square_sum", "capped", "nonfinite", "min", "max")
"""Columns of `Weights.moments`: the first five add up over ranks and batches."""
RUNNING_UNITS = 1024
"""How many earlier units count in the statistics of `scope: running`."""
_FLOOR = 1e-30
"""What a product of local weights counts as at least until it is known that not all are 0."""
_LEVEL_IDS: dict[str, str] = {"domain": "domain_ids", "document": "segment_ids"}


@dataclass(frozen=True)
class Weights:
    """What a built pipeline returns, in the shape of the signals; float32, no gradient.

    Attributes:
        token: Final weight of each token: the product of the factors, mean one over valid
            tokens unless the spec says otherwise, 0 at ignored ones.
        factors: Each factor's weight of each token, before the product.
        moments: [factors + 1, 7] statistics of the weights of this rank's units, one row per
            factor and last the tokens; see `MOMENTS`.  Sum or extremise over ranks, then
            `summarize`.
        compared: For each entry of `Weighting.compares` the number of units in its scope, over all
            ranks, 0-D; where it is 1 all tokens weigh alike.
    """

    token: Tensor
    factors: dict[str, Tensor]
    moments: Tensor
    compared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Readable statistics, 0-D; see `summarize`."""
        return summarize(self.moments, tuple(self.factors))

    def _repr_html_(self) -> str:
        """Return how a notebook shows them."""
        return weights_html(self.token, self.metrics)


def summarize(moments: Tensor, factors: Sequence[str]) -> dict[str, Tensor]:
    """Return named statistics of `Weights.moments`, one set per factor and one for the tokens.

        ess_frac = (sum w)^2 / (n * sum w^2), from 1/n (one unit has it all) to 1 (equal weights)

    Returns:
        For each factor and "weight" (the final token weights): `/min`, `/max`, `/ess_frac` and
        `/capped_frac` (the share of units at their cap); `weight/nonfinite_frac` is the share of
        tokens dropped for a non-finite signal.
    """
    metrics: dict[str, Tensor] = {}
    for name, row in zip([*factors, "weight"], moments, strict=True):
        count, total, squares, capped, nonfinite, low, high = row.unbind()
        none = count == 0
        n = torch.where(none, 1, count)
        metrics[f"{name}/min"] = torch.where(none, 0, low)
        metrics[f"{name}/max"] = torch.where(none, 0, high)
        ess = total * total / torch.where(squares > 0, n * squares, 1)
        metrics[f"{name}/ess_frac"] = ess.clamp(max=1)
        metrics[f"{name}/capped_frac"] = capped / n
        if name == "weight":
            metrics["weight/nonfinite_frac"] = nonfinite / (n + nonfinite)
    return metrics


def build(
    spec: Spec,
    *,
    domains: Sequence[str] | None = None,
    collectives: Collectives | None = None,
) -> Weighting:
    """Turn a spec into a module that maps signals and a step to weights.

    Args:
        spec: The spec.
        domains: Names of the domains in the order of their ids; needed when a factor reads them.
        collectives: How statistics reach other ranks; a single rank when None.

    Raises:
        SpecError: The stages do not fit together, or the domains do not fit the spec; every
            problem at once.
    """
    problems = order_problems(spec)
    if not problems:
        problems = _domain_problems(spec, domains)
    if problems:
        raise SpecError(problems)
    alone = collectives is None or spec.scope == "rank"
    return Weighting(spec, tuple(domains or ()), Alone() if alone else collectives)


def sketch(spec: Spec) -> Weighting:
    """Build a spec to look at, without the domain names it may need to run.

    Raises:
        SpecError: The stages do not fit together; every problem at once.
    """
    if problems := order_problems(spec):
        raise SpecError(problems)
    return Weighting(spec, (), Alone())


class Step(NamedTuple):
    """A stage of an expanded pipeline: what it is, where it was written, the level it leaves."""

    stage: Stage
    index: int
    level: Level


def plan(pipeline: tuple[Stage, ...]) -> list[Step]:
    """Return the stages a pipeline stands for: the implied head, and sugar spelled out."""
    head: tuple[Stage, ...] = ()
    if pipeline[0].kind == "pool":
        head = (Loss(),)
    elif pipeline[0].takes == "score":
        head = (Loss(), Mean(level="sequence"))
    steps: list[Step] = []
    level: Level = "token"
    for index, written in [*((0, stage) for stage in head), *enumerate(pipeline)]:
        for stage in _expand(written):
            if isinstance(stage, Pool):
                level = stage.level
            steps.append(Step(stage, index, level))
    return steps


def order_problems(spec: Spec) -> list[Problem]:
    """Return every place where the stages of a spec do not fit together."""
    problems: list[Problem] = []
    for factor, pipeline in spec.factors.items():
        for index, message in _misfits(pipeline):
            place, where = spec.place(factor, index), ""
            if place is None:
                where = f"{factor}, stage {index + 1}: "
            problems.append(Problem(where + message, place))
        steps = plan(pipeline)
        alone = all(step.stage.pointwise for step in steps)
        level = steps[-1].level
        if spec.scope == "running" and level in {"token", "domain"} and not alone:
            message = (
                f"{factor} weighs per {level}, and scope: running remembers documents and "
                "sequences: tokens are too many, domains return in every batch; "
                "leave scope out, or pool to sequences"
            )
            problems.append(Problem(message, spec.place(factor, len(pipeline) - 1)))
    return problems or _apply_problems(spec)


def applied(spec: Spec) -> dict[str, Apply]:
    """Return where each factor's weights act; those of anything but domains on the loss."""
    if isinstance(spec.apply, dict):
        return {name: spec.apply.get(name, "loss") for name in spec.factors}
    told = {name for name, pipeline in spec.factors.items() if tells_domains(plan(pipeline))}
    return {name: spec.apply if name in told else "loss" for name in spec.factors}


def numbers(stage: Stage) -> Iterator[tuple[str, Schedule]]:
    """Yield the numbers of a stage that may change over training, by name."""
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        if isinstance(value, dict):
            yield from value.items()
        elif isinstance(value, Schedule):
            yield name, value


def tells_domains(steps: Sequence[Step]) -> bool:
    """Tell whether a factor has a weight for each domain that is known between batches."""
    source, *rest = [step.stage for step in steps]
    assert isinstance(source, Source)
    if any(stage.inside() for stage in rest):
        return False
    if steps[-1].level == "domain":
        weigh = next(i for i, stage in enumerate(rest) if isinstance(stage, Weigh))
        return rest[weigh].standing and all(isinstance(x, Constrain) for x in rest[weigh + 1 :])
    of_domain = source.standing or source.reads() <= {"domain_ids"}
    on_tokens = all(step.level == "token" for step in steps)
    return of_domain and on_tokens and not any(stage.initial_state(()) for stage in rest)


class Weighting(nn.Module):
    """A built spec: signals and step in, weights out; pure but for its buffers, the state.

    Attributes:
        spec: What it was built from.
        domains: Names of the domains, in the order of their ids.
        plans: The expanded stages of each factor.
        collectives: How statistics reach other ranks.
        needs: Fields of `Signals` it reads.
        identity: True when every weight is one by construction.
        applied: Where each factor acts: loss, sampling or both; see `Spec`.
        sampling: Factors by whose weights training data is to be drawn; see `proportions`.
        hears: What it wants to be told between batches; see `tell`.
        local: Factors whose weight of a token is known from that token alone, but for one number
            that scales them all; `local_part` is their product.
        late: The units in which the rest of a token's weight is the same for all tokens, known
            only when the whole batch is: sequences, single tokens, or None for one number.
        compares: What weighs all tokens alike when there is one unit in its scope, with the level
            of that unit: factors by name, and the reduction.
    """

    def __init__(self, spec: Spec, domains: tuple[str, ...], collectives: Collectives) -> None:
        super().__init__()
        self.spec = spec
        self.domains = domains
        self.collectives = collectives
        self.plans = {name: plan(pipeline) for name, pipeline in spec.factors.items()}
        self.applied = applied(spec)
        self.sampling = _sampling(self.applied)
        self.hears = frozenset(
            step.stage.hears for steps in self.plans.values() for step in steps if step.stage.hears
        )
        corrected = "both" in self.applied.values()
        by_domain = {"domain_ids"} if corrected or spec.reduction == "domain_mean" else set()
        read = (
            _needs(steps)
            for name, steps in self.plans.items()
            if self.applied[name] != "sampling" or _follows(steps)
        )
        self.needs = frozenset(by_domain).union(*read)
        if corrected:
            count = max(len(domains), 1)
            drawn = torch.full((count,), 1 / count)
            self.register_buffer("drawn", drawn, persistent=False)
        self._buffers_of: dict[tuple[str, int], dict[str, str]] = {}
        for factor, steps in self.plans.items():
            for index, step in enumerate(steps):
                self._remember(factor, index, step.stage)
            if spec.scope == "running" and steps[-1].level in {"document", "sequence"}:
                self.register_buffer(f"{factor}__seen", torch.zeros(RUNNING_UNITS))
                count = torch.zeros((), dtype=torch.int64)
                self.register_buffer(f"{factor}__seen_count", count)
        if spec.scope == "running":
            self.register_buffer("seen_mean", torch.zeros(2))
        keeps_all = spec.reduction == "token_mean" and spec.on_nonfinite == "error"
        self.identity = keeps_all and all(
            _is_identity(steps) if self.applied[name] == "loss" else not self._runs(name)
            for name, steps in self.plans.items()
        )
        self.local = tuple(
            name
            for name, steps in self.plans.items()
            if self.applied[name] != "sampling" and _is_local(steps)
        )
        self.late = self._late()
        self.compares = compared_levels(self)
        self._warned = False

    @override
    def forward(self, signals: Signals, step: int | Tensor = 0) -> Weights:
        """Return the weights of a batch.

        Args:
            signals: Per-token tensors, [B, L] or [T]; at least `needs`.
            step: Optimizer step; a 0-D tensor keeps one compiled graph for all steps.

        Raises:
            ValueError: A signal it needs is missing or of another shape.
        """
        shape, device = signals.loss.shape, signals.loss.device
        flat = _flatten(signals, self.needs)
        assert flat.valid is not None
        if not flat.loss.numel():
            msg = f"an empty batch, {[*shape]}, has no weights"
            raise ValueError(msg)
        step = torch.as_tensor(step, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            compared: dict[str, Tensor] = {}
            if self.identity:
                runs = {name: _ones(flat.valid, flat.loss.isfinite()) for name in self.plans}
                token = flat.valid.float()
            else:
                runs = {name: self._weigh(name, signals, flat, step) for name in self.plans}
                compared = {n: run.units for n, run in runs.items() if run.units is not None}
                token, runs, units = self._combine(signals, flat, runs)
                compared |= {name: units for name in self.compares if name not in runs}
            ok = torch.stack([run.ok for run in runs.values()]).all(0)
            rows = [run.moments(flat.valid) for run in runs.values()]
            rows.append(_moments(token, ok, flat.valid & ~ok, largest=None))
            return Weights(
                token=token.reshape(shape),
                factors={name: run.token.reshape(shape) for name, run in runs.items()},
                moments=torch.stack(rows),
                compared=compared,
            )

    def local_part(self, signals: Signals, step: int | Tensor = 0) -> Tensor:
        """Return the product of the `local` factors before they are scaled, in the loss's shape.

            weight_t = local_part_t * r(t),   r the same for all tokens of a unit of `late`

        It is 0 where the weight is 0 for a non-finite signal, and never 0 for another reason that
        a later scaling might undo: scores of 0 count as 1e-30.

        Args:
            signals: Of any part of a batch.
            step: Optimizer step.
        """
        loss = signals.loss
        read = (_needs(self.plans[name]) for name in self.local)
        flat = _flatten(signals, frozenset().union(*read))
        assert flat.valid is not None
        sound = flat.valid & flat.loss.isfinite()
        product, step = sound.float(), torch.as_tensor(step, device=loss.device)
        with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
            for name in self.local:
                product = product * self._floored(name, self._run_local(name, signals, flat, step))
        return product.reshape(loss.shape)

    def domain_weights(self, step: int | Tensor = 0) -> dict[str, Tensor]:
        """Return the weight of each domain by the factors that tell one between batches.

        Args:
            step: Optimizer step.

        Returns:
            For each such factor weights that sum to one, [K], in the order of `domains`.
        """
        assert self.domains, "without domains there is nothing to weigh"
        told = (name for name, steps in self.plans.items() if tells_domains(steps))
        return {name: self._told(name, step) for name in told}

    def live_weights(self, step: int | Tensor = 0) -> dict[str, Tensor]:
        """Return those of `domain_weights` whose factors remember, and so move."""
        told = self.domain_weights(step)
        return {name: told[name] for name in told if _remembers(self.plans[name])}

    def average_weights(self) -> dict[str, Tensor]:
        """Return the averages over the run of domain weights, of the factors that keep one."""
        found: dict[str, Tensor] = {}
        for factor, index in self._buffers_of:
            state = self._state_of(factor, index)
            if "average" in state and tells_domains(self.plans[factor]):
                found[factor] = state["average"] / state["average"].sum()
        return found

    def proportions(self, step: int | Tensor = 0) -> Tensor:
        """Return in which proportions to draw the domains of the next batch, [K], sum one.

            p_d = prod_f w_fd / sum_e prod_f w_fe      f: the factors of `sampling`

        Args:
            step: Optimizer step of that batch.
        """
        assert self.sampling, "the spec draws nothing"
        told = self.domain_weights(step)
        product = torch.stack([told[name] for name in self.sampling]).double().prod(0)
        return product / product.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def tell(self, news: News, x: Tensor, step: int | Tensor = 0) -> None:
        """Tell the stages that listen what happened between batches; their state moves.

        Args:
            news: What it is.
            x: As `News` says.
            step: Optimizer step.
        """
        at = self._at(step)
        everywhere = torch.ones(len(self.domains), dtype=torch.bool, device=at.device)
        scope = Scope("domain", at, everywhere, self.domains)
        for (factor, index), names in self._buffers_of.items():
            stage = self.plans[factor][index].stage
            if stage.hears == news:
                before = self._state_of(factor, index)
                with torch.no_grad():
                    after = stage.hear(x.to(at.device, torch.float32), _with_state(scope, before))
                assert after.keys() == names.keys(), f"{stage.name} must return its whole state"
                for key, value in after.items():
                    before[key].copy_(value)

    @property
    def moves_domains(self) -> bool:
        """Whether some factor's weights of domains move and are known between batches."""
        return any(_remembers(steps) and tells_domains(steps) for steps in self.plans.values())

    @property
    def draws_live(self) -> bool:
        """Whether `proportions` may change from step to step."""
        return any(
            _remembers(self.plans[name]) or any(map(_moves, self.plans[name]))
            for name in self.sampling
        )

    @property
    def looks_around(self) -> bool:
        """Whether a weight depends on more than its own document or sequence and the state."""
        stages = [step.stage for steps in self.plans.values() for step in steps]
        statistics = any(not (x.pointwise or isinstance(x, Pool)) for x in stages)
        by_domain = any(step.level == "domain" for steps in self.plans.values() for step in steps)
        scaled = self.spec.normalize == "mean_one" or self.spec.reduction != "token_mean"
        return not self.identity and (statistics or by_domain or scaled)

    def most(self) -> float:
        """Return the largest share of this rank's tokens that weigh more than 0.

        But for ties, and for one token more in each sequence.
        """
        shares = [1.0]
        for steps in self.plans.values():
            stage, level = steps[-1].stage, steps[-1].level
            whole = self.collectives.parts.size == 1
            here = isinstance(self.collectives, Alone) or (whole and stage.inside() == "sequence")
            if isinstance(stage, Weigh) and level == "token" and here:
                shares.append(stage.most())
        return min(shares)

    def check(self, weights: Weights) -> None:
        """Raise if a signal was not finite and the spec says `on_nonfinite: error`; synchronises.

        Warns, once, if a batch had one unit to compare; see `OneUnitWarning`.

        Raises:
            NonFiniteSignalError: Says how many tokens and what to do.
        """
        raise_if_nonfinite(self.spec, int(weights.moments[-1, MOMENTS.index("nonfinite")]))
        self._warn([name for name, units in weights.compared.items() if int(units) == 1])

    def warn_of_one_unit(self, weights: Weights, *, rows_are_sequences: bool) -> None:
        """Warn, once, where a batch had one unit to compare, so that all tokens weigh alike.

        On CPU the units are counted.  On other devices counting would wait, so that only what
        shapes tell is looked at here, and the rest in `check`.

        Args:
            weights: Of the batch.
            rows_are_sequences: No ids told its sequences.
        """
        # Asked first, since a compiled graph must not depend on what was said before.
        if torch.compiler.is_compiling() or self._warned or not self.training:
            return
        shape = weights.token.shape
        one_row = rows_are_sequences and len(shape) > 1 and shape[0] * self.collectives.size == 1
        one = {"sequence": one_row, "domain": len(self.domains) == 1}
        counted = weights.token.device.type == "cpu"
        self._warn(
            [
                name
                for name, units in weights.compared.items()
                if (int(units) == 1 if counted else one.get(self.compares[name], False))
            ]
        )

    def _warn(self, alone: list[str]) -> None:
        """Warn of the first of what had one unit to compare, in training, unless that was done."""
        if not alone or self._warned or not self.training:
            return
        self._warned = True
        if self.collectives.rank == 0:
            level = self.compares[alone[0]]
            text = one_unit(self, alone[0], level, "this batch has", _MORE_UNITS[level])
            warnings.warn(text, OneUnitWarning, stacklevel=4)

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load this module's part of a saved state; torch calls it wherever in a model it stands.

        Raises:
            ValueError: The state is none that the stages could be in.
        """
        given = {name: state_dict.get(prefix + name) for name, _ in self.named_buffers()}
        saved = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        problems = dict[str, str]()
        for name, must in self._problems_with(saved):
            problems.setdefault(name, must)
        if problems:
            wrong = "; ".join(
                f"{prefix}{name} is {shown(saved[name])} and must be {must}"
                for name, must in problems.items()
            )
            msg = (
                f"the saved state of {self.spec.name} cannot be gone on from: {wrong}. The run had "
                "gone wrong before it was saved, or the file was changed: load an earlier one, or "
                "leave the weighting's state out, so that it starts afresh"
            )
            raise ValueError(msg)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _problems_with(self, saved: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
        """Yield (name, what it must be) for buffers that cannot be loaded."""
        known: dict[str, Tensor] = {}
        for name, buffer in self.named_buffers():
            value = saved.get(name)
            if value is None or value.is_meta or value.shape != buffer.shape:
                continue  # what is missing or has another shape torch refuses itself
            if torch.can_cast(value.dtype, buffer.dtype):
                known[name] = value
            else:
                yield name, f"{buffer.dtype}".removeprefix("torch.")
        for (factor, index), names in self._buffers_of.items():
            stage = self.plans[factor][index].stage
            state = {key: known.pop(name) for key, name in names.items() if name in known}
            if state.keys() == names.keys():
                problems = stage.problems_with_state(state, self.domains)
            else:  # with strict=False
                problems = Stage.problems_with_state(stage, state, self.domains)
            yield from ((names[key], must) for key, must in problems)
        yield from not_finite(known)  # the rest is of scope: running
        counts = [name for name in known if name.endswith("__seen_count")]
        yield from not_between(known, 0, RUNNING_UNITS, *counts)
        if "seen_mean" in known:
            yield from not_between(known, 0, torch.inf, "seen_mean")

    def _remember(self, factor: str, index: int, stage: Stage) -> None:
        """Register the state of a stage as buffers, named for where it stands."""
        names: dict[str, str] = {}
        for key, value in stage.initial_state(self.domains).items():
            names[key] = f"{factor}__{index}_{stage.name}__{key}"
            self.register_buffer(names[key], value.clone())
        if names:
            self._buffers_of[factor, index] = names

    def _runs(self, factor: str) -> bool:
        """Tell whether a batch changes anything about a factor or by it."""
        return self.applied[factor] != "sampling" or _follows(self.plans[factor])

    def _told(self, factor: str, step: int | Tensor) -> Tensor:
        """Return a factor's weight of each domain as it stands, sum one."""
        at = self._at(step)
        ids = torch.arange(len(self.domains), device=at.device)
        scope = Scope("domain", at, torch.ones_like(ids, dtype=torch.bool), self.domains)
        x = torch.zeros_like(ids, dtype=torch.float32)
        steps = [*enumerate(self.plans[factor])]
        if steps[-1][1].level == "domain":  # what comes before has gone into the state
            steps = [*dropwhile(lambda item: not isinstance(item[1].stage, Weigh), steps)]
        with torch.no_grad():
            for index, (stage, *_) in steps:
                around = _with_state(scope, self._state_of(factor, index))
                if isinstance(stage, Source):
                    x = stage.read(Signals(loss=x, domain_ids=ids), around)
                else:
                    assert isinstance(stage, Shape | Weigh | Constrain)
                    x = stage.apply(x, around)
        return x / x.sum()

    def _at(self, step: int | Tensor) -> Tensor:
        """Return a step where the state is."""
        device = next((buffer.device for buffer in self.buffers()), None)
        return torch.as_tensor(step, device=device)

    def _state_of(self, factor: str, index: int) -> dict[str, Tensor]:
        names = self._buffers_of.get((factor, index), {})
        return {key: self.get_buffer(name) for key, name in names.items()}

    def _late(self) -> Literal["sequence", "token"] | None:
        if self.identity:
            return None
        levels = {
            steps[-1].level
            for name, steps in self.plans.items()
            if self.applied[name] != "sampling" and name not in self.local
        }
        if "both" in self.applied.values():
            levels.add("domain")
        if self.spec.reduction == "sequence_mean":
            levels.add("sequence")
        if not levels and self.spec.reduction == "token_mean":
            return None
        return "sequence" if levels == {"sequence"} else "token"

    def _weigh(self, factor: str, signals: Signals, flat: Signals, step: Tensor) -> _Run:
        """Run a factor; one that acts on sampling alone weighs every token one."""
        assert flat.valid is not None
        if factor in self.local:
            return self._run_local(factor, signals, flat, step)
        if not self._runs(factor):
            return _ones(flat.valid, flat.loss.isfinite())
        run = self._run(factor, signals, flat, step)
        if self.applied[factor] != "sampling":
            return run
        return _ones(flat.valid & flat.loss.isfinite(), run.ok)

    def _run_local(self, factor: str, signals: Signals, flat: Signals, step: Tensor) -> _Run:
        """Run the stages of a local factor up to the number that scales it."""
        del signals
        assert flat.valid is not None
        (source, *rest) = [step.stage for step in self.plans[factor]]
        assert isinstance(source, Source)
        sound = flat.valid & _all_finite(flat, source.reads() | {"loss"})
        scope = Scope("token", step, sound, self.domains)
        around = _with_state(scope, self._state_of(factor, 0))  # batches do not move it
        x, scope = _finite(source.read(flat, around), scope)
        for stage in rest:
            assert isinstance(stage, Shape | Weigh | Constrain)
            x = stage.raw(x) if isinstance(stage, MeanOne) else stage.apply(x, scope)
            if stage.gives == "score":
                x, scope = _finite(x, scope)
        x = torch.where(scope.valid, x, 0)
        return _Run(x, scope.valid, x, scope.valid)

    def _floored(self, factor: str, run: _Run) -> Tensor:
        """Return token weights of which one that may yet be scaled up from 0 is not 0."""
        if not self._is_unscaled(factor):
            return run.token
        unscaled = sum(map(self._is_unscaled, self.local))
        return torch.where(run.ok, run.token.clamp(min=_FLOOR ** (1 / unscaled)), 0)

    def _is_unscaled(self, factor: str) -> bool:
        return factor in self.local and isinstance(self.plans[factor][-1].stage, MeanOne)

    def _run(self, factor: str, signals: Signals, flat: Signals, step: Tensor) -> _Run:
        """Run one factor's stages."""
        assert flat.valid is not None
        (source, *rest) = [step.stage for step in self.plans[factor]]
        assert isinstance(source, Source)
        sound = flat.valid & _all_finite(flat, source.reads() | {"loss"})
        scope = Scope("token", step, sound, self.domains, self.collectives)
        tokens_ok, groups, largest = flat.valid, None, None
        around = self._advanced(factor, 0, partial(source.advance, flat), scope)
        x, scope = _finite(source.read(flat, around), scope)
        for index, stage in enumerate(rest, 1):
            if isinstance(stage, Pool):
                groups = group(signals, stage.level, len(self.domains), self.collectives)
                assert groups is not None
                x, scope, tokens_ok = self._pool(stage, x, flat.valid, scope, groups)
                if self.spec.scope == "running":
                    x, scope = self._with_earlier(factor, *_finite(x, scope))
            else:
                assert isinstance(stage, Shape | Weigh | Constrain)
                advance = partial(stage.advance, x)
                around = self._advanced(factor, index, advance, scope)
                if inside := stage.inside():
                    parts = group(signals, inside, len(self.domains), self.collectives)
                    assert parts is not None
                    around = around.within(parts)
                x = stage.apply(x, around)
            if stage.gives == "score":
                x, scope = _finite(x, scope)
            if isinstance(stage, Clamp):
                largest = stage.max(step)
        x = torch.where(scope.valid, x, 0)
        x, valid = self._own(x, scope), self._own(scope.valid, scope)
        token = groups.broadcast(x) if groups else x
        tokens_ok = tokens_ok & (groups.broadcast(valid) if groups else valid)
        # Of all ranks, which have been brought together.
        units = scope.valid.sum() if factor in self.compares else None
        return _Run(x, valid, torch.where(tokens_ok, token, 0), tokens_ok, largest, units)

    def _advanced(
        self,
        factor: str,
        index: int,
        advance: Callable[[Scope], dict[str, Tensor]],
        scope: Scope,
    ) -> Scope:
        """Return the scope with the stage's state after this batch; keep it when training."""
        before = self._state_of(factor, index)
        if not before:
            return scope
        after = advance(_with_state(scope, before))
        name = self.plans[factor][index].stage.name
        assert after.keys() == before.keys(), f"{name} must return the state it was given"
        if not self.training:
            return _with_state(scope, after)
        # The caller's graph may replay: the state is written where it is, never replaced.
        after = {key: value.to(before[key].dtype) for key, value in after.items()}
        for key, value in after.items():
            assert value.shape == before[key].shape, f"{name} changed the shape of {key}"
            before[key].copy_(value)
        return _with_state(scope, after)

    def _pool(
        self, stage: Pool, x: Tensor, valid: Tensor, scope: Scope, groups: Groups
    ) -> tuple[Tensor, Scope, Tensor]:
        """Pool token scores to units, and bring the units of all ranks together."""
        bad = valid & ~scope.valid
        counting = groups.counting(torch.stack([scope.valid.float(), bad.float()]))
        score = stage.pool(x, scope.valid, counting)
        present, spoilt = counting.counts() > 0
        if groups.level == "domain":  # a bad token must not silence its whole domain
            return score, Scope("domain", scope.step, present, self.domains), scope.valid
        packed = torch.stack([score, (present & ~spoilt).float()])
        score, ok = self.collectives.gather(packed).transpose(0, 1).flatten(1)
        return score, Scope(groups.level, scope.step, ok > 0, self.domains), valid

    def _with_earlier(self, factor: str, x: Tensor, scope: Scope) -> tuple[Tensor, Scope]:
        """Put the units of earlier batches behind those at hand, and remember these first."""
        seen = self.get_buffer(f"{factor}__seen")
        count = self.get_buffer(f"{factor}__seen_count")
        kept = torch.arange(RUNNING_UNITS, device=x.device) < count
        values, usable = torch.cat([x, seen]), torch.cat([scope.valid, kept])
        if self.training:
            newest = usable.to(torch.int8).argsort(descending=True, stable=True)[:RUNNING_UNITS]
            count.copy_((count + scope.valid.sum()).clamp(max=RUNNING_UNITS))
            seen.copy_(values[newest])
        return values, Scope(scope.level, scope.step, usable, scope.domains)

    def _with_earlier_mean(self, sums: Tensor, sequences: Tensor) -> tuple[Tensor, ...]:
        """Add a batch's sum and number of weights to those before it, which fade as units do.

        A batch of one sequence would else be scaled to one, and weigh nothing.

        Args:
            sums: Sum and number of the weights.
            sequences: How many sequences the batch has on all ranks, 0-D.
        """
        kept = (1 - sequences / RUNNING_UNITS).clamp(min=0)
        before = self.get_buffer("seen_mean")
        after = kept * before + sums
        if self.training:
            before.copy_(after)
        return after.unbind()

    def _own(self, x: Tensor, scope: Scope) -> Tensor:
        """Return this rank's part of units that were brought together."""
        if scope.level in {"token", "domain"}:
            return x
        if self.spec.scope == "running":
            x = x[:-RUNNING_UNITS]
        return x.unflatten(0, (self.collectives.size, -1))[self.collectives.rank]

    def _combine(
        self, signals: Signals, flat: Signals, runs: dict[str, _Run]
    ) -> tuple[Tensor, dict[str, _Run], Tensor]:
        """Multiply the factors and scale: the product to mean one, and those not yet scaled.

        All scales take one collective; it is left out when there is nothing to scale.  Returned
        last is how many units the reduction counts alike.
        """
        valid = flat.valid
        assert valid is not None
        share, units = self._share(signals, valid)
        if flat.domain_ids is not None:
            share = share * self._correction(flat.domain_ids)
        rough = torch.stack([self._floored(name, run) for name, run in runs.items()]).prod(0)
        rough = rough * share
        unscaled = [name for name in runs if self._is_unscaled(name)]
        sums = [rough.sum(), valid.sum().float()]
        if self.spec.scope == "running":
            sums.append(self._sequences(signals, valid))
        scales = len(sums)
        for name in unscaled:
            sums += [runs[name].token.sum(), runs[name].ok.sum().float()]
        if self.spec.normalize == "mean_one" or unscaled:
            sums = self.collectives.sum(torch.stack(sums)).unbind()
        totals, counts = sums[scales::2], sums[scales + 1 :: 2]
        for name, total, count in zip(unscaled, totals, counts, strict=True):
            stage = self.plans[name][-1].stage
            assert isinstance(stage, MeanOne)
            run = runs[name]
            token = torch.where(run.ok, stage.scale(run.token, total, count), 0)
            runs = {**runs, name: run._replace(unit=token, token=token)}
        product = torch.stack([run.token for run in runs.values()]).prod(0) * share
        if self.spec.normalize == "none":
            return product, runs, units
        total, count = sums[:2]
        if self.spec.scope == "running":
            total, count = self._with_earlier_mean(torch.stack([total, count]), sums[2])
        token = torch.where(product > 0, rough / torch.where(total > 0, total, 1) * count, 0)
        return token, runs, units

    def _correction(self, domain_ids: Tensor) -> Tensor:
        """Return what undoes the draw for factors that act on both, [T]."""
        if "both" not in self.applied.values():
            return torch.ones_like(domain_ids, dtype=torch.float32)
        drawn = self.get_buffer("drawn") * len(self.domains)
        return (1 / drawn.clamp(min=1e-30)).index_select(0, domain_ids)

    def _sequences(self, signals: Signals, valid: Tensor) -> Tensor:
        """Return how many sequences with a valid token are here, 0-D, for a sum over all ranks.

        Ranks that hold parts of the same sequences count their share of them.  Tokens that nothing
        puts into sequences count as one.
        """
        no_ids = signals.sequence_ids is None and signals.segment_ids is None
        if signals.loss.dim() == 1 and no_ids:
            return torch.ones_like(valid[0], dtype=torch.float32)
        groups = group(signals, "sequence", len(self.domains), self.collectives)
        assert groups is not None
        return (groups.sum(valid.float()) > 0).sum() / self.collectives.parts.size

    def _share(self, signals: Signals, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each token counts before weighting, and the number of units counted alike.

        That is one, or its part of its unit.  Of the sequences of other ranks at least one each is
        counted, as counting them would take a collective.
        """
        if self.spec.reduction == "token_mean":
            return torch.ones_like(valid, dtype=torch.float32), valid.sum()
        level = "sequence" if self.spec.reduction == "sequence_mean" else "domain"
        groups = group(signals, level, len(self.domains), self.collectives)
        assert groups is not None
        lengths = groups.sum(valid.float())
        share = 1 / groups.broadcast(lengths).clamp(min=1)
        units = (lengths > 0).sum().float()
        # Every rank holds all domains, but its own sequences only.
        if self.spec.normalize == "mean_one":
            return share, units if level == "domain" else units + self.collectives.size - 1
        tokens = self.collectives.sum(valid.sum().float())
        units = units if level == "domain" else self.collectives.gather(units).sum()
        return share * (tokens / units.clamp(min=1)), units


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


class _Run(NamedTuple):
    """One factor's outcome: weights of its units, which count, and the same of the tokens."""

    unit: Tensor
    valid: Tensor
    token: Tensor
    ok: Tensor
    largest: Tensor | None = None
    units: Tensor | None = None

    def moments(self, valid: Tensor) -> Tensor:
        return _moments(self.unit, self.valid, valid & ~self.ok, self.largest)


def _expand(stage: Stage) -> Iterator[Stage]:
    parts = stage.expand()
    if parts == (stage,):
        yield stage
    else:
        for part in parts:
            yield from _expand(part)


def _misfits(pipeline: tuple[Stage, ...]) -> Iterator[tuple[int, str]]:
    """Yield (index, message) for every stage that cannot stand where it is written."""
    sound: list[Stage] = []
    for index, stage in enumerate(pipeline):
        if message := _misfit(stage, sound):
            yield index, message
        else:
            sound.append(stage)  # a misfit is passed over, lest it make others
    if len(sound) < len(pipeline):
        return
    for step in plan(pipeline):
        if step.level not in step.stage.levels:
            fits = " or ".join(f"mean({level})" for level in step.stage.levels if level != "token")
            message = f"{step.stage.name} cannot weigh units of level {step.level}"
            yield step.index, f"{message}; put {fits} before it"
        if step.stage.inside() and step.level != "token":
            message = f"{step.stage.name} works within each {step.stage.inside()} on tokens only"
            yield step.index, f"{message}, and this score is per {step.level}"
    if sound[-1].gives != "weight":
        yield len(pipeline) - 1, f"the pipeline ends in a score; {_TO_WEIGHT} at its end"


def _misfit(stage: Stage, earlier: list[Stage]) -> str | None:
    """Return why a stage cannot follow the earlier ones, or begin a pipeline, or None."""
    if not earlier:
        if stage.takes == "weight":
            return f"{stage.name} changes weights and cannot come first; {_TO_WEIGHT} before it"
        return None
    before = earlier[-1]
    if stage.takes is None:
        return f"{stage.name} starts a pipeline and cannot follow {before.name}"
    if stage.takes == "weight" and before.gives == "score":
        return (
            f"{stage.name} takes a weight, but {before.name} gives a score; {_TO_WEIGHT} before it"
        )
    if stage.takes == "score" and before.gives == "weight":
        message = f"{stage.name} takes a score, but {before.name} has already made weights of it"
        return f"{message}; a pipeline weighs once, at its end"
    if isinstance(stage, Pool):
        if any(isinstance(other, Pool) for other in earlier):
            return f"{stage.name}({stage.level}) pools tokens, but they are already pooled"
        first = earlier[0]
        if first.takes == "score":
            stands = f"{first.name} at the head stands for loss -> mean(sequence) -> {first.name}"
            return f"{stands}; put {stage.name}({stage.level}) before it"
    return None


_TO_WEIGHT = "put temperature(...) or mean_one"
_MORE_UNITS: dict[str, str] = {
    "sequence": (
        "a row is one sequence unless sequence_ids tell them apart, as they must in a padding-free "
        "batch: give sequence_ids, or larger batches, or write scope: running into the spec"
    ),
    "document": "give segment_ids, or larger batches, or write scope: running into the spec",
    "domain": "mix domains in each batch, and give build all of their names",
}


def _domain_problems(spec: Spec, domains: Sequence[str] | None) -> list[Problem]:
    problems: list[Problem] = []
    if spec.reduction == "domain_mean" and not domains:
        return [
            Problem("reduction: domain_mean needs domain names; give build(spec, domains=[...])")
        ]
    if {*applied(spec).values()} != {"loss"} and not domains:
        return [Problem("to draw by domain needs domain names; give build(spec, domains=[...])")]
    for factor, pipeline in spec.factors.items():
        for step in plan(pipeline):
            if "domain_ids" not in _needs([step]):
                continue
            place = spec.place(factor, step.index)
            if not domains:
                message = f"{factor} needs domain names; give build(spec, domains=[...])"
                return [Problem(message, place)]
            reason = isinstance(step.stage, Source) and step.stage.problem_with(tuple(domains))
            if reason:
                problems.append(Problem(reason, place))
    drawn = _sampling(applied(spec))
    tables = [x.weights for name in drawn for x in spec.factors[name] if isinstance(x, Table)]
    never = {name for table in tables for name, x in table.items() if x == Constant(value=0)}
    if domains and never >= {*domains} and not problems:
        message = f"nothing can be drawn: every domain has weight 0 in {' or '.join(drawn)}"
        problems.append(Problem(message, spec.place(drawn[0], 0)))
    return problems


def _needs(steps: Sequence[Step]) -> frozenset[str]:
    read = (step.stage.reads() for step in steps if isinstance(step.stage, Source))
    levels = {step.level for step in steps} | {step.stage.inside() for step in steps}
    ids = {_LEVEL_IDS[level] for level in levels if level in _LEVEL_IDS}
    return frozenset(ids).union(*read)


def _is_local(steps: list[Step]) -> bool:
    *rest, last = [step.stage for step in steps]
    scaled_at_end = isinstance(last, MeanOne) and last.within is None
    on_tokens = all(step.level == "token" for step in steps)
    return on_tokens and all(x.pointwise for x in rest) and (scaled_at_end or last.pointwise)


def _remembers(steps: Sequence[Step]) -> bool:
    return any(step.stage.initial_state(("",)) for step in steps)


def _follows(steps: Sequence[Step]) -> bool:
    """Tell whether batches move what a factor remembers, and not only what it is told between."""
    stages = (step.stage for step in steps)
    return any(stage.initial_state(("",)) and not stage.hears for stage in stages)


def _moves(step: Step) -> bool:
    """Tell whether a number of a stage is a schedule that changes."""
    return any(not isinstance(x, Constant | ShareOfN) for _, x in numbers(step.stage))


def _sampling(where: dict[str, Apply]) -> tuple[str, ...]:
    """Return the factors that draw: those that do nothing else, or else those that do both."""
    for word in ("sampling", "both"):
        if found := tuple(name for name, acts in where.items() if acts == word):
            return found
    return ()


def _apply_problems(spec: Spec) -> list[Problem]:
    """Return what keeps domain weights from acting where they should."""
    problems: list[Problem] = []
    asked = spec.apply if isinstance(spec.apply, dict) else dict.fromkeys(spec.factors, spec.apply)
    for factor, acts in asked.items():
        steps = plan(spec.factors[factor])
        place = spec.place(factor, len(spec.factors[factor]) - 1)
        by_name = isinstance(spec.apply, dict)
        if acts == "loss" or not (by_name or steps[-1].level == "domain"):
            continue
        if tells_domains(steps):
            continue
        if steps[-1].level == "domain":
            message = (
                f"apply: {acts} draws before a batch is seen, and {factor} knows its weights only "
                "after; end it in a stage that remembers, such as exponentiated, or apply it to "
                "the loss"
            )
        else:
            message = (
                f"apply: {acts} draws by the weights of domains, and {factor} weighs each "
                f"{steps[-1].level}; leave it to the loss, or name a factor that weighs domains"
            )
        problems.append(Problem(message, place))
    if spec.reduction == "domain_mean" and "both" in applied(spec).values():
        message = (
            "reduction: domain_mean counts every domain alike whatever is drawn, so apply: both "
            "would undo the draw twice; apply it to the loss"
        )
        problems.append(Problem(message, spec.place(next(iter(spec.factors)), 0)))
    told = {name for name, pipeline in spec.factors.items() if tells_domains(plan(pipeline))}
    for name, acts in asked.items():
        listening = [x.stage.name for x in plan(spec.factors[name]) if x.stage.hears == "gradients"]
        if listening and acts != "loss" and name in told:
            message = (
                f"{listening[0]} compares the gradients of domains that take turns, so it draws "
                "nothing; apply it to the loss, and draw a later run's data by what it finds"
            )
            problems.append(Problem(message, spec.place(name, 0)))
    if isinstance(spec.apply, str) and spec.apply != "loss" and not told and not problems:
        message = f"apply: {spec.apply}, but no factor weighs domains; add one, such as a table"
        problems.append(Problem(message, spec.place(next(iter(spec.factors)), 0)))
    return problems


def _is_identity(steps: list[Step]) -> bool:
    first, *rest = [step.stage for step in steps]
    return isinstance(first, Uniform) and all(isinstance(stage, Constrain) for stage in rest)


def _flatten(signals: Signals, needs: frozenset[str]) -> Signals:
    """Return the needed signals as flat float32, with 0 at invalid tokens."""
    loss = signals.loss
    valid = torch.ones_like(loss, dtype=torch.bool) if signals.valid is None else signals.valid
    flat: dict[str, Any] = {"columns": {}}
    for name in needs | {"loss", "valid"}:
        _, is_column, column = name.partition("columns.")
        value = signals.columns.get(column) if is_column else getattr(signals, name)
        value = valid if name == "valid" else value
        if value is None:
            if name == "target_prob":
                continue  # the stage derives it from the loss
            give = f"columns={{{column!r}: ...}}" if is_column else f"{name}=..."
            msg = f"this spec reads {name}; give Signals({give})"
            raise ValueError(msg)
        if value.shape != loss.shape:
            msg = f"{name} has shape {[*value.shape]}, the loss {[*loss.shape]}; they must agree"
            raise ValueError(msg)
        value = value.detach().reshape(-1)
        if name == "valid":
            flat[name] = value.bool()
            continue
        value = value.long() if name.endswith("_ids") else value.float()
        value = torch.where(valid.reshape(-1).bool(), value, 0)
        if is_column:
            flat["columns"][column] = value
        else:
            flat[name] = value
    return Signals(**flat)


def _finite(x: Tensor, scope: Scope) -> tuple[Tensor, Scope]:
    """Leave units whose score is not finite out of the scope."""
    ok = x.isfinite()
    kept = Scope(scope.level, scope.step, scope.valid & ok, scope.domains, scope.collectives)
    return torch.where(ok, x, 0), kept


def _with_state(scope: Scope, state: dict[str, Tensor]) -> Scope:
    return Scope(scope.level, scope.step, scope.valid, scope.domains, scope.collectives, state)


def _all_finite(flat: Signals, names: frozenset[str]) -> Tensor:
    """Return which tokens have finite values of all the named signals, those that are given."""
    ok = flat.loss.isfinite()
    for name in sorted(names):
        _, is_column, column = name.partition("columns.")
        value = flat.columns.get(column) if is_column else getattr(flat, name)
        if value is not None and value.is_floating_point():
            ok = ok & value.isfinite()
    return ok


def _ones(valid: Tensor, finite: Tensor) -> _Run:
    return _Run(valid.float(), valid, valid.float(), valid & finite)


def _moments(weight: Tensor, valid: Tensor, dropped: Tensor, largest: Tensor | None) -> Tensor:
    """Return the row of `MOMENTS` of one set of units."""
    at_cap = torch.zeros_like(valid) if largest is None else weight >= largest * (1 - 1e-5)
    return torch.stack(
        [
            valid.sum().float(),
            torch.where(valid, weight, 0).sum(),
            torch.where(valid, weight * weight, 0).sum(),
            (valid & at_cap).sum().float(),
            dropped.sum().float(),
            torch.where(valid, weight, torch.inf).amin(),
            torch.where(valid, weight, -torch.inf).amax(),
        ]
    )

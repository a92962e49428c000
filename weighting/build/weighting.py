"""The module that a plan becomes: signals and step in, weights out; its buffers are the state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from weighting.build.compared import MORE_UNITS, compared_levels, one_unit
from weighting.build.flatten import all_finite, flatten
from weighting.build.memory import (
    RUNNING_MEAN,
    RUNNING_UNITS,
    earlier_names,
    initial_buffers,
    state_names,
    state_problems,
    with_earlier,
    with_earlier_mean,
)
from weighting.build.plan import reduced_level
from weighting.build.statistics import MOMENTS, moments, raise_if_nonfinite, summarize
from weighting.contract import Combine, Constrain, Pool, Scope, Shape, Source, Weigh
from weighting.contract.collectives import CountedOnce
from weighting.contract.levels import domains_of, group, inside_domains
from weighting.errors import OneUnitWarning
from weighting.language.html import weights_html
from weighting.pipeline import on_tokens, signals_read
from weighting.saved import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weighting.build.plan import Plan
    from weighting.contract import Collectives, Groups, Level, Signals
    from weighting.contract.stage import DeferredScale
    from weighting.spec import Spec

_SMALLEST, _LARGEST = 1e-30, 1e30
"""What a product of local weights counts as at least until it is known that not all are 0, and what
a product of weights counts as at most, so that its sum is finite."""


@dataclass(frozen=True)
class Weights:
    """What a built pipeline returns, in the shape of the signals; float32, no gradient.

    Attributes:
        token: Final weight of each token: the product of the factors, mean one over valid
            tokens unless the spec says otherwise, 0 at ignored ones.
        factors: Each factor's weight of each token, before the product.
        moments: [factors + 1, 8] statistics of the weights of this rank's units, one row per
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


class Weighting(nn.Module):
    """A built spec: signals and step in, weights out; pure but for its buffers, the state.

    Attributes:
        plan: What it was built from, spelled out.
        domains: Names of the domains, in the order of their ids.
        collectives: How statistics reach other ranks.
        compares: What weighs all tokens alike when there is one unit in its scope, with the level
            of that unit: factors by name, and the reduction.
        told_of_one_unit: Whether the warning of such a batch was given, which it is once.
    """

    def __init__(self, plan: Plan, domains: tuple[str, ...], collectives: Collectives) -> None:
        super().__init__()
        self.plan = plan
        self.domains = domains
        self.collectives = collectives
        self.compares = compared_levels(plan)
        self.told_of_one_unit = False
        self._state_names = {name: state_names(plan, name, domains) for name in plan.factors}
        for name, value in initial_buffers(plan, domains).items():
            self.register_buffer(name, value)
        if "both" in plan.targets.values():
            count = max(len(domains), 1)
            self.register_buffer("drawn", torch.full((count,), 1 / count), persistent=False)

    @property
    def spec(self) -> Spec:
        """The spec it was built from."""
        return self.plan.spec

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Signals` it reads, columns as "columns.name"."""
        return self.plan.needs

    if TYPE_CHECKING:
        # torch declares that of every module as returning Any.
        @override
        def __call__(self, signals: Signals, step: int | Tensor = 0) -> Weights: ...

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
        flat = flatten(signals, self.plan.needs)
        assert flat.valid is not None
        if not flat.loss.numel():
            msg = f"an empty batch, {[*shape]}, has no weights"
            raise ValueError(msg)
        step = torch.as_tensor(step, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            compared: dict[str, Tensor] = {}
            if self.plan.identity:
                runs = {x: _ones(flat.valid, flat.loss.isfinite()) for x in self.plan.factors}
                token = flat.valid.float()
            else:
                runs = {x: self._weigh(x, signals, flat, step) for x in self.plan.factors}
                compared = {n: run.units for n, run in runs.items() if run.units is not None}
                signed = {name: runs[name] for name in self.plan.signed}
                sizes = {x: run._replace(token=run.token.abs()) for x, run in signed.items()}
                token, runs, units = self._combine(signals, flat, runs | sizes)
                for run in signed.values():
                    token = token * run.token.sign()
                runs |= signed
                compared |= {name: units for name in self.compares if name not in runs}
            ok = torch.stack([run.ok for run in runs.values()]).all(0)
            token = self._from_start(token, ok, step)
            rows = [
                moments(run.unit, run.valid, flat.valid & ~run.ok, run.cap) for run in runs.values()
            ]
            rows.append(moments(token, ok, flat.valid & ~ok, None))
            return Weights(
                token=token.reshape(shape),
                factors={name: run.token.reshape(shape) for name, run in runs.items()},
                moments=torch.stack(rows),
                compared=compared,
            )

    def local_part(self, signals: Signals, step: int | Tensor = 0) -> Tensor:
        """Return the product of the token-local factors before they are scaled, as the loss.

            weight_t = local_part_t * r(t),   r the same for all tokens of a deferred unit

        It is 0 where the weight is 0 for a non-finite signal, and never 0 for another reason that
        a later scaling might undo: scores of 0 count as 1e-30.

        Args:
            signals: Of any part of a batch.
            step: Optimizer step.
        """
        loss, late = signals.loss, self.plan.domain_late
        read = [signals_read(self.plan.factors[name]) for name in (*self.plan.token_local, *late)]
        flat = flatten(signals, frozenset().union(*read))
        assert flat.valid is not None
        sound = flat.valid & flat.loss.isfinite()
        product, step = sound.float(), torch.as_tensor(step, device=loss.device)
        with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
            for name in self.plan.token_local:
                run = self._run_local(name, flat, step)
                product = (product * self._floored(name, run)).clamp(-_LARGEST, _LARGEST)
                sound = sound & run.ok
            for name in late:  # a token that does not count in its domain weighs nothing
                for part in on_tokens(self.plan.factors[name]):
                    sound = sound & self._run_local(name, flat, step, part).ok
            product = torch.where(sound, product, 0) if late else product
            product = self._from_start(product, sound, step)
        return product.reshape(loss.shape)

    def _from_start(self, token: Tensor, ok: Tensor, step: Tensor) -> Tensor:
        """Return the weights; before the spec's first step, one for every token that counts."""
        if self.spec.start == 1:
            return token
        return torch.where(step < self.spec.start, ok.float(), token)

    def state_of(self, factor: str, index: int) -> dict[str, Tensor]:
        """Return what a step of a factor remembers, in the buffers themselves."""
        names = self._state_names[factor].get(index, {})
        return {key: self.get_buffer(name) for key, name in names.items()}

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
        if torch.compiler.is_compiling() or self.told_of_one_unit or not self.training:
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
        if not alone or self.told_of_one_unit or not self.training:
            return
        self.told_of_one_unit = True
        if self.collectives.rank == 0:
            level = self.compares[alone[0]]
            text = one_unit(self.plan, alone[0], level, "this batch has", MORE_UNITS[level])
            warnings.warn(text, OneUnitWarning, stacklevel=4)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weighting:
        """Move the state as torch moves a module's; its precision stays, whatever a model's is.

        In 16 bits small steps of a state are lost.
        """

        def moved(x: Tensor) -> Tensor:
            return fn(x).to(x.dtype)

        return super()._apply(moved, recurse)

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load this module's part of a saved state; torch calls it wherever in a model it stands.

        Raises:
            ValueError: The state is none that the stages could be in.
        """
        buffers = dict(self.named_buffers())
        given = {name: state_dict.get(prefix + name) for name in buffers}
        saved = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        problems = dict[str, str]()
        for name, must in state_problems(self.plan, self.domains, buffers, saved):
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

    def _weigh(self, factor: str, signals: Signals, flat: Signals, step: Tensor) -> _Run:
        """Run a factor; one that acts on sampling alone weighs every token one."""
        assert flat.valid is not None
        if factor in self.plan.token_local:
            return self._run_local(factor, flat, step)
        if not self.plan.runs(factor):
            return _ones(flat.valid, flat.loss.isfinite())
        run = self._run(factor, signals, flat, step)
        if self.plan.targets[factor] != "sampling":
            return run
        return _ones(flat.valid & flat.loss.isfinite(), run.ok)

    def _run_local(
        self, factor: str, flat: Signals, step: Tensor, only: range | None = None
    ) -> _Run:
        """Run the stages of a token-local factor up to the number that scales it.

        Args:
            factor: Its name; with `only`, of a factor whose stages there are pointwise.
            flat: The signals.
            step: Optimizer step.
            only: Places of the stages to run; all when None.
        """
        assert flat.valid is not None
        x, scope = flat.loss, Scope("token", step, flat.valid, self.domains)
        held: list[tuple[Tensor, Scope]] = []
        steps = self.plan.factors[factor]
        for index in only or range(len(steps)):
            stage = steps[index].stage
            if isinstance(stage, Source):
                held.append((x, scope))
                scope = replace(scope, valid=_sound(flat, stage))
                # Batches do not move its state.
                x = stage.read(flat, _with_state(scope, self.state_of(factor, index)))
            else:
                assert isinstance(stage, Shape | Weigh | Constrain | Combine)
                if isinstance(stage, Combine):
                    x, scope = _both(*held.pop(), x, scope)
                scale = stage.deferred_scale() if isinstance(stage, Weigh) else None
                x = scale.raw(x) if scale else stage.apply(x, scope)
            if stage.gives == "score" or isinstance(stage, Source):
                x, scope = _finite(x, scope)
        x = torch.where(scope.valid, x, 0)
        return _Run(x, scope.valid, x, scope.valid)

    def _run(self, factor: str, signals: Signals, flat: Signals, step: Tensor) -> _Run:
        """Run one factor's stages."""
        assert flat.valid is not None
        x, tokens_ok, groups, cap, domains = flat.loss, flat.valid, None, None, None
        scope = Scope("token", step, flat.valid, self.domains, self.collectives)
        held: list[tuple[Tensor, Scope, Tensor]] = []
        for index, (stage, *_) in enumerate(self.plan.factors[factor]):
            if isinstance(stage, Source):
                held.append((x, scope, tokens_ok))
                tokens_ok, sound = flat.valid, _sound(flat, stage)
                scope = Scope("token", step, sound, self.domains, self.collectives)
                around = self._advanced(factor, index, partial(stage.advance, flat), scope)
                x = stage.read(flat, around)
            elif isinstance(stage, Pool):
                groups = group(signals, stage.level, len(self.domains), self.collectives)
                assert groups is not None
                x, scope, tokens_ok, domains = self._pool(factor, stage, x, flat, scope, groups)
                if self.spec.scope == "running":
                    x, scope = self._with_earlier(factor, *_finite(x, scope))
            else:
                assert isinstance(stage, Shape | Weigh | Constrain | Combine)
                if isinstance(stage, Combine):
                    first, around, counted = held.pop()
                    x, scope = _both(first, around, x, scope)
                    tokens_ok = tokens_ok & counted
                around = self._advanced(factor, index, partial(stage.advance, x), scope)
                if inside := stage.inside():
                    number = len(self.domains)
                    parts = group(signals, inside, number, self.collectives)
                    if scope.level != "token":
                        assert domains is not None
                        parts = inside_domains(domains, number, scope.collectives)
                    assert parts is not None
                    around = around.within(parts)
                x = stage.apply(x, around)
                if isinstance(stage, Constrain) and (bound := stage.cap(step)) is not None:
                    cap = bound
            if stage.gives == "score" or isinstance(stage, Source):
                x, scope = _finite(x, scope)
        x = torch.where(scope.valid, x, 0)
        own = groups.size if groups else 0
        x, valid = self._own(x, scope, own), self._own(scope.valid, scope, own)
        token = groups.broadcast(x) if groups else x
        tokens_ok = tokens_ok & (groups.broadcast(valid) if groups else valid)
        units = None
        if factor in self.compares:  # of all ranks, which have been brought together or not
            units = scope.valid.sum() if scope.collectives is None else scope.count()
        return _Run(x, valid, torch.where(tokens_ok, token, 0), tokens_ok, cap, units)

    def _advanced(
        self,
        factor: str,
        index: int,
        advance: Callable[[Scope], dict[str, Tensor]],
        scope: Scope,
    ) -> Scope:
        """Return the scope with the stage's state after this batch; keep it when training."""
        before = self.state_of(factor, index)
        if not before:
            return scope
        after = advance(_with_state(scope, before))
        name = self.plan.factors[factor][index].stage.name
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
        self, factor: str, stage: Pool, x: Tensor, flat: Signals, scope: Scope, groups: Groups
    ) -> tuple[Tensor, Scope, Tensor, Tensor | None]:
        """Pool token scores to units, and bring the units of all ranks together, if need be.

        Returned are the scores, their scope, which tokens count, and the domain of each unit where
        a later stage works inside domains.
        """
        valid = flat.valid
        assert valid is not None
        bad = valid & ~scope.valid
        counting = groups.counting(torch.stack([scope.valid.float(), bad.float()]))
        score = stage.pool(x, scope.valid, counting)
        present, spoilt = counting.counts() > 0
        if groups.level == "domain":  # a bad token must not silence its whole domain
            return score, Scope("domain", scope.step, present, self.domains), scope.valid, None
        rows = [score, (present & ~spoilt).float()]
        if any(step.stage.inside() for step in self.plan.factors[factor]):
            assert flat.domain_ids is not None, "build checks what a pipeline needs"
            rows.append(domains_of(groups, flat.domain_ids, valid, len(self.domains)).float())
        ranks = None
        if self._stay(factor, groups.level):
            ranks, (score, ok, *of) = CountedOnce(self.collectives), rows
        else:
            score, ok, *of = self.collectives.gather(torch.stack(rows)).transpose(0, 1).flatten(1)
        domains = of[0].long() if of else None
        return score, Scope(groups.level, scope.step, ok > 0, self.domains, ranks), valid, domains

    def _stay(self, factor: str, level: Level) -> bool:
        """Tell whether each rank keeps its own units, and statistics alone reach the others.

        So do documents, of which a rank may have as many as tokens, where their stages would do
        for tokens.
        """
        if level != "document" or self.spec.scope == "running" or self.collectives.size == 1:
            return False
        return all("token" in step.stage.levels for step in self.plan.factors[factor])

    def _with_earlier(self, factor: str, x: Tensor, scope: Scope) -> tuple[Tensor, Scope]:
        """Put the units of earlier batches behind those at hand, and remember these first."""
        units, count = map(self.get_buffer, earlier_names(factor))
        return with_earlier(x, scope, units, count, remember=self.training)

    def _own(self, x: Tensor, scope: Scope, size: int) -> Tensor:
        """Return this rank's part of units that were brought together, of which it has so many."""
        if scope.level in {"token", "domain"} or scope.collectives is not None:
            return x
        if self.spec.scope == "running":
            x = x[:-RUNNING_UNITS]
        return x.unflatten(0, (self.collectives.size, -1))[self.collectives.rank, :size]

    def _deferred_scale(self, factor: str) -> DeferredScale | None:
        """Return how a token-local factor is scaled in the end; None if it is not."""
        last = self.plan.factors[factor][-1].stage
        local = factor in self.plan.token_local and isinstance(last, Weigh)
        return last.deferred_scale() if local else None

    def _floored(self, factor: str, run: _Run) -> Tensor:
        """Return token weights of which one that may yet be scaled up from 0 is not 0."""
        if self._deferred_scale(factor) is None:
            return run.token
        unscaled = sum(self._deferred_scale(name) is not None for name in self.plan.token_local)
        return torch.where(run.ok, run.token.clamp(min=_SMALLEST ** (1 / unscaled)), 0)

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
        rough = (rough * share).clamp(max=_LARGEST)
        deferred = [(name, self._deferred_scale(name)) for name in runs]
        scales = {name: how for name, how in deferred if how is not None}
        sums = [rough.sum(), valid.sum().float()]
        if self.spec.scope == "running":
            sums.append(self._sequences(signals, valid))
        begin = len(sums)
        for name in scales:
            sums += [runs[name].token.sum(), runs[name].ok.sum().float()]
        if self.spec.normalize == "mean_one" or scales:
            sums = self.collectives.sum(torch.stack(sums)).unbind()
        totals, counts = sums[begin::2], sums[begin + 1 :: 2]
        for (name, how), total, count in zip(scales.items(), totals, counts, strict=True):
            run = runs[name]
            token = torch.where(run.ok, how.scale(run.token, total, count), 0)
            runs = {**runs, name: run._replace(unit=token, token=token)}
        product = torch.stack([run.token for run in runs.values()]).prod(0) * share
        product = product.clamp(max=_LARGEST)
        if self.spec.normalize == "none":
            return product, runs, units
        total, count = sums[:2]
        if self.spec.scope == "running":
            total, count = with_earlier_mean(
                torch.stack([total, count]),
                self.get_buffer(RUNNING_MEAN),
                sums[2],
                remember=self.training,
            ).unbind()
        token = torch.where(product > 0, rough / torch.where(total > 0, total, 1) * count, 0)
        return token, runs, units

    def _correction(self, domain_ids: Tensor) -> Tensor:
        """Return what undoes the draw for factors that act on both, [T]."""
        if "both" not in self.plan.targets.values():
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
        level = reduced_level(self.spec)
        assert level is not None
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


class _Run(NamedTuple):
    """One factor's outcome.

    Attributes:
        unit: Weights of its units on this rank.
        valid: Which of them count.
        token: Weights of tokens.
        ok: Which of them count.
        cap: The largest weight it lets through, if there is one.
        units: How many units it compares, over all ranks, if it compares any.
    """

    unit: Tensor
    valid: Tensor
    token: Tensor
    ok: Tensor
    cap: Tensor | None = None
    units: Tensor | None = None


def _ones(valid: Tensor, finite: Tensor) -> _Run:
    return _Run(valid.float(), valid, valid.float(), valid & finite)


def _sound(flat: Signals, source: Source) -> Tensor:
    """Return which tokens count whose signals are finite, those that a source reads."""
    assert flat.valid is not None
    return flat.valid & all_finite(flat, source.reads() | {"loss"})


def _both(x: Tensor, around: Scope, other: Tensor, scope: Scope) -> tuple[Tensor, Scope]:
    """Return two scores of the same units, [2, U]; a unit counts where it does for both."""
    return torch.stack([x, other]), replace(scope, valid=around.valid & scope.valid)


def _finite(x: Tensor, scope: Scope) -> tuple[Tensor, Scope]:
    """Leave units whose score is not finite out of the scope."""
    ok = x.isfinite()
    kept = Scope(scope.level, scope.step, scope.valid & ok, scope.domains, scope.collectives)
    return torch.where(ok, x, 0), kept


def _with_state(scope: Scope, state: dict[str, Tensor]) -> Scope:
    return Scope(scope.level, scope.step, scope.valid, scope.domains, scope.collectives, state)

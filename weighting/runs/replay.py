"""What specs would have done to the sequences, or documents, that a run recorded.

A record has the mean of each signal over the tokens of a unit, a sequence or a document, so a spec
can be replayed as far as it asks for no more than that.  Units then weigh as if each were one
token; what tokens count for in the run, in scaling to mean one and in `reduction`, is put right by
their number.  Only the mean over a domain is that of its units, alike however long they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weighting.build import build
from weighting.build.domains import proportions
from weighting.build.statistics import MOMENTS
from weighting.columns import HIDDEN, plain_name
from weighting.contract import Combine, Pool, Source
from weighting.loss.cross_entropy import signals_of
from weighting.runs import layout
from weighting.runs.files import numbers_of
from weighting.simulate import capped_factors
from weighting.spec import SINGLE
from weighting.stages import (
    Column,
    ContextGain,
    Entropy,
    ErrorNorm,
    ExcessLoss,
    Loss,
    Mean,
    TargetProb,
    TopkEntropy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from torch import Tensor

    from weighting.build import Plan, Weighting
    from weighting.contract import Level
    from weighting.pipeline import Step as PlannedStage
    from weighting.spec import Spec

FOLDER = layout.RECORD
SEQUENCES, DOCUMENTS, TOKENS = layout.SEQUENCES, layout.DOCUMENTS, layout.TOKENS
STEP, ROW, DOMAIN, VALID, WEIGHT = "step", "row", "domain", "tokens", "mean_weight"
"""Columns that every file has; all others are signals.

`row` is the sequence's place in the step's batch, `domain` that of most of its tokens, `tokens`
how many labels count.
"""
DOCUMENT = "document"
"""Column of the files of documents: its place in its sequence, from 0.

A column named as the files says how many its sequence has, recorded or not.
"""
ABOUT = "weighting.record"
"""Key in a file's metadata of what is said of the run, as JSON."""

_AT_ONCE = 512
"""Batches that are weighed in one call."""
_MEANS = (
    Column,
    ContextGain,
    Entropy,
    ErrorNorm,
    ExcessLoss,
    Loss,
    TargetProb,
    TopkEntropy,
)
"""Sources whose mean over tokens is what they make of the signals' means."""


@dataclass(frozen=True)
class Record:
    """What a run recorded: its sequences, or documents, step after step, in the order of the data.

    Attributes:
        about: What is said of the run by its last file: `name` and `spec` of its weighting, and
            its `domains`.
        domains: Names of the domains, in the order of their indices.
        numbers: Its recorded steps, ascending, [s].
        sizes: How many units each of them has, [s].
        told: What is said of the run by the file of each of them.
        row: Place in the step's batch of each unit, or of its sequence, [n].
        document: Its place in its sequence, [n]; 0 for sequences.
        documents: How many its sequence has, [n]; 1 for sequences.
        domain: Index of the domain of most of its tokens, [n].
        tokens: Its valid tokens, float, [n].
        weight: Mean weight of these, [n].
        signals: Their mean signals by name, nats or as the signal is, [n] each; those that the
            files of all steps have.
        level: What a unit is, "sequence" or "document".
    """

    about: dict[str, Any]
    domains: tuple[str, ...]
    numbers: Tensor
    sizes: Tensor
    told: Sequence[dict[str, Any]]
    row: Tensor
    document: Tensor
    documents: Tensor
    domain: Tensor
    tokens: Tensor
    weight: Tensor
    signals: dict[str, Tensor]
    level: Level = "sequence"

    @cached_property
    def known(self) -> frozenset[str]:
        """The signals that were recorded, at every step."""
        of = self.each(torch.arange(len(self.sizes)))
        counts = {
            name: torch.zeros_like(self.sizes).index_add(0, of, (~x.isnan()).long())
            for name, x in self.signals.items()
        }
        return frozenset(name for name, count in counts.items() if (count > 0).all())

    def each(self, of_steps: Tensor) -> Tensor:
        """Return of each unit what its step has, [n]."""
        return of_steps.repeat_interleave(self.sizes)

    def batches(self, scope: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return which units a scope weighs together.

        Returns:
            Places of units, batch by batch, [n]; how many units each batch has, and its step, [b].
        """
        batch = of = self.each(torch.arange(len(self.sizes)))
        if scope != "step":
            keys = "ranks", "rank_rows", "batch_rows"
            counts = torch.tensor([[told[key] for key in keys] for told in self.told])
            ranks, rank_rows, batch_rows = map(self.each, counts.T)
            call = self.row // batch_rows
            if scope == "rank":
                call = call * ranks + self.row // rank_rows % ranks
            batch = of * (call.max() + 1) + call
        in_order = bool((batch.diff() >= 0).all())  # rows of ranks may alternate
        places = torch.arange(len(batch)) if in_order else batch.argsort(stable=True)
        sizes = batch[places].unique_consecutive(return_counts=True)[1]
        return places, sizes, self.numbers[of[places[sizes.cumsum(0) - sizes]]]


def read_record(run: Path, level: Level = "sequence") -> Record:
    """Return what a run recorded; of a step that was trained twice, the later record.

    Args:
        run: Its dump folder.
        level: What of, "sequence" or "document"; without recorded documents there are no steps.

    Raises:
        ValueError: There is no record, or a file of it cannot be read.
    """
    files = sorted((run / FOLDER).glob(f"{SEQUENCES}-*.parquet"))
    if not files:
        what = "no such folder"
        if os.path.exists(run):  # noqa: PTH110 - Path.exists raises on a name that is too long
            what = f"no record in {FOLDER}" if run.is_dir() else "is a file"
        msg = f"{run}: {what}; give the --dump_folder of a run with --weighting.record every=10"
        raise ValueError(msg)
    return _recorded(files, level)


def _recorded(files: Sequence[Path], level: Level) -> Record:
    """Return what some files hold, in the order of their names."""
    parts = [_read(file) for file in files]
    about = parts[-1].about
    named = (name for part in [parts[-1], *parts] for name in part.about["domains"])
    domains = tuple(dict.fromkeys(named))
    if level == "document":
        each = zip(files, parts, strict=True)
        parts = [own for file, part in each for own in _of_documents(file, part)]
    for part in parts:
        if domains and part.names:
            index = torch.tensor([domains.index(name) for name in part.names])
            part.columns[DOMAIN] = index[part.columns[DOMAIN]]
    steps, sizes = (torch.cat(x) for x in zip(*((x.steps, x.sizes) for x in parts), strict=True))
    order = steps.argsort(stable=True)
    kept = order[steps[order].diff(append=torch.tensor([-1])) != 0]  # the last of each step
    kept = kept[sizes[kept] > 0]
    starts, counts = (sizes.cumsum(0) - sizes)[kept], sizes[kept]
    places: Tensor | slice = slice(None)
    if not torch.equal(kept, torch.arange(len(sizes))):
        shift = (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
        places = shift + torch.arange(len(shift))
    of = [part for part in parts for _ in range(len(part.steps))]
    told = [of[i] for i in kept.tolist()]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    lacking = {name for name in names for part in told if name not in part.columns}
    columns = {
        name: torch.cat([part.column(name) for part in parts])[places]
        for name in names
        if name not in lacking
    }
    return Record(
        about=about,
        domains=domains,
        numbers=steps[kept],
        sizes=counts,
        told=[part.about for part in told],
        row=columns.pop(ROW),
        document=columns.pop(DOCUMENT),
        documents=columns.pop(DOCUMENTS),
        domain=columns.pop(DOMAIN),
        tokens=columns.pop(VALID),
        weight=columns.pop(WEIGHT),
        signals=columns,
        level=level,
    )


def _of_documents(file: Path, part: _Part) -> Iterator[_Part]:
    """Yield that sequences of a file are no documents, and the documents written beside them."""
    nothing = {name: x[:0] for name, x in part.columns.items()}
    yield part._replace(sizes=torch.zeros_like(part.sizes), columns=nothing)
    beside = file.with_name(file.name.replace(SEQUENCES, DOCUMENTS))
    if beside.exists():
        yield _read(beside, DOCUMENT, DOCUMENTS)


def unit_of(plan: Plan) -> Level:
    """Return of what a record must be for a spec, "document" if a factor weighs per document."""
    levels = {
        steps[-1].level for name, steps in plan.factors.items() if plan.targets[name] != "sampling"
    }
    by_document = "document" in levels or plan.spec.reduction == "document_mean"
    return "document" if by_document else "sequence"


def left_out(record: Record) -> tuple[int, int]:
    """Return how many documents were not recorded, and of how many."""
    step, start = record.each(record.numbers), torch.tensor([-1])
    begins = (record.row.diff(prepend=start) != 0) | (step.diff(prepend=start) != 0)
    there = int(record.documents[begins].sum())
    return there - len(record.row), there


def obstacle(plan: Plan, record: Record) -> str | None:
    """Return why a record cannot tell what a spec would have done, or None.

    Args:
        plan: The spec's.
        record: What was recorded.
    """
    if HIDDEN in plan.needs:
        return "it reads hidden states, which no record holds; train with it"
    for name, steps in plan.factors.items():
        if plan.targets[name] == "sampling":
            continue
        who = "it" if name == SINGLE else name
        feedback = [step.stage.listens_to for step in steps if step.stage.listens_to]
        if feedback:
            return f"{who} waits for {feedback[0]}, and only batches were recorded"
        if reason := _too_fine(steps, record.level):
            return f"{who} {reason}"
    needed = {name for name in plan.needs if not name.endswith("_ids")}
    lacking = sorted(plain_name(name) for name in needed - record.known)
    if lacking:
        if lacking[0] == "loss":
            return "it reads loss, which uniform records only with --loss.memory late"
        names = " and ".join(lacking)
        return f"it reads {names}, which the run's own spec did not; record one that does"
    return None


class Replayed(NamedTuple):
    """What a spec made of a record: weights of all its units, and the share of units at a cap."""

    weight: Tensor
    capped: float | None


def replay(spec: Spec, record: Record) -> Replayed:
    """Return the weight that a spec gives to each recorded unit, step by step.

    What it remembers moves with the recorded steps alone.

    Args:
        spec: One without an `obstacle`.
        record: What was recorded.

    Raises:
        SpecError: The spec does not fit the domains.
    """
    fn = build(spec, domains=record.domains or None)
    capping = [[*fn.plan.factors].index(name) for name in capped_factors(fn.plan)]
    moments = torch.zeros(len(fn.plan.factors) + 1, len(MOMENTS))
    found = torch.zeros_like(record.tokens)
    for places, steps in _together(fn.plan, record):
        if "both" in fn.plan.targets.values():
            fn.get_buffer("drawn").copy_(proportions(fn, steps[0]))
        weights, own = _weighed(fn, _signals(record, places), steps)
        found[places] = _scaled(spec, weights, record, places)
        moments += own
    count, at_cap = (moments[capping, MOMENTS.index(name)] for name in ("count", "capped"))
    capped = (at_cap / count.clamp(min=1)).max().item() if capping else None
    return Replayed(found, capped)


def _signals(record: Record, places: Tensor) -> dict[str, Tensor]:
    """Return the signals of the units at some places, by name, each of the places' shape."""
    signals = {name: record.signals[name][places] for name in record.known}
    signals.setdefault("loss", torch.zeros(places.shape))
    signals["valid"] = record.tokens[places] > 0
    signals["domain_ids"] = record.domain[places]
    return {**signals, "segment_ids": torch.zeros_like(signals["domain_ids"])}


def _together(plan: Plan, record: Record) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places of units that are weighed together, [k, n], and their steps, [k].

    Batches of as many units come several at once where no batch changes the next.
    """
    places, sizes, steps = record.batches(plan.spec.scope)
    if plan.has_state or "both" in plan.targets.values():
        for own, step in zip(places.split(sizes.tolist()), steps.split(1), strict=True):
            yield own[None], step
        return
    starts = sizes.cumsum(0) - sizes
    for count in sizes.unique().tolist():
        alike = sizes == count
        some = places[starts[alike, None] + torch.arange(count)]
        yield from zip(some.split(_AT_ONCE), steps[alike].split(_AT_ONCE), strict=True)


def _weighed(fn: Weighting, signals: dict[str, Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of some batches of as many units, [k, n], and the sum of their moments."""

    def weigh(signals: dict[str, Tensor], step: Tensor) -> tuple[Tensor, Tensor]:
        out = fn(signals_of({name: x[:, None] for name, x in signals.items()}), step)
        return out.token[:, 0], out.moments

    if len(steps) > 1:
        try:
            weights, moments = torch.vmap(weigh)(signals, steps)
        except RuntimeError:  # a stage asks for a number in Python
            pass
        else:
            return weights, moments.sum(0)
    each = [{name: x[i] for name, x in signals.items()} for i in range(len(steps))]
    apart = [weigh(own, step) for own, step in zip(each, steps, strict=True)]
    return torch.stack([x for x, _ in apart]), torch.stack([x for _, x in apart]).sum(0)


class Summary(NamedTuple):
    """What the sizes of weights come to.

    Attributes:
        ess: Effective sample size over n, (sum w)^2 / (n * sum w^2), the mean over steps.
        largest: The largest weight.
        top: Share of each step's tenth of highest weight that the recorded weights put there too.
        shares: Of each domain, the part of all weight, that of a unit counted for its tokens.
    """

    ess: float
    largest: float
    top: float
    shares: list[float]


def summary(record: Record, weight: Tensor) -> Summary:
    """Return what weights of all recorded units, [n], come to."""
    ess: list[Tensor] = []
    top: list[Tensor] = []
    there = record.tokens > 0
    of_step = record.each(torch.arange(len(record.sizes)))
    counts = torch.zeros_like(record.sizes).index_add(0, of_step, there.long())
    starts = counts.cumsum(0) - counts
    both = torch.stack([weight, record.weight]).abs()[:, there]
    for count in counts.unique().tolist():  # steps of as many units at once
        places = starts[counts == count, None] + torch.arange(count)
        own, recorded = both[:, places]
        squares = count * (own * own).sum(1)
        ess.append(torch.where(squares > 0, own.sum(1) ** 2 / squares.clamp(min=1e-30), 0))
        top.append(torch.minimum(_in_top(own), _in_top(recorded)).sum(1) / _tenth(count))
    mass = torch.zeros(max(len(record.domains), 1)).double()
    mass.index_add_(0, record.domain, (weight.abs() * record.tokens).double())
    shares = mass / mass.sum().clamp(min=1e-30)
    means = (torch.cat(x).mean().item() for x in (ess, top))
    return Summary(next(means), weight.max().item(), next(means), shares.tolist())


def _too_fine(steps: Sequence[PlannedStage], unit: Level) -> str | None:
    """Return what a factor asks of tokens beyond the mean over each unit, or None."""
    source, *rest = [step.stage for step in steps]
    assert isinstance(source, Source)
    if any(isinstance(stage, Combine) for stage in rest):
        return "combines two scores, and the means over each unit were recorded"
    level = steps[-1].level
    if source.reads() <= {"domain_ids"} and level == "token" and not any(x.inside() for x in rest):
        return None
    if level == "document" and unit == "sequence":
        fix = "record documents too: --weighting.record every=10,documents=8"
        return f"weighs per document, and sequences were recorded; {fix}"
    if level == "sequence" and unit == "document":
        return "weighs per sequence and another factor per document, and a replay is of one"
    if level == "token":
        return f"weighs per token, and {unit}s were recorded"
    pool = next(i for i, stage in enumerate(rest) if isinstance(stage, Pool))
    if not isinstance(rest[pool], Mean):
        return f"takes the {rest[pool].name} over tokens, and their mean was recorded"
    if pool or not isinstance(source, _MEANS):
        shaped = rest[0].name if pool else source.name
        return f"takes {shaped} of each token, and the means over {unit}s were recorded"
    return None


def _scaled(spec: Spec, weights: Tensor, record: Record, places: Tensor) -> Tensor:
    """Return what weights of units of one token become where they have more, [k, n]."""
    tokens = record.tokens[places]
    if spec.reduction != "token_mean":
        each = zip(weights, tokens, record.row[places], record.domain[places], strict=True)
        weights = torch.stack([_reduced(spec, *of) for of in each])
    if spec.normalize == "mean_one" and spec.scope != "running":
        total = (weights.abs() * tokens).sum(1, keepdim=True)
        scaled = weights * tokens.sum(1, keepdim=True) / total
        weights = torch.where(total > 0, scaled, weights)
    return weights


def _reduced(spec: Spec, weight: Tensor, tokens: Tensor, row: Tensor, domain: Tensor) -> Tensor:
    """Return the weights of a batch, [n], by whose tokens the reduction counts its units alike."""
    all_tokens, there = tokens.sum(), (tokens > 0).float()
    if spec.reduction == "sequence_mean":
        of = row.unique(return_inverse=True)[1]
        counted = weight.new_zeros(len(of)).index_add(0, of, tokens)
        weight = weight * all_tokens / (counted > 0).sum() / counted[of].clamp(min=1)
    elif spec.reduction == "document_mean":
        weight = weight * all_tokens / there.sum() / tokens.clamp(min=1)
    elif spec.reduction == "domain_mean":
        number = int(domain.max()) + 1
        units, counted = (
            weight.new_zeros(number).index_add(0, domain, x)[domain] for x in (there, tokens)
        )
        weight = weight * all_tokens / there.sum() * units / counted.clamp(min=1)
    return weight


def _tenth(count: int) -> int:
    return max(1, -(-count // 10))


def _in_top(weight: Tensor) -> Tensor:
    """Return how far weights are among the highest tenth of their row, [k, n].

    That is 1, 0, or a share where it ties.
    """
    if not weight.shape[1]:
        return weight
    k = _tenth(weight.shape[1])
    edge = weight.topk(k, 1).values[:, -1:]
    slack = 1e-4 * edge  # records are rounded
    above, level = weight > edge + slack, (weight - edge).abs() <= slack
    return above + level * (k - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)


class _Part(NamedTuple):
    """A file: its steps and how many units each has, columns of these, and what is said of them."""

    steps: Tensor
    sizes: Tensor
    columns: dict[str, Tensor]
    names: list[str]
    about: dict[str, Any]

    def column(self, name: str) -> Tensor:
        """Return a column; NaN where the file has none."""
        gaps = torch.full(self.columns[ROW].shape, torch.nan)
        return self.columns.get(name, gaps)


def _read(file: Path, *further: str) -> _Part:
    """Return a file that has some further columns of whole numbers."""
    try:
        import numpy as np  # noqa: PLC0415 - the core does without all three
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        msg = "records are Parquet files, which need pyarrow: pip install pyarrow"
        raise ValueError(msg) from None
    try:
        # Read as words, the domains would take longer than all else.
        named = [DOMAIN] if DOMAIN in pq.read_schema(file).names else []
        with pq.ParquetFile(file, read_dictionary=named) as parquet:
            about = json.loads((parquet.metadata.metadata or {}).get(ABOUT.encode(), "null"))
            table = parquet.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error).partition("\n")[0].partition(". ")[0]) from error
    if wrong := _wrong_about(about) or _wrong_columns(table, about["domains"], further):
        raise _damaged(file, wrong)
    domain = table[DOMAIN].unify_dictionaries().combine_chunks().dictionary_encode()
    columns = {name: table[name] for name in table.column_names if name != DOMAIN}
    columns[DOMAIN] = pa.chunked_array([domain.indices])
    whole = {STEP, ROW, DOMAIN, DOCUMENT, DOCUMENTS}
    found: dict[str, Tensor] = {}
    for name, x in columns.items():
        numbers, _ = numbers_of(x, x.type)
        if name == DOMAIN:  # all gaps where there are no domains
            numbers = np.nan_to_num(numbers)
        found[name] = torch.from_numpy(numbers.astype(np.int64 if name in whole else np.float32))
    steps, sizes = found.pop(STEP).unique_consecutive(return_counts=True)
    found.setdefault(DOCUMENT, torch.zeros_like(found[ROW]))
    found.setdefault(DOCUMENTS, torch.ones_like(found[ROW]))
    return _Part(steps, sizes, found, domain.dictionary.to_pylist(), about)


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file}: no file of a record, or a damaged one ({reason}); take it away")


def _wrong_about(about: object) -> str | None:
    """Return what is wrong with what a file says of its run, or None."""
    texts, counts = ("name", "hash", "spec"), ("ranks", "rank_rows", "batch_rows")
    if not isinstance(about, dict):
        return "it does not say of which run it is"
    said = {str(key): value for key, value in about.items()}
    names = said.get("domains")
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sound = sound and all(isinstance(said.get(key), str) for key in texts)
    sound = sound and all(isinstance(x := said.get(key), int) and x > 0 for key in counts)
    return None if sound else "what it says of its run is not complete"


def _wrong_columns(table: pa.Table, domains: list[str], further: Sequence[str]) -> str | None:
    """Return what is wrong with a file's columns, or None."""
    import pyarrow as pa  # noqa: PLC0415 - the core does without it

    counts = (STEP, ROW, VALID, *further)
    columns = (*counts, DOMAIN, WEIGHT)
    if lacking := [name for name in columns if name not in table.column_names]:
        return f"no column {lacking[0]}"
    if not table.num_rows:
        return "no rows"
    for name in table.column_names:
        if name == DOMAIN:
            continue
        kind, whole = table.schema.field(name).type, name in counts
        if not pa.types.is_integer(kind) and (whole or not pa.types.is_floating(kind)):
            return f"column {name} has no {'whole ' * whole}numbers"
        if table[name].null_count:
            return f"column {name} has gaps"
    named = set(table[DOMAIN].unique().to_pylist()) - ({None} if not domains else set())
    if unknown := sorted(map(str, named - {*domains})):
        return f"a domain {unknown[0]} that its run did not have"
    return None

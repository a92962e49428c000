"""What a run keeps between steps, in tensors that are written in place and never replaced.

The host captures forward, loss and backward in a CUDA graph: the Python of the loss runs twice and
never again.  So the step, what the batch brings along, the state of the stages and the statistics
all live in tensors at fixed addresses; the trainer fills them before a step and reads them when it
logs.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import override

from weighting.build.compared import one_unit, tables_compared
from weighting.build.domains import average_weights, live_weights, proportions, send_feedback
from weighting.build.statistics import MOMENTS, raise_if_nonfinite, summarize
from weighting.contract import Alone, Collectives, Signals
from weighting.loss.cross_entropy import signals_of
from weighting.loss.logits import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from titan_integration.state.observer import Observer
    from weighting import Weighting, Weights
    from weighting.contract import Level

_ADDED = MOMENTS.index("min")
"""Columns of the moments before this one add up; from here on they are a minimum, a maximum."""


_BY_DOMAIN = ("tokens", "loss", "weight")
"""What is added up for each domain: valid tokens, their losses and their weights."""
WEIGHTS = "weights"
"""Name among the signals of a call whose weights are known before it."""
_COLUMN = "columns."
_FROM_LOGITS = re.compile(r"columns\.topk_entropy_[1-9]\d*")
"""Columns that the loss finds in the logits it has at hand."""
_SHORT_LOSS = re.compile(r"columns\.short_loss_([1-9]\d*)")
"""Columns that are the model's own loss on a short context."""


def short_contexts(needs: frozenset[str]) -> dict[str, int]:
    """Return the signals that are losses on a short context, with the most tokens of it."""
    found = ((name, _SHORT_LOSS.fullmatch(name)) for name in sorted(needs))
    return {name: int(match[1]) for name, match in found if match}


def data_columns(needs: frozenset[str]) -> list[str]:
    """Return the columns that can come from nowhere but the data, by their names there."""
    computed = [*short_contexts(needs), *filter(_FROM_LOGITS.fullmatch, needs)]
    columns = {name for name in needs if name.startswith(_COLUMN)}
    return sorted(name.removeprefix(_COLUMN) for name in columns.difference(computed))


RECORD = ("spec_hash", "spec", "domains")
"""Keys of a saved state that say what it belongs to; all others are the stages' own."""


@dataclass(eq=False)
class Part:
    """What one call of the loss is about.

    Attributes:
        given: Signals that came with the batch, by name, [B, L].
        found: All of its signals, once the loss has taken them.
        token: Its weights, [B, L], where they are known before the call or come with others'.
        number: Which call of its step it is, 0-D, where that is recorded.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)
    token: Tensor | None = None
    number: Tensor | None = None

    def known(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the signals that predictions do not tell, [B, L]; weights if they are known."""
        weights = {} if self.token is None else {WEIGHTS: self.token}
        return {**self.given, **weights, "valid": labels != IGNORE_INDEX}


class Pipeline(NamedTuple):
    """The stages of a pipeline.

    Attributes:
        stages: Reaches the ranks of the other stages.
        last: The place among them of the one that computes the loss.
    """

    stages: Collectives
    last: int

    def from_last(self, x: Tensor) -> Tensor:
        """Return what the last stage has, on every stage."""
        return self.stages.gather(x)[self.last]


class RunState(Stateful):
    """A built weighting with its step, the batch's signals, and statistics of the current step.

    Most batches are one call of the loss, whose weights are made in it.  A pipeline calls it for
    each of its microbatches, and a scope may take in all of a step: then the calls are parts of one
    batch, noted until all are there, and weighed together.

    Attributes:
        fn: The built spec.
        step: Optimizer step, 0-D int64 on the device.
        calls: How many calls of the loss make up a batch of a pipeline.
        together: Whether these are noted in their forward passes, to be weighed together.
        ahead: Whether they are noted in forward passes without gradient, before the others.
        pipeline: The stages, where losses and state are known on the last one only.
        recorder: Notes what single sequences lost and weighed, if that was asked for.
        moments: Of the step's weights, of this rank's tokens, as `Weights.moments`.
        warnings: What to say once of batches that weigh all tokens alike; None until the first
            log step.
    """

    def __init__(self, fn: Weighting, device: torch.device, *, allow_changed_spec: bool) -> None:
        self.fn = fn.to(device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._weigh: Callable[[Signals, Tensor], Weights] = self.fn
        self._allow_changed_spec = allow_changed_spec
        self.calls, self.together, self.ahead = 1, False, False
        self.pipeline: Pipeline | None = None
        self.recorder: Observer | None = None
        self._current = Part()
        self._by_labels: dict[int, tuple[Tensor, Part]] = {}
        self._noted: list[Part] = []
        self._weighed: list[Part] = []
        rows = len(fn.plan.factors) + 1
        self._empty = torch.zeros(rows, len(MOMENTS), device=device)
        self._empty[:, _ADDED], self._empty[:, _ADDED + 1] = torch.inf, -torch.inf
        self._given = sorted(filter(_is_given, fn.needs))
        self._by_domain = torch.zeros(len(_BY_DOMAIN), len(fn.domains), device=device)
        self.moments = self._empty.clone()
        self._shares = torch.zeros(2, device=device)
        self._nonfinite = torch.zeros((), device=device)
        self._most_units = torch.zeros(len(fn.compares), device=device)
        self.warnings: list[str] | None = None

    @property
    def reads_documents(self) -> bool:
        """Whether the weighting or the recorder asks which document each token is in."""
        noted = self.recorder is not None and self.recorder.reads_documents
        return noted or "segment_ids" in self.fn.needs

    def compile(self, backend: str) -> None:
        """Run the weighting as one compiled graph from now on."""
        self._weigh = torch.compile(self.fn, fullgraph=True, dynamic=False, backend=backend)

    def begin_step(self, step: int) -> None:
        """Set the optimizer step and forget the statistics of the last one."""
        self.step.fill_(step)
        self.moments.copy_(self._empty)
        self._shares.zero_()
        self._by_domain.zero_()
        self._weighed.clear()
        if self.recorder is not None:
            self.recorder.begin_step(step)

    def set_batch(self, given: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        """Take what the weighting reads of the next call and the loss cannot find, each [B, L].

        Args:
            given: Signals by name, columns as "columns.name"; those it does not read are left.
            labels: What the loss will be called with, where several calls are prepared at once;
                without it the next call is meant, and tensors stay where they are.

        Raises:
            ValueError: One that it reads is missing.
        """
        part = self._current if labels is None else Part()
        reported = {"segment_ids", "domain_ids"} if self.fn.domains else {"segment_ids"}
        for name in sorted({*self._given} | (reported & given.keys())):
            if name not in given:
                raise ValueError(_missing(name))
            part.given[name] = _copied(given[name].to(self.step.device), part.given.get(name))
        if self._weighed and not self.ahead:
            token = self._weighed.pop(0).token
            assert token is not None
            part.token = _copied(token, part.token)
        if self.recorder is not None:
            part.number = self.recorder.next_call(part.number)
        if labels is not None:
            self._by_labels[id(labels)] = labels, part

    def part(self, labels: Tensor) -> Part | None:
        """Return what a call of the loss with these labels is about, or None if it is a rehearsal.

        A pipeline calls the loss once on stand-ins, to learn shapes.
        """
        if not self._by_labels:
            return self._current
        _, part = self._by_labels.get(id(labels), (None, None))
        return part

    def forget_parts(self, *, noted: bool = True) -> None:
        """Forget the calls that were prepared, and those that were noted."""
        self._by_labels.clear()
        if noted:
            self._noted.clear()

    def note(self, part: Part, found: dict[str, Tensor]) -> None:
        """Keep a part's signals until its batch is complete."""
        self._noted.append(Part() if self.ahead else part)
        # Copies: what came with this batch will be overwritten by the next one.
        self._noted[-1].found = {n: x.clone() for n, x in found.items() if n != WEIGHTS}

    def weigh_noted(self) -> None:
        """Weigh the noted parts as one batch, and give each its weights."""
        parts = list(self._noted)
        found = {name: torch.cat([part.found[name] for part in parts]) for name in parts[0].found}
        token = self.weigh(found).token
        for part, own in zip(parts, token.chunk(len(parts)), strict=True):
            part.token = own
        if self.ahead:
            self._weighed = parts

    def local_part(self, found: Mapping[str, Tensor]) -> Tensor:
        """Return the part of some tokens' weights that their own signals decide, by name."""
        if WEIGHTS in found:
            return found[WEIGHTS]
        return self.fn.local_part(signals_of(found), self.step)

    def weigh(self, found: Mapping[str, Tensor]) -> Weights:
        """Return the weights of a batch and add to the statistics of the step.

        Args:
            found: All signals that the weighting needs, by name, each [B, L].
        """
        signals = signals_of(found)
        out = self._weigh(signals, self.step)
        self.moments[:, :_ADDED] += out.moments[:, :_ADDED]
        low, high = out.moments[:, _ADDED:].unbind(1)
        self.moments[:, _ADDED].copy_(torch.minimum(self.moments[:, _ADDED], low))
        self.moments[:, _ADDED + 1].copy_(torch.maximum(self.moments[:, _ADDED + 1], high))
        self._nonfinite += out.moments[-1, MOMENTS.index("nonfinite")]
        if out.compared:
            units = torch.stack([out.compared[name].float() for name in self.fn.compares])
            self._most_units.copy_(torch.maximum(self._most_units, units))
        return out

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
        domains = torch.arange(len(self.fn.domains), device=rows.device)
        members = known["domain_ids"].reshape(-1, 1) == domains
        self._by_domain += torch.where(valid.flatten(), rows, 0) @ members.float()

    def weigh_gradients(self, products: Tensor) -> Tensor:
        """Tell the weighting how the gradients of domains compare; return their weights.

        Args:
            products: Inner products of the gradients, [K, K].

        Returns:
            Weights that sum to one, [K].
        """
        send_feedback(self.fn, "gradients", products, self.step)
        told = live_weights(self.fn, self.step)
        heard = [
            told[name]
            for name, steps in self.fn.plan.factors.items()
            if any(step.stage.listens_to == "gradients" for step in steps)
        ]
        product = torch.stack(heard).prod(0)
        return product / product.sum()

    @property
    def weighted_share(self) -> Tensor:
        """This rank's share of the step's weighted mean cross entropy so far, nats, 0-D."""
        return self._shares[1].clone()

    def statistics(self, collectives: Collectives | None = None) -> dict[str, float]:
        """Return the step's statistics over all ranks, and forget the non-finite count.

        Every rank must call it.  The two losses are in nats; the others are those of
        `weighting.build.summarize`, and for each domain of the data, as `domain/<name>/`: `share`
        of the valid tokens, `loss`, the mean unweighted one in nats, `weight`, the mean of its
        tokens, and what `mixtures` returns.

        Raises:
            NonFiniteSignalError: A signal was not finite since the last call and the spec says
                `on_nonfinite: error`.
        """
        ranks = collectives or Alone()
        added = [self.moments[:, :_ADDED].flatten(), self._shares, self._nonfinite[None]]
        added.append(self._by_domain.flatten())
        counts, shares, nonfinite, by_domain = ranks.sum(torch.cat(added)).split(
            [len(x) for x in added]
        )
        low, high = self.moments[:, _ADDED:].unbind(1)
        largest = ranks.max(torch.cat([-low, high, self._most_units]))
        lowest, highest, units = largest.split([len(low), len(high), len(self._most_units)])
        edges = torch.stack([-lowest, highest], dim=1)
        moments = torch.cat([counts.view(-1, _ADDED), edges], dim=1)
        if self.pipeline:
            moments, shares = self.pipeline.from_last(moments), self.pipeline.from_last(shares)
            nonfinite, by_domain = map(self.pipeline.from_last, (nonfinite, by_domain))
            units = self.pipeline.from_last(units)
        self._nonfinite.zero_()
        raise_if_nonfinite(self.fn.spec, int(nonfinite))
        self._look_for_one_unit(units, by_domain.view_as(self._by_domain)[0])
        unweighted, weighted = shares.tolist()
        named = summarize(moments, [*self.fn.plan.factors])
        metrics = {name: value.item() for name, value in named.items()}
        metrics |= self._domain_metrics(by_domain.view_as(self._by_domain))
        return {"unweighted_loss": unweighted, "weighted_loss": weighted, **metrics}

    def _look_for_one_unit(self, units: Tensor, tokens: Tensor) -> None:
        """Note, at the first log step, whether what the spec compares always came alone.

        Args:
            units: The most units in a batch, of each of `fn.compares`.
            tokens: Of each domain in this step.
        """
        if self.warnings is not None:
            return
        fn = self.fn
        alone: dict[str, Level] = {
            name: level
            for (name, level), most in zip(fn.compares.items(), units.tolist(), strict=True)
            if most == 1
        }
        if "domain" not in alone.values() and int((tokens > 0).sum()) == 1:
            for name in tables_compared(fn.plan):
                alone[name] = "domain"
        self.warnings = [
            one_unit(fn.plan, name, level, "every batch so far had", _MORE_UNITS[level])
            for name, level in alone.items()
        ]

    def _domain_metrics(self, sums: Tensor) -> dict[str, float]:
        """Return what is said of each domain; of one without tokens only that, and its mixture."""
        found: dict[str, float] = {}
        total = max(sums[0].sum().item(), 1.0) if sums.numel() else 1.0
        for name, (tokens, loss, weight) in zip(self.fn.domains, sums.T.tolist(), strict=True):
            found[f"domain/{name}/share"] = tokens / total
            if tokens:
                if not self.fn.plan.identity:  # the host's own loss tells no losses of tokens
                    found[f"domain/{name}/loss"] = loss / tokens
                found[f"domain/{name}/weight"] = weight / tokens
        for kind, shares in self.mixtures().items():
            found |= {f"domain/{name}/{kind}": share for name, share in shares.items()}
        return found

    def mixtures(self) -> dict[str, dict[str, float]]:
        """Return proportions of the domains, each summing to one, by what they are.

        Every rank of a pipeline must call it.

        Returns:
            `mixture`, where the weights of domains move: as they stand; `average`: their average
            over the run, where it is kept; `drawn`: what data is drawn by, if by anything.
        """
        fn, found = self.fn, dict[str, Tensor]()
        if not fn.domains:
            return {}
        if live := live_weights(fn, self.step):
            found["mixture"] = torch.stack([*live.values()]).prod(0)
        if live and live.keys() == (averages := average_weights(fn)).keys():
            found["average"] = torch.stack([*averages.values()]).prod(0)
        if fn.plan.sampling:
            found["drawn"] = proportions(fn, self.step)
        named: dict[str, dict[str, float]] = {}
        for kind, x in found.items():
            known = self.pipeline.from_last(x) if self.pipeline else x
            shares = (known / known.sum()).tolist()
            named[kind] = dict(zip(fn.domains, shares, strict=True))
        return named

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stages, and what it belongs to."""
        if self.recorder is not None:  # what a checkpoint is past is not recorded again
            self.recorder.flush()
        state = self.fn.state_dict()
        if self.pipeline:
            state = {name: self.pipeline.from_last(x) for name, x in state.items()}
        return {**self._record(), **state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the stages, unless it is another spec's, as `accepts` tells.

        Raises:
            ValueError: As `accepts`; or the state is none that the stages could be in.
        """
        state = dict(state_dict)
        if not self.accepts({key: state.pop(key) for key in RECORD if key in state}):
            return
        try:
            self.fn.load_state_dict(state)
        except ValueError as error:
            msg = (
                f"{error}. An earlier checkpoint: --checkpoint.load_step N; the weighting afresh: "
                "--checkpoint.exclude_from_loading weighting"
            )
            raise ValueError(msg) from error

    def accepts(self, record: Mapping[str, str]) -> bool:
        """Tell whether a saved state is of this spec; False where another one is allowed.

        Args:
            record: What `state_dict` has under the keys in `RECORD`.

        Raises:
            ValueError: It is of another spec and that was not allowed, or of other domains.
        """
        now = self._record()
        if record["spec_hash"] != now["spec_hash"]:
            if not self._allow_changed_spec:
                raise ValueError(_changed(record["spec"], now["spec"]))
            return False
        if record.get("domains", now.get("domains")) != now.get("domains"):
            msg = (
                f"the weighting in the checkpoint remembers the domains {record['domains']}, and "
                f"the data now has {now['domains']}. Restore the data, or start both afresh: "
                "--checkpoint.exclude_from_loading weighting,dataloader"
            )
            raise ValueError(msg)
        return True

    def _record(self) -> dict[str, str]:
        """Return what the state belongs to; the domains only where it may be one for each."""
        spec = self.fn.spec
        record = {"spec_hash": spec.hash, "spec": str(spec)}
        by_domain = "domain_ids" in self.fn.needs or self.fn.plan.moves_domains
        if by_domain and self.fn.state_dict():
            record["domains"] = ", ".join(self.fn.domains)
        return record


_MORE_UNITS = {
    "sequence": (
        "a row is a sequence: take more rows at once (--training.local_batch_size), or write "
        "scope: step or scope: running into the spec"
    ),
    "document": (
        "take more text at once (--training.local_batch_size, --training.seq_len), or write "
        "scope: step or scope: running into the spec"
    ),
    "domain": "mix domains in each batch (--training.local_batch_size, or the order of the data)",
}
"""What to do where a batch has one unit of a level."""


def _changed(saved: str, now: str) -> str:
    """Say how two specs differ, line by line, and what to do."""
    # All lines, so that the old spec can be restored from the message.
    lines = difflib.unified_diff(
        saved.splitlines(),
        now.splitlines(),
        "in the checkpoint",
        "now",
        n=len(saved) + len(now),
        lineterm="",
    )
    diff = "\n".join(lines) or "Both print alike, and only their hashes differ: it is damaged."
    return (
        f"the checkpoint was trained with another weighting spec.\n{diff}\n"
        "Resume with the old one, or pass --weighting.allow_changed_spec to go on with the new one "
        "from fresh state."
    )


def _is_given(name: str) -> bool:
    """Tell whether a signal comes with the batch, and not from the predictions."""
    if name.startswith(_COLUMN):
        return not _FROM_LOGITS.fullmatch(name)
    return name in {"domain_ids", "segment_ids", "ref_loss"}


def _copied(x: Tensor, into: Tensor | None) -> Tensor:
    """Return x in the tensor it was in before, which a captured graph may be reading."""
    return x.clone() if into is None else into.copy_(x)


def _missing(name: str) -> str:
    """Say that a signal should have come with the batch, and how it could."""
    if name == "domain_ids":
        reads, key = "weighs by domain", name
    elif name == "ref_loss":
        reads, key = "reads ref_loss", f"{_COLUMN}{name}"
    else:
        reads, key = f"reads {name}", name
    model = ", or give a model: --weighting.reference CHECKPOINT" if name == "ref_loss" else ""
    return (
        f"the spec {reads}, but the data loader yields no {key!r}; use "
        f"titan_integration.data.DomainTextDataLoader, or yield them beside 'input'{model}"
    )

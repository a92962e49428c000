"""The weighted loss in the host's trainer.

The host's chunked loss hands over hidden states and the output layer; the core's late-bound pass
takes losses, signals and gradients from them without a second pass for weights that look at the
whole batch.  Validation calls the same objects without gradient and stays the host's own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.loss.vocab_parallel import (
    divergence_of,
    losses_with_gradient,
    plain,
    signals,
    size_of,
    slice_of,
)
from titan_integration.state.microbatches import When
from weighting.columns import HIDDEN
from weighting.loss.cross_entropy import weighted_sum
from weighting.loss.late_bound import Batch, begin, late_bound
from weighting.loss.logits import check_labels
from weighting.loss.path import Memory, Path, Sizes, chunk_of, path_of
from weighting.loss.sums import Head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchtitan.config import CompileConfig

    from titan_integration.state.microbatches import Microbatch
    from titan_integration.state.run import Run

Outcome = tuple[Tensor, dict[str, Tensor]]
Output = tuple[Tensor, nn.Module]
"""What a model gives, hidden states or logits, and its output layer."""


class TokenSignals(Protocol):
    """A loss that tells signals of any model's output."""

    def token_signals(
        self,
        of: Output,
        labels: Tensor,
        needs: frozenset[str] = frozenset(),
        model: Output | None = None,
        model_lse: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, what else of `needs` the logits tell, and `kl`; [B, L], no gradient.

        Args:
            of: A model's.
            labels: [B, L].
            needs: Names of signals.
            model: Another model's, whose divergence from the first is `kl`; none without it.
            model_lse: What was returned with an earlier `kl` of the same model, [B, L].
        """
        ...


class _Bound:
    """What weighs by a run's weighting, once it is bound to one."""

    _run: Run | None = None
    _path: Path | None = None
    """The way through the output layer that was chosen for the run."""

    def bind(self, run: Run) -> None:
        """Weigh the calls that train by a run's weighting from now on."""
        self._run, self._path = run, None

    def token_losses(
        self: TokenSignals, pred: Tensor, labels: Tensor, lm_head: nn.Module
    ) -> Tensor:
        """Return the loss of every token, [B, L], without gradient; `pred`: a model's output."""
        return self.token_signals((pred, lm_head), labels)["loss"]


class WeightedCrossEntropyLoss(_Bound, CrossEntropyLoss):
    """Weighted cross entropy over full logits, [B, L, V]."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """The host's fields."""

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Outcome:
        """Return the loss of logits for labels [B, L]; weighted when training."""
        del kwargs
        call = call_of(self._run, pred, labels, global_valid_tokens)
        if call is not None and not call.run.fn.plan.identity:
            return from_logits(pred, self.global_vocab_size, call), {}
        check_labels(plain(labels), size_of(pred, self.global_vocab_size))
        outcome = super().__call__(pred, labels.long(), global_valid_tokens)
        return outcome if call is None else call.record_plain(*outcome)

    def token_signals(
        self,
        of: Output,
        labels: Tensor,
        needs: frozenset[str] = frozenset(),
        model: Output | None = None,
        model_lse: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what `TokenSignals` says, of logits."""
        own = None if model is None else model[0]
        return _told(of[0], own, model_lse, labels, self.global_vocab_size, needs)


class WeightedChunkedLoss(_Bound, ChunkedLossWrapper):
    """Weighted cross entropy over hidden states, [B, L, D], and the output layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """The host's fields, and how weights that come late are met."""

        memory: Memory = "auto"
        """late: one more gradient of the output layer for each further sequence on a rank, or for
        each domain where rows are of one, or all logits of a microbatch where that is less. keep:
        all logits of a microbatch. recompute: a second product of the output layer. full: the
        output layer as it is, on all tokens at once. auto: late or keep, whichever needs less
        memory, if that is no more than the unweighted loss would take, or a sixteenth of the
        device's; recompute otherwise; full for an output layer that does more than a linear one:
        soft-capped, adapted or of float8."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        """Build the inner loss, which validation uses."""
        super().__init__(config, compile_config=compile_config)
        self.memory = config.memory
        self._said = False

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> Outcome:
        """Return the loss of hidden states for labels [B, L]; weighted when training."""
        assert self.lm_head is not None, "the trainer sets lm_head"
        self._check(labels, self.lm_head)
        call = call_of(self._run, pred, labels, global_valid_tokens)
        if call is None:
            loss_inputs.pop("positions", None)
            return super().__call__(pred, labels.long(), global_valid_tokens, **loss_inputs)
        if call.run.fn.plan.identity and self.memory == "auto":
            return call.record_plain(*super().__call__(pred, labels.long(), global_valid_tokens))
        if self.memory == "full" or (self._whole(self.lm_head) and not call.waits):
            return from_logits(self.lm_head(pred), self._vocab_size, call, pred), {}
        with self._gathered(self.lm_head, for_long=call.waits) as head:
            batch = Batch(
                plain(labels).long(),
                head,
                self._path_for(call, head),
                call.run.fn.needs,
                call.run.local_part,
                call.microbatch.known(plain(labels)),
                1 / plain(call.global_valid_tokens),
            )
            hidden = plain(pred, partial=head.cut is not None).to(head.weight.dtype)
            if not pred.requires_grad:
                call.note(begin(batch, hidden, wants=(False, False))[0])
                return pred.new_zeros(()), {}
            note = call.note if call.waits else None
            return late_bound(hidden, batch, lambda found: (call.weigh(found),), note=note)[0], {}

    def token_signals(
        self,
        of: Output,
        labels: Tensor,
        needs: frozenset[str] = frozenset(),
        model: Output | None = None,
        model_lse: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what `TokenSignals` says, chunk by chunk, of hidden states."""
        hidden, lm_head = of
        self._check(labels, lm_head)
        found: list[dict[str, Tensor]] = []
        chunks = (hidden.chunk(self.num_chunks, dim=1), labels.chunk(self.num_chunks, dim=1))
        own = None if model is None else model[0].chunk(self.num_chunks, dim=1)
        sums = None if model_lse is None else model_lse.chunk(self.num_chunks, dim=1)
        with torch.no_grad():
            for i, (part, label) in enumerate(zip(*chunks, strict=True)):
                logits = None if model is None or own is None else model[1](own[i])
                lse = None if sums is None else sums[i]
                found.append(_told(lm_head(part), logits, lse, label, self._vocab_size, needs))
        return {name: torch.cat([x[name] for x in found], dim=1) for name in found[0]}

    def _check(self, labels: Tensor, lm_head: nn.Module) -> None:
        """Refuse labels outside the vocabulary, before they are cut into chunks."""
        if isinstance(weight := getattr(lm_head, "weight", None), Tensor):
            check_labels(plain(labels), size_of(weight, self._vocab_size))

    def _whole(self, lm_head: nn.Module) -> bool:
        """Tell whether the output layer does more than a linear one, so that all of it is run."""
        whole = self.memory == "auto" and type(lm_head).forward is not nn.Linear.forward
        if whole and not self._said:
            self._said = True
            logger.info(f"Weighted loss: full, as the output layer is a {type(lm_head).__name__}")
        return whole

    @property
    def _vocab_size(self) -> int | None:
        return getattr(self.loss_fn, "global_vocab_size", None)

    @contextlib.contextmanager
    def _gathered(self, lm_head: nn.Module, *, for_long: bool) -> Iterator[Head]:
        """Give the output layer's parameters, whole but for tensor parallelism.

        Args:
            lm_head: The output layer.
            for_long: They are needed until the backward pass, and not for this pass alone.

        Raises:
            ValueError: The layer does more than a linear one, such as an adapter or float8.
        """
        if type(lm_head).forward is not nn.Linear.forward:
            msg = (
                f"the output layer is a {type(lm_head).__qualname__}, which has products of its "
                "own; set --loss.memory full"
            )
            raise ValueError(msg)
        if isinstance(lm_head, FSDPModule):
            lm_head.unshard()
        assert isinstance(lm_head.weight, Tensor)
        bias = getattr(lm_head, "bias", None)
        cut = slice_of(lm_head.weight, self._vocab_size)
        yield Head(plain(lm_head.weight), None if bias is None else plain(bias), cut)
        if isinstance(lm_head, FSDPModule) and not for_long:
            lm_head.reshard()

    def _path_for(self, call: Call, head: Head) -> Path:
        """Return the way through the output layer, chosen at the first batch and said once."""
        labels, run = plain(call.labels), call.run
        sizes = Sizes.of(labels, head.weight, run.row_domains)
        chunk = chunk_of(sizes.tokens, self.num_chunks)
        if call.microbatch.when is When.LOOKAHEAD:  # signals are all that is wanted
            return Path("recompute", 1, chunk, None, 0)
        if call.microbatch.token is not None:  # weights known token by token
            return Path("late", 1, chunk, None, 0)
        if self._path is None:
            parts = run.microbatches.calls if call.waits else 1
            self._path = path_of(
                run.fn.plan,
                sizes,
                self.memory,
                chunks=self.num_chunks,
                parts=parts,
                collectives=run.fn.collectives,
            )
            logger.info(f"Weighted loss: {self._path}")
        return self._path


@dataclass(frozen=True)
class Call:
    """A call of the loss that trains or is looked at ahead, and what it is about."""

    run: Run
    microbatch: Microbatch
    labels: Tensor
    global_valid_tokens: Tensor

    @property
    def waits(self) -> bool:
        """Whether its weights come with those of calls yet to be made."""
        return self.microbatch.when is When.DEFERRED and self.microbatch.token is None

    def weigh(self, found: dict[str, Tensor]) -> Tensor:
        """Return the weight of each token, given the signals the predictions tell."""
        if self.waits:
            self.run.weigh_noted()
        token, known = self.microbatch.token, self.microbatch.known(plain(self.labels))
        if token is None:
            token = self.run.weigh({**found, **known}).token
        losses = found["loss"].sum(), weighted_sum(found["loss"], token)
        count = plain(self.global_valid_tokens)
        self.run.statistics.add_losses(losses[0] / count, losses[1] / count)
        self.run.statistics.add_by_domain(found["loss"], token, known)
        self._record({**found, **known}, token)
        return token

    def note(self, found: dict[str, Tensor]) -> None:
        """Keep the signals until the others of its batch are there."""
        known = self.microbatch.known(plain(self.labels))
        self.run.microbatches.note(self.microbatch, {**found, **known})

    def record_plain(self, loss: Tensor, metrics: dict[str, Tensor]) -> Outcome:
        """Note the statistics of a batch whose weights are one by construction."""
        labels = plain(self.labels)
        known = self.microbatch.known(labels)
        nothing = torch.zeros_like(labels, dtype=torch.float32)
        token = self.run.weigh({**known, "loss": nothing}).token
        self.run.statistics.add_by_domain(None, token, known)
        self._record(known, token)
        self.run.statistics.add_losses(plain(loss), plain(loss))
        return loss, metrics

    def _record(self, signals: dict[str, Tensor], token: Tensor) -> None:
        """Show the call to the observer, if there is one."""
        if self.run.observer is not None:
            assert self.microbatch.number is not None, "set_batch numbers the calls"
            self.run.observer.add(self.microbatch.number, signals, token)


def _told(
    logits: Tensor,
    model: Tensor | None,
    lse: Tensor | None,
    labels: Tensor,
    vocab_size: int | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """Return what logits tell; with a model's logits, its `kl` to them and its log sums too."""
    found = signals(logits, labels, vocab_size, needs)
    if model is not None:
        lse = signals(model, labels, vocab_size, frozenset())["lse"] if lse is None else lse
        found["kl"] = divergence_of(model, logits, lse, found["lse"], vocab_size)
        found["model_lse"] = lse
    return found


def call_of(
    run: Run | None, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None
) -> Call | None:
    """Return what a call is about, or None if it neither trains nor is looked at ahead."""
    microbatch = None if run is None else run.microbatches.of(labels)
    if run is None or microbatch is None:
        return None
    if not pred.requires_grad and microbatch.when is not When.LOOKAHEAD:
        return None
    if global_valid_tokens is None:
        global_valid_tokens = torch.ones((), device=pred.device)
    return Call(run, microbatch, labels, global_valid_tokens)


def from_logits(
    logits: Tensor, vocab_size: int | None, call: Call, hidden: Tensor | None = None
) -> Tensor:
    """Return the weighted loss of full logits; `hidden`: what they were made of."""
    needs = call.run.fn.needs
    nll, found = losses_with_gradient(logits, call.labels, vocab_size, needs)
    if HIDDEN in needs:
        assert hidden is not None, "refused at the start"
        found[HIDDEN] = plain(hidden).detach()
    if call.microbatch.when is When.LOOKAHEAD:
        call.note(found)
        return nll.new_zeros(())
    assert not call.waits, "refused at the start"
    return weighted_sum(nll, call.weigh(found)) / plain(call.global_valid_tokens)

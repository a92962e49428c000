"""The weighted loss in the host's trainer.

The host's chunked loss hands over hidden states and the output layer; the core's late-bound pass
takes losses, signals and gradients from them without a second pass for weights that look at the
whole batch.  Validation calls the same objects without gradient and stays the host's own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.vocabulary import losses_with_gradient, plain, signals, slice_of
from weighting.linear import Batch, Head, Memory, Path, Sizes, late_bound, path_of
from weighting.losses import weighted_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchtitan.config import CompileConfig

    from titan_integration.state import RunState

Outcome = tuple[Tensor, dict[str, Tensor]]


class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """Weighted cross entropy over full logits, [B, L, V]."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """The host's fields."""

    state: RunState | None = None
    """Set by the trainer before the first step."""

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Outcome:
        """Return the loss of logits for labels [B, L]; weighted when training."""
        state = self.state
        if state is None or global_valid_tokens is None or not pred.requires_grad:
            return super().__call__(pred, labels, global_valid_tokens)
        if state.fn.identity:
            loss, metrics = super().__call__(pred, labels, global_valid_tokens)
            _record_plain(state, labels, loss)
            return loss, metrics
        given = _Given(state, labels, positions, global_valid_tokens)
        return _from_logits(pred, self.global_vocab_size, given)

    def token_losses(self, pred: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
        """Return the loss of every token, [B, L], without gradient; `pred` is logits."""
        del lm_head
        return signals(pred, labels, self.global_vocab_size, frozenset())["loss"]


class WeightedChunkedLoss(ChunkedLossWrapper):
    """Weighted cross entropy over hidden states, [B, L, D], and the output layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """The host's fields, and how weights that come late are met."""

        memory: Memory = "auto"
        """late: one more gradient of the output layer for each further sequence on a rank. keep:
        all logits of a microbatch. recompute: a second product of the output layer. full: the
        output layer as it is, on all tokens at once. auto: late or keep, whichever needs less
        memory, if that is at most a sixteenth of the device's; recompute otherwise."""

    state: RunState | None = None
    """Set by the trainer before the first step."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        """Build the inner loss, which validation uses."""
        super().__init__(config, compile_config=compile_config)
        self.memory = config.memory
        self._path: Path | None = None

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        **loss_inputs: Any,
    ) -> Outcome:
        """Return the loss of hidden states for labels [B, L]; weighted when training."""
        state = self.state
        if state is None or global_valid_tokens is None or not pred.requires_grad:
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        if state.fn.identity and self.memory == "auto":
            loss, metrics = super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
            _record_plain(state, labels, loss)
            return loss, metrics
        assert self.lm_head is not None, "the trainer sets lm_head"
        given = _Given(state, labels, positions, global_valid_tokens)
        if self.memory == "full":
            return _from_logits(self.lm_head(pred), self._vocab_size, given)
        with self._gathered(self.lm_head) as head:
            batch = Batch(
                plain(labels),
                head,
                self._path_for(state, plain(labels), head),
                state.fn.needs,
                state.local_part,
                state.known(plain(labels)),
                1 / plain(global_valid_tokens),
            )
            hidden = plain(pred, partial=head.cut is not None)
            return late_bound(hidden, batch, given.weigh), {}

    def token_losses(self, pred: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
        """Return the loss of every token, [B, L], without gradient; `pred` is hidden states."""
        chunks = (pred.chunk(self.num_chunks, dim=1), labels.chunk(self.num_chunks, dim=1))
        with torch.no_grad():
            return torch.cat(
                [
                    signals(lm_head(hidden), label, self._vocab_size, frozenset())["loss"]
                    for hidden, label in zip(*chunks, strict=True)
                ],
                dim=1,
            )

    @property
    def _vocab_size(self) -> int | None:
        return getattr(self.loss_fn, "global_vocab_size", None)

    @contextlib.contextmanager
    def _gathered(self, lm_head: nn.Module) -> Iterator[Head]:
        """Give the output layer's parameters, whole but for tensor parallelism, for one pass."""
        if isinstance(lm_head, FSDPModule):
            lm_head.unshard()
        assert isinstance(lm_head.weight, Tensor)
        bias = getattr(lm_head, "bias", None)
        cut = slice_of(lm_head.weight, self._vocab_size)
        yield Head(plain(lm_head.weight), None if bias is None else plain(bias), cut)
        if isinstance(lm_head, FSDPModule):
            lm_head.reshard()

    def _path_for(self, state: RunState, labels: Tensor, head: Head) -> Path:
        """Return the way through the output layer, chosen at the first batch and said once."""
        if self._path is None:
            sizes = Sizes.of(labels, head.weight)
            self._path = path_of(state.fn, sizes, self.memory, chunks=self.num_chunks)
            logger.info(f"Weighted loss: {self._path}")
        return self._path


class _Given(NamedTuple):
    """A call of the loss: what it got beside predictions."""

    state: RunState
    labels: Tensor
    positions: Tensor | None
    global_valid_tokens: Tensor

    def weigh(self, found: dict[str, Tensor]) -> Tensor:
        """Return the weight of each token, given its signals, and note the statistics."""
        self.state.add_cross_entropy(found["loss"].sum() / plain(self.global_valid_tokens))
        positions = None if self.positions is None else plain(self.positions)
        return self.state.weigh(plain(self.labels), positions, found).token


def _from_logits(logits: Tensor, vocab_size: int | None, given: _Given) -> Outcome:
    """Return the weighted loss of full logits."""
    nll = losses_with_gradient(logits, given.labels, vocab_size)
    found = {"loss": nll.detach()}
    if given.state.fn.needs - {"loss"}:
        found = signals(logits, given.labels, vocab_size, given.state.fn.needs)
    return weighted_sum(nll, given.weigh(found)) / plain(given.global_valid_tokens), {}


def weighted_loss_config(stock: BaseLoss.Config) -> BaseLoss.Config:
    """Return the weighted counterpart of a stock loss config, with the same settings.

    Raises:
        ValueError: The loss is not the cross entropy, chunked or not.
    """
    if isinstance(stock, WeightedChunkedLoss.Config | WeightedCrossEntropyLoss.Config):
        return stock
    if type(stock) is ChunkedLossWrapper.Config and type(stock.loss_fn) is CrossEntropyLoss.Config:
        return WeightedChunkedLoss.Config(num_chunks=stock.num_chunks, loss_fn=stock.loss_fn)
    if type(stock) is CrossEntropyLoss.Config:
        return WeightedCrossEntropyLoss.Config(global_vocab_size=stock.global_vocab_size)
    msg = (
        f"cannot weight the loss {type(stock).__qualname__}; "
        "use CrossEntropyLoss, alone or in a ChunkedLossWrapper"
    )
    raise ValueError(msg)


def _record_plain(state: RunState, labels: Tensor, loss: Tensor) -> None:
    """Note the statistics of a batch whose weights are one by construction."""
    state.weigh(labels, None, {"loss": torch.zeros_like(labels, dtype=torch.float32)})
    state.add_cross_entropy(loss)

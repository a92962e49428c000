"""The weighted loss: torchtitan's losses, with a weight for every token.

A sequence's weight needs all of the sequence and all of the batch, while the host's chunked loss
runs backward chunk by chunk.  So signals are taken first, in a pass over the chunks without
gradient; the weights then travel through the host's own loop as one more per-token input.
Validation calls the same objects without gradient and stays unweighted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from typing_extensions import override

from titan_integration.vocabulary import losses_with_gradient, signals
from weighting.losses import weighted_sum

if TYPE_CHECKING:
    from titan_integration.state import RunState

Outcome = tuple[Tensor, dict[str, Tensor]]


class TokenWeightedCrossEntropy(CrossEntropyLoss):
    """The host's cross entropy, or sum(weight * nll) / global_valid_tokens when given weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """The host's fields."""

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Outcome:
        """Return the loss of logits [B, L, V] for labels [B, L]; weights is [B, L] or None."""
        if weights is None:
            return super().__call__(pred, labels, global_valid_tokens, **kwargs)
        assert global_valid_tokens is not None, "only training is weighted"
        nll = losses_with_gradient(pred, labels, self.global_vocab_size)
        return weighted_sum(nll, weights) / global_valid_tokens, {}


class WeightedCrossEntropyLoss(TokenWeightedCrossEntropy):
    """Weighted cross entropy over full logits, [B, L, V]."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenWeightedCrossEntropy.Config):
        """The host's fields."""

    state: RunState | None = None
    """Set by the trainer before the first step."""

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Outcome:
        """Return the loss; weighted when training."""
        assert weights is None, "weights come from the state"
        state = self.state
        if state is None or global_valid_tokens is None or not pred.requires_grad:
            return super().__call__(pred, labels, global_valid_tokens)
        if state.fn.identity:
            loss, metrics = super().__call__(pred, labels, global_valid_tokens)
            _record_plain(state, labels, loss)
            return loss, metrics
        found = signals(pred, labels, self.global_vocab_size, state.fn.needs)
        out = state.weigh(labels, positions, found)
        state.add_cross_entropy(found["loss"].sum() / global_valid_tokens)
        return super().__call__(pred, labels, global_valid_tokens, weights=out.token)

    def token_losses(self, pred: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
        """Return the loss of every token, [B, L], without gradient; `pred` is logits."""
        del lm_head
        return signals(pred, labels, self.global_vocab_size, frozenset())["loss"]


class WeightedChunkedLoss(ChunkedLossWrapper):
    """The host's chunked loss with weights that look at the whole batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """The host's fields."""

        loss_fn: BaseLoss.Config = field(default_factory=TokenWeightedCrossEntropy.Config)
        """Loss of each chunk's logits; it must take `weights`."""

    state: RunState | None = None
    """Set by the trainer before the first step."""

    @override
    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        **loss_inputs: Any,
    ) -> Outcome:
        """Return the loss of hidden states [B, L, D] for labels [B, L]; weighted when training."""
        state = self.state
        if state is None or global_valid_tokens is None or not pred.requires_grad:
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        if state.fn.identity:
            loss, metrics = super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
            _record_plain(state, labels, loss)
            return loss, metrics
        assert self.lm_head is not None, "the trainer sets lm_head"
        found = self._signals(pred, labels, state.fn.needs, self.lm_head)
        out = state.weigh(labels, positions, found)
        state.add_cross_entropy(found["loss"].sum() / global_valid_tokens)
        return super().__call__(pred, labels, global_valid_tokens, weights=out.token, **loss_inputs)

    def token_losses(self, pred: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
        """Return the loss of every token, [B, L], without gradient; `pred` is hidden states."""
        return self._signals(pred, labels, frozenset(), lm_head)["loss"]

    @torch.no_grad()
    def _signals(
        self, hidden: Tensor, labels: Tensor, needs: frozenset[str], lm_head: nn.Module
    ) -> dict[str, Tensor]:
        """Return the loss of every token and what else is needed, [B, L], chunk by chunk."""
        if isinstance(lm_head, FSDPModule):  # gather its weight once; the host's loop reshards it
            lm_head.set_reshard_after_forward(False)
            lm_head.unshard()
        found: dict[str, list[Tensor]] = {}
        chunks = (hidden.chunk(self.num_chunks, dim=1), labels.chunk(self.num_chunks, dim=1))
        for hidden_chunk, label_chunk in zip(*chunks, strict=True):
            vocab_size = getattr(self.loss_fn, "global_vocab_size", None)
            chunk = signals(lm_head(hidden_chunk), label_chunk, vocab_size, needs)
            for name, value in chunk.items():
                found.setdefault(name, []).append(value)
        return {name: torch.cat(parts, 1) for name, parts in found.items()}


def weighted_loss_config(stock: BaseLoss.Config) -> BaseLoss.Config:
    """Return the weighted counterpart of a stock loss config, with the same settings.

    Raises:
        ValueError: The loss is not the cross entropy, chunked or not.
    """
    if isinstance(stock, WeightedChunkedLoss.Config | WeightedCrossEntropyLoss.Config):
        return stock
    if type(stock) is ChunkedLossWrapper.Config and type(stock.loss_fn) is CrossEntropyLoss.Config:
        inner = TokenWeightedCrossEntropy.Config(global_vocab_size=stock.loss_fn.global_vocab_size)
        return WeightedChunkedLoss.Config(num_chunks=stock.num_chunks, loss_fn=inner)
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

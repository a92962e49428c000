"""The loss of several heads, each of which predicts tokens one further ahead.

    sum(u_0 * nll_0) / valid + scale / heads * sum over k of sum(u_k * nll_k) / valid

The host hands over the logits of all heads and the positions of the tokens.  Labels of head k are
those of the first, k further on in the same document, and its weights u_k are what the same rule
makes of its own losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.deepseek_v3.mtp import MTPLoss, roll_mtp_sequence
from typing_extensions import override

from titan_integration.loss.loss import Outcome, WeightedCrossEntropyLoss, call_of, from_logits
from titan_integration.loss.vocab_parallel import losses_with_gradient, plain
from weighting.loss.cross_entropy import weighted_sum
from weighting.loss.logits import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchtitan.config import CompileConfig


class WeightedMTPLoss(WeightedCrossEntropyLoss):
    """Weighted cross entropy of each head, [B, L, V]; validation has that of the first alone.

    Statistics and metrics are those of the first head.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(WeightedCrossEntropyLoss.Config):
        """The host's fields."""

        mtp_scale: float = 0.3
        """Of the mean loss of the further heads, beside that of the first."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        """Build the host's loss beside ours, for a spec whose weights are one."""
        super().__init__(config, compile_config=compile_config)
        self._scale = config.mtp_scale
        stock = MTPLoss.Config(
            mtp_scale=config.mtp_scale, global_vocab_size=config.global_vocab_size
        )
        self._host = MTPLoss(stock, compile_config=compile_config)

    @override
    # The host calls it with what its model returns.
    def __call__(  # pyrefly: ignore[bad-override]
        self,
        pred: list[Tensor],
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Outcome:
        """Return the loss of the heads' logits for labels [B, L]; weighted when training."""
        first, *further = pred
        call = call_of(self._run, first, labels, global_valid_tokens)
        if call is None:
            return CrossEntropyLoss.__call__(self, first, labels.long(), global_valid_tokens)
        if call.run.fn.plan.identity:
            with torch.no_grad():
                main = CrossEntropyLoss.__call__(self, first, labels.long(), global_valid_tokens)
            call.record_plain(*main)
            return self._host(pred, labels.long(), global_valid_tokens, **kwargs)
        loss = from_logits(first, self.global_vocab_size, call)
        positions = kwargs["positions"]
        for shift, logits in enumerate(further, 1):
            own = roll_mtp_sequence(
                labels, shift=shift, fill_value=IGNORE_INDEX, positions=positions
            )
            assert isinstance(own, torch.Tensor), "without the mask"
            needs = call.run.fn.needs
            nll, found = losses_with_gradient(logits, own, self.global_vocab_size, needs)
            token = call.run.weigh_further({**found, **call.microbatch.known(plain(own))})
            share = self._scale / len(further) / plain(call.global_valid_tokens)
            loss = loss + weighted_sum(nll, token) * share
        return loss, {}

    @override
    def token_losses(  # pyrefly: ignore[bad-override]
        self, pred: list[Tensor], labels: Tensor, lm_head: nn.Module
    ) -> Tensor:
        """Return the loss of every token by the first head, [B, L], without gradient."""
        return super().token_losses(pred[0], labels, lm_head)

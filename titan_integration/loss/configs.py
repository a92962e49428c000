"""Which weighted loss takes the place of which of the host's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from titan_integration.loss.loss import WeightedChunkedLoss, WeightedCrossEntropyLoss

if TYPE_CHECKING:
    from torchtitan.components.loss import BaseLoss


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
    if type(stock).__qualname__ == "MTPLoss.Config":
        # Only where it is met, as it imports a model of the host's.
        from titan_integration.loss.several_heads import WeightedMTPLoss  # noqa: PLC0415

        return WeightedMTPLoss.Config(
            mtp_scale=stock.mtp_scale,  # pyrefly: ignore[missing-attribute]
            global_vocab_size=stock.global_vocab_size,  # pyrefly: ignore[missing-attribute]
        )
    why = "; use CrossEntropyLoss, alone or in a ChunkedLossWrapper, or MTPLoss"
    msg = f"cannot weight the loss {type(stock).__qualname__}{why}"
    raise ValueError(msg)

"""Where the signals of a spec come from: the batch, the logits, or a forward pass of their own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from weighting.columns import column_of, signal_of

if TYPE_CHECKING:
    from torch import Tensor

_FROM_LOGITS = re.compile(r"topk_entropy_[1-9]\d*")
"""Columns that the loss finds in the logits it has at hand."""
_SHORT_LOSS = re.compile(r"short_loss_([1-9]\d*)")
"""Columns that are the model's own loss on a short context."""
_OF_THE_TEXT = ("position", "token_id")
"""Columns that a batch itself tells."""


def short_contexts(needs: frozenset[str]) -> dict[str, int]:
    """Return the signals that are losses on a short context, with the most tokens of it."""
    found = ((name, _SHORT_LOSS.fullmatch(column_of(name) or "")) for name in sorted(needs))
    return {name: int(match[1]) for name, match in found if match}


def data_columns(needs: frozenset[str]) -> list[str]:
    """Return the columns that can come from nowhere but the data, by their names there."""
    columns = filter(None, map(column_of, needs))
    made = (_FROM_LOGITS.fullmatch, _SHORT_LOSS.fullmatch, _OF_THE_TEXT.__contains__)
    return sorted(x for x in columns if not any(is_made(x) for is_made in made))


def of_the_text(
    needs: frozenset[str], positions: Tensor | None, labels: Tensor
) -> dict[str, Tensor]:
    """Return the signals of `needs` that a batch itself tells: places in documents, and labels.

    Args:
        needs: Of a weighting.
        positions: [B, L]; rows are documents when None.
        labels: [B, L].
    """
    if positions is None:
        positions = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
    told = zip(_OF_THE_TEXT, (positions, labels.clamp(min=0)), strict=True)
    return {signal_of(name): x.float() for name, x in told if signal_of(name) in needs}


def comes_with_batch(name: str) -> bool:
    """Tell whether the trainer gives a signal to the loss; the loss finds the others itself."""
    if (column := column_of(name)) is not None:
        return not _FROM_LOGITS.fullmatch(column)
    return name in {"domain_ids", "segment_ids", "ref_loss"}


def is_signal(key: str) -> bool:
    """Tell whether an entry of a loader's batch is for the weighting and not for the model."""
    return key == "domain_ids" or column_of(key) is not None


def missing(name: str) -> str:
    """Say that a signal should have come with the batch, and how it could."""
    if name == "domain_ids":
        reads, key = "weighs by domain", name
    elif name == "ref_loss":
        reads, key = "reads ref_loss", signal_of(name)
    else:
        reads, key = f"reads {name}", name
    model = ", or give a model: --weighting.reference CHECKPOINT" if name == "ref_loss" else ""
    return (
        f"the spec {reads}, but the data loader yields no {key!r}; use "
        f"titan_integration.data.DomainTextDataLoader, or yield them beside 'input'{model}"
    )

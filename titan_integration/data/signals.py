"""Where the signals of a spec come from: the batch, the logits, or a forward pass of their own."""

from __future__ import annotations

import re

COLUMN = "columns."
"""Begins the name of a signal that is a column of the data."""
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
    columns = {name for name in needs if name.startswith(COLUMN)}
    return sorted(name.removeprefix(COLUMN) for name in columns.difference(computed))


def comes_with_batch(name: str) -> bool:
    """Tell whether the trainer gives a signal to the loss; the loss finds the others itself."""
    if name.startswith(COLUMN):
        return not _FROM_LOGITS.fullmatch(name)
    return name in {"domain_ids", "segment_ids", "ref_loss"}


def is_signal(key: str) -> bool:
    """Tell whether an entry of a loader's batch is for the weighting and not for the model."""
    return key == "domain_ids" or key.startswith(COLUMN)


def missing(name: str) -> str:
    """Say that a signal should have come with the batch, and how it could."""
    if name == "domain_ids":
        reads, key = "weighs by domain", name
    elif name == "ref_loss":
        reads, key = "reads ref_loss", f"{COLUMN}{name}"
    else:
        reads, key = f"reads {name}", name
    model = ", or give a model: --weighting.reference CHECKPOINT" if name == "ref_loss" else ""
    return (
        f"the spec {reads}, but the data loader yields no {key!r}; use "
        f"titan_integration.data.DomainTextDataLoader, or yield them beside 'input'{model}"
    )

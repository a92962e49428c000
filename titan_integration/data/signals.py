"""Where the signals of a spec come from: the batch, the logits, or a forward pass of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weighting.columns import column_of, plain_name, signal_of

if TYPE_CHECKING:
    from torch import Tensor

_FROM_LOGITS = re.compile(r"topk_entropy_[1-9]\d*|label_is_top")
"""Columns that the loss finds in the logits it has at hand."""
_SHORT_LOSS = re.compile(r"short_loss_([1-9]\d*)")
"""Columns that are the model's own loss on a short context."""
_OF_THE_TEXT = ("position", "token_id")
"""Columns that a batch itself tells."""
_TOLD = ("ref_loss", "ref_entropy", "kl")
"""What a reference tells; a column of that name, and of one with a name `_NAME` behind it."""
_NAMED = re.compile(r"([A-Za-z0-9_]+)=(.*)", re.DOTALL)


def references_of(text: str) -> dict[str, str]:
    """Return the references of `--weighting.reference`, by name: one without, or several.

    Raises:
        ValueError: A name is given twice, or one of several has none.
    """
    if Path(text).expanduser().exists():  # lr=0.1/checkpoint is a folder if there is one
        return {"": text} if text else {}
    parts = [part for part in re.split(r",\s*(?=[A-Za-z0-9_]+=)", text) if part]
    found: dict[str, str] = {}
    for part in parts:
        named = _NAMED.fullmatch(part)
        name, source = (named[1], named[2]) if named else ("", part)
        if name in found or not source or (not name and len(parts) > 1):
            msg = (
                f"--weighting.reference {text}: one checkpoint, or several with a name each, as in "
                "old=outputs/a/checkpoint,base=outputs/b/checkpoint"
            )
            raise ValueError(msg)
        found[name] = source
    return found


def told_by(name: str) -> dict[str, str]:
    """Return the signals of the reference of a name, "" for an only one, by what they are of it."""
    end = f"_{name}" if name else ""
    told = {what: signal_of(what + end) for what in _TOLD}
    return told if name else {**told, "ref_loss": "ref_loss"}


def references_read(text: str, needs: frozenset[str]) -> str:
    """Return those references of `--weighting.reference` of which something is needed, likewise."""
    found = references_of(text)
    read = [name for name in found if needs.intersection(told_by(name).values())]
    return ",".join(f"{name}={found[name]}" if name else found[name] for name in read)


def reference_flag(column: str) -> str:
    """Return what follows `--weighting.reference` for a model to tell a column; "" if none can."""
    for what in _TOLD:
        if column == what:
            return "CHECKPOINT"
        if column.startswith(f"{what}_"):
            return f"{column.removeprefix(f'{what}_')}=CHECKPOINT"
    return ""


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
    model = reference_flag(plain_name(name))
    model = f", or give a model: --weighting.reference {model}" if model else ""
    return (
        f"the spec {reads}, but the data loader yields no {key!r}; use "
        f"titan_integration.data.DomainTextDataLoader, or yield them beside 'input'{model}"
    )

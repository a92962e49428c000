"""Token <-> document, sequence and domain: which tokens share a unit, reduce and broadcast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from weighting.contract.collectives import Alone

if TYPE_CHECKING:
    from weighting.contract.collectives import Collectives
    from weighting.contract.signals import Signals

Level = Literal["token", "document", "sequence", "domain"]
Within = Literal["document", "sequence", "domain"]
"""A level inside whose units, instead of over all of them, a token-level statistic runs."""


@dataclass(frozen=True)
class Groups:
    """Tokens grouped into the units of a level.

    Attributes:
        level: document, sequence or domain.
        ids: [T] unit of each token, from 0 below `size`.
        size: Number of unit slots on this rank; empty slots are allowed.
        row: Tokens per unit when units are consecutive and equally long (rows), else 0.
        collectives: Joins the parts of a unit that live on several ranks: all of them for
            domains, those that share its sequences for the others.
    """

    level: Level
    ids: Tensor
    size: int
    row: int
    collectives: Collectives

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x [..., T] over the tokens of each unit, [..., U]."""
        if self.row:
            part = x.unflatten(-1, (self.size, self.row)).sum(-1)
        elif self.level == "domain":
            part = sum_by(self.ids, self.size, x)
        else:
            part = x.new_zeros(*x.shape[:-1], self.size).index_add(-1, self.ids, x)
        return self.collectives.sum(part)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of x [T] over the tokens of each unit, [U]; -inf for empty ones."""
        if self.row:
            part = x.unflatten(-1, (self.size, self.row)).amax(-1)
        else:
            empty = x.new_full((self.size,), -torch.inf)
            part = empty.scatter_reduce(0, self.ids, x, "amax")
        return self.collectives.max(part)

    def broadcast(self, unit: Tensor) -> Tensor:
        """Return each token's value of its unit, [..., U] -> [..., T]."""
        if self.row:
            return unit.repeat_interleave(self.row, dim=-1)
        return unit.index_select(-1, self.ids)

    def counting(self, of: Tensor) -> CountingGroups:
        """Return the same groups, whose first sum takes rows of its own with it, [R, T]."""
        return CountingGroups(self.level, self.ids, self.size, self.row, self.collectives, of)


@dataclass(frozen=True)
class CountingGroups(Groups):
    """Groups that sum up rows of their own beside what they are asked for, in one collective."""

    of: Tensor
    found: list[Tensor] = field(default_factory=list)

    @override
    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x [..., T] over the tokens of each unit, [..., U]."""
        if self.found:
            return Groups.sum(self, x)
        rows = x.reshape(-1, x.shape[-1])
        both = Groups.sum(self, torch.cat([rows, self.of]))
        self.found.append(both[len(rows) :])
        return both[: len(rows)].reshape(*x.shape[:-1], self.size)

    def counts(self) -> Tensor:
        """Return the sums of its own rows, [R, U]."""
        return self.found[0] if self.found else Groups.sum(self, self.of)


def group(
    signals: Signals, level: Level, num_domains: int, collectives: Collectives
) -> Groups | None:
    """Return the groups of a level for signals of shape [B, L] or [T]; None for tokens.

    Where sequence ids are given, equal ids in one row are one sequence.  Without them a row is one
    sequence, and so is a document of [T], which has no rows.

    Raises:
        ValueError: The ids this level needs are missing, of another shape or out of range.  The
            range is looked at on CPU in eager mode only, where it costs no synchronisation.
    """
    is_flat = signals.loss.dim() == 1
    rows, length = (1, signals.loss.numel()) if is_flat else signals.loss.shape
    if level == "token":
        return None
    if level == "domain":
        ids = _ids(signals.domain_ids, signals.valid, "domain_ids", num_domains)
        return Groups(level, ids, num_domains, 0, collectives)
    parts = collectives.parts
    by_id = level == "sequence" and signals.sequence_ids is not None
    if level == "sequence" and not (is_flat or by_id):
        row_ids = torch.arange(rows, device=signals.loss.device).repeat_interleave(length)
        return Groups(level, row_ids, rows, length, parts)
    length *= parts.size  # ids count along the whole row, of which this rank may hold a part
    if level == "sequence" and not by_id and signals.segment_ids is None:
        msg = (
            "flat tokens have no rows, and this spec weighs sequences; give "
            "Signals(sequence_ids=...), or segment_ids if every document is a sequence"
        )
        raise ValueError(msg)
    given, name = signals.segment_ids, "segment_ids"
    if by_id:
        given, name = signals.sequence_ids, "sequence_ids"
    if given is not None and given.shape != signals.loss.shape:
        shapes = [*given.shape], [*signals.loss.shape]
        msg = f"{name} has shape {shapes[0]}, the loss {shapes[1]}; they must agree"
        raise ValueError(msg)
    ids = _ids(given, signals.valid, name, rows * length if by_id else length)
    if by_id:  # they may count on from row to row; modulo the length they differ within a row
        _check_span(ids, signals.valid, rows, length)
        ids = ids % length
    rows_of = torch.arange(rows, device=ids.device).repeat_interleave(ids.numel() // rows)
    return Groups(level, ids + rows_of * length, rows * length, 0, parts)


def domains_of(groups: Groups, domain_ids: Tensor, valid: Tensor, number: int) -> Tensor:
    """Return the domain that most valid tokens of each unit are of, [U]; the first of equals.

    Args:
        groups: The units.
        domain_ids: [T].
        valid: [T] bool.
        number: Of domains.
    """
    domains = torch.arange(number, device=domain_ids.device)[:, None]
    return groups.sum(((domain_ids == domains) & valid).float()).argmax(0)


def inside_domains(ids: Tensor, number: int, collectives: Collectives | None = None) -> Groups:
    """Return the groups of units by their domains, [U]; None if all of them are here."""
    return Groups("domain", ids, number, 0, collectives or Alone())


def sum_by(ids: Tensor, size: int, x: Tensor) -> Tensor:
    """Return the sum of x [..., T] over the tokens of each id, [..., size], in a fixed order.

    Few ids are a product with their members.  Many would be a large matrix: tokens are sorted by
    id and summed segment by segment, as adding where they stand has no fixed order on a device.
    """
    if size <= _FEW:
        members = ids[:, None] == torch.arange(size, device=ids.device)
        return x @ members.to(x.dtype)
    if x.device.type == "cpu":
        return x.new_zeros(*x.shape[:-1], size).index_add(-1, ids, x)
    return _segment_sum(ids, size, x)


def _segment_sum(ids: Tensor, size: int, x: Tensor) -> Tensor:
    order = ids.argsort(stable=True)
    lengths = torch.zeros(size, dtype=torch.int64, device=ids.device)
    lengths = lengths.scatter_add(0, ids, torch.ones_like(ids))
    rows = x.reshape(-1, x.shape[-1])[:, order]
    sums = torch.segment_reduce(rows.T.contiguous(), "sum", lengths=lengths, unsafe=True)
    return sums.T.reshape(*x.shape[:-1], size)


_FEW = 128
"""Ids up to which a product is faster than sorting."""


def documents(positions: Tensor) -> Tensor:
    """Return the document of each token, from 0 in each row, given positions [B, L] or [T].

    A document begins where the position is 0; a row may begin in the middle of one.
    """
    starts = positions == 0
    # The first token opens document 0 whatever its position.
    starts = torch.cat([torch.zeros_like(starts[..., :1]), starts[..., 1:]], dim=-1)
    return starts.cumsum(-1)


def _ids(ids: Tensor | None, valid: Tensor | None, name: str, size: int) -> Tensor:
    """Return flat ids, 0 at ignored tokens, whose ids may be anything."""
    if ids is None:
        msg = f"{name} are needed by this spec's levels; give Signals({name}=...)"
        raise ValueError(msg)
    ids = ids.reshape(-1).long()
    if valid is not None:
        ids = torch.where(valid.reshape(-1).bool(), ids, 0)
    if _may_look_at(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            msg = f"{name} must run from 0 to {size - 1}; found {low} to {high}"
            raise ValueError(msg)
    return ids


def _check_span(ids: Tensor, valid: Tensor | None, rows: int, length: int) -> None:
    """Raise where ids of a row are so far apart that two of them may share a slot."""
    if rows == 1 or not _may_look_at(ids) or int(ids.max()) < length:
        return
    ids = ids.view(rows, -1)
    counts = torch.ones_like(ids) if valid is None else valid.view(rows, -1)
    high = torch.where(counts.bool(), ids, 0).amax(1)
    low = torch.where(counts.bool(), ids, high[:, None]).amin(1)
    row = int((high - low).argmax())
    if high[row] - low[row] >= length:
        msg = (
            f"sequence_ids of row {row} run from {int(low[row])} to {int(high[row])}, and a row of "
            f"{length} tokens has at most {length} sequences; number those of each row one after "
            "the other, from 0 in each row or on from row to row"
        )
        raise ValueError(msg)


def _may_look_at(x: Tensor) -> bool:
    """Tell whether looking at values waits for no device and breaks no graph."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() > 0

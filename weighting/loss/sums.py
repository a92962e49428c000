"""Sums of the output layer's gradients over chunks of tokens, one for each late unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from weighting.compiled import compiled, compiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.loss.logits import Slice


class Head(NamedTuple):
    """An output layer: its weight [V, D], its bias [V], how its vocabulary is cut over ranks."""

    weight: Tensor
    bias: Tensor | None = None
    cut: Slice | None = None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits of hidden states [T, D], [T, V]."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class Gradients(NamedTuple):
    """Of the loss: with respect to hidden states [T, D], weight and bias; None where unwanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums:
    """Sums of the output layer's gradients, one of the weight's for each late unit.

    Units are rows.  Where `of_rows` tells the unit of each row, all of them are in one tensor, so
    that a captured graph finds that of a row wherever the row's unit is.  Unless it is the `whole`
    batch that is added, hidden states that are not have a gradient of 0.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        wants: tuple[bool, bool],
        units: int = 1,
        of_rows: Tensor | None = None,
        *,
        ends: Sequence[int] = (),
        whole: bool = True,
    ) -> None:
        self._head, self._hidden, self._of_rows, self._ends = head, hidden, of_rows, ends
        of_hidden, of_weight = wants
        begun = torch.empty_like if whole else torch.zeros_like
        self._d_hidden = begun(hidden) if of_hidden else None
        # Apart, so that the first can outlive the others as the parameter's gradient.
        apart = 1 if of_rows is not None else units
        self._d_weight = [torch.empty_like(head.weight) for _ in range(apart if of_weight else 0)]
        many = of_weight and of_rows is not None
        self._of_units = head.weight.new_zeros(units, *head.weight.shape) if many else None
        no_bias = not of_weight or head.bias is None
        shape = units, len(head.weight)
        self._d_bias = None if no_bias else head.weight.new_zeros(shape, dtype=torch.float32)
        self._empty = [True] * units

    def add(self, d_logits: Tensor, scale: Tensor | None, rows: slice | Tensor) -> None:
        """Add what some tokens contribute.

        Args:
            d_logits: The gradient of their logits, [T, V]; with `scale`, up to that.
            scale: [T], for each token; None if the gradient is whole.
            rows: Which tokens they are.
        """
        if self._d_hidden is not None:  # which is scaled in the end
            if isinstance(rows, slice):
                torch.mm(d_logits, self._head.weight, out=self._d_hidden[rows])
            else:
                self._d_hidden[rows] = d_logits @ self._head.weight
        if not self._d_weight and self._d_bias is None:
            return
        hidden = self._hidden[rows]
        if scale is not None:
            hidden = torch.mul(hidden, scale[:, None], out=torch.empty_like(hidden))
        for row, part in self._by_row(rows):
            self._add_weight(row, d_logits[part], hidden[part])
            if self._d_bias is not None:
                ones = torch.ones_like(hidden[part, 0]) if scale is None else scale[part]
                column = ones.to(d_logits.dtype)[:, None]
                of_bias = (d_logits[part].t() @ column).squeeze(1)
                if self._of_rows is None:
                    self._d_bias[row] += of_bias
                else:
                    self._d_bias.index_add_(0, self._of_rows[row : row + 1], of_bias[None].float())

    def _add_weight(self, row: int, d_logits: Tensor, hidden: Tensor) -> None:
        """Add what some tokens of a row contribute to the gradient of the weight."""
        if not self._d_weight:
            return
        if self._of_units is not None:
            assert self._of_rows is not None
            unit, room = self._of_rows[row : row + 1], self._d_weight[0][None]
            torch.index_select(self._of_units, 0, unit, out=room)
            room[0].addmm_(d_logits.t(), hidden)
            self._of_units.index_copy_(0, unit, room)
        elif self._empty[row]:
            torch.mm(d_logits.t(), hidden, out=self._d_weight[row])
            self._empty[row] = False
        else:
            self._d_weight[row].addmm_(d_logits.t(), hidden)

    def _by_row(self, rows: slice | Tensor) -> list[tuple[int, slice]]:
        """Return the rows of some tokens, and which of these are of each."""
        if len(self._ends) <= 1:
            return [(0, slice(None))]
        assert isinstance(rows, slice), "only one unit is walked in another order"
        found = zip([0, *self._ends], self._ends, strict=False)
        return [
            (row, slice(max(start - rows.start, 0), end - rows.start))
            for row, (start, end) in enumerate(found)
            if max(start, rows.start) < min(end, rows.stop)
        ]

    def scaled(self, scale: Tensor | None, late: Tensor | None = None) -> Gradients:
        """Return the gradients.

        Args:
            scale: [T], what `add` was given for each token, times the late part of its weight.
            late: [units], the late part of each unit's weights; None if there is none.
        """
        if self._d_hidden is not None and scale is not None:
            # In float32, as the factor has a dimension.
            torch.mul(self._d_hidden, scale[:, None], out=self._d_hidden)
        if self._d_weight and late is not None:
            if self._of_units is None:
                for part, empty in zip(self._d_weight, self._empty, strict=True):
                    if empty:  # no token of the row counts
                        part.zero_()
                fold_(self._d_weight, late)
            else:
                of_units = [*self._of_units.unbind()]
                fold_(of_units, late)
                self._d_weight[0].copy_(of_units[0])
        if self._d_bias is not None and late is not None:
            self._d_bias[0] = late @ self._d_bias
        d_weight = self._d_weight[0] if self._d_weight else None
        d_bias = None if self._d_bias is None else self._d_bias[0].to(self._head.weight.dtype)
        return Gradients(self._d_hidden, d_weight, d_bias)


def fold_(of_units: list[Tensor], late: Tensor) -> None:
    """Replace the first of some tensors of a shape by sum_u late_u * x_u, summed in float32."""
    first, compiling = of_units[0], torch.compiler.is_compiling()
    if not compiling and not compiles(late.device):
        if len(of_units) == 1 and _is_one(late):
            return
        # Piece by piece, in memory that stays in the cache.
        rows = min(len(first), max(1, _PIECE * len(first) // max(1, first.numel())))
        shape = 2, rows, *first.shape[1:]
        total, other = first.new_empty(shape, dtype=torch.float32)
        for pieces in zip(*(x.split(rows) for x in of_units), strict=True):
            _fold_pieces_([*pieces], late, (total, other))
    elif len(of_units) == 1:
        torch.mul(first, late, out=first)  # in float32, as the factor has a dimension
    else:
        fold = _fold_pieces_ if compiling else compiled(_fold_pieces_)
        fold(of_units, late, (None, None))


def _is_one(factor: Tensor) -> bool:
    return bool(factor == 1)


def _fold_pieces_(
    of_units: list[Tensor], late: Tensor, scratch: tuple[Tensor | None, Tensor | None]
) -> None:
    first, *others = of_units
    total = _wide(first, scratch[0]).mul_(late[0])
    for other, factor in zip(others, late[1:], strict=True):
        total.addcmul_(_wide(other, scratch[1]), factor)
    if total is not first:
        first.copy_(total)


def _wide(x: Tensor, scratch: Tensor | None) -> Tensor:
    """Return x in float32, or as it is if it is no narrower."""
    if x.element_size() >= 4:  # noqa: PLR2004 - float32
        return x
    return x.float() if scratch is None else scratch[: len(x)].copy_(x)


_PIECE = 2**16
"""Elements in a piece in which gradients are folded on CPU: 256 KiB of float32."""

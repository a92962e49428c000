"""Columns of the data on their way through a collator that does not know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weighting.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

Row = dict[str, Any]


class ColumnsCollator:
    """Takes columns off the rows, has the others made a batch, and puts the columns beside them.

    A column has a number for each row, or a list of one for each of its tokens.
    """

    def __init__(
        self,
        collator: Callable[[list[Row]], Mapping[str, Any]],
        columns: Sequence[str],
        domain_column: str | None,
        domains: Sequence[str],
        keep: frozenset[str] | None,
    ) -> None:
        """Take what to do.

        Args:
            collator: The host's.
            columns: Columns of numbers.
            domain_column: The column that holds names, or ids in the order of `domains`.
            domains: Names of the domains.
            keep: The other columns that the host's collator gets; all of them when None.
        """
        self.collator = collator
        self._columns, self._domain_column = tuple(columns), domain_column
        self._ids = {name: number for number, name in enumerate(domains)}
        self._keep = keep

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Return a batch, with each column as a tensor [B] or in the shape of the labels.

        A column that no row has is left out: evaluation does without.

        Raises:
            ValueError: Some rows lack a column, or it does not fit the tokens.
        """
        own = [*self._columns, *([self._domain_column] if self._domain_column else [])]
        rest = [{k: v for k, v in row.items() if self._kept(k, own)} for row in rows]
        batch = dict(self.collator(rest))
        for name in own:
            values = [row[name] for row in rows if row.get(name) is not None]
            if not values:
                continue
            if len(values) < len(rows):
                msg = f"{len(rows) - len(values)} of {len(rows)} rows of a batch have no {name!r}"
                raise ValueError(msg)
            if name == self._domain_column:
                values = [self._id(value) for value in values]
            batch[name] = _placed(name, values, rest, batch)
        return batch

    def _kept(self, key: str, own: Sequence[str]) -> bool:
        return key not in own and (self._keep is None or key in self._keep)

    def _id(self, value: Any) -> Any:  # noqa: ANN401 - a name, an id, or a list of them
        """Return a domain's id, or a list of them."""
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str):
            if value not in self._ids:
                fix = nearest(value, self._ids) or f"; there are {', '.join(self._ids)}"
                msg = f"{self._domain_column!r} has the domain {value!r}, which is not known{fix}"
                raise ValueError(msg)
            return self._ids[value]
        if isinstance(value, list):
            return [self._id(one) for one in value]
        number = int(value)
        if not 0 <= number < len(self._ids):
            msg = (
                f"{self._domain_column!r} has {number}, and ids run from 0 to {len(self._ids) - 1}"
            )
            raise ValueError(msg)
        return number


def _placed(name: str, values: list[Any], rows: list[Row], batch: Mapping[str, Any]) -> Tensor:
    """Return values of rows or of their tokens where a batch has those."""
    ids = batch["input_ids"]
    values = [_numbers(name, value) for value in values]
    flat = len(ids) != len(rows)
    if not flat and all(value.dim() == 0 for value in values):
        return torch.stack(values)
    real = any(value.is_floating_point() for value in values)
    out = torch.zeros(ids.shape, dtype=torch.float32 if real else torch.int64)
    at = 0
    for number, (value, row) in enumerate(zip(values, rows, strict=True)):
        tokens = torch.as_tensor(row["input_ids"])
        if value.dim() and len(value) != len(tokens):
            msg = f"{name!r} has {len(value)} values for {len(tokens)} tokens; give one for each"
            raise ValueError(msg)
        line = ids[0] if flat else ids[number]
        starts = [at] if flat else [0, len(line) - len(tokens)]
        fits = (s for s in starts if s >= 0 and torch.equal(line[s : s + len(tokens)], tokens))
        start = next(fits, None)
        if start is None:
            msg = (
                "the collator moved or changed tokens, so that it is not known which ones "
                f"{name!r} is of; use one that pads rows or lays them end to end"
            )
            raise ValueError(msg)
        out[0 if flat else number, start : start + len(tokens)] = value
        at += len(tokens)
    return out


def _numbers(name: str, value: Any) -> Tensor:  # noqa: ANN401 - whatever a row holds
    """Return a row's number or numbers.

    Raises:
        ValueError: There are others than numbers.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        msg = f"{name!r} holds {value!r}; give a number, or a list of one for each token"
        raise ValueError(msg) from None

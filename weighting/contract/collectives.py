"""How statistics reach other ranks; injected, so that the core knows no ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Collectives(Protocol):
    """How statistics reach the other ranks; injected, so that the core knows no ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, [ranks, *x.shape], in rank order.

        Shapes are equal; where they are not, zeros follow in the last dimension of smaller ones.
        """
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place in what `gather` returns."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks that `gather` reaches: those that hold other sequences."""
        ...

    @property
    def parts(self) -> Collectives:
        """Reaches the ranks that hold other parts of this rank's sequences.

        `sum` and `max` reach these as well, `gather` does not.
        """
        ...


class Alone:
    """The collectives of a single rank."""

    rank = 0
    size = 1

    @property
    def parts(self) -> Alone:
        """Nobody holds other parts of its sequences."""
        return self

    def gather(self, x: Tensor) -> Tensor:
        """Return x with a leading dimension of one."""
        return x.unsqueeze(0)

    def sum(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class CountedOnce:
    """The collectives of values that ranks with parts of the same sequences all hold alike.

    A sum takes those of the first of these ranks.
    """

    parts = Alone()

    def __init__(self, ranks: Collectives) -> None:
        self._ranks, self._first = ranks, ranks.parts.rank == 0
        self.rank, self.size = ranks.rank, ranks.size

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, [ranks, *x.shape]."""
        return self._ranks.gather(x)

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over ranks that hold other sequences."""
        return self._ranks.sum(x if self._first else x.new_zeros(x.shape))

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks."""
        return self._ranks.max(x)

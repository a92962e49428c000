"""Several ranks in one process: a thread each, meeting at every collective."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from weighting.contract import Alone

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

T = TypeVar("T")


class Lockstep:
    """Ranks that exchange tensors as processes would, and insist that all ask for the same."""

    def __init__(self, ranks: int) -> None:
        """Prepare for a number of ranks."""
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._slots: dict[int, tuple[str, Tensor]] = {}

    def run(self, function: Callable[[RankCollectives], T]) -> list[T]:
        """Return what the function gives on each rank, called with that rank's collectives.

        Raises:
            BaseException: What the function raised on the first rank that failed by itself.
        """
        failures: list[BaseException] = []

        def one(rank: int) -> T:
            try:
                return function(RankCollectives(self, rank))
            except BaseException as error:
                failures.append(error)  # what broke the others comes first
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.ranks)]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def exchange(self, rank: int, kind: str, x: Tensor) -> Tensor:
        """Return every rank's x, [ranks, *x.shape].

        Raises:
            RuntimeError: The ranks ask for different things.
        """
        self._slots[rank] = (kind, x)
        self._barrier.wait()
        everyone = [self._slots[other] for other in range(self.ranks)]
        self._barrier.wait()
        asked = {f"{kind} of {[*v.shape]} {v.dtype}" for kind, v in everyone}
        if len(asked) > 1:
            msg = f"ranks disagree on what they exchange: {' and '.join(sorted(asked))}"
            raise RuntimeError(msg)
        return torch.stack([v for _, v in everyone])


class RankCollectives:
    """The collectives of one rank; see `weighting.contract.Collectives`."""

    def __init__(self, lockstep: Lockstep, rank: int) -> None:
        """Belong to a lockstep, as one of its ranks."""
        self._lockstep = lockstep
        self._rank = rank

    @property
    def rank(self) -> int:
        """This rank's place in what `gather` returns."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._lockstep.ranks

    @property
    def parts(self) -> Alone:
        """Every rank holds whole sequences."""
        return Alone()

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, in rank order."""
        return self._lockstep.exchange(self._rank, "gather", x)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        return self._lockstep.exchange(self._rank, "sum", x).sum(0)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum over ranks."""
        return self._lockstep.exchange(self._rank, "max", x).amax(0)

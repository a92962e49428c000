"""Proportions that are told step by step, to whichever process draws the rows of the step."""

import os
import queue
from collections import deque
from typing import Any, cast

import torch.multiprocessing as mp
from torch.utils.data import get_worker_info

Proportions = tuple[float, ...]
_PATIENCE = 1.0
"""Seconds after which a process that waits looks whether the one that tells it is still there."""


class Told:
    """The proportions of each step, in order; a worker process waits until its step's are told.

    Args:
        batches: How many batches a step has.
        workers: How many processes draw rows; with none, the one that tells them does.
    """

    def __init__(self, batches: int, workers: int) -> None:
        """Begin with nothing told."""
        self._batches = batches
        self._here = deque[Proportions]()
        self._workers: list[mp.Queue[Any]] = [mp.Queue() for _ in range(workers)]
        self._teller = os.getpid()
        for told in self._workers:
            told.cancel_join_thread()  # what nobody reads any more must not keep a run from ending

    def tell(self, proportions: Proportions | None) -> None:
        """Give the proportions of the next step that has none; None ends it for workers."""
        for told in self._workers:
            told.put(proportions)
        if not self._workers and proportions is not None:
            self._here.append(proportions)

    def begins(self, batch: int) -> bool:
        """Tell whether a batch of this iteration is the first of a step."""
        return batch % self._batches == 0

    def of_next(self) -> Proportions | None:
        """Return the proportions of the next step, once they are told; None if it is over."""
        worker = get_worker_info()
        if worker is None:
            assert self._here, "the proportions of a step are told before its first batch"
            return self._here.popleft()
        while os.getppid() == self._teller:
            try:
                return cast("Proportions | None", self._workers[worker.id].get(timeout=_PATIENCE))
            except queue.Empty:
                continue
        return None

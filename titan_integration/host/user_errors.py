"""How errors of the user's making end a run on many ranks: one message, and status 2."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.api import CheckpointException

from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError into one message on each node's first rank, and exit status 2 on all."""
    try:
        yield
    except ValueError as error:
        _let_the_first_speak()
        sys.stderr.write(printable(f"\nerror: {error}\n", keep="\n"))
        sys.stderr.flush()
        raise SystemExit(2) from None
    except (Exception, CheckpointException):  # as where the first has ended, and is missed
        _let_the_first_speak()
        raise


def _let_the_first_speak() -> None:
    """Wait on other ranks than a node's first, as torchrun stops all as soon as one ends.

    If the first has nothing to say, the error is this rank's alone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEAD_START)


_HEAD_START = 10.0
"""Seconds the other ranks wait for the first to report an error."""

"""How errors of the user's making end a run on many ranks: one message, and status 2."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titan_integration.host.together import meeting_place
from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError into one message, and exit status 2 on all ranks.

    On several nodes the first rank says it where it can, and else the rank that has it, with its
    node; each of the other nodes says in a line who does.
    """
    try:
        yield
    except ValueError as error:
        store = _between_nodes()
        _tell(store, str(error))
        _let_the_first_speak()
        _say(store, str(error))
        raise SystemExit(2) from None
    except (Exception, CheckpointException):  # as where the first has ended, and is missed
        _let_the_first_speak()
        if (speaker := _speaker(_between_nodes())) is not None:
            _point_to(speaker)
            raise SystemExit(2) from None
        raise


def _say(store: dist.Store | None, message: str) -> None:
    """Write the message, unless another node has written it."""
    first = os.environ.get("RANK", "0") == "0"
    if store is not None and not first:
        with contextlib.suppress(dist.DistStoreError, RuntimeError):  # nobody has, or nobody can
            store.wait([_SAID], timedelta(seconds=_HEARING))
            _point_to(_speaker(store) or "the first rank")
            return
        if not message.startswith("rank "):
            message = f"{_me()}: {message}"
    _write(f"\nerror: {message}\n")
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(_SAID, _me())
        time.sleep(_HEARING / 2)  # the store may end with this node, and others look there


def _tell(store: dist.Store | None, message: str) -> None:
    """Leave word for ranks that will only see a connection lost."""
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(_FAILED, json.dumps([_me(), message]))


def _speaker(store: dist.Store | None) -> str | None:
    """Return which rank has said what ended the run; None if no user's error did."""
    if store is None:
        return None
    with contextlib.suppress(RuntimeError):
        if store.check([_SAID]):
            return store.get(_SAID).decode()
        if store.check([_FAILED]):
            return json.loads(store.get(_FAILED))[0]
    return None


def _point_to(speaker: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _write(f"\n{_me()}: ended, as {speaker} says why\n")


def _write(text: str) -> None:
    sys.stderr.write(printable(text, keep="\n"))
    sys.stderr.flush()


def _me() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def _between_nodes() -> dist.Store | None:
    """Return where ranks of several nodes leave word for each other; None on a single node."""
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return None
    with contextlib.suppress(RuntimeError):
        return meeting_place()
    return None


def _let_the_first_speak() -> None:
    """Wait on other ranks than a node's first, as torchrun stops all as soon as one ends.

    If the first has nothing to say, the error is this rank's alone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEAD_START)


_FAILED, _SAID = "user-error", "user-error/said"
_HEARING = 4.0
"""Seconds that a node's first rank waits for the run's first to say an error."""
_HEAD_START = 10.0
"""Seconds the other ranks wait for the first to report an error."""

"""Ranks tell each other what they found before there is a process group, and end as one.

What one node lacks would else be said on that node alone, and the others would see a lost
connection.  The words go through the store at which the ranks meet anyway.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from titan_integration.data.identity import differences

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PATIENCE = 300
"""Seconds that a rank waits for others, as the host's `--comm.init_timeout_seconds`."""


@contextlib.contextmanager
def fail_together(patience: float = PATIENCE) -> Iterator[None]:
    """Run what every rank does for itself; where one fails, all do, with the same message.

    Every rank must come to the end of it, whether its part has failed or not.

    Raises:
        ValueError: A rank has failed; names it, unless all failed alike.
    """
    try:
        yield
    except Exception as error:
        user = isinstance(error, ValueError)
        message = str(error) if user else f"{type(error).__name__}: {error}"
        told = _first_failure(exchange(json.dumps([socket.gethostname(), message]), patience))
        if user:
            raise ValueError(told) from error
        raise
    if told := _first_failure(exchange("", patience)):
        raise ValueError(told)


def refuse_other_data(data: Mapping[str, Any], patience: float = PATIENCE) -> None:
    """Check that all ranks make rows from the same; every rank must call it.

    Args:
        data: What each of this rank's loaders tells as its `identity`, by what it is for.
        patience: Seconds to wait for the other ranks.

    Raises:
        ValueError: One does not; says which, and in what it differs.
    """
    text = json.dumps(data, sort_keys=True)
    found = exchange(hashlib.sha256(text.encode()).hexdigest(), patience)
    odd = next((rank for rank, digest in enumerate(found) if digest != found[0]), None)
    if odd is None:
        return
    tells = int(os.environ["RANK"]) in {0, odd}
    mine = json.dumps([socket.gethostname(), data]) if tells else ""
    words = exchange(mine, patience)
    (first, before), (host, now) = json.loads(words[0]), json.loads(words[odd])
    different = [
        f"{name}: {'; '.join(found)}"
        for name in now
        if (found := differences(before.get(name, {}), now[name], f"on rank {odd}"))
    ]
    msg = (
        f"rank {odd} on {host} makes its rows from other data than rank 0 on {first}. "
        f"{'. '.join(different) or 'One has no data for what the other has'}. "
        "Give all ranks the same files and settings"
    )
    raise ValueError(msg)


def exchange(words: str, patience: float = PATIENCE) -> list[str]:
    """Return what each rank says, by rank; every rank must call it, as often as the others.

    Raises:
        ValueError: A rank has said nothing for so many seconds.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "MASTER_ADDR" not in os.environ:
        return [words]
    store, talk = meeting_place(), f"together/{next(_talks)}"
    limit = timedelta(seconds=patience)
    store.set(f"{talk}/{rank}", words)
    if rank == 0:  # so that thousands need not ask for thousands
        for other in range(ranks):
            _wait(store, f"{talk}/{other}", limit, f"rank {other}")
        all_words = store.multi_get([f"{talk}/{other}" for other in range(ranks)])
        store.set(f"{talk}/all", json.dumps([word.decode() for word in all_words]))
    # The first rank may have to wait as long for the last.
    _wait(store, f"{talk}/all", 2 * limit, "rank 0")
    found = json.loads(store.get(f"{talk}/all"))
    store.set(f"{talk}/{rank}/heard", "")
    if rank == 0:  # the store may end with it
        for other in range(ranks):
            _wait(store, f"{talk}/{other}/heard", limit, f"rank {other}")
    return found


_talks = itertools.count()
"""Numbers the exchanges, alike on all ranks."""


@functools.cache
def meeting_place() -> dist.Store:
    """Return the store that the process group will use; kept, as the first rank may serve it."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store  # a new one at each attempt
    # torchrun's own lives on, with the words of an earlier attempt. The count is a launcher's own:
    # those of several nodes may differ, which is why `weighting train` has torchrun share none.
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait(store: dist.Store, key: str, limit: timedelta, who: str) -> None:
    try:
        store.wait([key], limit)
    except dist.DistStoreError as error:
        msg = (
            f"{who} has said nothing for {limit.total_seconds():.0f} s, while the others wait to "
            "begin: it is still opening its data, or has ended. Ranks wait longer with "
            "--comm.init_timeout_seconds"
        )
        raise ValueError(msg) from error


def _first_failure(words: list[str]) -> str:
    """Return what to say of ranks of which some have failed; empty if none has."""
    failed = {rank: json.loads(word) for rank, word in enumerate(words) if word}
    if not failed:
        return ""
    first = min(failed)
    host, message = failed[first]
    alike = [rank for rank, (_, other) in failed.items() if other == message]
    if len(alike) == len(words):
        return message
    more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
    return f"rank {first} on {host}{more}: {message}"

"""The most memory that some work takes, as the operating system sees it; on Linux."""

import ctypes
from collections.abc import Callable
from pathlib import Path

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of <malloc.h>."""


def free_at_once() -> None:
    """Let this process give memory back as soon as it is freed, for good; that takes time.

    Raises:
        OSError: The C library has no such thing.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    except AttributeError as error:
        raise OSError(*error.args) from None


def peak_of(work: Callable[[], object]) -> int:
    """Return how far the resident memory of this process rises while some work is done, in bytes.

    `free_at_once` comes first, and whatever is loaded or built at a first call.

    Raises:
        OSError: The system does not forget its peak when asked to, as Linux does.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    outcome = work()
    peak = _resident("VmHWM")
    del outcome
    return max(peak - before, 0)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024

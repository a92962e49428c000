"""Rows that carry domains, and where their text comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_integration.data.loader import DomainTextDataLoader as DomainTextDataLoader

__all__ = ["DomainTextDataLoader"]


def __getattr__(name: str) -> object:
    """Import the loader when it is asked for, as it imports torchtitan."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from titan_integration.data import loader  # noqa: PLC0415 - lazily, as said above

    return getattr(loader, name)

"""How a column of the data is named among the signals: "columns.quality" for `quality`."""

from __future__ import annotations

_PREFIX = "columns."
HIDDEN = "hidden"
"""The signal that is a vector for each token, [..., D], where all others are numbers."""


def signal_of(column: str) -> str:
    """Return the signal that a column is."""
    return _PREFIX + column


def column_of(signal: str) -> str | None:
    """Return the column that a signal is; None for `loss` and all others that are none."""
    return signal.removeprefix(_PREFIX) if signal.startswith(_PREFIX) else None


def plain_name(signal: str) -> str:
    """Return a signal's name as users know it, which of a column is the column's."""
    return signal.removeprefix(_PREFIX)

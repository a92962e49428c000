"""The name of 0.1.0 for `weighting.Groups`, which pools of one's own take."""

from __future__ import annotations

import warnings


def __getattr__(name: str) -> object:
    """Return `Groups`, with a warning that says its new name."""
    if name != "Groups":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from weighting.contract import Groups  # noqa: PLC0415 - an old name, seldom asked for

    msg = "weighting.levels.Groups is now weighting.Groups; import it from there"
    warnings.warn(msg, DeprecationWarning, stacklevel=2)
    return Groups

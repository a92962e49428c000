"""Plugs built weightings into torchtitan's trainer; see `with_weighting`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_integration.trainer import WeightedTrainer as WeightedTrainer
    from titan_integration.trainer import with_weighting as with_weighting

__all__ = ["WeightedTrainer", "with_weighting"]


def __getattr__(name: str) -> object:
    """Import the trainer when it is asked for: `weighting train` starts without torchtitan."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from titan_integration import trainer  # noqa: PLC0415 - lazily, as said above

    return getattr(trainer, name)

"""The host's trainer with a weighting plugged in, and what is checked before it is built."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_integration.trainer.plug_in import with_weighting as with_weighting
    from titan_integration.trainer.trainer import WeightedTrainer as WeightedTrainer

__all__ = ["WeightedTrainer", "with_weighting"]
_ROOMS = {"WeightedTrainer": "trainer", "with_weighting": "plug_in"}


def __getattr__(name: str) -> object:
    """Import the trainer when it is asked for, as it imports torchtitan."""
    if name not in _ROOMS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)

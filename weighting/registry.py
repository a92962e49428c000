"""Which stages there are: `@stage("name")` makes a class a word of the language."""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from weighting.contract import Stage
from weighting.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

S = TypeVar("S", bound=type[Stage])
_STAGES: dict[str, type[Stage]] = {}


def stage(name: str) -> Callable[[S], S]:
    """Register a stage under its name in the language.

    Args:
        name: Lower-case identifier; taken names are refused, unless the very same class is
            being defined again, as when its module is reloaded.

    Raises:
        ValueError: The name is not an identifier, is taken, or the class is not a stage.
    """

    def register(cls: S) -> S:
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
            msg = f"a stage name is a lower-case identifier, not {name!r}"
            raise ValueError(msg)
        if not (isinstance(cls, type) and issubclass(cls, Stage) and hasattr(cls, "kind")):
            msg = f"@stage({name!r}) needs a subclass of Source, Pool, Shape, Weigh or Constrain"
            raise ValueError(msg)
        if name in SCHEDULES:
            msg = f"{name!r} is a schedule; give the stage another name"
            raise ValueError(msg)
        other = _STAGES.get(name)
        if other is not None and _origin(other) != _origin(cls):
            msg = f"two stages are named {name!r}: {_origin(other)} and {_origin(cls)}; rename one"
            raise ValueError(msg)
        cls.name = name
        _STAGES[name] = cls
        return cls

    return register


def stages() -> Mapping[str, type[Stage]]:
    """Return every registered stage by name, ours and those of installed packages included.

    A package brings stages by an entry point of the group `weighting.stages` whose value is a
    module; importing it registers them.  One that cannot be imported is warned of, not fatal.
    """
    _load_installed()
    return _STAGES


@cache
def _load_installed() -> None:
    import_module("weighting.stages")  # not at the top: each of them imports this module
    for point in entry_points(group="weighting.stages"):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - somebody else's package may fail in any way
            msg = f"stages of {point.value} are missing: {type(error).__name__}: {error}"
            warnings.warn(msg, stacklevel=2)


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

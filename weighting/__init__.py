"""A language for deciding how much each token's gradient counts."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import override

if TYPE_CHECKING:
    from weighting.build import Weighting as Weighting
    from weighting.build import Weights as Weights
    from weighting.build.build import build as build  # of the package, mypy takes the module
    from weighting.contract import Constrain as Constrain
    from weighting.contract import Groups as Groups
    from weighting.contract import Pool as Pool
    from weighting.contract import Scope as Scope
    from weighting.contract import Shape as Shape
    from weighting.contract import Signals as Signals
    from weighting.contract import Source as Source
    from weighting.contract import Stage as Stage
    from weighting.contract import Weigh as Weigh
    from weighting.contract.levels import documents as documents
    from weighting.errors import NonFiniteSignalError as NonFiniteSignalError
    from weighting.errors import OneUnitWarning as OneUnitWarning
    from weighting.errors import SpecError as SpecError
    from weighting.language.read import load as load
    from weighting.language.read import loads as loads
    from weighting.loss.cross_entropy import weighted_cross_entropy as weighted_cross_entropy
    from weighting.loss.linear import linear_weighted_cross_entropy as linear_weighted_cross_entropy
    from weighting.registry import stage as stage
    from weighting.schedules import Schedule
    from weighting.simulate import simulate as simulate
    from weighting.spec import Spec as Spec
    from weighting.spec import dumps as dumps

    # An argument is given as a number and read as a schedule: `at: PositiveNumber = 1.0`, then
    # `self.at(step)`.  Only a union with Any says both to a type checker.  It checks what is read;
    # what is given is checked when the stage is made.
    Number: TypeAlias = Schedule | Any
    NonNegativeNumber: TypeAlias = Schedule | Any
    PositiveNumber: TypeAlias = Schedule | Any
    UnitNumber: TypeAlias = Schedule | Any

__version__ = "0.1.0"

_ROOMS = {
    "build": "Weighting Weights build",
    "contract": "Constrain Groups Pool Scope Shape Signals Source Stage Weigh",
    "contract.levels": "documents",
    "errors": "NonFiniteSignalError OneUnitWarning SpecError",
    "language.read": "load loads",
    "loss.cross_entropy": "weighted_cross_entropy",
    "loss.linear": "linear_weighted_cross_entropy",
    "registry": "stage",
    "schedules": "NonNegativeNumber Number PositiveNumber UnitNumber",
    "simulate": "simulate",
    "spec": "Spec dumps",
}
"""Where each public name is; it is imported when it is asked for, since torch takes seconds."""
_PUBLIC = {name: f"weighting.{room}" for room, names in _ROOMS.items() for name in names.split()}

__all__ = [*_PUBLIC]  # noqa: PLE0604 - they are strings


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg, name=name, obj=sys.modules[__name__])
    if name == "stage":  # it refuses a name that is taken, so those that are ours come first
        import_module("weighting.stages")
    found = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Package(ModuleType):
    """This module: `weighting.build` stays the function when the package of that name is loaded.

    Python binds a submodule to its name here after importing it.
    """

    @override
    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

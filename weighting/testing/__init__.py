"""The public test kit: the laws every stage and every spec obeys, ready for one's own tests.

    check_stage(SoftCap(at=0.5))           every check, in one call
    @parametrize_with_checks([SoftCap()])  every check, a test each
    assert_weights(spec, loss=..., expect=...)

`weighting.testing.checks` holds the checks, `weighting.testing.generators` batches and losses for
hypothesis, and `weighting.testing.plugin` lets `pytest specs/` test spec files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weighting.testing.checks import CHECKS as CHECKS
    from weighting.testing.checks import check_stage as check_stage
    from weighting.testing.expect import assert_weights as assert_weights
    from weighting.testing.parametrize import parametrize_with_checks as parametrize_with_checks

_HOMES = {
    "CHECKS": "checks",
    "check_stage": "checks",
    "assert_weights": "expect",
    "parametrize_with_checks": "parametrize",
}
__all__ = ["CHECKS", "assert_weights", "check_stage", "parametrize_with_checks"]


def __getattr__(name: str) -> object:
    """Import what is asked for: the plugin starts without torch, the checks without pytest."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

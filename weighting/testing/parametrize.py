"""One pytest test per stage and check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weighting.errors import nearest
from weighting.testing.checks import CHECKS, checks_for, name_of
from weighting.testing.subject import as_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weighting.testing.subject import Checkable

    Reasons = Mapping[str, str]


def parametrize_with_checks(
    stages: Iterable[Checkable],
    *,
    expected_failed_checks: Reasons | Callable[[Checkable], Reasons] | None = None,
) -> pytest.MarkDecorator:
    """Return a decorator that calls a test with each (stage, check) that belong together.

    ::

        @parametrize_with_checks([SoftCap(at=0.5), "normalize -> soft_cap -> temperature(1)"])
        def test_my_stage(stage, check):
            check(stage)

    Args:
        stages: Stages, stage classes that need no arguments, arrow text or specs.
        expected_failed_checks: Reasons by the name of the check, {"order_free": "draws by
            place"}, or a function from a stage to such reasons.  These tests must fail: one that
            passes is an error, so that no reason outlives its fault.

    Raises:
        ValueError: There is no check of a name in `expected_failed_checks`, or it does not
            concern that stage.
        SpecError: A spec is wrong.
    """
    return pytest.mark.parametrize(
        ("stage", "check"),
        [case for stage in stages for case in _cases(stage, expected_failed_checks)],
    )


def _cases(
    stage: Checkable, expected: Reasons | Callable[[Checkable], Reasons] | None
) -> Iterator[object]:
    reasons = expected(stage) if callable(expected) else expected or {}
    label = as_subject(stage).label
    names = [name_of(check) for check in CHECKS]
    for name in reasons:
        if name.removeprefix("check_") not in names:
            close = nearest(name.removeprefix("check_"), names) or f"; known: {', '.join(names)}"
            msg = f"expected_failed_checks: there is no check {name!r}{close}"
            raise ValueError(msg)
    given = {name.removeprefix("check_"): reason for name, reason in reasons.items()}
    checks = checks_for(stage)
    unconcerned = given.keys() - {name_of(check) for check in checks}
    if callable(expected) and unconcerned:
        msg = f"expected_failed_checks: {', '.join(unconcerned)} does not concern {label}"
        raise ValueError(msg)
    for check in checks:
        marks: list[pytest.MarkDecorator] = []
        if reason := given.get(name_of(check)):
            marks.append(pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError))
        yield pytest.param(stage, check, id=f"{label}-{name_of(check)}", marks=marks)

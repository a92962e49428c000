"""Make every run alike: the helpers importable, one thread, fixed seeds, no clock in hypothesis."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

hypothesis.settings.register_profile(
    "weighting",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("weighting")


def pytest_terminal_summary(terminalreporter):
    """Say over how many stages and specs the laws were checked."""
    from weighting.registry import stages  # noqa: PLC0415 - only when there is something to say
    from weighting.spec import shipped  # noqa: PLC0415

    passed = terminalreporter.stats.get("passed", [])
    laws = sum("test_laws.py" in report.nodeid for report in passed)
    if laws:
        own = sum(cls.__module__.startswith("weighting.stages.") for cls in stages().values())
        terminalreporter.line(f"laws: {laws} checks over {own} stages and {len(shipped())} specs")


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(20260822)

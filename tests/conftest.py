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

    lines = [value for report in passed for key, value in report.user_properties if key == "matrix"]
    for text in _matrix(lines):
        terminalreporter.line(text)


def _matrix(lines):
    """Return a table of layouts and specs: the larger of two differences to one rank."""
    if not lines:
        return
    specs = list(lines[0][1])
    yield "largest relative difference of weights and gradients to one rank:"
    yield " ".join([f"{'':31}", *(f"{name:>15}" for name in specs)])
    reasons = []
    for layout, line in lines:
        cells = []
        for name in specs:
            refused = isinstance(line[name], str)
            if refused and line[name] not in reasons:
                reasons.append(line[name])
            cells.append("refused" if refused else f"{max(line[name]):.1e}")
        yield " ".join([f"{layout:31}", *(f"{cell:>15}" for cell in cells)])
    yield from reasons


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(20260822)

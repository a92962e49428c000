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


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(20260822)

"""Make every run alike: the helpers importable, one thread, fixed seeds, no clock in hypothesis."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

hypothesis.settings.register_profile(
    "weighting",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("weighting")


FILES = {
    "laws": ("test_laws.py", "test_properties.py", "test_identities.py"),
    "specs": ("test_specs.py", "test_specs_train.py"),
    "golden": ("test_golden.py", "test_errors.py", "test_bad_input.py", "test_hostile.py"),
    "faults": ("test_resume.py", "test_launch.py", "test_faults.py", "test_soak.py"),
}
"""Families of tests by the files they are in."""
MARKS = {"distributed": "processes", "fuzz": "hypothesis"}
"""Families by a mark, wherever they are."""


def pytest_configure(config):
    """Let torch work alone; what only hands tests out to processes never imports it.

    Imports leave no garbage, and to look for it takes a seventh of them.
    """
    gc.disable()
    if not config.getoption("numprocesses", None):
        import torch  # noqa: PLC0415 - takes two seconds, in which no test would run

        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what the kit compiles: a check of its is told by the test's name alone."""
    for item in items:
        if item.name.endswith("-compiles]"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Never look through what the imports made, a million objects, for garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Let the end of the process look through all of it, or libraries tell of leaks."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fail a run of all tests in which a family has none that passed."""
    config = session.config
    if session.exitstatus or hasattr(config, "workerinput") or not is_whole(config):
        return
    counts = families(config.pluginmanager.get_plugin("terminalreporter"))
    if not all(counts.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def is_whole(config):
    """Tell whether all tests were asked for."""
    option = config.option
    chosen = option.keyword or option.markexpr or option.collectonly
    return config.args_source == pytest.Config.ArgsSource.TESTPATHS and not chosen


def families(reporter):
    """Return how many tests of each family have passed."""
    passed = reporter.stats.get("passed", [])
    names = [report.nodeid.partition("::")[0].rpartition("/")[2] for report in passed]
    by_file = {family: sum(name in files for name in names) for family, files in FILES.items()}
    return by_file | {
        family: sum(mark in report.keywords for report in passed) for family, mark in MARKS.items()
    }


def pytest_terminal_summary(terminalreporter):
    """Say how many tests of each family passed, and how many stages and specs the laws are over."""
    passed = terminalreporter.stats.get("passed", [])
    counts = families(terminalreporter)
    if is_whole(terminalreporter.config):
        told = ", ".join(f"{family} {count or 'NONE'}" for family, count in counts.items())
        terminalreporter.line(f"passed by family: {told}")
    laws = sum("test_laws.py" in report.nodeid for report in passed)
    for text in _noted(passed, "laws"):
        terminalreporter.line(f"laws: {laws} tests, {text}")

    told = _noted(passed, "model")
    if told:
        terminalreporter.line("largest relative difference of a gradient to float64, three specs:")
        terminalreporter.line("\n".join(told))
    for text in _matrix(_noted(passed, "matrix")):
        terminalreporter.line(text)


def _noted(passed, name):
    """Return what tests that passed wrote down with `record_property`, under a name."""
    return [value for report in passed for key, value in report.user_properties if key == name]


def _matrix(lines):
    """Return a table of layouts and specs: the larger of two differences to one rank."""
    if not lines:
        return
    specs = list(dict.fromkeys(name for _, line in lines for name in line))
    yield "largest relative difference of weights and gradients to one rank:"
    yield " ".join([f"{'':31}", *(f"{name:>15}" for name in specs)])
    reasons = []
    for layout, line in lines:
        cells = []
        for name in specs:
            found = line.get(name, "")
            refused = found and isinstance(found, str)
            if refused and found not in reasons:
                reasons.append(found)
            cells.append("refused" if refused else f"{max(found):.1e}" if found else "-")
        yield " ".join([f"{layout:31}", *(f"{cell:>15}" for cell in cells)])
    yield from reasons


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Start every test from the same random state, whatever ran before it."""
    from looping import seeded  # noqa: PLC0415 - imports torch, see above

    seeded()

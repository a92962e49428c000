"""Which versions of torch and torchtitan this was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = {"torchtitan": "0.3.0", "torch": "2.15.0"}
_warned: set[str] = set()


def found() -> dict[str, str]:
    """Return the installed versions of what `TESTED` names; 'missing' for absent ones."""
    versions: dict[str, str] = {}
    for package in TESTED:
        try:
            versions[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def check() -> None:
    """Warn once, in the log, when the installed pair is not the tested one."""
    from torchtitan.tools.logging import logger  # noqa: PLC0415 - keeps `found` free of torchtitan

    for package, here in found().items():
        if here != TESTED[package] and package not in _warned:
            _warned.add(package)
            logger.warning(f"{package} {here} is not the tested version, {TESTED[package]}")

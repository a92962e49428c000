"""Which versions of the hosts this was tested with, and outside which it is refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED = {
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "lightning": "2.6.6",
}
_FLOORS = {"transformers": "5.8", "trl": "1.16", "lightning": "2.6", "axolotl": "0.18"}
_CEILINGS = {"transformers": "6", "trl": "2", "lightning": "3", "axolotl": "1"}
"""From which on nobody knows whether the seams are where they were."""
_WHY = {
    "transformers": "earlier ones were not tried",
    "trl": "earlier ones have no fused head that returns log_probs",
}


def need(package: str) -> None:
    """Refuse a host that is older than what the weights rely on, or of a later major version.

    Raises:
        ImportError: It is missing, too old or too new.
    """
    floor, ceiling = _FLOORS[package], _CEILINGS[package]
    install = f"pip install '{package}>={floor},<{ceiling}'"
    try:
        here = version(package)
    except PackageNotFoundError:
        msg = f"{package} is not installed; {install}"
        raise ImportError(msg) from None
    if Version(here) < Version(floor):
        why = f": {_WHY[package]}" if package in _WHY else ""
        msg = f"{package} {here} is too old for weights{why}; {install}"
        raise ImportError(msg)
    if Version(here) >= Version(ceiling):
        msg = f"{package} {here} is newer than what weights were tested with; {install}"
        raise ImportError(msg)


def found() -> dict[str, str]:
    """Return the installed versions of the hosts."""
    versions: dict[str, str] = {}
    for package in ("torch", *TESTED):
        try:
            versions[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return versions

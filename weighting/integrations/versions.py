"""Which versions of the hosts this was tested with, and outside which it is refused."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED = {
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "lightning": "2.6.6",
}
"""The versions of the lock, which all tests run with."""
READ = {"axolotl": "0.18.0"}
"""The version whose source was read; none was run."""
FLOORS = {"transformers": "5.8", "trl": "1.16", "lightning": "2.6", "axolotl": "0.18"}
CEILINGS = {"transformers": "6", "trl": "2", "lightning": "3", "axolotl": "1"}
"""From which on nobody knows whether the seams are where they were."""
_WHY = {
    "transformers": "earlier ones were not tried",
    "trl": "earlier ones have no fused head that returns log_probs",
}
_BESIDE = {"transformers": ("accelerate", "peft")}
"""What works under a host, if it is installed."""
_warned: set[str] = set()


def need(package: str) -> None:
    """Refuse a host that is older than what the weights rely on, or of a later major version.

    Others than the tested versions are warned of once.

    Raises:
        ImportError: It is missing, too old or too new.
    """
    floor, ceiling = FLOORS[package], CEILINGS[package]
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
    for name in (package, *_BESIDE.get(package, ())):
        _warn_of(name)


def _warn_of(package: str) -> None:
    """Warn once of a version that was not tested."""
    try:
        here = version(package)
    except PackageNotFoundError:
        return
    if here == TESTED.get(package) or package in _warned:
        return
    _warned.add(package)
    text = f"weights were not tested with {package} {here} but with {TESTED.get(package)}"
    if package in READ:
        text = (
            f"weights were not run with {package}, whose source was read at {READ[package]}; "
            f"this is {here}"
        )
    warnings.warn(text, stacklevel=3)


def found() -> dict[str, str]:
    """Return the installed versions of the hosts."""
    versions: dict[str, str] = {}
    for package in ("torch", *TESTED):
        try:
            versions[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return versions

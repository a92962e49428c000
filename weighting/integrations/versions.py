"""Which versions of the hosts this was tested with, and below which it is refused."""

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
_FLOORS = {"transformers": "5.23", "trl": "1.16", "lightning": "2.6", "axolotl": "0.19"}
_WHY = {
    "transformers": "earlier ones count the first label of each row in num_items_in_batch",
    "trl": "earlier ones have no fused head that returns log_probs",
}


def need(package: str) -> None:
    """Refuse a host that is older than what the weights rely on.

    Raises:
        ImportError: It is missing or too old.
    """
    floor = _FLOORS[package]
    try:
        here = version(package)
    except PackageNotFoundError:
        msg = f"{package} is not installed; pip install '{package}>={floor}'"
        raise ImportError(msg) from None
    if Version(here) < Version(floor):
        why = f": {_WHY[package]}" if package in _WHY else ""
        msg = f"{package} {here} is too old for weights{why}; pip install '{package}>={floor}'"
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

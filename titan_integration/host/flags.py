"""The host's flags: parsed with one line for a mistyped one, and all of them listed."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torchtitan.config import ConfigManager
from typing_extensions import override

from weighting.errors import closest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_parse = ConfigManager.parse_args


class _Weighted(ConfigManager):
    """The host's, which has a weighting plugged into what the config function returns."""

    @override
    def _load_config(self, args: list[str]) -> tuple[object, list[str]]:
        from titan_integration.trainer.stock import weighted  # noqa: PLC0415 - the host's trainer

        config, rest = super()._load_config(args)
        return weighted(config), rest


def parse(arguments: Sequence[str] | None = None) -> Any:  # noqa: ANN401 - the host's config
    """Return the host's config of a command line, which begins with --module and --config.

    Raises:
        ValueError: There is no such flag; says which, and what is near it.
        SystemExit: The host has said what else is wrong, or has printed its help.
    """
    given = sys.argv[1:] if arguments is None else [*arguments]
    said = io.StringIO()
    manager = _Weighted()
    try:
        with contextlib.redirect_stderr(said):
            return _parse(manager, given)
    except SystemExit:
        if "Unrecognized" in said.getvalue() and (wrong := _unknown(manager, given)):
            raise ValueError(_sentence(*wrong)) from None
        sys.stderr.write(said.getvalue())
        raise


def explain_mistyped() -> None:
    """Have the host's own entry point parse as `parse` does."""

    def parse_args(self: ConfigManager, args: list[str] | None = None) -> object:
        del self
        return parse(args)

    ConfigManager.parse_args = parse_args  # pyrefly: ignore[method-assign]


def _unknown(manager: ConfigManager, given: list[str]) -> tuple[str, list[str]] | None:
    """Return the first flag that is none, and all flags; None if all are some."""
    config, rest = manager._load_config(given)  # noqa: SLF001 - nothing else tells it
    known = [f"--{name}" for name in _names(config)]
    for word in rest:
        flag = word.partition("=")[0]
        plain = flag.replace("-", "_").replace("__no_", "__", 1).replace(".no_", ".", 1)
        if flag.startswith("--") and plain not in {x.replace("-", "_") for x in known}:
            return flag, known
    return None


def _names(config: object, above: str = "") -> Iterator[str]:
    """Yield the flags of a config, without dashes before them; those in lists and maps too."""
    for name, value in _parts(config):
        if not is_dataclass(value):
            yield f"{above}{name}"
        yield from _names(value, f"{above}{name}.")


def _parts(value: Any) -> list[tuple[object, object]]:  # noqa: ANN401 - any value of a config
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, dict):
        return [*value.items()]
    return [*enumerate(value)] if isinstance(value, (list, tuple)) else []


def _sentence(flag: str, known: list[str]) -> str:
    section, _, last = flag.removeprefix("--").rpartition(".")
    parts = [(x, *x.removeprefix("--").rpartition(".")[::2]) for x in known]
    beside = {name: x for x, where, name in parts if where == section}
    near = [beside[name] for name in closest(last.lower(), beside, 1)]
    near = near or [x for x, _, name in parts if name == last]  # in another section, or in none
    near = near or [x for x, _, name in parts if name.endswith(f"_{last}")]  # local_batch_size
    if not near and not beside:  # a section that is misspelt
        near = closest(flag.lower(), known, 1)
    meant = f"did you mean {near[0]!r}?" if near else "weighting train --help-all lists them"
    return f"no flag {flag!r}; {meant}"

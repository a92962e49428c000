"""The names of the configs that `--config` takes, read from files: no torch, no torchtitan."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from weighting.errors import nearest

OURS = "titan_integration"
_NOT_TEXT = {"flux": "makes images; its trainer is another than the one a weighting plugs into"}


class Named(NamedTuple):
    """A config function: its name, and the first line of what it says of itself."""

    name: str
    line: str


def configs() -> dict[str, list[Named]]:
    """Return the configs by where they come from: `titan_integration`, then the host's models.

    A model of the host's that ours has a config of the same name for is ours.
    """
    ours = _functions(Path(__file__).parents[1] / "config_registry.py")
    known = {found.name for found in ours}
    theirs = {
        family: [x for x in _functions(file) if x.name not in known]
        for family, file in _registries().items()
        if family not in _NOT_TEXT
    }
    return {OURS: ours, **theirs}


def family_of(config: str) -> str | None:
    """Return which model of the host's a config is of; None if of none, or not of text."""
    found = (
        family for family, names in configs().items() if config in {found.name for found in names}
    )
    return next((family for family in found if family != OURS), None)


def family_named(module: str) -> str | None:
    """Return the model of the host's that `--module` means, in any of its spellings; or None."""
    family = module.removeprefix("torchtitan.models.").removesuffix(".config_registry")
    return family if family in _registries() else None


def refuse_unknown(module: str, config: str) -> None:
    """Refuse a config that ours or the host's model does not have; says nothing of other modules.

    Raises:
        ValueError: There is none of this name; says which there are.
    """
    family = family_named(module)
    if family in _NOT_TEXT:
        msg = f"--module {module}: it {_NOT_TEXT[family]}; `weighting list configs` names others"
        raise ValueError(msg)
    if family is not None:
        known = [found.name for found in _functions(_registries()[family])]
        more = ""
    elif module == OURS:
        named = configs()
        known = [found.name for names in named.values() for found in names]
        if any(config == x.name for file in map(_file_of, _NOT_TEXT) for x in _functions(file)):
            other = next(name for name in _NOT_TEXT if config.startswith(name))
            msg = f"--config {config}: {other} {_NOT_TEXT[other]}; take a model of text"
            raise ValueError(msg)
        more = "; `weighting list configs` names all"
    else:
        return
    if config not in known:
        shown = [found.name for found in configs()[OURS]] if family is None else known
        msg = (
            f"no config function {config!r}{nearest(config, known)}; there are "
            f"{', '.join(shown)}{more}"
        )
        raise ValueError(msg)


def _registries() -> dict[str, Path]:
    """Return the files of the host's configs by model; none where it is not installed."""
    spec = find_spec("torchtitan")
    if spec is None or not spec.submodule_search_locations:
        return {}
    models = Path(spec.submodule_search_locations[0]) / "models"
    return {file.parent.name: file for file in sorted(models.glob("*/config_registry.py"))}


def _file_of(family: str) -> Path:
    return _registries().get(family, Path(__file__))


def _functions(file: Path) -> list[Named]:
    """Return the functions of a file that make a config: public, and without arguments."""
    return [
        Named(node.name, (ast.get_docstring(node) or "").partition("\n")[0])
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not node.args.args
        and not node.args.kwonlyargs
    ]

"""Modules that a spec names under `plugins:`, which register stages of their own."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from weighting.language.yaml_nodes import Node, Scalar, Seq

if TYPE_CHECKING:
    from weighting.errors import Problem, Source
    from weighting.spec import Spec


def imported(spec: Spec) -> str:
    """Return the modules under `plugins:`, each with the file whose code ran; '' for none."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in spec.plugins}
    return ", ".join(f"{name} ({file or 'no file'})" for name, file in files.items())


def import_plugins(
    source: Source, node: Node, problems: list[Problem], *, allow: bool
) -> tuple[str, ...]:
    """Import the plugin modules if that was allowed; return their names."""
    items = node.items if isinstance(node, Seq) else (node,)
    names: list[str] = []
    for item in items:
        name = item.value if isinstance(item, Scalar) else None
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            message = "a plugin is the dotted name of a Python module, such as my_stages"
            problems.append(source.problem(message, item.span))
            continue
        names.append(name)
        if name in sys.modules:
            continue
        if not allow:
            message = (
                f"importing {name} runs its code; allow it with --allow-plugins, or "
                f"allow_plugins=True, or import {name} yourself first"
            )
            problems.append(source.problem(message, item.span))
            continue
        try:
            _import_plugin(name)
        except Exception as error:  # noqa: BLE001 - a plugin may fail in any way
            message = f"plugin {name} cannot be imported: {type(error).__name__}: {error}"
            problems.append(source.problem(message, item.span))
    return tuple(names)


def _import_plugin(name: str) -> None:
    """Import a module, from the working directory too.

    That is searched last: a file there may be called like a module of an installed package.
    """
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)

"""`weighting schema`: the JSON Schema of a spec file, printed or put where editors look."""

from __future__ import annotations

import json
import os
from errno import ENOTDIR
from pathlib import Path
from typing import Any

import click

from weighting.cli.common import give_up, reason
from weighting.language.words import SCHEMA_FILE, reference
from weighting.runs.files import write_whole

_SETTINGS = Path(".vscode") / "settings.json"


@click.command("schema")
@click.option(
    "--install",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Save it in a folder of specs and tell VS Code.",
)
def print_schema(install: Path | None) -> None:
    """Print the JSON Schema of a spec file, for editors.

    Any editor with a YAML language server finds it by the first line of a spec:
      # yaml-language-server: $schema=weighting.schema.json

    \b
    Examples:
      weighting schema > weighting.schema.json
      weighting schema --install specs
    """  # noqa: D301
    text = json.dumps(reference(), indent=1, ensure_ascii=False)
    if install is None:
        click.echo(text)
        return
    try:
        for line in installed(text, install):
            click.echo(line)
    except OSError as error:
        give_up(f"{reason(error)}; to save it alone: weighting schema > {SCHEMA_FILE}")


def installed(text: str, folder: Path) -> list[str]:
    """Save the schema in a folder, tell VS Code of it, and return what was done, line by line.

    Raises:
        OSError: One of the two cannot be.
    """
    settings = _read_settings()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SCHEMA_FILE
    write_whole(path, text + "\n")
    pattern = f"{folder.as_posix()}/*.yaml"
    said = [f"schema: {path}"]
    if settings is None:
        entry = json.dumps({"yaml.schemas": {f"./{path.as_posix()}": pattern}})
        said.append(f"{_SETTINGS} is not plain JSON and is left as it is; add {entry[1:-1]}")
    else:
        known = settings.setdefault("yaml.schemas", {})
        known[f"./{path.as_posix()}"] = pattern
        _SETTINGS.parent.mkdir(exist_ok=True)
        write_whole(_SETTINGS, json.dumps(settings, indent=4) + "\n")
        said += [f"VS Code: {_SETTINGS}, for {pattern}", "  (with the extension YAML)"]
    said.append(f"other editors: first line # yaml-language-server: $schema={SCHEMA_FILE}")
    return said


def _read_settings() -> dict[str, Any] | None:
    """Return VS Code's settings here, empty if there are none; None if they hold more than JSON.

    Raises:
        OSError: They cannot be there, or cannot be read.
    """
    if not _SETTINGS.exists():
        if _SETTINGS.parent.exists() and not _SETTINGS.parent.is_dir():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(_SETTINGS.parent))
        return {}
    try:
        settings = json.loads(_SETTINGS.read_text(encoding="utf-8"))
    except ValueError:
        return None
    is_map = isinstance(settings, dict) and isinstance(settings.get("yaml.schemas", {}), dict)
    return settings if is_map else None

"""`weighting schema`: the JSON Schema of a spec file."""

from __future__ import annotations

import json

import click

from weighting.schema import schema


@click.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of a spec file, for editors.

    \b
    Save it beside your specs and begin them with
      # yaml-language-server: $schema=weighting.schema.json
    """  # noqa: D301
    click.echo(json.dumps(schema(), indent=1, ensure_ascii=False))

"""What takes torchtitan: functions of the integration, imported when they are called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from weighting.cli.common import complain, give_up
from weighting.errors import closest

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_in_host(command: str, /, *, flags: Sequence[str], **options: object) -> NoReturn:
    """Call `main` of a module of `titan_integration.commands`, and exit with what it returns.

    Exits with status 2 for an error of the user's, which is a ValueError or an OSError, and with
    130 if it was interrupted.

    Args:
        command: The module's name.
        flags: The user's, for torchtitan.
        options: What else its `main` takes.
    """
    _refuse_mistyped(flags)
    main = from_host(command, "main")
    try:
        status = main(flags=[*flags], **options)
    except BrokenPipeError:  # `| head` has seen enough, which click knows
        raise
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _refuse_mistyped(flags: Sequence[str]) -> None:
    """Exit with status 2 if a flag for torchtitan is rather a misspelt option of the command.

    Torchtitan's own are looked at where it is imported, which takes seconds.
    """
    own = [x for param in click.get_current_context().command.params for x in param.opts]
    for word in flags:
        flag = word.partition("=")[0]
        if flag.startswith("--") and "." not in flag and flag.replace("-", "_") not in _THEIRS:
            for near in closest(flag, [x for x in own if x.startswith("--")], 1):
                give_up(f"no flag {flag!r}; did you mean {near!r}?")


_THEIRS = {"__", "__hf_assets_path", "__dump_folder"}
"""Flags of torchtitan that are of no section, with underscores."""


def from_host(module: str, name: str) -> Any:  # noqa: ANN401 - the core knows nothing of the host
    """Return a function of a module of `titan_integration.commands`.

    A plugin or config module of the user's may be in the working folder.  That is searched last,
    since a file there may be called like a module of Python's or of an installed package.
    """
    if importlib.util.find_spec("torchtitan") is None:
        give_up("this needs torchtitan: pip install 'weighting-dsl[titan]'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return getattr(importlib.import_module(f"titan_integration.commands.{module}"), name)

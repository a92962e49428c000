"""`weighting doctor`: what is here, what works, and what a run would use."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

import click

from weighting import __version__
from weighting.cli.common import echo
from weighting.errors import SpecError
from weighting.language.find import shipped

if TYPE_CHECKING:
    from collections.abc import Iterator


class Finding(NamedTuple):
    """One line of the report: what was looked at, what was found, and whether that is in order."""

    what: str
    found: str
    ok: bool = True
    more: str = ""


@click.command()
def doctor() -> None:
    """Look at this machine: versions, accelerator, imports, folders; exit 2 if training cannot run.

    \b
    Examples:
      weighting doctor
    """  # noqa: D301
    failed = False
    for finding in findings():
        mark = "ok " if finding.ok else "BAD"
        echo(f"{mark} {finding.what:14} {finding.found}")
        for line in finding.more.splitlines():
            echo(f"    {line}")
        failed = failed or not finding.ok
    if failed:
        sys.exit(2)


def findings() -> Iterator[Finding]:
    """Yield what is found, the quick things first."""
    yield Finding("weighting-dsl", f"{__version__}, Python {platform.python_version()}")
    yield _specs()
    for package, why in _PACKAGES.items():
        yield _package(package, why)
    yield Finding("would use", _device())
    if importlib.util.find_spec("torchtitan") is not None:
        yield from _training()


_PACKAGES = {
    "torch": "",
    "torchtitan": "to train: pip install 'weighting-dsl[titan]'",
    "matplotlib": "to plot: pip install 'weighting-dsl[plot]'",
}
"""What is looked for, and what it is for where one can do without."""


def _specs() -> Finding:
    from weighting.build import plan_of  # noqa: PLC0415 - imports torch
    from weighting.language.read import load  # noqa: PLC0415

    wrong: list[str] = []
    for name, path in shipped().items():
        try:
            plan_of(load(path))
        except SpecError as error:
            wrong.append(f"{name}: {error}")
    return Finding("specs", f"{len(shipped())} shipped", ok=not wrong, more="\n".join(wrong))


def _package(name: str, why: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, f"not installed; {why}" if why else "not installed", ok=bool(why))


def _device() -> str:
    import torch  # noqa: PLC0415 - takes seconds

    cores = os.cpu_count() or 1
    if torch.accelerator.is_available():
        count = torch.accelerator.device_count()
        return f"{count} x {torch.accelerator.current_accelerator()}, one process each"
    return f"the CPU, {cores} cores; without an accelerator models are small"


def _training() -> Iterator[Finding]:
    """Import the integration in a process of its own, which shows the real traceback if it fails.

    The trainer's command line would say no more than "config function not found".
    """
    code = (
        "from titan_integration import config_registry\n"
        "from titan_integration.host import versions\n"
        "from titan_integration.data.tokenizer import ensure_tokenizer\n"
        "print(versions.found() == versions.TESTED, *map(' '.join, versions.TESTED.items()))\n"
        "print(ensure_tokenizer())"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        yield Finding("integration", "cannot be imported", ok=False, more=done.stderr.strip())
        return
    tested, folder = done.stdout.strip().splitlines()[-2:]
    is_tested, _, pair = tested.partition(" ")
    note = "the tested versions" if is_tested == "True" else f"but was tested with {pair}"
    yield Finding("integration", f"imports; {note}")
    yield Finding("tokenizer", folder)
    here = os.access(".", os.W_OK)
    yield Finding("outputs", f"{os.getcwd()}/outputs", ok=here, more="" if here else _LOCKED)  # noqa: PTH109


_LOCKED = "this folder cannot be written to; pass --dump_folder"

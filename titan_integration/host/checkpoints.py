"""The folders `step-N` of a run: which are whole checkpoints, which are torn, which are exports.

The host writes a checkpoint's `.metadata` last, so a save that is cut short leaves none.  A folder
may have one and still be torn: it was being deleted, or written anew over an older checkpoint, or
copied in part, or its ranks wrote to disks of their own.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from torchtitan.tools.logging import logger

from titan_integration.state.checksums import IntactReader, why
from weighting.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

METADATA = ".metadata"
_INDEX = "model.safetensors.index.json"
"""What the host writes last of an export for Hugging Face."""
_SHOWN = 8
"""How many missing files a message names."""


def step_folders(folder: Path) -> dict[int, Path]:
    """Return the folders named exactly `step-N`, by step, latest first."""
    names = re.compile(r"step-(0|[1-9][0-9]*)")
    matches = ((names.fullmatch(path.name), path) for path in folder.glob("step-*"))
    found = {int(match[1]): path for match, path in matches if match and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def latest_whole(folder: Path) -> int:
    """Return the latest step whose `step-N` is whole, -1 if none is; warns of later ones."""
    passed = False
    for step, path in step_folders(folder).items():
        reason = flaw(path)
        if reason is None:
            if passed:
                logger.warning(printable(f"Going on from {path}"))
            return step
        passed = True
        logger.warning(printable(f"Passing over {path}: {reason}"))
    return -1


def flaw(folder: Path) -> str | None:
    """Return what keeps a folder from being a whole checkpoint, or None; reads sizes only."""
    try:
        written = (folder / METADATA).stat()
        ends = _ends(folder, (written.st_mtime_ns, written.st_size, written.st_ino))
    except FileNotFoundError:
        if is_export(folder):
            return "it is a finished export for Hugging Face: weights alone, no state to go on from"
        return f"it has no {METADATA}, so it was never finished"
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        return f"its {METADATA} cannot be read: {why(error)}"
    missing = [name for name in sorted(ends) if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        verb = "is" if len(missing) == 1 else "are"
        return f"{', '.join(missing[:_SHOWN])}{more} {verb} missing"
    for name, end in sorted(ends.items()):
        if (size := (folder / name).stat().st_size) < end:
            return f"{name} has {size} of {end} bytes"
    return None


def is_export(folder: Path) -> bool:
    """Tell whether a folder is a finished export of a model for Hugging Face."""
    if (folder / METADATA).exists():
        return False
    alone = not (folder / "sharded").exists() and any(folder.glob("*.safetensors"))
    return (folder / _INDEX).is_file() or alone


def lost(folder: Path, interval: int) -> str | None:
    """Return why a folder without a whole checkpoint is not one to start afresh in, or None.

    Only a first save that was cut short is no reason: nothing was saved before it.  It left no
    `.metadata`, and its step is not after the first that is saved.

    Args:
        folder: Where the `step-N` are.
        interval: Steps from one save to the next.
    """
    for step, path in step_folders(folder).items():
        reason = flaw(path)
        if is_export(path):
            return (
                f"{path}: {reason}, and there is no earlier checkpoint. To start a new run from "
                "these weights, take another --dump_folder, with --checkpoint.initial_load_path "
                f"{path.absolute()} --checkpoint.initial_load_in_hf; to train from step 1 here, "
                "move the folder away"
            )
        finished = (path / METADATA).exists()
        if not finished and step <= interval:
            continue
        earlier = f", and with --checkpoint.interval {interval} a save came before it"
        return (
            f"{folder} holds checkpoints, none of them whole, and training would start afresh: "
            f"{path.name}: {reason}{'' if finished else earlier}. If nodes have this folder each "
            "for itself, the rest is on the others: put all files into one folder that they share. "
            f"If it was copied, copy it again, {METADATA} included. To train from step 1, move the "
            "step folders away"
        )
    return None


def stale(folder: Path, keep: int) -> list[Path]:
    """Return the whole checkpoints before the latest whole ones, of which so many are kept."""
    return [path for path in step_folders(folder).values() if flaw(path) is None][keep:]


@functools.lru_cache(maxsize=64)
def _ends(folder: Path, written: tuple[int, ...]) -> dict[str, int]:
    """Return the size that each file of a checkpoint has at least.

    Args:
        folder: The checkpoint's.
        written: Tells one `.metadata` from another at the same place.
    """
    del written
    ends: dict[str, int] = {}
    for info in IntactReader(folder).read_metadata().storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends

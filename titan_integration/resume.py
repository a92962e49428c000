"""Going on from a checkpoint: the latest whole one, whoever wrote it and whatever it lacks.

The host writes a checkpoint's `.metadata` last, so a save that is cut short leaves none.  A folder
may have one and still be torn: it was being deleted, or written anew over an older checkpoint, or
copied in part.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
)
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.intact import IntactReader, cause_of, why
from titan_integration.state import RECORD, RunState
from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future

    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
    from torch.distributed.checkpoint.stateful import Stateful
    from torchtitan.components.checkpointer.dcp import AsyncMode

T = TypeVar("T")

WEIGHTING, REFERENCE = "weighting", "reference"
"""Our entries of a checkpoint: the weighting's state, and a reference that is an average."""

_AFRESH = "--checkpoint.exclude_from_loading"


class ResumingCheckpointManager(CheckpointManager):
    """The host's checkpoint manager; passes over torn checkpoints, and does without our entries.

    A checkpoint of a run that was not weighted resumes with a fresh weighting, and one without an
    average with the loaded model as the average.  Remote folders are left to the host.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """The host's fields."""

    @override
    def _find_load_step(self, folder: str = "") -> int:
        """Return the step of the latest whole checkpoint; -1 if there is none."""
        folder = folder or self.folder
        if filesystem.is_remote(folder):
            return super()._find_load_step(folder)
        return _on_first_rank(lambda: latest_whole(Path(folder)))

    @override
    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load a checkpoint, as far as it goes.

        Raises:
            ValueError: It is torn or damaged, of another spec, or lacks what a run cannot go on
                without.
        """
        wanted = state_dict
        if from_hf or filesystem.is_remote(checkpoint_id):
            super().dcp_load(wanted, checkpoint_id, from_hf, from_quantized)
        else:
            folder = Path(checkpoint_id)
            if reason := _on_first_rank(lambda: flaw(folder)):
                msg = f"cannot resume from {folder}: {reason}; leave out --checkpoint.load_step"
                raise ValueError(msg)
            try:
                wanted = _without_absent(state_dict, folder)
                dcp.load(wanted, storage_reader=IntactReader(folder))
            except CheckpointException as error:
                msg = (
                    f"cannot resume from {folder}: {why(error)}. Move this folder away, and the "
                    "same command goes on from the checkpoint before it"
                )
                raise ValueError(msg) from error
            if MODEL in self.states:  # as the host does: what was loaded is a flat copy
                self.states[MODEL].load_state_dict(wanted)
        if REFERENCE in self.states and REFERENCE not in wanted:
            self.states[REFERENCE].load_state_dict(self.states[MODEL].state_dict())

    @override
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future[Any] | AsyncSaveResponse | None:
        """Save a checkpoint; one that it overwrites is none from the first byte on.

        Else a kill might leave some ranks' new files and others' old ones under one `.metadata`.
        No rank writes before the first has planned, which it does after this.

        Raises:
            ValueError: It cannot be written.
        """
        if dist.get_rank() == 0 and not filesystem.is_remote(checkpoint_id):
            (Path(checkpoint_id) / ".metadata").unlink(missing_ok=True)
        with _saving(checkpoint_id):
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )

    @override
    def _wait_for_saving(self) -> None:
        """Wait for a save in the background.

        Raises:
            ValueError: It could not be written.
        """
        with _saving(self.folder):
            super()._wait_for_saving()


def latest_whole(folder: Path) -> int:
    """Return the latest step whose `step-N` is whole, -1 if none is; warns of later ones."""
    steps = {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        reason = flaw(steps[step])
        if reason is None:
            return step
        logger.warning(printable(f"Passing over {steps[step]}: {reason}"))
    return -1


def flaw(folder: Path) -> str | None:
    """Return what keeps a folder from being a whole checkpoint, or None; reads sizes only."""
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except FileNotFoundError:
        return "it has no .metadata, so it was never finished"
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        return f"its .metadata cannot be read: {type(error).__name__}: {error}"
    ends: dict[str, int] = {}
    for info in stored.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) < end:
            return f"{name} has {size} of {end} bytes"
    return None


@contextlib.contextmanager
def _saving(folder: str) -> Iterator[None]:
    """Say what a checkpoint could not be written for, on every rank.

    Raises:
        ValueError: It could not.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = cause_of(error)
        # Torch finds what a full disk has cut short, and says so in its own words.
        if not isinstance(cause, OSError) and "inline_container" not in str(cause):
            raise
        free = "" if filesystem.is_remote(folder) else f", {_free(Path(folder))} MiB are free there"
        msg = (
            f"cannot write the checkpoint {folder}: {why(error)}{free}. Those before it are whole: "
            "when that is mended, the same command goes on from the latest"
        )
        raise ValueError(msg) from error


def _free(folder: Path) -> str:
    above = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
    return f"{shutil.disk_usage(above).free / 2**20:,.1f}"


def misfits(part: str, state: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return what of a state a checkpoint does not have, or has in another shape.

    Args:
        part: The state's entry in the checkpoint.
        state: What is to be loaded.
        saved: A checkpoint's metadata by key, `part.key`.
    """
    found: list[str] = []
    for key, value in state.items():
        there = saved.get(f"{part}.{key}")
        if there is None:
            found.append(f"it has no {key}")
        elif isinstance(there, TensorStorageMetadata) and there.size != value.shape:
            found.append(f"{key} is {[*there.size]} there and {[*value.shape]} here")
    return found


def _without_absent(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what of a state to load from a checkpoint.

    Raises:
        ValueError: It lacks what a run cannot go on without; says what to do.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    parts = {key.partition(".")[0] for key in saved}
    needed = {OPTIMIZER, LR_SCHEDULER, "train_state"}
    if absent := sorted(needed.intersection(state_dict) - parts):
        msg = (
            f"cannot resume from {folder}: it holds no {', '.join(absent)}, as the last checkpoint "
            "of a run with --checkpoint.last-save-model-only; resume an earlier one with "
            "--checkpoint.load_step, or start anew from its weights with "
            "--checkpoint.initial_load_path"
        )
        raise ValueError(msg)
    if DATALOADER in state_dict:
        _check_data(state_dict[DATALOADER], folder, saved)
    wanted = dict(state_dict)
    if WEIGHTING in wanted and not _has_weighting(wanted[WEIGHTING], folder, saved):
        del wanted[WEIGHTING]
    if REFERENCE in wanted and REFERENCE not in parts:
        _warn(f"{folder} holds no moving average; it starts from the loaded model")
        del wanted[REFERENCE]
    return wanted


def _check_data(loader: Stateful, folder: Path, saved: Mapping[str, Any]) -> None:
    """Check that a checkpoint has a data loader's state; each rank may ask for its own."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, misfits(DATALOADER, loader.state_dict(), saved))
    lacks = [reason for reasons in found for reason in reasons]
    if not lacks:
        return
    prefix = f"{DATALOADER}."
    there = [key.removeprefix(prefix) for key in sorted(saved) if key.startswith(prefix)]
    msg = (
        f"{folder} does not have the state of this data loader: {lacks[0]} but "
        f"{', '.join(there[:3]) or 'nothing'}. It was written by another loader, or for other "
        "data, or by another number of ranks that read a stream. To start the data afresh: "
        f"{_AFRESH} {DATALOADER}"
    )
    raise ValueError(msg)


def _has_weighting(state: RunState, folder: Path, saved: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint has a weighting's state to load; warns if it starts afresh."""
    record = {key: "" for key in RECORD if f"{WEIGHTING}.{key}" in saved}
    if "spec_hash" not in record:
        _warn(f"{folder} holds no state of a weighting; the weighting starts afresh")
        return False
    dcp.load({WEIGHTING: record}, storage_reader=IntactReader(folder))
    if not state.accepts(record):
        _warn(f"{folder} is of another weighting spec; the weighting starts afresh")
        return False
    if lacks := misfits(WEIGHTING, state.state_dict(), saved):
        msg = (
            f"{folder} has another state of this very weighting: {lacks[0]}. It was written by "
            "another version of it, or for data of other domains; to start the weighting afresh: "
            f"{_AFRESH} {WEIGHTING}"
        )
        raise ValueError(msg)
    return True


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        logger.warning(printable(message))


def _on_first_rank(question: Callable[[], T]) -> T:
    """Ask the first rank alone and tell all, so that they agree and thousands need not look."""
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return cast("T", answer[0])

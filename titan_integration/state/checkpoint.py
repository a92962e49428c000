"""Going on from a checkpoint: the latest whole one, whoever wrote it and whatever it lacks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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

from titan_integration.host.checkpoints import (
    METADATA,
    flaw,
    is_export,
    latest_whole,
    lost,
    stale,
    step_folders,
)
from titan_integration.host.run_dir import writing
from titan_integration.state.checksums import IntactReader, cause_of, why
from titan_integration.state.draws import PROPORTIONS
from titan_integration.state.saved_weighting import RECORD, SavedWeighting
from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future

    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
    from torch.distributed.checkpoint.stateful import Stateful
    from torchtitan.components.checkpointer.dcp import AsyncMode

    from titan_integration.state.run import Run

T = TypeVar("T")

WEIGHTING, REFERENCE = "weighting", "reference"
"""Our entries of a checkpoint: the weighting's state, and a reference that is an average; one of
several has its name behind it."""

_AFRESH = "--checkpoint.exclude_from_loading"
_PATIENCE = 90.0
"""Seconds until a file that another node has written must be seen: network disks look again after
a minute."""


class ResumingCheckpointManager(CheckpointManager):
    """The host's checkpoint manager; passes over torn checkpoints, and does without our entries.

    A checkpoint of a run that was not weighted resumes with a fresh weighting, and one without an
    average with the loaded model as the average.  Remote folders are left to the host.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """The host's fields."""

    initial_load_path: str | None = None
    _run: Run | None = None

    def bind(self, run: Run) -> None:
        """Let a run's observer write what a checkpoint is past, before each is saved."""
        self._run = run

    @override
    def _load(self, step: int = -1) -> bool:
        """Load the checkpoint of a step, the latest whole one by default; tell whether there is.

        Raises:
            ValueError: There is none to go on from though there was, or ranks have folders of
                their own.
        """
        folder = Path(self.folder)
        initial = self.initial_load_path
        if initial and not filesystem.is_remote(initial):
            of_hf = self.sd_adapter is not None and is_export(Path(initial))
            if not self.initial_load_in_hf and _on_first_rank(lambda: of_hf):
                self.initial_load_in_hf = self.initial_load_model_only = True
        if not filesystem.is_remote(self.folder):
            if not self.load_only:
                _refuse_separate(folder)
            if step != -1 and _on_first_rank(lambda: step not in step_folders(folder)):
                there = ", ".join(map(str, sorted(step_folders(folder)))) or "none"
                msg = f"--checkpoint.load_step {step}: {folder} has no step-{step}; steps: {there}"
                raise ValueError(msg)
        return super()._load(step)

    @override
    def _find_load_step(self, folder: str = "") -> int:
        """Return the step of the latest whole checkpoint; -1 if nothing was saved yet.

        Raises:
            ValueError: Something was, and none of it is whole.
        """
        folder = folder or self.folder
        if filesystem.is_remote(folder):
            return super()._find_load_step(folder)

        def look() -> tuple[int, str | None]:
            step = latest_whole(Path(folder))
            return step, lost(Path(folder), self.interval) if step == -1 else None

        step, reason = _on_first_rank(look)
        if reason:
            raise ValueError(reason)
        return step

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
        if from_hf and not _on_first_rank(lambda: any(Path(checkpoint_id).glob("*.safetensors"))):
            flag = "hf_assets_path" if self.initial_load_path is None else "initial_load_path"
            msg = (
                f"--checkpoint.initial_load_in_hf: no *.safetensors in {flag} {checkpoint_id}; "
                "leave it out for a checkpoint of torchtitan's own format"
            )
            raise ValueError(msg)
        if from_hf or filesystem.is_remote(checkpoint_id):
            super().dcp_load(wanted, checkpoint_id, from_hf, from_quantized)
        else:
            folder, initial = Path(checkpoint_id), checkpoint_id == self.initial_load_path
            if reason := _on_first_rank(lambda: flaw(folder)):
                mend = _instead_of(folder) if initial else "leave out --checkpoint.load_step"
                msg = f"{_source(folder, initial=initial)}: {reason}; {mend}"
                raise ValueError(msg)
            if blind := _blind(folder / METADATA):
                msg = f"{_source(folder, initial=initial)}: {blind} it there; {_SHARE}"
                raise ValueError(msg)
            try:
                wanted = _without_absent(state_dict, folder, initial=initial)
                dcp.load(wanted, storage_reader=IntactReader(folder))
            except CheckpointException as error:
                mend = (
                    "Give another one"
                    if initial
                    else "Move this folder away, and the same command goes on from the checkpoint "
                    "before it"
                )
                msg = f"{_source(folder, initial=initial)}: {why(error)}. {mend}"
                raise ValueError(msg) from error
            if MODEL in self.states:  # as the host does: what was loaded is a flat copy
                self.states[MODEL].load_state_dict(wanted)
        for key in _averages(self.states):
            if key not in wanted:
                self.states[key].load_state_dict(self.states[MODEL].state_dict())

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
        if self._run is not None:  # what a checkpoint is past is not observed again
            self._run.flush()
        if dist.get_rank() == 0 and not filesystem.is_remote(checkpoint_id):
            (Path(checkpoint_id) / METADATA).unlink(missing_ok=True)
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

    @override
    def _purge_stale_checkpoints(self) -> None:
        """Delete whole checkpoints before the latest `keep_latest_k` whole ones, and no others.

        A save in the background is not whole yet, so what it will replace stays until the next.
        """
        if filesystem.is_remote(self.folder):
            super()._purge_stale_checkpoints()
        elif self._should_purge():
            folder = Path(self.folder)
            for path in stale(folder, self.keep_latest_k):
                try:  # no half of it is ever a `step-N`, though its deletion be cut short
                    path.rename(folder / f".{path.name}.{uuid.uuid4().hex}.deleted")
                except OSError as error:
                    logger.warning(printable(f"Cannot delete {path}: {error.strerror}"))
            for path in folder.glob(".step-*.deleted"):
                self.purge_queue.put(str(path))


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
    """Return what of a state a checkpoint does not have, or has in another shape or type.

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
        elif not isinstance(there, TensorStorageMetadata):
            if isinstance(value, torch.Tensor):
                found.append(f"{key} is no tensor there")
        elif not isinstance(value, torch.Tensor):
            found.append(f"{key} is a tensor there")
        elif there.size != value.shape:
            found.append(f"{key} is {[*there.size]} there and {[*value.shape]} here")
        elif not torch.can_cast(there.properties.dtype, value.dtype):
            found.append(f"{key} is {there.properties.dtype} there and {value.dtype} here")
    return found


def _without_absent(
    state_dict: dict[str, Any], folder: Path, *, initial: bool = False
) -> dict[str, Any]:
    """Return what of a state to load from a checkpoint.

    Raises:
        ValueError: It lacks what a run cannot go on without; says what to do.
    """
    saved = IntactReader(folder).read_metadata().state_dict_metadata
    parts = {key.partition(".")[0] for key in saved}
    needed = {OPTIMIZER, LR_SCHEDULER, "train_state"}
    if absent := sorted(needed.intersection(state_dict) - parts):
        mend = (
            "start from its weights alone with --checkpoint.initial_load_model_only"
            if initial
            else "resume an earlier one with --checkpoint.load_step, or start anew from its "
            "weights with --checkpoint.initial_load_path"
        )
        msg = (
            f"{_source(folder, initial=initial)}: it holds no {', '.join(absent)}, as the last "
            f"checkpoint of a run with --checkpoint.last-save-model-only; {mend}"
        )
        raise ValueError(msg)
    if DATALOADER in state_dict:
        _check_data(state_dict[DATALOADER], folder, saved)
    wanted = dict(state_dict)
    if WEIGHTING in wanted and not _has_weighting(wanted[WEIGHTING], folder, saved):
        del wanted[WEIGHTING]
    for key in _averages(wanted):
        if key not in parts:
            name = key.removeprefix(REFERENCE).replace("_", " ", 1)
            _warn(f"{folder} holds no moving average{name}; it starts from the loaded model")
            del wanted[key]
    return wanted


def _averages(states: Mapping[str, Any]) -> list[str]:
    """Return which entries are references that are averages: of the only one, or named."""
    return [key for key in states if key == REFERENCE or key.startswith(f"{REFERENCE}_")]


def _check_data(loader: Stateful, folder: Path, saved: Mapping[str, Any]) -> None:
    """Check that a checkpoint has a data loader's state; each rank may ask for its own."""
    shards = sum(key.startswith(f"{DATALOADER}.shard_") for key in saved)
    if shards and hasattr(loader, "take_shards"):  # else it would ask for those of a new run
        loader.take_shards(shards)
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


def _has_weighting(state: SavedWeighting, folder: Path, saved: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint has a weighting's state to load; warns if it starts afresh."""
    record = {key: "" for key in RECORD if f"{WEIGHTING}.{key}" in saved}
    if "spec_hash" not in record:
        _warn(f"{folder} holds no state of a weighting; the weighting starts afresh")
        return False
    dcp.load({WEIGHTING: record}, storage_reader=IntactReader(folder))
    if not state.accepts(record):
        _warn(f"{folder} is of another weighting spec; the weighting starts afresh")
        return False
    if f"{WEIGHTING}.{PROPORTIONS}" not in saved:
        state.draw_at_once()
    if lacks := misfits(WEIGHTING, state.state_dict(), saved):
        msg = (
            f"{folder} has another state of this very weighting: {lacks[0]}. It was written by "
            "another version of it, or for data of other domains; to start the weighting afresh: "
            f"{_AFRESH} {WEIGHTING}"
        )
        raise ValueError(msg)
    return True


def _source(folder: Path, *, initial: bool) -> str:
    """Return how messages name a checkpoint that cannot be loaded."""
    return f"--checkpoint.initial_load_path {folder}" if initial else f"cannot resume from {folder}"


def _instead_of(folder: Path) -> str:
    """Return what to give instead of a folder that was to be started from."""
    if is_export(folder):
        return "add --checkpoint.initial_load_in_hf"
    around = [path for where in (folder, folder.parent) for path in step_folders(where).values()]
    whole = next((path for path in around if flaw(path) is None), None)
    return "give the folder of a whole checkpoint" + (f", such as {whole}" if whole else "")


_SHARE = (
    "every node needs the same folder: give one on a disk that all of them share, as "
    "--dump_folder or --checkpoint.folder"
)


def _refuse_separate(folder: Path) -> None:
    """Refuse a folder for checkpoints that is not the same one on every rank.

    The first rank makes a file there, and all must see it; it is taken away again.

    Raises:
        ValueError: Some do not, or it cannot be written.
    """
    if dist.get_world_size() == 1:
        return

    def make() -> tuple[str, str]:
        name = f".seen-by-all-{uuid.uuid4().hex}"
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch(exist_ok=False)
        except ValueError as error:
            return name, str(error)
        return name, ""

    name, problem = _on_first_rank(make)
    if problem:
        raise ValueError(problem)
    blind = _blind(folder / name)

    def clear() -> str:
        (folder / name).unlink(missing_ok=True)
        torn = ((path.name, flaw(path)) for path in step_folders(folder).values())
        found = [f"{step}: {reason}" for step, reason in torn if reason]
        return f" ({found[0]})" if blind and found else ""

    there = _on_first_rank(clear)
    if blind:
        msg = (
            f"{folder}{there}: {blind} what the first rank writes there, so each would keep a part "
            f"of every checkpoint and none could be resumed; {_SHARE}"
        )
        raise ValueError(msg)


def _blind(path: Path) -> str:
    """Return which ranks do not see a file that the first rank sees, as "rank 1 ... not see".

    Every rank must call it; "" if all see it.
    """
    until = time.monotonic() + _PATIENCE
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(
        told, "" if seen else f"rank {dist.get_rank()} on {socket.gethostname()}"
    )
    blind = [rank for rank in told if rank]
    if not blind:
        return ""
    more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
    return f"{blind[0]}{more} {'do' if more else 'does'} not see"


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        logger.warning(printable(message))


def _on_first_rank(question: Callable[[], T]) -> T:
    """Ask the first rank alone and tell all, so that they agree and thousands need not look."""
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return cast("T", answer[0])

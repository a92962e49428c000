"""Reading checkpoints: their checksums are looked at, and nothing in them is run.

`torch.save`, which writes the items of the host's checkpoints, leaves a CRC-32 of every tensor in
its zip archives, and `torch.load` does not look at it.  Each rank checks what it reads.

What torch's own reader unpickles may name any function, which is called with that.  Here
`.metadata` names the classes of a checkpoint's metadata and no others, and what is stored beside
tensors is what `torch.load` takes for plain data: numbers, texts, bytes, and lists and dicts of
them.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import override

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
    from torch.futures import Future

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""What `.metadata` is made of, beside numbers, texts and dtypes."""


class IntactReader(FileSystemReader):
    """Torch's reader of a checkpoint's folder, for folders of anybody.

    It refuses bytes that are not as they were written, and runs no code that is in them.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds and where.

        Raises:
            FileNotFoundError: There is no `.metadata`.
            ValueError: It is something else than metadata.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            msg = f"it holds a {type(metadata).__name__}, no metadata of a checkpoint"
            raise ValueError(msg)  # noqa: TRY004 - the file is wrong, and no argument
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned.

        Raises:
            ValueError: It is not intact, or an object that is no plain data.
        """
        return super().read_data(plan, cast("LoadPlanner", _PlainData(planner)))

    @override
    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """Return the bytes of one tensor or object, all of them in memory.

        Raises:
            ValueError: They are not intact.
        """
        found = io.BytesIO(super()._slice_file(file, sinfo).read())
        # What is no archive any more does not load.
        if zipfile.is_zipfile(found) and not _is_intact(found):
            end = sinfo.offset + sinfo.length
            msg = f"{sinfo.relative_path} is damaged between bytes {sinfo.offset:,} and {end:,}"
            raise ValueError(msg)
        found.seek(0)
        return found


def why(error: BaseException) -> str:
    """Return in one line why reading or writing a checkpoint failed, on the first such rank."""
    cause = cause_of(error)
    return f"{cause}" if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the first rank that had one, which torch wraps for all of them."""
    if isinstance(error, CheckpointException) and error.failures:
        cause, _ = error.failures[min(error.failures)]
        return cause
    return error


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata, and refuses to find any other."""

    @override
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _KNOWN.get(module, ()):
            msg = (
                f"it names {f'{module}.{name}'!a}, which is no part of a checkpoint and could run "
                "code; do not use this folder unless you know who wrote it"
            )
            raise ValueError(msg)
        return super().find_class(module, name)


class _PlainData:
    """Stands between a reader and a planner, and hands on objects only if they are plain data."""

    def __init__(self, planner: LoadPlanner) -> None:
        self.resolve_tensor = planner.resolve_tensor
        self.commit_tensor = planner.commit_tensor
        self._load_bytes = planner.load_bytes

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand on an object, which the planner unpickles whatever it is."""
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            key = read_item.storage_index.fqn
            # The rest of torch's message is about an argument that nobody here can give.
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"names {named[1]!a}" if named else "is damaged, or no plain data"
            msg = (
                f"{key} {what}, and loading it could run code. If you know who wrote it, allow its "
                "classes with torch.serialization.add_safe_globals, as in a module among the "
                "spec's plugins; to go on without: --checkpoint.exclude_from_loading "
                f"{key.partition('.')[0]}"
            )
            raise ValueError(msg) from error
        value.seek(0)
        self._load_bytes(read_item, value)


def _is_intact(found: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(found) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001 - a damaged archive raises anything
        return False

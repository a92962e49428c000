"""Nothing in a checkpoint is run by looking at it, or by loading it."""

import collections
import datetime as dt
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from titan_integration.host.checkpoints import flaw, latest_whole
from titan_integration.loss.reference_model import find_checkpoint, load_model
from titan_integration.state import checkpoint as resume
from titan_integration.state.checksums import IntactReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Return what a pickle calls."""
        return os.mkdir, (str(self.path),)


def saved(folder, **objects):
    """Save a small checkpoint, and return its folder."""
    dcp.save({"weight": torch.arange(4.0), **objects}, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder, **objects):
    """Load one."""
    state = {"weight": torch.zeros(4), **objects}
    dcp.load(state, storage_reader=IntactReader(folder), no_dist=True)
    return state


@pytest.fixture
def evil(tmp_path):
    """Return a checkpoint whose `.metadata` runs code, and what that makes."""
    made = tmp_path / "made"
    folder = saved(tmp_path / "all" / "step-2")
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(made)))
    return folder, made


def test_the_pickle_is_one_that_torch_runs(evil):
    """Or else the tests below would show nothing."""
    folder, made = evil
    with pytest.raises(AttributeError):
        FileSystemReader(folder).read_metadata()
    assert made.exists()


def test_looking_at_a_folder_runs_nothing(evil, caplog):
    """It is torn, and says what it would have run."""
    folder, made = evil
    assert "names 'posix.mkdir', which is no part of a checkpoint and could run code" in flaw(
        folder
    )
    assert latest_whole(folder.parent) == -1
    assert "Passing over" in caplog.text
    assert resume._instead_of(folder.parent) == "give the folder of a whole checkpoint"
    assert find_checkpoint(str(folder.parent)) == folder
    assert not made.exists()


def test_loading_a_folder_runs_nothing(evil):
    """Neither as a reference nor as torch asks for it."""
    folder, made = evil
    with pytest.raises(ValueError, match=r"cannot read .*names 'posix\.mkdir'"):
        load_model(torch.nn.Linear(2, 2), folder, "a layer")
    with pytest.raises(CheckpointException, match=r"names 'posix\.mkdir'"):
        load(folder)
    assert not made.exists()


@pytest.mark.parametrize("where", ["attribute", "builtins", "inside"])
def test_no_other_class_is_found(where, tmp_path):
    """Attributes of known classes, builtins, and what is deep inside of real metadata."""
    folder, made = saved(tmp_path / "step-2"), tmp_path / "made"
    if where == "attribute":
        text = b"\x80\x04\x8c\x05torch\x8c\x17Size.__class__.__call__\x93."
    elif where == "builtins":
        text = b"cbuiltins\neval\n(S'1'\ntR."
    else:
        metadata = FileSystemReader(folder).read_metadata()
        metadata.planner_data = {"a": [Runs(made)]}
        text = pickle.dumps(metadata)
    (folder / ".metadata").write_bytes(text)
    assert "could run code" in flaw(folder)
    assert not made.exists()


def test_what_is_no_metadata_is_called_so(tmp_path):
    """A pickle of something harmless is no checkpoint either."""
    folder = saved(tmp_path / "step-2")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert (
        flaw(folder) == "its .metadata cannot be read: it holds a dict, no metadata of a checkpoint"
    )


@pytest.mark.parametrize("name", ["plain", "nested"])
def test_an_object_that_runs_code_is_not_loaded(name, tmp_path):
    """Its key is named, and what it asks for."""
    made = tmp_path / "made"
    value = Runs(made) if name == "plain" else {"row": [1, Runs(made)]}
    # Saving flattens dicts, so that lists and objects are entries of their own.
    folder = saved(tmp_path / "step-2", dataloader={"a": value})
    key = "dataloader.a" if name == "plain" else r"dataloader\.a\.row\S*"
    with pytest.raises(CheckpointException, match=rf"{key} names 'posix\.mkdir', and loading it"):
        load(folder, dataloader={"a": 0 if name == "plain" else {"row": [0, 0]}})
    assert not made.exists()


def test_plain_data_and_all_kinds_of_tensors_are_loaded(tmp_path):
    """What the host, its loaders and ours leave in checkpoints."""
    objects = {
        "numbers": {"a": 1, "b": 2.5, "c": True, "d": None, "e": 2**70, "f": 1j},
        "texts": {"a": "text", "b": b"bytes" * 1000, "c": pickle.dumps({"row": 3})},
        "lists": {"a": [1, [2, "x"]], "b": (1, 2), "c": {1, 2}},
        "others": {"a": torch.Size([1]), "b": torch.float16, "c": collections.OrderedDict(a=1)},
    }
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
    tensors = {f"{kind}": torch.ones(3, dtype=kind) for kind in kinds}
    folder = saved(tmp_path / "step-2", **objects, tensors=tensors)
    empty = {name: dict.fromkeys(value) for name, value in objects.items()}
    empty["lists"]["a"] = [0, [0, ""]]
    empty["others"]["c"] = collections.OrderedDict(a=0)
    found = load(
        folder, **empty, tensors={key: x.bool().to(x.dtype) * 0 for key, x in tensors.items()}
    )
    assert {key: found[key] for key in objects} == objects
    assert all(torch.equal(found["tensors"][key], x) for key, x in tensors.items())


def test_a_tensor_with_a_flipped_bit_is_not_loaded(tmp_path):
    """Its file is named, and where it is damaged; torch itself would take another number."""
    folder = saved(tmp_path / "step-2")
    (path,) = folder.glob("*.distcp")
    data, weight = path.read_bytes(), torch.arange(4.0).numpy().tobytes()
    assert data.count(weight) == 1
    path.write_bytes(data.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    with pytest.raises(CheckpointException, match=rf"{path.name} is damaged between bytes"):
        load(folder)


def test_a_class_that_a_user_trusts_is_loaded(tmp_path):
    """As the message says."""
    folder = saved(tmp_path / "step-2", dataloader={"a": dt.timedelta(3)})
    with pytest.raises(CheckpointException, match=r"'datetime\.timedelta'.*add_safe_globals"):
        load(folder, dataloader={"a": None})
    with torch.serialization.safe_globals([dt.timedelta]):
        assert load(folder, dataloader={"a": None})["dataloader"]["a"] == dt.timedelta(3)


def test_a_reader_of_a_moved_folder_reads_the_new_one(tmp_path):
    """Sizes of files are remembered for one `.metadata` at one place."""
    folder = saved(tmp_path / "step-2")
    assert flaw(folder) is None
    shutil.rmtree(folder)
    saved(folder, more=torch.zeros(1000))
    assert flaw(folder) is None
    (path,) = folder.glob("*.distcp")
    os.truncate(path, 1000)
    assert "has 1000 of" in flaw(folder)

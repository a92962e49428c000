"""Which folders of a run are whole, and what is said where none is."""

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_integration.host.checkpoints import (
    flaw,
    is_export,
    latest_whole,
    lost,
    stale,
    step_folders,
)
from titan_integration.loss.reference_model import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def whole(folder, *steps):
    """Save small checkpoints, and return their folder."""
    for step in steps:
        state = {"weight": torch.arange(100.0)}
        dcp.save(state, checkpoint_id=folder / f"step-{step}", no_dist=True)
    return folder


def half(folder, *steps):
    """Save checkpoints of which another node has the data."""
    for step in steps:
        whole(folder, step)
        (folder / f"step-{step}" / "__0_0.distcp").unlink()
    return folder


def unfinished(folder, *steps):
    """Save checkpoints that end before `.metadata`."""
    for step in steps:
        whole(folder, step)
        (folder / f"step-{step}" / ".metadata").unlink()
    return folder


def export(folder, step, *, finished=True):
    """Write what the host does for Hugging Face."""
    path = folder / f"step-{step}"
    (path / "sharded").mkdir(parents=True)
    (path / "sharded" / "shard-00001-model-00001-of-00001.safetensors").touch()
    (path / "model-00001-of-00001.safetensors").touch()
    if finished:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    return path


def test_folders_are_steps_by_their_exact_names(tmp_path):
    """What was moved away, or is a file, is none."""
    for name in ("step-2", "step-10", "step-9", "old-step-11", "step-12.bak", "step-x", "step-007"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-13").touch()
    assert [*step_folders(tmp_path)] == [10, 9, 2]
    assert step_folders(tmp_path / "missing") == {}


def test_all_missing_files_are_named(tmp_path):
    """And where there are many, how many more."""
    metadata = (whole(tmp_path, 2) / "step-2" / ".metadata").read_bytes()
    assert flaw(half(tmp_path, 4) / "step-4") == "__0_0.distcp is missing"
    twenty = {f"w{i}": torch.zeros(1) for i in range(20)}
    writer = dcp.FileSystemWriter(tmp_path / "step-6", single_file_per_rank=False)
    dcp.save(twenty, storage_writer=writer, no_dist=True)
    for path in (tmp_path / "step-6").glob("*.distcp"):
        path.unlink()
    assert flaw(tmp_path / "step-6").endswith(" and 12 more are missing")
    assert metadata


def test_an_export_is_not_called_unfinished(tmp_path, caplog):
    """With its index, or as one file that somebody has copied; one that was cut short is torn."""
    path = export(tmp_path, 5)
    assert flaw(path).startswith("it is a finished export for Hugging Face: weights alone")
    assert "never finished" in flaw(export(tmp_path, 6, finished=False))
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "model.safetensors").touch()
    assert is_export(tmp_path / "step-7")
    assert not is_export(whole(tmp_path, 4) / "step-4")
    assert latest_whole(tmp_path) == 4
    assert caplog.messages[-1] == f"Going on from {tmp_path / 'step-4'}"


def test_a_finished_export_alone_is_not_started_over(tmp_path):
    """The message says how its weights are used."""
    path = export(tmp_path, 5)
    reason = lost(tmp_path, 500)
    assert f"--checkpoint.initial_load_path {path} --checkpoint.initial_load_in_hf" in reason
    assert "take another --dump_folder" in reason


def test_checkpoints_of_which_none_is_whole_are_not_started_over(tmp_path):
    """The missing files and the likely cause are named."""
    reason = lost(half(tmp_path, 2, 4), 2)
    assert "step-4: __0_0.distcp is missing" in reason
    assert "nodes have this folder each for itself" in reason
    assert "To train from step 1, move the step folders away" in reason
    os.truncate(whole(tmp_path, 6) / "step-6" / ".metadata", 50)
    assert "step-6: its .metadata cannot be read" in lost(tmp_path, 2)


def test_a_first_save_that_was_cut_short_is_started_over(tmp_path):
    """Nothing was saved before it; a later one had an earlier one, which is gone."""
    assert lost(tmp_path, 2) is None
    assert lost(unfinished(tmp_path, 1, 2), 2) is None
    export(tmp_path, 0, finished=False)
    assert lost(tmp_path, 2) is None
    reason = lost(unfinished(tmp_path, 4), 2)
    assert "step-4: it has no .metadata, so it was never finished, and with" in reason
    assert "--checkpoint.interval 2 a save came before it" in reason
    assert lost(tmp_path, 4) is None


def test_only_whole_checkpoints_count_and_are_deleted(tmp_path):
    """Torn ones, exports and what was moved away stay."""
    half(unfinished(whole(tmp_path, 1, 3, 5), 2, 6), 7)
    export(tmp_path, 4)
    (tmp_path / "step-1").rename(tmp_path / "step-1-moved")
    whole(tmp_path, 0)
    assert stale(tmp_path, 2) == [tmp_path / "step-0"]
    assert stale(tmp_path, 1) == [tmp_path / "step-3", tmp_path / "step-0"]
    assert stale(tmp_path, 3) == []


def test_a_reference_tells_what_it_passes_over(tmp_path, caplog):
    """An export later than the checkpoint that is taken; alone it is taken itself."""
    path = export(tmp_path, 5)
    for where in (path, tmp_path):
        assert find_checkpoint(str(where)) == path
    assert find_checkpoint(str(whole(tmp_path, 4))) == tmp_path / "step-4"
    assert f"{tmp_path}: passing over step-5: it is a finished export" in caplog.text

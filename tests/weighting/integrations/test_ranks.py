"""`accelerate launch` with two ranks: the step is the one of a rank that has the whole batch."""

import functools
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from looping import for_each
from recorded import steps_of
from runs import accelerate_launch
from tiny_trainer import ACCUMULATED, BATCH, STEPS
from torch.testing import assert_close

from weighting.runs.record_reader import read_record

pytestmark = pytest.mark.processes
RANKS = 2
MODES = {
    "DDP": ["--multi_gpu"],
    "FSDP2": [
        "--use_fsdp",
        "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_state_dict_type=SHARDED_STATE_DICT",
        "--fsdp_cpu_ram_efficient_loading=false",
    ],
}
WAYS = ("linupper-x-mile", "group-dro", "loop", "loop, fused", "loop, padding-free")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the folders in which two ranks wrote what they trained, by mode."""
    driver = Path(__file__).resolve().parents[2] / "integrations_on_ranks.py"
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
    given = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    given += ["--main_process_port=0"]
    lines = [[*given, *MODES[mode], str(driver), str(out)] for mode, out in folders.items()]
    done = accelerate_launch(*lines)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folders


@functools.cache
def on_one(spec, accumulated):
    """Return the losses and parameters of float64 on the batches of both ranks."""
    size = RANKS * BATCH
    rows = tiny.rows(STEPS * accumulated * size)
    batches = [tiny.padded(rows[at : at + size]) for at in range(0, len(rows), size)]
    steps = [batches[at : at + accumulated] for at in range(0, len(batches), accumulated)]
    return tiny.descended("llama", spec, steps)


@for_each("mode, way", [(mode, way) for mode in MODES for way in WAYS], ids=", ".join)
def test_two_ranks_take_the_steps_of_the_whole_batch(ranks, mode, way):
    """Losses and parameters are those of float64, though the ranks' counts of labels differ.

    The Trainer accumulates two microbatches of unequal length; the loops take one, and one of them
    batches without padding, of which a rank has more tokens than the other.
    """
    looped = way.startswith("loop")
    spec = "linupper-x-mile" if looped else way
    losses, parameters = on_one(spec, 1 if looped else ACCUMULATED)
    for rank in range(RANKS):
        found = torch.load(ranks[mode] / f"{way}-{rank}.pt")
        for name, value in found["parameters"].items():
            assert_close(value.double(), parameters[name], rtol=1e-4, atol=2e-6)
        assert_close(torch.tensor(found["losses"]), torch.tensor(losses), rtol=1e-5, atol=1e-6)


@for_each("mode", list(MODES))
def test_uniform_weights_train_as_the_plain_trainer_does_on_ranks(ranks, mode):
    """Losses and parameters agree bit for bit, and another spec's do not."""
    read = {
        way: torch.load(ranks[mode] / f"{way}-1.pt") for way in ("plain", "uniform", "group-dro")
    }
    assert read["plain"]["losses"] == read["uniform"]["losses"] != read["group-dro"]["losses"]
    for name, value in read["plain"]["parameters"].items():
        assert torch.equal(value, read["uniform"]["parameters"][name])


@for_each("mode", list(MODES))
def test_ranks_that_resume_end_as_those_that_went_on(ranks, mode):
    """From checkpoint-1 on the second step is that of the whole run, bit for bit."""
    for rank in range(RANKS):
        found, other = (
            torch.load(ranks[mode] / f"{x}-{rank}.pt") for x in ("group-dro", "resumed")
        )
        assert found["losses"] == other["losses"]
        for name, value in found["parameters"].items():
            assert torch.equal(value, other["parameters"][name])


@for_each("mode", list(MODES))
def test_the_first_rank_records_the_sequences_of_both(ranks, mode):
    """Each microbatch has the rows of both ranks, told apart by their places."""
    record = read_record(ranks[mode] / "whole")
    assert [step.step for step in steps_of(record)] == [1, 2]
    assert all(len(step.row.unique()) == RANKS * ACCUMULATED * BATCH for step in steps_of(record))
    assert record.batches("microbatch")[2].tolist() == [1] * ACCUMULATED + [2] * ACCUMULATED

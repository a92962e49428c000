"""Two ranks with weights: the step is the one of a single rank that has the whole batch."""

import functools
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from looping import for_each
from runs import torchrun
from torch.testing import assert_close

from weighting.runs.replay import read_record

STEPS, BATCH = 2, 3
WAYS = ("by_the_trainer", "by_ddp", "by_fsdp", "by_ddp_fused", "by_fsdp_fused")
SPECS = ("linupper-x-mile", "group-dro")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the folder in which two ranks wrote what they trained."""
    out = tmp_path_factory.mktemp("ranks")
    driver = Path(__file__).resolve().parents[2] / "integrations_on_ranks.py"
    done = torchrun(2, str(driver), str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@functools.cache
def on_one(spec):
    """Return the losses and parameters of float64 on the batches of both ranks."""
    rows = tiny.rows(2 * STEPS * BATCH)
    whole = [tiny.padded(rows[at : at + 2 * BATCH]) for at in range(0, len(rows), 2 * BATCH)]
    return tiny.descended("llama", spec, [[batch] for batch in whole])


@pytest.mark.processes
@for_each("spec, way", [(spec, way) for spec in SPECS for way in WAYS], ids=", ".join)
def test_two_ranks_take_the_steps_of_the_whole_batch(ranks, spec, way):
    """Losses and parameters are those of float64, though the ranks' counts of labels differ."""
    losses, parameters = on_one(spec)
    for rank in range(2):
        found = torch.load(ranks / f"{way}-{spec}-{rank}.pt")
        for name, value in found["parameters"].items():
            assert_close(value.double(), parameters[name], rtol=1e-4, atol=2e-6)
        assert_close(torch.tensor(found["losses"]), torch.tensor(losses), rtol=1e-5, atol=1e-6)


@pytest.mark.processes
def test_the_first_rank_records_the_sequences_of_both(ranks):
    """Each step has the rows of both ranks, told apart by their places."""
    record = read_record(ranks / "group-dro")
    assert [step.step for step in record.steps] == [1, 2]
    assert all(len(step.row.unique()) == 2 * BATCH for step in record.steps)
    assert [len([*step.batches("microbatch")]) for step in record.steps] == [1, 1]

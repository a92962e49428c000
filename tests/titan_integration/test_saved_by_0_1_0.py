"""A checkpoint that version 0.1.0 wrote resumes, and goes on as 0.1.0 went on itself.

saved_by_0_1_0/ holds step 3 of a run of 6 steps, made by 0.1.0 with torch 2.15.0 and the flags
below, and what that run logged.
"""

import json
import tarfile

import pytest
from runs import HERE, drive

SAVED = HERE / "saved_by_0_1_0"


@pytest.mark.processes
def test_a_checkpoint_of_0_1_0_goes_on_as_0_1_0_did(tmp_path):
    """Losses, weights and parameters of steps 4 to 6 are those of the run that was not cut."""
    with tarfile.open(SAVED / "step-3.tar.xz") as archive:
        archive.extractall(tmp_path / "dump" / "checkpoint", filter="data")

    (found,) = drive(
        tmp_path,
        1,
        "byte_llama",
        "byte_llama",
        f"--weighting.spec={SAVED}/spec.yaml",
        "--weighting.reference=ema:0.9",
        f"--dataloader.dataset_path={SAVED}/text.jsonl",
        "--debug.seed=1",
        "--training.local_batch_size=16",
        "--training.steps=6",
        "--checkpoint.enable",
    )

    # On the machine that made it, these are equal bit for bit; others round differently.
    expected = json.loads((SAVED / "rest.json").read_text())
    assert [step for step, _ in found["losses"]] == [4, 5, 6]
    assert [loss for _, loss in found["losses"]] == pytest.approx(
        [loss for _, loss in expected["losses"][3:]], rel=1e-5
    )
    for weights, rows in zip(found["weights"], expected["weights"][3:], strict=True):
        assert weights[:, 0].tolist() == pytest.approx(rows, rel=1e-4)
    for name, parameter in found["parameters"].items():
        total = expected["parameter_sums"][name]
        assert parameter.double().sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4)

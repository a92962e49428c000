"""A moving average of the model as a reference, by name: `--weighting.reference lag=ema:DECAY`."""

import shutil

import pytest
import torch
from runs import drive

from titan_integration.loss.reference_model import average_decay

SPEC = "excess_loss(lag) -> abs -> affine(shift=0.01) -> mean_one"


def run(out, decay, *flags, ranks=1):
    """Return what each rank saw in three steps with an average of this decay."""
    more = [f"--weighting.spec={SPEC}", f"--weighting.reference=lag=ema:{decay}", "--debug.seed=3"]
    size = f"--training.local_batch_size={4 // ranks}"
    more += [size, "--training.steps=4", *flags]
    return drive(out, ranks, "small", "debugmodel", *more)


@pytest.mark.parametrize("text", ["ema:", "ema:x", "ema:1.5", "ema:-1", "ema:nan"])
def test_a_decay_is_a_number_from_0_to_1(text):
    """Anything else after ema: is refused, with an example."""
    with pytest.raises(ValueError, match=r"a decay is from 0 to 1, as in ema:0.999"):
        average_decay(text)
    assert average_decay("checkpoints/step-5") is None
    assert average_decay("ema:0.5") == 0.5


@pytest.mark.processes
def test_an_average_lags_by_its_decay(tmp_path):
    """With decay 0 the average is the model at every step; with 1 it stays where it began."""
    (same,) = run(tmp_path / "same", 0)
    (fixed,) = run(tmp_path / "fixed", 1, ranks=1)

    for weights in same["weights"]:
        # Two forward passes of one model differ by rounding, small beside the shift of 0.01.
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-2)
    assert fixed["weights"][0].std() < 1e-2
    assert fixed["weights"][3].std() > 0.1


@pytest.mark.processes
def test_an_average_goes_on_after_a_resume(tmp_path):
    """Two steps, a stop and two more on two ranks are four steps: the average is saved."""
    keep = ["--checkpoint.enable", "--checkpoint.interval=2"]
    whole = run(tmp_path, 0.5, *keep, ranks=2)
    shutil.rmtree(tmp_path / "dump" / "checkpoint" / "step-4")
    rest = run(tmp_path, 0.5, *keep, ranks=2)

    assert len(rest[0]["losses"]) == 2
    assert rest[0]["losses"] == whole[0]["losses"][2:]
    assert whole[0]["weights"][3].std() > 0.01
    for name, value in whole[0]["parameters"].items():
        assert torch.equal(value, rest[0]["parameters"][name]), name

"""The weighted trainer against the host's own, and against itself cut over ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import drive, seed_checkpoint, torchrun

pytestmark = pytest.mark.processes

ALL_LEVELS = """
version: 1
name: all-levels
factors:
  domain: table(code=1, data=0.5, docs=1.5, tables=0.5, tests=1) -> mean_one
  instance: normalize -> linupper(alpha=1) -> temperature(step(1, 0.4, at=3)) -> clamp(1.5/n)
  document: mean(document) -> normalize -> temperature(1) -> clamp(2/n)
  token: entropy(gamma=1) -> token_scale -> clamp(1.2)
"""


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Losses are sums in another order, off by 1e-7; the spec divides their spread, of some 0.05 nats
between sequences at the start, and by tau 0.4: a magnification of a hundred."""


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of step 0, which every run starts from."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed"))


def start(seed: Path, out: Path) -> list[str]:
    """Return the flags that make a run start from a copy of the seed."""
    shutil.copytree(seed, out / "dump" / "checkpoint")
    return ["--checkpoint.enable", "--checkpoint.interval=1000", "--dump_folder", str(out / "dump")]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Return a spec file with a factor at every level."""
    path = tmp_path_factory.mktemp("spec") / "all-levels.yaml"
    path.write_text(ALL_LEVELS)
    return path


@pytest.fixture(scope="module")
def one_rank(seed, spec, tmp_path_factory):
    """Return five steps of all levels on one rank."""
    out = tmp_path_factory.mktemp("one")
    flags = [*start(seed, out), f"--weighting.spec={spec}", "--training.local_batch_size=8"]
    return drive(out, 1, "small", "debugmodel", *flags)


def test_uniform_is_the_stock_trainer_bitwise(seed, tmp_path):
    """Five steps of specs/uniform.yaml and of the host's own loss give the same bits."""
    validate = ["--validator.enable", "--validator.freq=5", "--validator.steps=2"]
    runs = {}
    for name, module in {"stock": "stock_configs", "uniform": "small"}.items():
        flags = [*start(seed, tmp_path / name), "--training.local_batch_size=4", *validate]
        flags += ["--weighting.spec=uniform"] if name == "uniform" else []
        (runs[name],) = drive(tmp_path / name, 1, module, "debugmodel", *flags)
    stock, uniform = runs["stock"], runs["uniform"]

    assert len(stock["losses"]) == 5
    assert stock["losses"] == uniform["losses"]
    assert stock["validations"] == uniform["validations"]
    assert stock["validations"]
    assert stock["parameters"].keys() == uniform["parameters"].keys()
    for name, value in stock["parameters"].items():
        assert torch.equal(value, uniform["parameters"][name]), name


def test_two_ranks_weigh_and_learn_as_one(seed, spec, one_rank, tmp_path):
    """Two FSDP2 ranks give the weights and losses of one rank on the same global batch."""
    flags = [*start(seed, tmp_path), f"--weighting.spec={spec}", "--training.local_batch_size=4"]
    two = drive(tmp_path, 2, "small", "debugmodel", *flags)

    (one,) = one_rank
    assert len(one["weights"]) == len(one["losses"]) == 5
    for step, weights in enumerate(one["weights"]):
        assert weights.max() > weights[weights > 0].min() * 1.2, "the weights must say something"
        both = torch.cat([rank["weights"][step] for rank in two])
        torch.testing.assert_close(both, weights, **CLOSE)
    for (_, a), (_, b) in zip(one["losses"], two[0]["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_full_logits_weigh_and_learn_as_chunks(seed, spec, one_rank, tmp_path):
    """The loss over full logits gives the weights and losses of the chunked one."""
    flags = [*start(seed, tmp_path), f"--weighting.spec={spec}", "--training.local_batch_size=8"]
    (full,) = drive(tmp_path, 1, "stock_configs", "full_logits", *flags)

    (one,) = one_rank
    for ours, theirs in zip(one["weights"], full["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    for (_, a), (_, b) in zip(one["losses"], full["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_resumed_run_goes_on_bitwise(seed, spec, one_rank, tmp_path):
    """Three steps, a stop and two more are five steps; another spec is refused on the way."""
    common = [f"--weighting.spec={spec}", "--training.local_batch_size=8"]
    first = start(seed, tmp_path) + common
    first[1] = "--checkpoint.interval=3"
    half = ["--training.steps=5", "--checkpoint.keep_latest_k=0"]
    drive(tmp_path, 1, "small", "debugmodel", *first, *half)
    shutil.rmtree(tmp_path / "dump" / "checkpoint" / "step-5")

    other = ["--module=small", "--config=debugmodel", "--weighting.spec=mile"]
    flags = ["--checkpoint.enable", f"--dump_folder={tmp_path}/dump", "--training.seq_len=64"]
    refused = torchrun(1, "-m", "torchtitan.train", *other, *flags, "--training.local_batch_size=8")
    assert refused.returncode != 0
    assert "another weighting spec" in refused.stderr
    assert "entropy(gamma=1)" in refused.stderr
    assert "--weighting.allow_changed_spec" in refused.stderr

    resume = ["--checkpoint.enable", "--checkpoint.interval=3"]
    (rest,) = drive(tmp_path, 1, "small", "debugmodel", *resume, *common)
    (one,) = one_rank
    assert rest["losses"] == one["losses"][3:]
    for name, value in one["parameters"].items():
        assert torch.equal(value, rest["parameters"][name]), name


def test_shards_start_apart(tmp_path):
    """Without a seed checkpoint, the halves of a parameter on two ranks are no copies."""
    flags = ["--weighting.spec=linupper", "--training.local_batch_size=2", "--training.steps=1"]
    first, _ = drive(tmp_path, 2, "small", "debugmodel", *flags)

    for name, value in first["parameters"].items():
        if value.dim() > 1:
            half = len(value) // 2
            assert not torch.allclose(value[:half], value[half:], atol=1e-2), name

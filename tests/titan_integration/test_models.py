"""Every config of the host's text models: weighted as float64 says, or refused with the reason."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from faulty import Run
from runs import environment
from torch.testing import assert_close

import titan_integration.host.cpu as on_cpu

on_cpu.use_cpu()

import generators as tables  # noqa: E402
from reference import Batch  # noqa: E402
from reference_methods import FORMULAS  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402

from titan_integration import config_registry  # noqa: E402
from titan_integration.commands.configs import (  # noqa: E402
    OURS,
    configs,
    family_named,
    family_of,
    refuse_unknown,
)
from titan_integration.loss.loss import WeightedChunkedLoss  # noqa: E402
from titan_integration.state.run import start  # noqa: E402
from titan_integration.trainer.stock import weighted  # noqa: E402
from weighting.runs.files import read_lines  # noqa: E402

ROWS, LENGTH = 4, 32
SPECS = ("linupper", "linupper-x-mile", "dft")
REFUSED = {
    "mxfp8": "torchao",
    "nvfp4": "torchao",
    "float8": "torchao",
    "_mtp": "losses of tokens further ahead, each with labels of its own",
    "gpt_oss": "has sinks, which only a GPU computes",
    "flex_flash": "only supported on Hopper or Blackwell",
    "kimi": "torchvision",
    "moonlight": "torchvision",
    "qwen35": "fla",
    "_mm": "torchvision",
}
"""What a part of a name says cannot be done on this machine, and why."""
OVER_RANKS = ("hybridep", "async_ep", "deepep", "dist_gemm")
"""Configs of which one process alone cannot run the model."""


def names():
    """Return the configs of the host's text models."""
    return [x.name for family, found in configs().items() if family != OURS for x in found]


DEBUG = ["llama3_debugmodel", *(x for x in names() if "debug" in x)]


def reason_of(name):
    """Return why a config is refused here; None if it is not."""
    return next((why for part, why in REFUSED.items() if part in name), None)


@pytest.mark.parametrize("name", names())
def test_a_config_of_the_hosts_is_weighted_or_refused_with_the_reason(name):
    """By its name alone; what cannot be built here says what is missing."""
    make, why = getattr(config_registry, name), reason_of(name)
    if why:
        with pytest.raises(ValueError, match=why) as refused:
            make()
        assert f"--config {name}: " in str(refused.value)
    else:
        assert hasattr(make(), "weighting")


@pytest.fixture(scope="module")
def alone():
    """Be the only rank there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(config):
    """Return the model of a config on this CPU, and labels and what else it takes of a batch."""
    torch.manual_seed(0)
    config.training.seq_len = LENGTH
    model_config = config.model_spec.model
    model_config.layers = model_config.layers[-2:]
    model_config.update_from_config(config=config)
    model = model_config.build()
    model.init_weights(buffer_device=None)
    with torch.no_grad():  # first weights of some models make all predictions alike
        model.lm_head.weight.normal_(0, 0.1)
        for gain in (p for p in model.parameters() if p.ndim == 1 and not p.any()):
            gain.normal_()
    tokens = torch.randint(0, model_config.vocab_size, (ROWS, LENGTH))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :5] = -100
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    positions[1] %= LENGTH // 2  # two documents
    kwargs = {"positions": positions, "attention_masks": model.get_attention_masks(positions)}
    return model, tokens, labels, kwargs


# The host's routers ask for a precision that a CPU has anyway.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize(
    "name", [x for x in DEBUG if not reason_of(x) and not any(o in x for o in OVER_RANKS)]
)
def test_a_models_loss_and_gradients_are_those_of_float64(name, alone):
    """Through its own output layer, chunked or not: linupper, a product of two factors, and dft."""
    del alone
    config = getattr(config_registry, name)()
    model, tokens, labels, kwargs = model_of(config)
    dims = ParallelDims.from_config(config.parallelism, 1)
    spmd = dist_utils.get_spmd_context(parallel_dims=dims)
    loss_fn = config.loss.build(compile_config=config.compile)
    is_chunked = isinstance(loss_fn, WeightedChunkedLoss)
    model._skip_lm_head = is_chunked
    if is_chunked:
        loss_fn.set_lm_head(model.lm_head)
    count = (labels != -100).sum()
    parameters = dict(model.named_parameters())
    for spec in SPECS:
        text = tables.SPEC_TEXTS[spec]
        run = start(tables.built(text), torch.device("cpu"))
        run.begin_step(1)
        run.microbatches.set_batch({"segment_ids": torch.zeros_like(labels)})
        loss_fn.bind(run)
        model.zero_grad()
        with spmd():
            hidden = model(tokens, **kwargs)
        hidden.retain_grad()
        loss, _ = loss_fn(hidden, labels, count)
        loss.backward(retain_graph=True)
        states_grad = hidden.grad
        found = {key: p.grad for key, p in parameters.items()}

        # The same by brute force from the model's states on: in float64, without chunks.
        exact = hidden.detach().double().requires_grad_()
        head = model.lm_head.double()
        logits = head(exact) if is_chunked else exact
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        nll = nll.view_as(labels)
        weights = brute_force(spec, nll.detach(), logits.detach(), labels)
        expected = (weights * nll).sum() / count
        by_states, by_head = torch.autograd.grad(expected, [exact, head.weight], allow_unused=True)
        model.lm_head.float()
        model.zero_grad()
        hidden.backward(by_states.float())
        size = by_states.abs().max()
        assert_close(states_grad / size, (by_states / size).float(), rtol=1e-4, atol=1e-5)
        assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        some = weights[labels != -100]
        assert some.std() > some.mean() / 1000, "it weighs something"
        for key, p in parameters.items():
            there = p.grad
            if p is head.weight and by_head is not None:  # also where it is the embedding's
                there = by_head.float() if there is None else there + by_head.float()
            if there is None:
                assert found[key] is None, key
            else:
                apart = (found[key] - there).norm() / there.norm().clamp_min(1e-12)
                assert apart < 1e-2, f"{key}: {apart}"  # experts multiply in bfloat16


def brute_force(spec, nll, logits, labels):
    """Return the weights that a slow reference makes of float64 signals; padding has none."""
    log_p = logits.log_softmax(-1)
    lists = {
        "loss": nll.tolist(),
        "entropy": (-(log_p.exp() * log_p).sum(-1)).tolist(),
        "target_prob": (-nll).exp().tolist(),
    }
    absent = ("error_norm", "ref_loss", "domain", "document", "columns")
    nothing = {key: [] for key in absent}
    valid = (labels != -100).tolist()
    batch = Batch(**lists, **nothing, valid=valid, domains=(), step=1)
    return torch.tensor(FORMULAS[spec](batch), dtype=torch.float64)


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("qwen3", "qwen3"),
        ("torchtitan.models.qwen3", "qwen3"),
        ("torchtitan.models.qwen3.config_registry", "qwen3"),
        ("mine", None),
        ("titan_integration", None),
    ],
)
def test_a_module_of_the_hosts_is_known_in_any_spelling(module, family):
    """As the host knows it."""
    assert family_named(module) == family


@pytest.mark.parametrize(
    ("module", "config", "reason"),
    [
        ("titan_integration", "qwen3_debugmodl", "did you mean 'qwen3_debugmodel'"),
        ("titan_integration", "flux_dev", "flux makes images"),
        ("torchtitan.models.flux", "flux_dev", "makes images"),
        ("qwen3", "llama3_8b", "there are qwen3_debugmodel,"),
    ],
)
def test_a_config_that_is_not_there_is_refused_before_torch_is_imported(module, config, reason):
    """With the nearest name, or why none will do."""
    with pytest.raises(ValueError, match=reason):
        refuse_unknown(module, config)
    refuse_unknown("mine", "anything")
    assert family_of("flux_dev") is None


def test_a_config_that_is_weighted_already_stays():
    """And one of a user's that is not is weighted by the command line."""
    config = config_registry.llama3_proxy()
    assert weighted(config) is config
    with pytest.raises(ValueError, match="no config of a torchtitan trainer"):
        weighted(3)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_debugmodel", "deepseek_v3_debugmodel"])
def test_two_ranks_train_a_model_as_one_does(tmp_path, name):
    """From one checkpoint on, the same losses and weights; of the model, two layers."""
    steps, found = [], []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        if steps:
            shutil.copytree(steps[0] / "step-1", out / "checkpoint" / "step-1")
        steps.append(out / "checkpoint")
        flags = [f"--config=small_{name}", f"--dump_folder={out}", "--training.steps=3"]
        flags += ["--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0"]
        flags += ["--weighting.spec=linupper-x-mile", f"--training.local_batch_size={4 // ranks}"]
        status, said = Run(tmp_path / "log", ranks, *flags).ended(300)
        assert status == 0, said[-4000:]
        found.append({x["step"]: x for x in read_lines(out / "weighting" / "metrics.jsonl")})
    one, two = found
    assert ([*one], [*two]) == ([1, 2, 3], [2, 3])
    for step, mine in two.items():
        for key in ("weighted_loss", "unweighted_loss", "weight/max"):
            assert mine[key] == pytest.approx(one[step][key], rel=1e-3), (step, key)


@pytest.mark.slow
def test_the_list_of_configs_needs_no_torch():
    """It is read from files, and names the host's models and ours."""
    code = "import sys; from weighting.cli import main; main(['list', 'configs'], "
    code += "standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("llama3_proxy", "qwen3_debugmodel", "deepseek_v3_16b", "muse_glimmer_30b"):
        assert name in done.stdout

"""Every config of the host's text models: weighted as float64 says, or refused with the reason."""

import dataclasses
import itertools
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from faulty import FLAGS as OF_FAULTY
from runs import environment, torchrun
from torch.testing import assert_close

import titan_integration.host.cpu as on_cpu

on_cpu.use_cpu()

import generators as tables  # noqa: E402
from reference import Batch  # noqa: E402
from reference_methods import FORMULAS  # noqa: E402
from torchtitan.components.lora import LoRAConverter  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.models.common.moe import TokenChoiceTopKRouter  # noqa: E402
from torchtitan.models.common.rope import ComplexRoPE  # noqa: E402
from torchtitan.models.deepseek_v3.mtp import MTPLoss  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402

import weighting as wt  # noqa: E402
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
from titan_integration.trainer.plug_in import with_weighting  # noqa: E402
from titan_integration.trainer.preflight import refuse_unsupported  # noqa: E402
from titan_integration.trainer.stock import weighted  # noqa: E402
from weighting.build import plan_of  # noqa: E402
from weighting.runs.files import read_lines  # noqa: E402

ROWS, LENGTH = 4, 32
SPECS = ("linupper", "linupper-x-mile", "dft")
REFUSED = {
    "mxfp8": "torchao",
    "nvfp4": "torchao",
    "float8": "torchao",
    "sft_debugmodel": "has chats of the host's own tests",
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
ACROSS = ("Dispatcher", "AllGatherFused", "RowParallel")
"""Parts of a model that speak to other ranks."""


def names():
    """Return the configs of the host's text models."""
    return [x.name for family, found in configs().items() if family != OURS for x in found]


def tied(name):
    """Return a config whose output layer is its embedding, or is not, other than it has it."""
    config = getattr(config_registry, name)()
    model = config.model_spec.model
    model.enable_weight_tying = not model.enable_weight_tying
    return config


def sigmoid_routed():
    """Return DeepSeek-V3 with the router that its large models have."""
    config = config_registry.deepseek_v3_debugmodel()
    large = config_registry.deepseek_v3_671b()
    routers = [x for _, x, _, _ in config.traverse(TokenChoiceTopKRouter.Config)]
    for router in routers:
        _, like, _, _ = next(large.traverse(TokenChoiceTopKRouter.Config))
        router.score_func, router.route_norm = like.score_func, like.route_norm
    return config


def unscaled():
    """Return Llama 3 with the plain rotary positions of the paper's models."""
    config = config_registry.llama3_debugmodel()
    for _, rope, _, _ in config.traverse(ComplexRoPE.Config):
        rope.scaling = "none"
    return config


def with_lora(targets):
    """Return Llama 3 with adapters on some linear layers; on all of them for None."""
    config = llama3.llama3_debugmodel()
    lora = LoRAConverter.Config(rank=4, target_modules=targets)
    config.model_spec = model_registry("debugmodel", converters=[lora])
    return with_weighting(config)


VARIANTS = {
    "llama3_debugmodel, tied": lambda: tied("llama3_debugmodel"),
    "llama3_debugmodel, plain positions": unscaled,
    "llama3_debugmodel, LoRA on attention": lambda: with_lora(["wq", "wkv", "wo"]),
    "llama3_debugmodel, LoRA everywhere": lambda: with_lora(None),
    "qwen3_debugmodel, untied": lambda: tied("qwen3_debugmodel"),
    "deepseek_v3_debugmodel, sigmoid": sigmoid_routed,
}
"""What the large configs have and no small one, and adapters."""


def config_of(name):
    """Return a config of the host's, ours, or a variant, with a weighting."""
    return VARIANTS[name]() if name in VARIANTS else getattr(config_registry, name)()


DEBUG = ["llama3_debugmodel", *(x for x in names() if "debug" in x), *VARIANTS]


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
        for adapter in (p for key, p in model.named_parameters() if "lora_b" in key):
            adapter.normal_(0, 0.1)
    tokens = torch.randint(0, model_config.vocab_size, (ROWS, LENGTH))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :5] = -100
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    positions[1] %= LENGTH // 2  # two documents
    kwargs = {"positions": positions, "attention_masks": model.get_attention_masks(positions)}
    return model, tokens, labels, kwargs


TRAINABLE = [x for x in DEBUG if not reason_of(x) and not any(o in x for o in OVER_RANKS)]


@pytest.mark.slow
# The host's routers ask for a precision that a CPU has anyway.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_models_loss_and_gradients_are_those_of_float64(name, alone, record_property):
    """Through its own output layer, chunked or not; of several heads, each on its own labels."""
    del alone
    config = config_of(name)
    model, tokens, labels, kwargs = model_of(config)
    dims = ParallelDims.from_config(config.parallelism, 1)
    spmd = dist_utils.get_spmd_context(parallel_dims=dims)
    loss_fn = config.loss.build(compile_config=config.compile)
    is_chunked = isinstance(loss_fn, WeightedChunkedLoss)
    model._skip_lm_head = is_chunked
    if is_chunked:
        loss_fn.set_lm_head(model.lm_head)
    count = (labels != -100).sum()
    parameters, largest = dict(model.named_parameters()), {}
    for spec in SPECS:
        text = tables.SPEC_TEXTS[spec]
        run = start(tables.built(text), torch.device("cpu"))
        run.begin_step(1)
        run.microbatches.set_batch({"segment_ids": torch.zeros_like(labels)})
        loss_fn.bind(run)
        model.zero_grad()
        with spmd():
            out = model(tokens, **kwargs)
        states = out if isinstance(out, list) else [out]
        for x in states:
            x.retain_grad()
        loss, _ = loss_fn(out, labels, count, positions=kwargs["positions"])
        loss.backward(retain_graph=True)
        states_grads = [x.grad for x in states]
        found = {key: p.grad for key, p in parameters.items()}

        scales = [1.0] + [getattr(config.loss, "mtp_scale", 0)] * (len(states) > 1)
        head = model.lm_head if is_chunked else None
        expected, by_states, by_head = by_float64(
            spec, states, labels, kwargs["positions"], head, scales
        )
        model.lm_head.float()
        model.zero_grad()
        torch.autograd.backward(states, [x.float() for x in by_states])
        for x, y in zip(states_grads, by_states, strict=True):
            size = y.abs().max()
            assert_close(x / size, (y / size).float(), rtol=1e-4, atol=1e-5)
        assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        largest[spec] = 0.0
        for key, p in parameters.items():
            there = p.grad
            if (own := by_head.get(p)) is not None:  # also where it is the embedding's
                there = own.float() if there is None else there + own.float()
            if there is None:
                assert found[key] is None, key
            else:
                apart = (found[key] - there).norm() / there.norm().clamp_min(1e-12)
                assert apart < 1e-2, f"{key}: {apart}"  # experts multiply in bfloat16
                largest[spec] = max(largest[spec], apart.item())
    record_property("model", f"{name:40}" + "".join(f"{x:10.1e}" for x in largest.values()))


def by_float64(spec, states, labels, positions, head, scales):
    """Return loss and gradients by brute force from a model's states on, without chunks.

    Args:
        spec: A shipped one's name.
        states: Of each head, hidden states for an output layer, or logits.
        labels: Of the first head.
        positions: Of the tokens in their documents.
        head: The output layer, which is left in float64; None for logits.
        scales: Of the losses of the first head and of a further one.
    """
    exact = [x.detach().double().requires_grad_() for x in states]
    count, expected = (labels != -100).sum(), 0
    if head is not None:
        head.double()
    for shift, x in enumerate(exact):
        logits = x if head is None else head(x)
        own = labels if not shift else further_labels(labels, positions, shift)
        nll = F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none").view_as(own)
        weights = brute_force(spec, nll.detach(), logits.detach(), own)
        share = scales[1] / (len(exact) - 1) if shift else 1
        expected += share * (weights * nll).sum() / count
        some = weights[own != -100]
        assert some.std() > some.mean() / 1000, "it weighs something"
    trained = [p for p in head.parameters() if p.requires_grad] if head is not None else []
    grads = torch.autograd.grad(expected, [*exact, *trained])
    return expected, grads[: len(exact)], dict(zip(trained, grads[len(exact) :], strict=True))


def further_labels(labels, positions, shift):
    """Return labels of a head further ahead: later ones, of the same document, in plain loops."""
    own = torch.full_like(labels, -100)
    for row in range(len(labels)):
        for i in range(labels.shape[1] - shift):
            if positions[row, i + shift] == positions[row, i] + shift:
                own[row, i] = labels[row, i + shift]
    return own


def parts_of(config):
    """Return what a model is made of: classes with their switches and words, without sizes."""
    found = set()
    seen = [config]
    while seen:
        x = seen.pop()
        if dataclasses.is_dataclass(x):
            fields = {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x)}
            kinds = {k: v for k, v in fields.items() if isinstance(v, bool | str)}
            found.add((type(x).__qualname__, str(sorted(kinds.items()))))
            seen += fields.values()
        elif isinstance(x, list | tuple):
            seen += x
        elif isinstance(x, dict):
            seen += x.values()
    return found


@pytest.mark.slow
def test_every_other_config_is_made_of_parts_that_were_compared():
    """Large ones differ in sizes alone; those over ranks in what sends tokens or sums parts."""
    compared = [config_of(name) for name in TRAINABLE]
    known = set().union(*(parts_of(x.model_spec.model) for x in compared))
    losses = {type(x.loss) for x in compared}
    others = [x.name for found in configs().values() for x in found]
    others = [x for x in others if not reason_of(x) and x not in TRAINABLE]
    assert {"llama3_8b", "qwen3_14b", "deepseek_v3_671b", "muse_glimmer_30b"} <= {*others}
    for name in others:
        config = config_of(name)
        assert type(config.loss) in losses
        new = {kind for kind, _ in parts_of(config.model_spec.model) - known}
        if any(part in name for part in OVER_RANKS):
            new = {kind for kind in new if not any(x in kind for x in ACROSS)}
        assert not new, name


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("rho-1", "reads ref_loss, given for the labels of the first head alone"),
        ("version: 1\nscope: step\npipeline: normalize -> temperature(1)\n", "scope: step weighs"),
        ("group-dro", "remembers batches"),
    ],
)
def test_what_further_heads_cannot_be_weighed_by_is_refused(spec, reason, tmp_path):
    """With the reason, before anything is built."""
    config = config_registry.deepseek_v3_debugmodel_mtp()
    if "\n" in spec:
        (tmp_path / "spec.yaml").write_text(spec)
        spec = tmp_path / "spec.yaml"
    with pytest.raises(ValueError, match=rf"predicts several tokens ahead, and .*{reason}"):
        refuse_unsupported(config, plan_of(wt.load(spec), steps=10))
    refuse_unsupported(config, plan_of(wt.load("linupper"), steps=10))


def test_heads_of_weight_one_are_the_hosts_own_loss_bitwise():
    """`uniform` trains several heads as the host does; validation has the first alone."""
    config = config_registry.deepseek_v3_debugmodel_mtp()
    heads = [torch.randn(2, 8, 2048) for _ in range(3)]
    labels = torch.randint(0, 2048, (2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
    count, ours, theirs = (
        torch.tensor(16),
        *([x.clone().requires_grad_() for x in heads] for _ in "12"),
    )
    loss_fn = config.loss.build()
    run = start(tables.built("uniform"), torch.device("cpu"))
    run.microbatches.set_batch({})
    loss_fn.bind(run)
    stock = MTPLoss.Config(mtp_scale=config.loss.mtp_scale, global_vocab_size=2048).build()
    for fn, given in ((loss_fn, ours), (stock, theirs)):
        fn(given, labels, count, positions=positions)[0].backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.grad, other.grad)
    first = F.cross_entropy(heads[0].flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(loss_fn(heads, labels)[0], first)


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


FLAGS = [x for x in OF_FAULTY if not x.startswith("--config")]
SMALL = ["small_qwen3", "small_deepseek_v3", "small_mtp"]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Train three steps on one rank, and go on from the first on two; return metrics of both."""
    out = tmp_path_factory.mktemp("ranks")
    saving = {1: "enable_first_step_checkpoint", 2: "load_only"}
    for name, ranks in itertools.product(SMALL, saving):
        folder = out / str(ranks) / name
        flags = [*FLAGS, f"--config={name}", f"--dump_folder={folder}", "--training.steps=3"]
        flags += ["--weighting.spec=linupper-x-mile", f"--training.local_batch_size={4 // ranks}"]
        flags += ["--checkpoint.enable", f"--checkpoint.{saving[ranks]}"]
        if ranks == 2:
            first = "checkpoint/step-1"
            shutil.copytree(out / "1" / name / first, folder / first)
        done = torchrun(ranks, "-m", "torchtitan.train", *flags)
        assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [
            {x["step"]: x for x in read_lines(out / ranks / name / "weighting/metrics.jsonl")}
            for ranks in ("1", "2")
        ]
        for name in SMALL
    }


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_train_a_model_as_one_does(on_ranks, name):
    """From one checkpoint on, the same losses and weights, also of a model with a further head."""
    one, two = on_ranks[name]
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

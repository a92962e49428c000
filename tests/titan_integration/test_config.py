"""Configs: every stock Llama gets a weighting and nothing else; what cannot be right is refused."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torchtitan
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.models.llama3 import config_registry as stock
from torchtitan.trainer import Trainer

import weighting as wt
from titan_integration import config_registry, with_weighting
from titan_integration.host import cpu
from titan_integration.loss.loss import WeightedChunkedLoss, WeightedCrossEntropyLoss
from titan_integration.observe.metrics import WeightedMetricsProcessor
from titan_integration.observe.recorder import Layout, Recorder, asked
from titan_integration.observe.validation import DomainValidator
from titan_integration.state.checkpoint import ResumingCheckpointManager
from titan_integration.trainer.config import WeightingConfig
from titan_integration.trainer.preflight import (
    build_tokenizer,
    read_spec,
    refuse_tokenizer,
    refuse_unsupported,
)
from titan_integration.trainer.trainer import WeightedTrainer
from weighting import registry
from weighting.build import plan_of
from weighting.language.find import find
from weighting.runs.replay import obstacle

REPLACED = {
    "checkpoint",
    "loss",
    "metrics",
    "validator",
    "dataloader",
    "weighting",
    "model_spec",
    "training",
}
"""What a weighting (or, for the last two, a CPU) changes in a config."""


@pytest.mark.parametrize("size", ["debugmodel", "1b", "3b", "8b", "70b", "405b"])
def test_every_stock_llama_has_a_weighted_config(size):
    """The weighted config builds a WeightedTrainer and keeps the host's settings."""
    config = getattr(config_registry, f"llama3_{size}")()
    try:
        host = getattr(stock, f"llama3_{size}", stock.llama3_8b)()
    except (ImportError, ValueError):  # 405B takes torchao and a recent GPU
        assert size == "405b"
        host = stock.llama3_70b()
        host.optimizer, host.lr_scheduler = config.optimizer, config.lr_scheduler
        host.training, host.compile = config.training, config.compile

    assert type(config)._owner is WeightedTrainer
    assert isinstance(config.loss, WeightedChunkedLoss.Config)
    assert isinstance(config.metrics, WeightedMetricsProcessor.Config)
    assert isinstance(config.validator, DomainValidator.Config)
    assert isinstance(config.checkpoint, ResumingCheckpointManager.Config)
    assert dataclasses.asdict(config.checkpoint) == dataclasses.asdict(host.checkpoint)
    assert config.loss.num_chunks == host.loss.num_chunks
    assert config.model_spec.flavor.lower() == size
    assert config.training.local_batch_size == host.training.local_batch_size
    assert config.training.seq_len == host.training.seq_len
    for field in dataclasses.fields(Trainer.Config):
        if field.name not in REPLACED | {"hf_assets_path"}:
            assert getattr(config, field.name) == getattr(host, field.name), field.name


def test_a_loss_keeps_its_settings():
    """Chunked or not, the cross entropy becomes its weighted counterpart with the same settings."""
    host = stock.llama3_debugmodel()
    host.loss = CrossEntropyLoss.Config(global_vocab_size=77)
    assert with_weighting(host).loss == WeightedCrossEntropyLoss.Config(global_vocab_size=77)
    host.loss = ChunkedLossWrapper.Config(
        num_chunks=3, loss_fn=CrossEntropyLoss.Config(global_vocab_size=77)
    )
    weighted = with_weighting(host).loss
    assert (weighted.num_chunks, weighted.loss_fn.global_vocab_size) == (3, 77)


def shipped_configs():
    """Return every config that torchtitan's own functions return on this machine, by name."""
    found = {}
    root = Path(torchtitan.__file__).parent
    for file in sorted(root.rglob("config_registry.py")):
        parts = ("torchtitan", *file.relative_to(root).with_suffix("").parts)
        if "rl" in parts:  # needs vLLM, and importing it changes the environment
            continue
        module_name = ".".join(parts)
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # a package that is not installed here
            continue
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = inspect.signature(function).parameters.values()
            if function.__module__ != module_name or any(p.default is p.empty for p in parameters):
                continue
            try:
                found[f"{parts[-2]}.{name}"] = function()
            except (ImportError, ValueError):  # takes a package or a GPU that is not here
                continue
    return found


@pytest.mark.slow
def test_a_shipped_config_is_weighted_or_refused_by_name(monkeypatch):
    """Configs of the host's Trainer keep their settings; those of other trainers are refused."""
    monkeypatch.setattr(cpu, "use_cpu", lambda: False)  # what a CPU cannot do is tested elsewhere
    taken, refused = [], []
    for name, config in shipped_configs().items():
        if type(config) is Trainer.Config:
            if not isinstance(config.loss, ChunkedLossWrapper.Config | CrossEntropyLoss.Config):
                continue
            weighted = with_weighting(config)
            assert type(weighted) is WeightedTrainer.Config
            for field in dataclasses.fields(Trainer.Config):
                if field.name not in REPLACED:
                    assert getattr(weighted, field.name) == getattr(config, field.name), name
            taken.append(name)
        else:
            with pytest.raises(ValueError, match="cannot weight") as error:
                with_weighting(config)
            message = str(error.value)
            assert f"{type(config).__module__}.{type(config).__qualname__}" in message
            assert f"builds {type(config)._owner.__module__}" in message
            assert "start from a config of torchtitan.trainer.Trainer" in message
            refused.append(type(config)._owner.__name__)
    assert len(taken) >= 20
    assert {
        "FaultTolerantTrainer",
        "FluxTrainer",
        "GraphTrainer",
        "HFTransformerTrainer",
    } <= {*refused}


def test_a_config_with_checks_of_its_own_is_refused():
    """A subclass of the host's config builds the same trainer, but its checks would be lost."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Checked(Trainer.Config):
        def __post_init__(self):
            Trainer.Config.__post_init__(self)

    host = stock.llama3_debugmodel()
    values = {field.name: getattr(host, field.name) for field in dataclasses.fields(host)}
    with pytest.raises(ValueError, match=r"Checked: it has fields or checks of its own"):
        with_weighting(Checked(**values))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (stock.llama3_debugmodel, "llama3_debugmodel: it is not a config yet; call the function"),
        (None, "NoneType: it is no config of a torchtitan trainer"),
        ({}, "dict: it is no config of a torchtitan trainer"),
    ],
)
def test_what_is_no_config_is_refused(config, message):
    """A function that was not called, or anything else, is named."""
    with pytest.raises(ValueError, match="cannot weight") as error:
        with_weighting(config)
    assert message in str(error.value)


class OwnTrainer(WeightedTrainer):
    """A trainer of a user's own."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(WeightedTrainer.Config):
        """One more field."""

        answer: int = 42


def test_a_trainer_of_ones_own_is_kept():
    """A subclass of WeightedTrainer stays what it is, with its fields and its weighting."""
    host = with_weighting(stock.llama3_debugmodel(), "linupper")
    values = {field.name: getattr(host, field.name) for field in dataclasses.fields(host)}
    own = OwnTrainer.Config(**values, answer=43)
    own.weighting.agree_every = 5

    weighted = with_weighting(own, "mile")
    assert type(weighted) is OwnTrainer.Config
    assert weighted.answer == 43
    assert (weighted.weighting.spec, weighted.weighting.agree_every) == ("mile", 5)
    assert own.weighting.spec == "linupper"
    assert with_weighting(own).weighting == own.weighting


class OwnMetrics(MetricsProcessor):
    """Metrics of a user's own."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The same fields."""


def test_metrics_of_ones_own_are_refused_unless_they_can_be_weighted():
    """Else the run would end in an assertion once the model is built."""
    host = stock.llama3_debugmodel()
    host.metrics = OwnMetrics.Config()
    with pytest.raises(ValueError, match=r"OwnMetrics.Config; use MetricsProcessor.Config"):
        with_weighting(host)


def test_another_loss_is_refused():
    """A loss that is not the cross entropy cannot be weighted, and is named."""
    host = stock.llama3_debugmodel()
    host.loss = MSELoss.Config()
    with pytest.raises(
        ValueError, match=r"cannot weight the loss MSELoss.Config; use CrossEntropy"
    ):
        with_weighting(host)


def test_no_spec_and_a_wrong_spec_are_errors():
    """A run without a spec is not a run with a default one."""
    with pytest.raises(ValueError, match=r"no weighting spec; pass --weighting.spec"):
        read_spec(WeightingConfig())
    with pytest.raises(wt.SpecError, match="unknown stage 'nope'"):
        read_spec(WeightingConfig(spec="nope(1)"))


def refused(spec, **parallelism):
    """Return why a spec, given as text or name, is refused under a parallelism, or None."""
    config = config_registry.llama3_debugmodel()
    memory = parallelism.pop("memory", None)
    config.loss.memory = memory or config.loss.memory
    config.weighting.reference = parallelism.pop("reference", "")
    config.training.seq_len = parallelism.pop("seq_len", config.training.seq_len)
    for name, value in parallelism.items():
        setattr(config.parallelism, name, value)
    spec = wt.load(spec) if ":" not in spec else wt.loads(f"version: 1\n{spec}\n")
    try:
        refuse_unsupported(config, plan_of(spec))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("given", [{"initial_load_path": "/there/step-9"}, {"load_step": 9}])
def test_a_checkpoint_that_would_not_be_read_is_refused(given):
    """The host looks at none where checkpoints are off, and would start from random weights."""
    config, plan = config_registry.llama3_debugmodel(), plan_of(wt.load("uniform"))
    ((flag, value),) = given.items()
    setattr(config.checkpoint, flag, value)
    with pytest.raises(ValueError, match=f"--checkpoint.{flag} does nothing without"):
        refuse_unsupported(config, plan)
    config.checkpoint.enable = True
    refuse_unsupported(config, plan)


def test_hidden_states_are_had_by_the_chunked_loss_alone(monkeypatch):
    """A loss that is given logits has none, and no recording holds any."""
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))

    @wt.stage("length_of_hidden")
    class _LengthOfHidden(wt.Source):
        needs = frozenset({"hidden"})

        def read(self, signals, _scope):
            return signals.hidden.norm(dim=-1)

    assert refused("pipeline: length_of_hidden -> mean(sequence) -> temperature(1)") is None
    plan = plan_of(wt.loads("version: 1\npipeline: length_of_hidden -> mean_one\n"))
    config = config_registry.llama3_debugmodel()
    config.loss = WeightedCrossEntropyLoss.Config()
    with pytest.raises(ValueError, match=r"reads hidden states, and the loss .* is given logits"):
        refuse_unsupported(config, plan)
    fn, where = wt.build(plan), torch.device("cpu")
    recorder = Recorder(asked("every=1"), fn, Layout(1, 2, 3, 1), None, device=where)
    assert recorder._signals == ("loss",)
    assert "hidden states, which no record holds" in obstacle(plan, None)


def test_a_pipeline_that_begins_backward_early_is_refused_with_two_ways_out():
    """Weights that look around need all losses first; without statistics any schedule will do."""
    early = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1B"}
    message = refused("linupper", **early)
    assert "the pipeline schedule 1F1B runs some backward passes earlier" in message
    assert "--parallelism.pipeline_parallel_schedule GPipe" in message
    assert "scope: step" in message
    assert refused("uniform", **early) is None
    assert refused("dft", **early) is None
    body = "normalize -> temperature(1)"
    assert refused(f"scope: step\npipeline: {body}", **early) is None
    assert refused(f"scope: running\npipeline: {body}", **early) is None
    late = {**early, "pipeline_parallel_schedule": "GPipe"}
    assert refused("linupper", **late) is None
    assert "--loss.memory auto" in refused("linupper", **late, memory="full")
    assert "not sent through the pipeline" in refused("longce", **late)


def test_a_part_of_each_sequence_is_not_enough_for_some():
    """Context parallelism is refused for short contexts, scope: rank and the ptrr balancer."""
    cut = {"context_parallel_degree": 2}
    assert refused("linupper", **cut) is None
    assert "short contexts" in refused("longce", **cut)
    assert "whole sequences" in refused("scope: rank\npipeline: temperature(1)", **cut)
    balancer = {**cut, "context_parallel_load_balancer": "ptrr"}
    assert "load_balancer headtail" in refused("linupper", **balancer)


def test_rows_that_context_parallelism_cannot_cut_are_refused():
    """Each rank takes whole blocks of attention; the next length that does is named."""
    for spec in ("linupper", "uniform"):
        message = refused(spec, context_parallel_degree=2, seq_len=128)
        assert "--training.seq_len 128 cannot be cut over 2 ranks" in message
        assert "use a multiple of 256, as in --training.seq_len 256" in message
    assert "multiple of 512" in refused("uniform", context_parallel_degree=4, seq_len=768)
    assert refused("linupper", context_parallel_degree=2, seq_len=256) is None
    assert refused("linupper", seq_len=100) is None


def test_a_signal_nobody_gives_is_refused(monkeypatch):
    """A spec that reads what the trainer cannot give is refused by the name of the signal."""

    class NeedsAttention(wt.Source):
        needs = frozenset({"attention"})

        def read(self, signals, scope):
            del scope
            return signals.attention

    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))
    wt.stage("needs_attention")(NeedsAttention)
    plan = plan_of(wt.loads("needs_attention -> mean_one"))
    config = config_registry.llama3_debugmodel()
    with pytest.raises(ValueError, match="reads attention, which this trainer does not provide"):
        refuse_unsupported(config, plan)


@pytest.mark.parametrize("name", ["uniform", "linupper-x-mile"])
def test_a_spec_may_be_a_text_a_path_or_a_spec(name):
    """However the spec is given in Python, the run reads the same one."""
    spec = wt.load(name)
    for given in (name, str(spec), spec, find(name)):
        config = with_weighting(stock.llama3_debugmodel(), given)
        assert read_spec(config.weighting) == spec


def test_ranks_that_would_remember_apart_are_refused():
    """A checkpoint holds one memory, so scope: rank and stages that remember do not go together."""
    config = config_registry.llama3_debugmodel()
    text = "version: 1\nscope: rank\npipeline: {}\n"
    with pytest.raises(ValueError, match="every rank remember something else"):
        refuse_unsupported(config, plan_of(wt.loads(text.format("running(1)"))))
    refuse_unsupported(config, plan_of(wt.loads(text.format("temperature(1)"))))


def test_a_tokenizer_larger_than_the_model_is_refused():
    """Both sizes are told before anything is built; a smaller tokenizer is fine."""
    config = config_registry.llama3_debugmodel()
    refuse_tokenizer(config, build_tokenizer(config))
    spec = config.model_spec
    for size in (4096, 512):
        model = dataclasses.replace(spec.model, vocab_size=size)
        config.model_spec = dataclasses.replace(spec, model=model)
        if size == 4096:
            refuse_tokenizer(config, build_tokenizer(config))
    with pytest.raises(ValueError, match=r"has 2048 tokens, and the model .* has 512; give the"):
        refuse_tokenizer(config, build_tokenizer(config))
    config.hf_assets_path = "nowhere"
    with pytest.raises(ValueError, match="--hf_assets_path nowhere: no tokenizer there"):
        refuse_tokenizer(config, build_tokenizer(config))

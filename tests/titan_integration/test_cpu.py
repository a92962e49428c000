"""The host's trainer on CPU: started as a user starts it, and the attention it trains with."""

import re
import sys

import pytest
import torch

pytest.importorskip("torchtitan")

from runs import torchrun
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.attention import (
    FlexAttention,
    VarlenAttention,
    get_causal_mask_mod,
    get_efficient_causal_mask_mod_for_packed_document,
)
from torchtitan.models.gpt_oss import config_registry as gpt_oss
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from titan_integration.host import cpu

# A user's module, as `--module` finds it. It counts upwards in documents of 50 tokens.
MODULE = """
import dataclasses
from dataclasses import dataclass

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import DeviceMemoryMonitor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from titan_integration.host import cpu


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    def decode(self, *args, **kwargs):
        raise NotImplementedError

    def get_vocab_size(self):
        return 2048


class Counting(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, seq_len, local_batch_size, **kwargs):
        self.generator = torch.Generator().manual_seed(dp_rank)
        self.shape = (local_batch_size, seq_len + 1)

    def __iter__(self):
        positions = (torch.arange(self.shape[1]) % 50).repeat(self.shape[0], 1)
        while True:
            first = torch.randint(64, (self.shape[0], 1), generator=self.generator)
            tokens = (first + 3 * positions) % 64
            inputs = {"input": tokens[:, :-1].clone(), "positions": positions[:, :-1].clone()}
            yield inputs, tokens[:, 1:].clone()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class CpuTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config):
        assert cpu.use_cpu() and cpu.use_cpu()
        super().__init__(cpu.prepare_config(config))
        cpu.fix_fsdp(self.model_parts)
        cpu.hide_mfu(self.metrics_processor)
        assert self.device == torch.device("cpu", 0)
        assert DeviceMemoryMonitor().device == self.device


def counting():
    config = llama3_debugmodel()
    config.dataloader = Counting.Config()
    config.tokenizer = NoTokenizer.Config()
    config.metrics.disable_color_printing = True
    config.training.seq_len = 128
    config.training.local_batch_size = 4
    config.training.steps = 3
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return CpuTrainer.Config(**fields)
"""


@pytest.mark.processes
def test_the_stock_entry_point_trains(tmp_path, monkeypatch):
    """Two ranks under FSDP2 lose loss, and print no number that is not true."""
    (tmp_path / "counting_module.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    words = ["--module", "counting_module", "--config", "counting"]
    done = torchrun(2, "-m", "torchtitan.train", *words, timeout=240)
    log = done.stdout + done.stderr
    sys.stdout.write(log)  # pytest shows it if anything below fails
    assert done.returncode == 0

    steps = re.findall(r"step: +(\d)  loss: +([\d.]+) .* memory: +([\d.]+)GiB.* mfu: (\S+)", log)
    assert [step for step, *_ in steps] == sorted([*"123"] * 2)
    losses = [float(loss) for _, loss, *_ in steps]
    assert losses[-1] < losses[0] - 0.5
    assert all(0.1 < float(memory) < 8 for _, _, memory, _ in steps)
    assert {mfu for *_, mfu in steps} == {"N/A"}
    assert log.count("No accelerator found: running on CPU with gloo (") == 1
    assert "Peak flops undefined" not in log
    assert "Peak FLOPS" not in log


def test_an_accelerator_is_left_alone(monkeypatch):
    """With an accelerator nothing is rebound."""
    monkeypatch.setattr(cpu, "accelerator_present", lambda: True)
    monkeypatch.setattr(utils, "device_type", "cuda")  # as if no test had been here before
    before = (utils.device_type, utils.device_module, utils.get_peak_flops)
    assert not cpu.use_cpu()
    assert (utils.device_type, utils.device_module, utils.get_peak_flops) == before


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_prepare_config_swaps_every_attention(backend):
    """Both masked attentions of the host become ours, keeping what they share, once."""
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", attn_backend=backend)
    config.dataloader.pin_memory = True
    config.training.enable_cpu_offload = True
    once = [layer.attention.inner_attention for layer in prepared(config).model_spec.model.layers]
    twice = [layer.attention.inner_attention for layer in prepared(config).model_spec.model.layers]
    assert [type(found) for found in once] == [cpu.DenseDocumentAttention.Config] * 6
    assert all(a is b for a, b in zip(once, twice, strict=True))
    assert isinstance(once[0].build(), cpu.DenseDocumentAttention)
    assert config.training.disable_cuda_graphs
    assert config.training.mixed_precision_param == "float32"
    assert not config.training.enable_cpu_offload
    assert not config.dataloader.pin_memory


def test_prepare_config_refuses_a_window():
    """A sliding window is not causal attention within documents, and is not passed off as such."""
    config = llama3_debugmodel()
    windowed = VarlenAttention.Config(window_size=(16, 0))
    config.model_spec.model.layers[3].attention.inner_attention = windowed
    with pytest.raises(ValueError, match=r"window_size=\(16, 0\), which only a GPU computes"):
        cpu.prepare_config(config)


@pytest.mark.parametrize("name", ["gpt_oss_debugmodel", "gpt_oss_debugmodel_flex", "gpt_oss_20b"])
def test_attention_with_sinks_is_refused_before_anything_is_built(name):
    """Sinks rescale what attention returns, in either attention; said with what to do."""
    config = getattr(gpt_oss, name)()
    with pytest.raises(ValueError, match=r"gpt_oss.model.Attention.Config has sinks, which only a"):
        cpu.prepare_config(config)


def test_lora_keeps_its_frozen_layers_and_gets_dense_attention():
    """LoRA freezes by subclasses of configs, which build the same attention."""
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", converters=[LoRAConverter.Config(rank=4)])
    prepared(config)
    for layer in config.model_spec.model.layers:
        assert type(layer.attention.inner_attention) is cpu.DenseDocumentAttention.Config
        assert "LoRA" in type(layer.attention.wo)._owner.__name__


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_equals_a_loop_over_documents(key_heads, scale):
    """Outputs and gradients are those of a softmax per document and head, in float64."""
    mask = document_mask([[40, 1, 87], [128]])
    ours, slow = random_inputs(key_heads), random_inputs(key_heads)
    got = dense()(*ours, attention_masks=mask, scale=scale, enable_gqa=key_heads < 4)
    expected = slow_attention(*slow, [[40, 1, 87], [128]], scale)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(got, expected.float())
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_documents_do_not_see_each_other():
    """Changing a token of the first document leaves the second, in the same row, unchanged."""
    mask = document_mask([[50, 78], [64, 64]])
    q, k, v = (x.detach() for x in random_inputs(4))
    before = dense()(q, k, v, attention_masks=mask)
    for x in (q, k, v):
        x[0, 7] += 1.0
    after = dense()(q, k, v, attention_masks=mask)
    assert (before[0, 7:50] != after[0, 7:50]).any(dim=(-1, -2)).all()
    assert torch.equal(before[0, :7], after[0, :7])
    assert torch.equal(before[0, 50:], after[0, 50:])
    assert torch.equal(before[1], after[1])


def test_layers_share_one_dense_mask():
    """The mask is spelled out once a batch, and forgotten with it."""
    mask = document_mask([[128], [128]])
    inputs = random_inputs(4)
    dense()(*inputs, attention_masks=mask)
    (first,) = cpu._biases.values()
    dense()(*inputs, attention_masks=mask)
    (second,) = cpu._biases.values()
    assert first is second
    del mask
    assert not cpu._biases


@pytest.mark.parametrize("name", ["score_mod", "out_transform"])
def test_what_needs_scores_is_refused(name):
    """Nothing is dropped silently."""
    mask = document_mask([[128], [128]])
    with pytest.raises(ValueError, match="has a score_mod or out_transform, which only a GPU"):
        dense()(*random_inputs(4), attention_masks=mask, **{name: lambda x, *_: x})


def prepared(config: Trainer.Config) -> Trainer.Config:
    """Prepare, and see that the same object comes back."""
    assert cpu.prepare_config(config) is config
    return config


def dense() -> FlexAttention:
    """Build our attention."""
    return cpu.DenseDocumentAttention.Config().build()


def document_mask(lengths: list[list[int]]) -> BlockMask:
    """Make the host's own mask for rows of documents of these lengths."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    within = get_efficient_causal_mask_mod_for_packed_document(positions)
    rows, length = positions.shape
    both = and_masks(get_causal_mask_mod(), within)
    return create_block_mask(both, rows, None, length, length, device="cpu")


def random_inputs(key_heads: int) -> list[torch.Tensor]:
    """Make queries, keys and values: two rows, 128 tokens, 4 query heads of size 8."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 128, heads, 8, generator=generator).requires_grad_()
        for heads in (4, key_heads, key_heads)
    ]


def slow_attention(q, k, v, lengths, scale):
    """Attend one document, head and query at a time, in float64."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for row, row_lengths in enumerate(lengths):
        tokens = []
        start = 0
        for length in row_lengths:
            for token in range(start, start + length):
                heads = []
                for head in range(q.shape[2]):
                    seen = (row, slice(start, token + 1), head // group)
                    scores = k[seen].double() @ q[row, token, head].double() * scale
                    heads.append(torch.softmax(scores, 0) @ v[seen].double())
                tokens.append(torch.stack(heads))
            start += length
        rows.append(torch.stack(tokens))
    return torch.stack(rows)

"""Run torchtitan's whole trainer on CPU with gloo, where a machine has no accelerator.

torchtitan 0.3.0 takes CUDA for granted. What it needs to do without, in the order of a trainer:

    if cpu.use_cpu():               # before the host's Trainer.__init__
        cpu.prepare_config(config)
        ...                         # the host's Trainer.__init__
        cpu.fix_fsdp(self.model_parts)
        cpu.fix_initial_weights(self.model_config, self.model_parts)
        cpu.hide_mfu(self.metrics_processor)

CUDA_VISIBLE_DEVICES="" gives the CPU on a machine with GPUs. Knows nothing about losses or weights.
"""

import contextlib
import math
import os
import platform
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.components import metrics
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config import Configurable
from torchtitan.models.common import attention
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols import BaseModel
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer
from typing_extensions import override


def accelerator_present() -> bool:
    """Tell whether the host would find an accelerator; looks anew at every call."""
    return bool(utils.get_device_info()[1].is_available())


def use_cpu() -> bool:
    """Point torchtitan at the CPU if there is no accelerator, and say so; any time, and again."""
    if accelerator_present() or utils.device_type == "cpu":
        return utils.device_type == "cpu"
    # Several modules copy the two names when imported, and `torchtitan.train` imports them all
    # before it reads `--module`. Rebinding `utils` will do once they look the names up there.
    stock = {"device_type": utils.device_type, "device_module": utils.device_module}
    ours = {"device_type": "cpu", "device_module": _device_module()}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchtitan":
            for key, value in ours.items():
                if vars(module).get(key) == stock[key]:
                    setattr(module, key, value)
    metrics.DeviceMemoryMonitor.__init__.__defaults__ = ("cpu:0",)
    utils.get_peak_flops = lambda device_name: math.nan  # noqa: ARG005 (stock: an A100's figure)
    # Host and torch compile this: some twenty seconds a process, to save milliseconds a step.
    vars(attention)["_compiled_create_block_mask"] = create_block_mask
    vars(torch_cp)["_compiled_create_block_mask"] = create_block_mask
    # The host's routers ask for float32, which a CPU computes in anyway.
    warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")
    # `fix_initial_weights` sees to it.
    warnings.filterwarnings("ignore", r"DTensor .* may not have complete support on cpu")
    logger.addFilter(lambda record: "Peak FLOPS used" not in record.getMessage())  # nan here
    if os.environ.get("RANK", "0") == "0":
        logger.info(f"No accelerator found: running on CPU with gloo ({_cpu_name()})")
    return True


def prepare_config(config: Trainer.Config) -> Trainer.Config:
    """Change a trainer's config, in place and for good, to what a CPU can run; return it.

    Raises:
        ValueError: The attention is not FlexAttention, nor causal over whole documents, or it
            changes what comes of it.
    """
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.training.enable_cpu_offload = False  # It is there already.
    for _, loader, _, _ in config.traverse(ParallelAwareDataloader.Config):
        loader.pin_memory = False  # pyrefly: ignore[missing-attribute]
    for stock in (FlexAttention.Config, VarlenAttention.Config):
        for _, found, parent, name in list(config.traverse(stock)):
            setattr(parent, str(name), _dense_config(found, parent))
    return config


def fix_fsdp(model_parts: Iterable[nn.Module]) -> None:
    """Make FSDP reduce gradients by plain sums, as gloo lacks PREMUL_SUM. For sharded models."""
    for module in (module for part in model_parts for module in part.modules()):
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def fix_initial_weights(model_config: BaseModel.Config, model_parts: Iterable[nn.Module]) -> None:
    """Start a sharded model as one rank would; alone, each rank draws its shard from one seed.

    Torch keeps track of random numbers across shards on accelerators only: on CPU the shards of a
    parameter come out as copies of each other.  Every rank builds the whole model for a moment.
    """
    if dist.get_world_size() == 1:
        return
    seed = torch.tensor(torch.initial_seed() % 2**63)
    dist.broadcast(seed, src=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(int(seed))
        whole = model_config.build()
        whole.init_weights(buffer_device=None)
    values = dict(whole.named_parameters())
    for part in model_parts:
        for name, parameter in part.named_parameters():
            value = values[_WRAPPERS.sub("", name)].detach()
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.detach().copy_(value)


_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
"""What checkpointing and compiling put into the names of parameters."""


def hide_mfu(metrics_processor: metrics.MetricsProcessor) -> None:
    """Make the host print "N/A" for the share of this CPU's peak FLOPS, which nobody knows."""
    metrics_processor.has_quantization = True  # The flag does nothing else so far.


class DenseDocumentAttention(FlexAttention):
    """What FlexAttention computes, where its kernel has no backward: on CPU.

        softmax(q k^T * scale + bias) v,   bias = 0 where the mask allows, else -inf

    A FlexAttention by class, since that is how the host knows to build a BlockMask and, under
    context parallelism, to gather K and V. Every query must be allowed some key.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """FlexAttention's fields; `kernel_options` has no effect."""

    @override
    def forward(
        self,
        q_BLNH: Tensor,  # The host's sharding config knows these arguments by name.
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: BlockMask,
        score_mod: Callable[..., Tensor] | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Attend where the mask allows.

        Raises:
            ValueError: A score_mod or out_transform is given.
        """
        if score_mod is not None or out_transform is not None:
            msg = f"the model's attention has a score_mod or out_transform, {_NOT_ON_CPU}"
            raise ValueError(msg)
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        bias = _bias(attention_masks, q.dtype)
        out = scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


# All layers of a batch share one mask; an entry goes when its batch does.
_biases: WeakKeyDictionary[BlockMask, Tensor] = WeakKeyDictionary()


def _bias(mask: BlockMask, dtype: torch.dtype) -> Tensor:
    compiling = torch.compiler.is_compiling()  # The mask is part of the graph then; keep nothing.
    if not compiling and mask in _biases:
        return _biases[mask]
    allowed = create_mask(mask.mask_mod, *mask.shape, device=mask.kv_indices.device)
    # Given booleans, SDPA would make these numbers in every layer, for 40% more of its time.
    bias = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -math.inf)
    if not compiling:
        _biases[mask] = bias
    return bias


_NOT_ON_CPU = (
    "which only a GPU computes; train it on one, or on this machine another model, such as "
    "llama3_debugmodel"
)


def _dense_config(stock: Configurable.Config, parent: object) -> FlexAttention.Config:
    """Return the attention that a CPU can run in place of a model's.

    Args:
        stock: Configures the attention itself.
        parent: Configures the layer it is in.

    Raises:
        ValueError: It would not compute the same.
    """
    if getattr(parent, "_owner", None) in _with_sinks():
        msg = f"the attention of {_name(parent)} has sinks, {_NOT_ON_CPU}"
        raise ValueError(msg)
    if isinstance(stock, DenseDocumentAttention.Config):
        return stock
    # Nobody says that a dense mask means the same for a subclass or another window. A subclass of
    # the config alone, as LoRA makes one to freeze parameters, builds the same attention.
    if stock._owner is FlexAttention or getattr(stock, "window_size", None) == (-1, 0):  # noqa: SLF001
        names = [field.name for field in fields(FlexAttention.Config) if hasattr(stock, field.name)]
        return DenseDocumentAttention.Config(**{name: getattr(stock, name) for name in names})
    window = getattr(stock, "window_size", None)
    what = _name(stock) + (f" with window_size={window}" if window else "")
    msg = f"the model's attention is {what}, {_NOT_ON_CPU}"
    raise ValueError(msg)


def _with_sinks() -> list[type]:
    """Return the layers that rescale what attention returns, of models that were imported."""
    module = sys.modules.get("torchtitan.models.gpt_oss.model")
    return [module.Attention] if module else []


def _name(config: object) -> str:
    return f"{type(config).__module__}.{type(config).__qualname__}"


def _device_module() -> ModuleType:
    """Make what torch.cuda is to a GPU: torch.cpu, and what else the host asks of it."""
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module = ModuleType("cpu")
    vars(module).update(
        vars(torch.cpu),
        current_device=lambda: 0,  # "cpu" in torch.cpu; the host passes it to barrier().
        get_device_name=lambda _device=None: _cpu_name(),
        get_device_properties=lambda _device=None: SimpleNamespace(total_memory=total_memory),
        memory_stats=lambda _device=None: _memory_stats(),
        reset_peak_memory_stats=_reset_peak_memory,
        empty_cache=lambda: None,
    )
    return module


def _cpu_name() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.machine()


def _memory_stats() -> dict[str, int]:
    """Report the whole process's peak resident memory, in bytes, under the names of a GPU's."""
    peak = _proc_field("/proc/self/status", "VmHWM")
    # Without that field: the peak since the process began, which nothing resets.
    kib = int(peak.split()[0]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"active_bytes.all.peak": kib * 1024, "reserved_bytes.all.peak": kib * 1024}


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # Not every container may write there.
        Path("/proc/self/clear_refs").write_text("5")


def _proc_field(path: str, key: str) -> str | None:
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)

"""Signals that take one more forward pass: of references, and of the model itself.

All passes run eagerly, without gradient and in evaluation mode, before the training forward of the
same batch and outside what a CUDA graph captures.

* **A reference model** has the architecture, the parallelism and the mixed precision of the one
  that trains.  Each rank holds its share of one more set of parameters (no gradients, no optimizer
  state: 4 bytes each at float32, against 16 for a parameter that Adam trains), and what a forward
  pass needs for a moment: one unsharded block, and the logits of one chunk.
* **Divergence** from a reference takes the model's own forward pass as well, of which hidden states
  are kept, and the logits of one chunk of both models beside each other.
* **A short context** costs no parameters, but gathers the model's own once more.
* **Time**: each forward pass is about a third of a training step without activation checkpointing.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_integration.data.data_files import near, siblings
from titan_integration.data.signals import told_by
from titan_integration.host.checkpoints import METADATA, flaw, is_export, step_folders
from titan_integration.loss.loss import WeightedChunkedLoss, WeightedCrossEntropyLoss
from titan_integration.state.checksums import IntactReader, why
from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
    from torchtitan.trainer import Trainer

    from titan_integration.loss.loss import Output, TokenSignals

SOURCE = "--weighting.reference"
"""What messages call the source of a reference, unless they are told."""


def find_checkpoint(path: str, source: str = SOURCE) -> Path:
    """Return the folder of a checkpoint: the path itself, or the latest finished `step-N` in it.

    A folder for Hugging Face is one too, though a `step-N` of torchtitan's own format beside it is
    taken first.  Warns of later ones that are not finished, or exports.

    Args:
        path: A folder.
        source: Where the path was given, for messages.

    Raises:
        ValueError: There is none; says what there is.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        msg = f"{source} {path}: no such folder{near(folder.name, siblings(path))}"
        raise ValueError(msg)
    if (folder / METADATA).is_file() or is_export(folder):
        return folder
    passed: list[Path] = []
    for step in step_folders(folder).values():
        if (step / METADATA).is_file():
            for later in passed:
                logger.warning(
                    printable(f"{source} {path}: passing over {later.name}: {flaw(later)}")
                )
            return step
        passed.append(step)
    exported = next((step for step in passed if is_export(step)), None)
    if exported is not None:
        return exported
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    msg = (
        f"{source} {path}: no checkpoint here, neither {METADATA} nor a folder step-N with one, "
        f"nor *.safetensors; there is: {there}. It takes a checkpoint of torchtitan's own format, "
        "or a model's folder for Hugging Face"
    )
    raise ValueError(msg)


def average_decay(reference: str) -> float | None:
    """Return the decay of `ema:DECAY`, a moving average of the model itself; None for a folder.

    Raises:
        ValueError: The decay is not a number from 0 to 1.
    """
    _, is_average, text = reference.partition("ema:")
    if not is_average:
        return None
    try:
        decay = float(text)
    except ValueError:
        decay = -1.0
    if not 0 <= decay <= 1:
        msg = f"--weighting.reference {reference}: a decay is from 0 to 1, as in ema:0.999"
        raise ValueError(msg)
    return decay


@torch.no_grad()
def follow(reference: Decoder, model: torch.nn.Module, decay: float) -> None:
    """Move each parameter of the reference: r <- decay * r + (1 - decay) * p; 0 copies."""
    for average, parameter in zip(reference.parameters(), model.parameters(), strict=True):
        average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)


def build_reference(
    config: Trainer.Config, dims: ParallelDims, folder: Path | None, source: str = SOURCE
) -> Decoder:
    """Build a second model like the one that trains, load it if there is a folder, and freeze it.

    Args:
        config: The trainer's, as the host has completed it.
        dims: The trainer's meshes.
        folder: A checkpoint as `find_checkpoint` returns it; None for a moving average.
        source: Where it was given, for messages.

    Raises:
        ValueError: The checkpoint cannot be read, or is of another architecture.
    """
    spec, training = config.model_spec, config.training
    assert spec is not None, "the host needs one too"
    with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[training.dtype]):
        model = cast("Decoder", spec.model.build())
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder=config.dump_folder,
    )
    offload = training.enable_cpu_offload
    model.to_empty(device="cpu" if offload else utils.device_type)
    with torch.no_grad():  # Buffers are in no checkpoint.
        model.init_weights(buffer_device=torch.device(utils.device_type) if offload else None)
    if folder is not None:
        convert = spec.state_dict_adapter
        adapter = convert(spec.model, None) if convert is not None else None
        load_model(model, folder, f"{spec.name} {spec.flavor}", source, adapter)
    model.requires_grad_(requires_grad=False)
    model.eval()
    if isinstance(config.loss, WeightedChunkedLoss.Config):
        model._skip_lm_head = True  # noqa: SLF001 - the host's own switch for its chunked loss
    return model


def load_model(
    model: torch.nn.Module,
    folder: Path,
    name: str,
    source: str = SOURCE,
    adapter: BaseStateDictAdapter | None = None,
) -> None:
    """Load the parameters of a checkpoint, whatever else is in it; every rank must call it.

    Args:
        model: The model.
        folder: A checkpoint as `find_checkpoint` returns it.
        name: The model's, for messages.
        source: Where the folder was given, for messages.
        adapter: Knows Hugging Face's names, for a folder of theirs.

    Raises:
        ValueError: The checkpoint cannot be read, or is not one of this architecture, `name`.
    """
    wrapper = ModelWrapper(model)
    state = wrapper.state_dict()
    of_hf = is_export(folder)
    if of_hf and adapter is None:
        msg = f"{source}: {folder} is for Hugging Face, and the host cannot convert {name} from it"
        raise ValueError(msg)
    reader: Any = HuggingFaceStorageReader(str(folder)) if of_hf else IntactReader(folder)
    wanted = adapter.to_hf(state) if of_hf and adapter is not None else state
    try:
        saved = reader.read_metadata().state_dict_metadata
        misfits = _misfits(wanted, saved)
        if not misfits:
            dcp.load(wanted, storage_reader=reader if of_hf else IntactReader(folder))
    except (Exception, CheckpointException) as error:
        msg = f"{source}: cannot read {folder}: {why(error)}"
        raise ValueError(msg) from error
    if misfits:
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        msg = (
            f"{source}: {folder} is no checkpoint of {name}: {misfits[0]}{more}. A reference has "
            "the architecture of the model that trains; weighting score takes any, with the "
            "--config it was trained with, and stores its losses as a column 'ref_loss'"
        )
        raise ValueError(msg)
    wrapper.load_state_dict(adapter.from_hf(wanted) if of_hf and adapter is not None else state)


@torch.no_grad()
def token_losses(
    model: Decoder,
    loss_fn: WeightedChunkedLoss | WeightedCrossEntropyLoss,
    inputs: Tensor,
    labels: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return a model's loss of every token, [B, L], and leave the model as it was.

    Args:
        model: One that trains, or a frozen one.
        loss_fn: Knows how logits come from the model's output.
        inputs: [B, L].
        labels: [B, L].
        kwargs: Positions and masks, as the trainer gives them to the model.
    """
    with left_alone(model):
        return loss_fn.token_losses(model(inputs, **kwargs), labels, model.lm_head)


@torch.no_grad()
def told_by_references(
    references: Mapping[str, Decoder],
    model: Decoder,
    loss_fn: TokenSignals,
    batch: tuple[Tensor, Tensor, dict[str, Any]],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """Return what of `needs` references tell of a batch, [B, L] by signal; all are left alone.

    Args:
        references: Frozen models, by name.
        model: The one that trains, which goes forward too where `kl` to any of them is needed.
        loss_fn: Knows how logits come from a model's output.
        batch: Inputs and labels, [B, L], and what else the trainer gives the model.
        needs: Names of signals.
    """
    inputs, labels, kwargs = batch
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        own: Output | None = None
        lse: Tensor | None = None
        for name, reference in references.items():
            told = {what: x for what, x in told_by(name).items() if x in needs}
            if "kl" in told and own is None:
                stack.enter_context(left_alone(model))
                own = model(inputs, **kwargs), model.lm_head
            with left_alone(reference):
                of = reference(inputs, **kwargs), reference.lm_head
                more = frozenset({"entropy"} if "ref_entropy" in told else ())
                beside = own if "kl" in told else None
                signals = loss_fn.token_signals(of, labels, more, beside, lse)
            lse = signals.get("model_lse", lse)
            kinds = {"ref_loss": "loss", "ref_entropy": "entropy", "kl": "kl"}
            found |= {signal: signals[kinds[what]] for what, signal in told.items()}
    return found


@contextlib.contextmanager
def left_alone(model: Decoder) -> Iterator[None]:
    """Put a model into evaluation mode for forward passes, and leave it as it was."""
    training = model.training
    model.eval()
    yield
    model.train(training)
    if isinstance(model, FSDPModule) and next(model.parameters()).requires_grad:
        # Were the last parameters still gathered when a graph is captured, no replay would gather
        # them.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    elif isinstance(model, FSDPModule):
        model.reset_iter_state()  # It keeps a record of forwards, which else only backward clears.


def short_context(model: Decoder, kwargs: dict[str, Any], window: int) -> dict[str, Any]:
    """Return the positions and masks with which every document begins anew each `window` tokens."""
    positions = kwargs["positions"]
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    starts = torch.where(positions == 0, index, 0).cummax(1).values
    short = (index - starts) % window
    return {"positions": short, "attention_masks": model.get_attention_masks(positions=short)}


def _misfits(state: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Return what keeps a checkpoint from being one of the model with this state."""
    found: list[str] = []
    parts = {key.partition(".")[0] for key in state}
    for key, value in state.items():
        there = saved.get(key)
        if not isinstance(there, TensorStorageMetadata):
            found.append(f"it has no {key}")
        elif there.size != value.shape:
            found.append(f"{key} is {[*there.size]} there and {[*value.shape]} here")
    extra = [key for key in saved if key not in state and key.partition(".")[0] in parts]
    return found + [f"it has {key}, the model has not" for key in sorted(extra)]

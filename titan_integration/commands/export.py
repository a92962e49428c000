"""A checkpoint as a folder that Hugging Face's `AutoModelForCausalLM` loads.

What `weighting export` calls, and `weighting train --hf` at its end: one process, on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import Sequence as InTurn
from tokenizers.processors import TemplateProcessing

from titan_integration.commands import train as launch
from titan_integration.host import cpu
from titan_integration.host.flags import parse
from titan_integration.host.hf_configs import hf_config, refuse_untold
from titan_integration.host.quiet import quiet
from titan_integration.host.run_dir import refuse_unwritable, writing
from titan_integration.loss.reference_model import find_checkpoint, load_model
from titan_integration.trainer.preflight import build_tokenizer
from weighting.errors import printable

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

_SHARD = "5GB"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(*, checkpoint: str, out: str, dtype: str = "float32", **options: Any) -> int:  # noqa: ANN401
    """Write a checkpoint for Hugging Face; return 0.

    Args:
        checkpoint: A folder step-N, or one of them.
        out: The folder to write; there must be none, or an empty one.
        dtype: Of the weights: `float32` or `bfloat16`.
        options: Those of `HostOptions`.

    Raises:
        ValueError: Checkpoint, config or folder are not as they must be, or transformers has no
            such model.
    """
    given = launch.HostOptions(**options)
    launch.check_config(given.module, given.config)
    folder = find_checkpoint(checkpoint, "CHECKPOINT")
    to = Path(out)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        msg = f"--out {out}: exists already; give the name of a folder that is to be made"
        raise ValueError(msg)
    refuse_unwritable(to)
    with quiet():
        cpu.use_cpu()
        flags = [*launch.host_flags(given, "uniform", "outputs/export"), *given.flags]
        config = cast("Trainer.Config", parse(flags))
        write(config, folder, to, _DTYPES[dtype])
    print(printable(f"exported: {to}, of {folder}"))  # noqa: T201 - the result
    return 0


def write(config: Trainer.Config, folder: Path, to: Path, dtype: torch.dtype) -> None:
    """Write the model of a checkpoint: weights, config.json, tokenizer and generation config.

    The folder appears when all of it is there.

    Raises:
        ValueError: As `main`.
    """
    spec, told = _told(config)
    tokenizer = build_tokenizer(config)
    state = _state(config, spec, folder, dtype)
    ids = {
        f"{name}_token_id": x
        for name in ("bos", "eos")
        if (x := getattr(tokenizer, f"{name}_id", None)) is not None
    }
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    with writing(to):
        try:
            part.mkdir(parents=True)
            _weights(state, part)
            kind = str(dtype).removeprefix("torch.")
            _json(part / "config.json", {**told, **ids, "torch_dtype": kind})
            _json(part / "generation_config.json", {"_from_model_config": True, **ids})
            _tokenizer(tokenizer, Path(config.hf_assets_path), part)
            with contextlib.suppress(FileNotFoundError):
                to.rmdir()
            part.rename(to)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def refuse(config: Trainer.Config) -> None:
    """Refuse a model that could not be written once it is trained.

    Raises:
        ValueError: As `main`.
    """
    spec, _ = _told(config)
    refuse_untold(spec)


def _told(config: Trainer.Config) -> tuple[ModelSpec, dict[str, Any]]:
    """Return a config's model, and what config.json says of it."""
    spec = config.model_spec
    assert spec is not None, "the host needs one too"
    return spec, hf_config(spec, config.hf_assets_path, config.training.seq_len)


def _state(
    config: Trainer.Config, spec: ModelSpec, folder: Path, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the model's weights under Hugging Face's names.

    Raises:
        ValueError: The checkpoint is not of the model, or transformers has no place for it.
    """
    assert spec.state_dict_adapter is not None, "refused by `hf_config`"
    adapter = spec.state_dict_adapter(spec.model, None)
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    with torch.no_grad(), warnings.catch_warnings():
        # There are no other ranks, which torch says.
        warnings.filterwarnings("ignore", "torch.distributed is")
        model.init_weights(buffer_device=torch.device("cpu"))  # buffers are in no checkpoint
        load_model(model, folder, f"{spec.name} {spec.flavor}", "CHECKPOINT", adapter)
    state = dict(model.state_dict())
    refuse_untold(spec, state)
    return {
        key: x.detach().to(dtype).contiguous().clone() for key, x in adapter.to_hf(state).items()
    }


def _weights(state: dict[str, Tensor], to: Path) -> None:
    """Write safetensors, several of them with an index where they are large."""
    parts = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD)
    for name, keys in parts.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, to / name, metadata={"format": "pt"})
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        _json(to / "model.safetensors.index.json", index)


def _tokenizer(tokenizer: BaseTokenizer, assets: Path, to: Path) -> None:
    """Write the tokenizer; a text begins with the token that documents began with in training."""
    inner = getattr(tokenizer, "tokenizer", None)
    if not isinstance(inner, Tokenizer):
        return
    tokens = {name: getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos")}
    begin, begin_id = tokens["bos"], getattr(tokenizer, "bos_id", None)
    copy = Tokenizer.from_str(inner.to_str())
    if begin is not None and copy.encode("").ids[:1] != [begin_id]:
        begins = TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, begin_id)],
        )
        before = copy.post_processor
        copy.post_processor = begins if before is None else InTurn([before, begins])
    copy.save(str(to / "tokenizer.json"))
    given = assets / "tokenizer_config.json"
    config = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else {}
    config |= {f"{name}_token": token for name, token in tokens.items() if token is not None}
    # The class that takes tokenizer.json as it is; others would take its beginning away again.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _json(to / "tokenizer_config.json", config)
    template = assets / "chat_template.jinja"
    if template.is_file():
        shutil.copy(template, to / template.name)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

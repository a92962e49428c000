r"""The loss of every token of a data set under a frozen checkpoint, as a column `ref_loss`.

What `weighting score` calls.  On several nodes, start that by torchrun oneself:

    torchrun --nproc-per-node 8 --nnodes 2 ... -m weighting score outputs/mile/checkpoint \
        --data corpus --out scored.parquet --config llama3_8b --training.local_batch_size 8

A document is encoded as in training, with begin and end of text.  One longer than
`--training.seq_len` is scored in consecutive windows of so many tokens, each of which begins anew,
as packing cuts a document that starts a row.  In training most documents start within a row and are
cut elsewhere, and there a token may know more or less of its document than it did here: that is
what a column made beforehand can give.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.config.override import apply_overrides
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

import weighting
from titan_integration.commands import train as launch
from titan_integration.commands.score_data import open_source, provenance, write
from titan_integration.commands.score_windows import scored_blocks
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.packing import Cut
from titan_integration.data.records import REF_LOSS
from titan_integration.host import cpu, versions
from titan_integration.host.flags import parse
from titan_integration.host.together import fail_together
from titan_integration.host.user_errors import exit_on_user_error
from titan_integration.loss.configs import weighted_loss_config
from titan_integration.loss.loss import (
    WeightedChunkedLoss,
    WeightedCrossEntropyLoss,
)
from titan_integration.loss.reference_model import build_reference, find_checkpoint, token_losses
from titan_integration.loss.vocab_parallel import signals
from titan_integration.trainer.preflight import build_tokenizer
from weighting.errors import printable

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.components.tokenizer import BaseTokenizer


@dataclass(frozen=True, kw_only=True)
class Options(launch.HostOptions):
    """What scoring is given.

    Attributes:
        checkpoint: A folder step-N, or one of them.
        out: The Parquet file to write.
        per: `token` for a list of losses for each document, `document` for their mean.
        overwrite: Whether to replace the file, and the column.
        name: Of a reference among several; its column is `ref_loss_<name>`.
    """

    checkpoint: str
    out: str
    per: str
    overwrite: bool
    name: str | None = None

    @property
    def column(self) -> str:
        """What the losses are called."""
        return f"{REF_LOSS}_{self.name}" if self.name else REF_LOSS


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Score on all ranks, or be one of them; return 0, or the ranks' status.

    Raises:
        ValueError: What can be seen before the model is there is not as it must be.
    """
    args = Options(**options)
    if dist.is_torchelastic_launched():
        init_logger()
        with exit_on_user_error():
            score(args)
        return 0
    _check(args)
    code = launch.on_ranks(args.ranks, "titan_integration.commands.score", [json.dumps(options)])
    if code == 0:
        made = provenance(Path(args.out))
        print(  # noqa: T201 - the result
            f"\n{made['documents']:,} documents, {made['tokens']:,} tokens, mean loss "
            f"{made['mean_loss']:.4f} nats\n\nscored: {printable(args.out)}"
        )
    return code


def score(args: Options) -> None:
    """Score this rank's share of the data; the first rank writes what all have found.

    Raises:
        ValueError: Checkpoint, data, configuration or disk are not as they must be.
    """
    with fail_together():
        versions.check()
        folder = _check(args)
        flags = [*launch.host_flags(args, "uniform", "outputs/score"), *args.flags]
        config = cast("Trainer.Config", parse(flags))
        loader = _refuse_unsupported(config)
        source = open_source(loader, replaces=args.overwrite, column=args.column)
        tokenizer = build_tokenizer(config)
    model = FrozenModel(config, folder)
    rank, ranks = 0, 1
    if model.parallel_dims.dp_enabled:
        mesh = model.parallel_dims.get_mesh("batch")
        rank, ranks = mesh.get_local_rank(), mesh.size()
    cut = Cut(config.training.seq_len, config.training.local_batch_size, rank, ranks)
    encode = partial(tokenizer.encode, add_bos=True, add_eos=True)
    blocks = scored_blocks(source, encode, model.losses, cut)
    if dist.get_rank() == 0:
        assert config.model_spec is not None
        step = re.fullmatch(r"step-(\d+)", folder.resolve().name)
        made = {
            "column": args.column,
            "checkpoint": str(folder.resolve()),
            "step": int(step[1]) if step else None,
            "config": f"{args.module}.{args.config}",
            "model": f"{config.model_spec.name} {config.model_spec.flavor}",
            "tokenizer": fingerprint(tokenizer),
            "seq_len": cut.seq_len,
            "per": args.per,
            "data": source.where,
            "split": loader.split,
            "versions": {**versions.found(), "weighting": weighting.__version__},
        }
        write(Path(args.out), source.schema, blocks, made)
    else:
        for _ in blocks:
            pass
    dist.barrier()  # The first rank is not left alone while it writes.
    dist.destroy_process_group()


_GIVEN = "CHECKPOINT"
"""What messages call the checkpoint."""


class FrozenModel(Trainer):
    """As much of a trainer as it takes to run a model that does not change."""

    def __init__(self, config: Trainer.Config, folder: Path, source: str = _GIVEN) -> None:
        """Join the ranks and load the model.

        Args:
            config: A trainer's; its parallelism, precision and compilation are kept.
            folder: A checkpoint as `find_checkpoint` returns it.
            source: Where it was given, for messages.

        Raises:
            ValueError: The checkpoint cannot be read, or is of another architecture.
        """
        if cpu.use_cpu():
            cpu.prepare_config(config)
        config.comm.trace_buf_size = 0  # It would make a folder for what it traces.
        config.loss = weighted_loss_config(config.loss)
        self.config, self.device = config, utils.get_local_device()
        utils.device_module.set_device(self.device)
        self.parallel_dims = self.init_distributed()
        dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
        self.train_context = dist_utils.get_spmd_context(parallel_dims=self.parallel_dims)
        assert config.model_spec is not None
        self.model_config = config.model_spec.model
        self.model_config.update_from_config(config=config)
        if config.override.imports:
            apply_overrides(config.override, config)
        self.loss_fn = config.loss.build(compile_config=config.compile)
        self.model = build_reference(config, self.parallel_dims, folder, source)
        self.model_parts = [self.model]
        self.ntokens_seen = 0

    def losses(self, inputs: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every label in nats, float32; all are [B, L]."""
        batch = self._batch(inputs, positions, labels)
        assert isinstance(self.loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
        with self.train_context():
            return token_losses(self.model, self.loss_fn, *batch).float().cpu()

    @torch.no_grad()
    def signals(
        self, inputs: Tensor, positions: Tensor, labels: Tensor, needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """Return `loss` and what else of `needs` the logits tell; all are [B, L].

        The logits of all tokens are there at once.
        """
        inputs, labels, kwargs = self._batch(inputs, positions, labels)
        with self.train_context():
            logits = self.model(inputs, **kwargs)
            if isinstance(self.loss_fn, WeightedChunkedLoss):
                logits = self.model.lm_head(logits)
            found = signals(logits, labels, None, needs)
        if isinstance(self.model, FSDPModule):
            self.model.reset_iter_state()  # as `token_losses` does
        return {name: x.float().cpu() for name, x in found.items() if name != "lse"}

    def _batch(
        self, inputs: Tensor, positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        given = {"input": inputs.to(self.device), "positions": positions.to(self.device)}
        return self.post_dataloading_process(given, labels.to(self.device))


def fingerprint(tokenizer: BaseTokenizer) -> str:
    """Return 16 hexadecimal digits that differ for another tokenizer."""
    inner = getattr(tokenizer, "tokenizer", None)  # a Hugging Face one
    text = inner.to_str() if inner is not None else type(tokenizer).__qualname__
    parts = [text, tokenizer.get_vocab_size(), tokenizer.encode("", add_bos=True, add_eos=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check(args: Options) -> Path:
    """Return the checkpoint's folder.

    Raises:
        ValueError: There is none, the result could not be written, or there is no such config.
    """
    launch.check_config(args.module, args.config)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        msg = f"--out {out}: exists already; choose another name, or pass --overwrite"
        raise ValueError(msg)
    return find_checkpoint(args.checkpoint, _GIVEN)


def _refuse_unsupported(config: Trainer.Config) -> DomainTextDataLoader.Config:
    """Return the loader's configuration; refuse what would end in a traceback."""
    loader = config.dataloader
    if not isinstance(loader, DomainTextDataLoader.Config):
        msg = f"the config's data loader is {type(loader).__qualname__}; use DomainTextDataLoader"
        raise ValueError(msg)  # noqa: TRY004 - it is the config that is wrong
    for name in ("pipeline", "context"):
        if getattr(config.parallelism, f"{name}_parallel_degree") > 1:
            msg = (
                "scoring shards the model, but cuts neither its layers nor rows over ranks; set "
                f"--parallelism.{name}_parallel_degree 1"
            )
            raise ValueError(msg)
    return loader


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))  # a rank, of what `main` has started

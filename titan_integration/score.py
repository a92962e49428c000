r"""The loss of every token of a data set under a frozen checkpoint, as a column `ref_loss`.

`weighting score` ends up here.  On several nodes, start it by torchrun oneself:

    torchrun --nproc-per-node 8 --nnodes 2 ... -m titan_integration.score \
        --checkpoint outputs/mile/checkpoint --data corpus --out scored.parquet \
        --config llama3_8b -- --training.local_batch_size 8

A document is encoded as in training, with begin and end of text.  One longer than
`--training.seq_len` is scored in consecutive windows of so many tokens, each of which begins anew,
as packing cuts a document that starts a row.  In training most documents start within a row and are
cut elsewhere, and there a token may know more or less of its document than it did here: that is
what a column made beforehand can give.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import ConfigManager
from torchtitan.config.override import apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.logging import init_logger, logger
from torchtitan.trainer import Trainer

import weighting
from titan_integration import cpu, launch, versions
from titan_integration.data import EMBEDDED, DomainTextDataLoader, load_documents
from titan_integration.documents import open_hub
from titan_integration.loss import (
    WeightedChunkedLoss,
    WeightedCrossEntropyLoss,
    weighted_loss_config,
)
from titan_integration.packing import Cut
from titan_integration.records import (
    REF_LOSS,
    SUFFIXES,
    Columns,
    domain_of,
    local_files,
    read_records,
    text_of,
)
from titan_integration.reference import build_reference, find_checkpoint, token_losses
from titan_integration.trainer import exit_on_user_error

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.components.tokenizer import BaseTokenizer

PROVENANCE = "weighting.score"
"""Key in the file's metadata of what made it, as JSON."""

Record = tuple[str, Mapping[str, Any]]
"""A record with its place, for messages."""

Kinds = dict[str, pa.DataType | None]
"""What columns hold, by name; None for one that Parquet cannot hold."""

LossesOf = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Inputs, positions and labels -> losses in nats, float32, each [B, L]."""


def main(arguments: list[str] | None = None) -> int:
    """Score on all ranks, or be one of them; return 0, 2 for an error of the user's, or theirs."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    if dist.is_torchelastic_launched():
        init_logger()
        with exit_on_user_error():
            score(args)
        return 0
    try:
        _check(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    code = _on_ranks(args.ranks, sys.argv[1:] if arguments is None else arguments)
    if code == 0:
        made = provenance(args.out)
        print(  # noqa: T201 - the result
            f"\n{made['documents']:,} documents, {made['tokens']:,} tokens, mean loss "
            f"{made['mean_loss']:.4f} nats\n\nscored: {args.out}"
        )
    return code


def provenance(path: Path) -> dict[str, Any]:
    """Return what a scored file says about how it was made."""
    return json.loads((pq.read_metadata(path).metadata or {})[PROVENANCE.encode()])


def score(args: argparse.Namespace) -> None:
    """Score this rank's share of the data; the first rank writes what all have found.

    Raises:
        ValueError: Checkpoint, data, configuration or disk are not as they must be.
    """
    versions.check()
    folder = _check(args)
    config = cast("Trainer.Config", ConfigManager().parse_args(_flags(args)))
    loader = _refuse_unsupported(config)
    source = open_source(loader, replaces=args.overwrite)
    try:
        tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    except OSError as error:
        msg = f"--hf_assets_path {config.hf_assets_path}: no tokenizer there: {error}"
        raise ValueError(msg) from error
    dims, losses_of = load(config, folder)
    rank, ranks = 0, 1
    if dims.dp_enabled:
        mesh = dims.get_mesh("batch")
        rank, ranks = mesh.get_local_rank(), mesh.size()
    cut = Cut(config.training.seq_len, config.training.local_batch_size, rank, ranks)
    encode = partial(tokenizer.encode, add_bos=True, add_eos=True)
    blocks = scored_blocks(source, encode, losses_of, cut)
    if dist.get_rank() == 0:
        assert config.model_spec is not None
        step = re.fullmatch(r"step-(\d+)", folder.resolve().name)
        made = {
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
        write(args.out, source.schema, blocks, made)
    else:
        for _ in blocks:
            pass
    dist.barrier()  # The first rank is not left alone while it writes.
    dist.destroy_process_group()


class Source(NamedTuple):
    """Records to score, in order, and what of them a Parquet file can hold."""

    where: str
    columns: Columns
    schema: pa.Schema
    total: int
    records: Callable[[], Iterator[Record]]


def open_source(config: DomainTextDataLoader.Config, *, replaces: bool = False) -> Source:
    """Open what a loader's configuration names, and look at every record's text and domain.

    Args:
        config: What to read, as in training; columns of numbers are kept like all others.
        replaces: Whether a column `ref_loss` that is there already may be replaced.

    Raises:
        ValueError: For anything wrong with the data or its description; names the place.
    """
    columns = Columns(config.text_column, config.domain_column, tuple(config.columns))
    where = config.dataset_path or config.dataset
    parts = _parts(config, columns)
    seen: list[Kinds] = []
    total, has_text = 0, False
    for part in parts:
        if part.schema is not None:
            seen.append(dict(zip(part.schema.names, part.schema.types, strict=True)))
        records = part.records()
        while some := list(islice(records, 1_000)):
            for place, record in some:
                has_text |= text_of(record, columns, place) != ""
                domain_of(record, columns, place)
            total += len(some)
            if part.schema is None:
                seen.append(_inferred(some))
    if not has_text:
        msg = f"{where}: no text in any record of split {config.split!r}"
        raise ValueError(msg)
    kinds = _common(seen)
    if REF_LOSS in kinds and not replaces:
        msg = f"{where}: has a column {REF_LOSS!r} already; --overwrite replaces it"
        raise ValueError(msg)
    _refuse_lost(kinds, columns, where)
    kept = [(name, x) for name, x in kinds.items() if x is not None and name != REF_LOSS]

    def all_records() -> Iterator[Record]:
        return chain.from_iterable(part.records() for part in parts)

    return Source(where, columns, pa.schema(kept), total, all_records)


def load(config: Trainer.Config, folder: Path) -> tuple[ParallelDims, LossesOf]:
    """Join the ranks and load the frozen model; return their meshes and its losses.

    Args:
        config: A trainer's; its parallelism, precision and compilation are kept.
        folder: A checkpoint as `find_checkpoint` returns it.

    Raises:
        ValueError: The checkpoint cannot be read, or is of another architecture.
    """
    if cpu.use_cpu():
        cpu.prepare_config(config)
    config.comm.trace_buf_size = 0  # It would make a folder for what it traces.
    config.loss = weighted_loss_config(config.loss)
    device = utils.get_local_device()
    utils.device_module.set_device(device)
    offload = config.training.enable_cpu_offload
    world = dist_utils.init_distributed(config.comm, enable_cpu_backend=offload)
    dims = ParallelDims.from_config(config.parallelism, world)
    dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
    assert config.model_spec is not None
    config.model_spec.model.update_from_config(config=config)
    if config.override.imports:
        apply_overrides(config.override, config)
    loss_fn = config.loss.build(compile_config=config.compile)
    assert isinstance(loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
    with _about_a_checkpoint():
        model = build_reference(config, dims, folder)
    context = dist_utils.get_spmd_context(parallel_dims=dims)
    # As much of a trainer as the host's own way from a batch to a model's arguments looks at.
    trainer = cast(
        "Trainer",
        SimpleNamespace(
            config=config,
            model_config=config.model_spec.model,
            model_parts=[model],
            parallel_dims=dims,
            device=device,
            ntokens_seen=0,
        ),
    )

    def losses_of(inputs: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        given = {"input": inputs.to(device), "positions": positions.to(device)}
        batch = Trainer.post_dataloading_process(trainer, given, labels.to(device))
        with context():
            return token_losses(model, loss_fn, *batch).float().cpu()

    return dims, losses_of


def scored_blocks(
    source: Source, encode: Callable[[str], list[int]], losses_of: LossesOf, cut: Cut
) -> Iterator[tuple[list[Record], list[np.ndarray]]]:
    """Yield records, and on the first rank the losses of their tokens; every rank must iterate.

    The losses of a document are float32, in nats, one for each of its tokens but the first.

    Args:
        source: What to score.
        encode: Text -> token ids, with begin and end of text.
        losses_of: The model, as `load` returns it.
        cut: Which part is this rank's.
    """
    done, tell = 0, _progress(source.total)
    for records, texts in _blocks(source, cut.num_ranks):
        # Dealt by length, so that all ranks get much the same to do.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        mine = order[cut.rank :: cut.num_ranks]
        tokens = [torch.tensor(encode(texts[i]), dtype=torch.int64) for i in mine]
        found = [np.zeros(max(len(x) - 1, 0), np.float32) for x in tokens]
        rows = packed(windows([len(x) for x in found], cut.seq_len), cut.seq_len)
        # A sharded model is gathered by all ranks or none: those that are done run on padding.
        batches = _most(-(-len(rows) // cut.local_batch))
        for n in range(batches):
            some = rows[n * cut.local_batch : (n + 1) * cut.local_batch]
            losses = losses_of(*laid_out(some, tokens, cut)).numpy()
            for row, span, window in _spans(some):
                to = slice(window.start, window.start + window.length)
                found[window.document][to] = losses[row, span]
            tell(done + len(records) * (n + 1) // batches)
        done += len(records)
        yield records, _in_order(dict(zip(mine, found, strict=True)))


class Window(NamedTuple):
    """Some inputs of a document, from `start` on."""

    document: int
    start: int
    length: int


def windows(lengths: Sequence[int], seq_len: int) -> list[Window]:
    """Cut documents of so many inputs each into windows of at most `seq_len`."""
    return [
        Window(document, start, min(seq_len, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_len)
    ]


def packed(pieces: Sequence[Window], seq_len: int) -> list[list[Window]]:
    """Fill rows with windows: in each the longest that fits, then the longest that still fits."""
    left = sorted(pieces, key=_length)
    rows: list[list[Window]] = []
    while left:
        row: list[Window] = []
        room = seq_len
        while at := bisect_right(left, room, key=_length):
            row.append(left.pop(at - 1))
            room -= row[-1].length
        rows.append(row)
    return rows


def laid_out(
    rows: list[list[Window]], tokens: list[Tensor], cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, positions and labels of a batch, int64 [B, L]; what is left over is padding.

    Positions start at 0 in every window and at the padding, so that each sees itself alone.
    """
    shape = cut.local_batch, cut.seq_len
    inputs = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    positions = torch.arange(cut.seq_len).repeat(cut.local_batch, 1)
    for row, span, w in _spans(rows):
        piece = tokens[w.document][w.start : w.start + w.length + 1]
        inputs[row, span], labels[row, span] = piece[:-1], piece[1:]
        positions[row, span.stop :] = torch.arange(cut.seq_len - span.stop)  # begins anew
    return inputs, positions, labels


def write(
    out: Path,
    schema: pa.Schema,
    blocks: Iterator[tuple[list[Record], list[np.ndarray]]],
    made: dict[str, Any],
) -> None:
    """Write records with their losses as a Parquet file, which appears whole or not at all.

    Args:
        out: The file; until it is whole it is called `<out>.part`.
        schema: Of the records' own columns.
        blocks: As `scored_blocks` yields them.
        made: What to write about how it was made; `per` decides what the column holds.

    Raises:
        ValueError: The disk is full or the like, or a loss is not finite.
    """
    is_per_token = made["per"] == "token"
    kind = pa.list_(pa.float32()) if is_per_token else pa.float32()
    schema = schema.append(pa.field(REF_LOSS, kind))
    part = out.with_name(f"{out.name}.part")
    documents, tokens, total = 0, 0, 0.0
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for records, losses in blocks:
                _refuse_nonfinite(records, losses, made["checkpoint"])
                documents += len(losses)
                tokens += sum(map(len, losses))
                total += sum(float(x.sum(dtype=np.float64)) for x in losses)
                found = losses if is_per_token else [_mean(x) for x in losses]
                own = schema.names[:-1]
                columns = [[record.get(name) for _, record in records] for name in own]
                arrays = [*map(pa.array, [*columns, found], schema.types)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            made |= {"documents": documents, "tokens": tokens, "mean_loss": total / max(tokens, 1)}
            writer.add_key_value_metadata({PROVENANCE: json.dumps(made)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        msg = f"--out {out}: cannot write it: {error.strerror or error}"
        raise ValueError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def fingerprint(tokenizer: BaseTokenizer) -> str:
    """Return 16 hexadecimal digits that differ for another tokenizer."""
    inner = getattr(tokenizer, "tokenizer", None)  # a Hugging Face one
    text = inner.to_str() if inner is not None else type(tokenizer).__qualname__
    parts = [text, tokenizer.get_vocab_size(), tokenizer.encode("", add_bos=True, add_eos=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_BLOCK = 1_024, 4_000_000
"""Documents, and characters, that each rank scores before what they have found is written."""

_TELL_EVERY = 10.0
"""Seconds between two lines about the progress."""


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titan_integration.score")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--per", choices=("token", "document"), default="token")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--config", default="llama3_debugmodel")
    parser.add_argument("--module", default="titan_integration")
    parser.add_argument("--data")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("flags", nargs="*")
    return parser.parse_args(arguments)


def _flags(args: argparse.Namespace) -> list[str]:
    """Return torchtitan's command line, as of a training run with the same data and flags."""
    words = ["--spec", "uniform", "--config", args.config, "--module", args.module]
    words += ["--data", args.data] if args.data else []
    return launch._flags(launch._parse([*words, "--", *args.flags]), "score")  # noqa: SLF001


def _check(args: argparse.Namespace) -> Path:
    """Return the checkpoint's folder.

    Raises:
        ValueError: There is none, the result could not be written, or there is no such config.
    """
    if message := launch._unknown_config(args.module, args.config):  # noqa: SLF001
        raise ValueError(message)
    if args.out.suffix != ".parquet":
        msg = f"--out {args.out}: it is a Parquet file; give it a name that ends in .parquet"
        raise ValueError(msg)
    if not args.out.parent.is_dir():
        msg = f"--out {args.out}: no folder {args.out.parent}; make it first"
        raise ValueError(msg)
    if args.out.exists() and not args.overwrite:
        msg = f"--out {args.out}: exists already; choose another name, or pass --overwrite"
        raise ValueError(msg)
    with _about_a_checkpoint():
        return find_checkpoint(args.checkpoint)


def _on_ranks(ranks: int | None, arguments: list[str]) -> int:
    """Run this module on every rank, as the launcher of training runs the trainer."""
    ranks = ranks or max(1, torch.accelerator.device_count())
    if not torch.accelerator.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    options = ["--standalone", f"--nproc-per-node={ranks}", "--local-ranks-filter=0"]
    command = [*options, "--role=rank", "--tee=3", "-m", "titan_integration.score", *arguments]
    return launch._torchrun(command)  # noqa: SLF001


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


@contextlib.contextmanager
def _about_a_checkpoint() -> Iterator[None]:
    """Word errors about a reference model for who gave a CHECKPOINT."""
    try:
        yield
    except ValueError as error:
        text, is_misfit, _ = str(error).partition(". A reference has")
        text = text.replace("--weighting.reference", "CHECKPOINT")
        hint = "; name the config it was trained with: --config" if is_misfit else ""
        raise ValueError(text + hint) from error


class _Part(NamedTuple):
    """Records of one kind; without a schema they must be looked at."""

    schema: pa.Schema | None
    records: Callable[[], Iterator[Record]]


def _parts(config: DomainTextDataLoader.Config, columns: Columns) -> list[_Part]:
    where = config.dataset_path or config.dataset
    if where == EMBEDDED and config.dataset_path is None:
        documents = load_documents(config)
        pairs = [documents[i] for i in range(len(documents))]
        records = [(where, {"text": text, "domain": domain}) for text, domain in pairs]
        strings = pa.schema([("text", pa.string()), ("domain", pa.string())])
        return [_Part(strings, lambda: iter(records))]
    path = Path(where).expanduser()
    if config.dataset_path is not None or path.suffix in SUFFIXES or path.exists():
        return [_file(file, columns) for file in local_files(path, config.split)]
    if config.streaming:
        msg = (
            f"{where} is streamed, and has no end that scoring could reach; give --data a file, or "
            "set --dataloader.no-streaming to download the whole"
        )
        raise ValueError(msg)
    dataset = open_hub(where, config.hf_name, config.split, streaming=False)
    return [_Part(dataset.features.arrow_schema, partial(_hub_records, dataset, where))]


def _file(path: Path, columns: Columns) -> _Part:
    schema = None
    if path.suffix == ".parquet":
        # What is wrong with a broken file is said when its records are read.
        with contextlib.suppress(pa.ArrowException, OSError):
            schema = pq.read_schema(path)
            columns = replace(columns, numbers=tuple(schema.names))
    return _Part(schema, partial(read_records, path, columns))


def _hub_records(dataset: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
    batches = dataset.with_format("arrow").iter(batch_size=1_000)
    records = (record for batch in batches for record in batch.to_pylist())
    return ((f"{where}: record {i}", record) for i, record in enumerate(records))


def _inferred(records: Sequence[Record]) -> Kinds:
    """Return what every column holds."""
    names = dict.fromkeys(name for _, record in records for name in record)
    found: Kinds = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
            found[name] = pa.array([record.get(name) for _, record in records]).type
    return found


def _common(seen: Sequence[Kinds]) -> Kinds:
    """Return the types that hold what columns hold in all records."""
    kinds: Kinds = {}
    for found in seen:
        for name, kind in found.items():
            kinds[name] = _wider(kinds.get(name, kind), kind)
    return kinds


def _wider(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """Return the type that holds both; None if there is none, or Parquet has not got it."""
    if a is None or b is None:
        return None
    with contextlib.suppress(pa.ArrowException):
        both = [pa.schema([("x", kind)]) for kind in (a, b)]
        schema = pa.unify_schemas(both, promote_options="permissive")
        pq.write_table(schema.empty_table(), pa.BufferOutputStream())
        return schema.field("x").type
    return None


def _refuse_lost(kinds: Kinds, columns: Columns, where: str) -> None:
    """Say which columns are left out; refuse if one is needed."""
    lost = [name for name, kind in kinds.items() if kind is None]
    for column in (columns.text, columns.domain, *columns.numbers):
        name = column if column in kinds else column.partition(".")[0]
        if name in lost:
            msg = f"{where}: column {name!r} holds values of several types; Parquet wants one"
            raise ValueError(msg)
    if lost:
        logger.warning(f"Left out, as Parquet cannot hold such columns: {', '.join(lost)}")


def _blocks(source: Source, ranks: int) -> Iterator[tuple[list[Record], list[str]]]:
    """Yield records and their texts, in parts that keep all ranks busy for a while."""
    most, most_characters = (limit * ranks for limit in _BLOCK)
    block, texts, characters = list[Record](), list[str](), 0
    for place, record in source.records():
        block.append((place, record))
        texts.append(text_of(record, source.columns, place))
        characters += len(texts[-1])
        if len(block) == most or characters >= most_characters:
            yield block, texts
            block, texts, characters = list[Record](), list[str](), 0
    if block:
        yield block, texts


def _most(count: int) -> int:
    """Return the largest of all ranks' numbers."""
    counts = torch.tensor(count, device=utils.device_type)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def _in_order(share: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Return, on the first rank, what all ranks have found for the documents of a block."""
    shares: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(share, shares)
    found = {i: losses for share in shares or [] for i, losses in share.items()}
    return [found[i] for i in range(len(found))]


def _spans(rows: list[list[Window]]) -> Iterator[tuple[int, slice, Window]]:
    """Yield every window with its row and its place there."""
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            yield row, slice(at, at + piece.length), piece
            at += piece.length


def _length(window: Window) -> int:
    return window.length


def _mean(losses: np.ndarray) -> float:
    """Return the mean loss of a document; 0 if there was nothing to predict."""
    return float(losses.mean(dtype=np.float64)) if len(losses) else 0.0


def _refuse_nonfinite(records: list[Record], losses: list[np.ndarray], checkpoint: str) -> None:
    for (place, _), found in zip(records, losses, strict=True):
        if not np.isfinite(found).all():
            msg = f"{place}: a loss is NaN or infinite under {checkpoint}; use a sound checkpoint"
            raise ValueError(msg)


def _progress(total: int) -> Callable[[int], None]:
    """Return what logs, every few seconds and on the first rank, how many records are done."""
    began = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if dist.get_rank() == 0 and now >= told + _TELL_EVERY:
            told = now
            share = 100 * done // total
            logger.info(f"Scored {done:,} of {total:,} documents, {share} %, {now - began:.0f} s")

    return tell


if __name__ == "__main__":
    sys.exit(main())

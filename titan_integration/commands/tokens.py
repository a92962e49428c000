"""What specs weigh the tokens of one text under a checkpoint, shaded.

What `weighting tokens` calls.  One process runs the model, without torchrun.  A text is encoded
and cut as `weighting score` does it; its windows are the sequences of one batch.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer

import weighting as wt
from titan_integration.commands import train as launch
from titan_integration.commands.score import FrozenModel
from titan_integration.commands.score_windows import laid_out, windows
from titan_integration.data.packing import Cut
from titan_integration.host import versions
from titan_integration.host.flags import parse
from titan_integration.host.quiet import quiet
from titan_integration.loss.reference_model import find_checkpoint
from weighting.errors import printable
from weighting.loss.cross_entropy import signals_of
from weighting.report import shading
from weighting.runs.files import read_text, write_whole
from weighting.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.trainer import Trainer

    from weighting.build import Weighting


_GIVEN = "--checkpoint"
"""What messages call the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Options(launch.HostOptions):
    """What is asked for.

    Attributes:
        specs: As the user gave them, and as they were read.
        checkpoint: A folder step-N, or one of them.
        text: A file in UTF-8.
        html: File for a page; None for none.
        step: Optimizer step; None for the checkpoint's.
        allow_plugins: Whether the modules that specs name were imported.
    """

    specs: Sequence[tuple[str, Spec]]
    checkpoint: str
    text: str
    html: str | None = None
    step: int | None = None
    allow_plugins: bool = False


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Print the text, and write the page if asked to; return 0.

    Raises:
        ValueError: As `shaded_text`, or the page cannot be written.
    """
    args = Options(**options)
    try:
        with quiet():  # The host's warnings are about training.
            shaded = shaded_text(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if args.html:
        _write(Path(args.html), shading.page(shaded))
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    colours = sys.stdout.isatty() and not plain
    text = shading.terminal(shaded) if colours else shading.table(shaded)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))  # noqa: T201 - the result
    if args.html:
        print(printable(f"\npage: {args.html}", keep="\n"))  # noqa: T201 - the result
    return 0


def shaded_text(args: Options) -> shading.Shaded:
    """Run the model on the text and weigh it by every spec.

    Raises:
        ValueError: Text, checkpoint, configuration or a spec are not as they must be.
    """
    versions.check()
    launch.check_config(args.module, args.config)
    folder = find_checkpoint(args.checkpoint, _GIVEN)
    text = read_text(Path(args.text), f"--text {args.text}")
    if not text:
        msg = f"--text {args.text}: the file is empty; it takes a text to weigh"
        raise ValueError(msg)
    _check_page(args.html, Path(args.text))
    fns = [wt.build(spec, domains=["text"]).eval() for _, spec in args.specs]
    config = _config(args)
    try:
        tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    except OSError as error:
        msg = f"--hf_assets_path {config.hf_assets_path}: no tokenizer there: {error}"
        raise ValueError(msg) from error
    ids, pieces = encoded(tokenizer, text)
    if len(ids) == 1:
        msg = f"--text {args.text}: one token alone, which nothing predicts; it takes more text"
        raise ValueError(msg)
    known = config.model_spec
    assert known is not None
    if max(ids) >= (size := cast("Decoder.Config", known.model).vocab_size):
        msg = (
            f"--hf_assets_path {config.hf_assets_path}: token {max(ids)} is not one of the "
            f"model's {size}; give the tokenizer it was trained with"
        )
        raise ValueError(msg)
    needs = frozenset({"entropy"}).union(*(fn.needs for fn in fns))
    _be_the_only_rank()
    model = FrozenModel(config, folder, _GIVEN)
    batch = batch_of(model, ids, config.training.seq_len, needs)
    found = re.fullmatch(r"step-(\d+)", folder.resolve().name)
    step = args.step if args.step is not None else max(1, int(found[1]) if found else 1)
    weights = []
    for fn in fns:
        out = fn(signals_of(batch.signals), step)
        fn.check(out)
        weights.append(out.token[batch.valid].tolist())
    lengths = batch.valid.sum(-1).tolist()
    names = [_name(spec, given) for given, spec in args.specs]
    spoken = [
        shading.Weighed(name, tuple(notes(fn, lengths)))
        for name, fn in zip(names, fns, strict=True)
    ]
    facts = (
        f"{known.name} {known.flavor} from {folder}",
        f"{sum(lengths):,} tokens in {_windows(lengths)}, each predicted from its window alone",
        f"weights of step {step}",
    )
    tokens = _tokens(batch, weights, pieces)
    return shading.Shaded(args.text, facts, tuple(spoken), tuple(tokens))


class Batch(NamedTuple):
    """The windows of a text as rows: signals by name, and which places hold a token, [B, L]."""

    signals: dict[str, Tensor]
    valid: Tensor


@torch.no_grad()
def batch_of(model: FrozenModel, ids: Sequence[int], seq_len: int, needs: frozenset[str]) -> Batch:
    """Run a model on a text window by window.

    Args:
        model: The model.
        ids: Tokens; all but the first are predicted.
        seq_len: Length of a window.
        needs: Signals the specs read; those that logits tell are found.
    """
    rows = [[piece] for piece in windows([len(ids) - 1], seq_len)]
    index, positions = laid_out(rows, Cut(seq_len, len(rows), 0, 1), padding=len(ids) - 1)
    inputs = torch.tensor([*ids[:-1], 0])[index]
    labels = torch.tensor([*ids[1:], IGNORE_INDEX])[index]
    # Row by row: the logits of a row are all there at once.
    parts = zip(inputs.split(1), positions.split(1), labels.split(1), strict=True)
    found = [model.signals(*part, needs) for part in parts]
    signals = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    valid = labels != IGNORE_INDEX
    same = torch.zeros_like(labels)  # one domain, and in each row one document
    return Batch({**signals, "valid": valid, "domain_ids": same, "segment_ids": same}, valid)


def encoded(tokenizer: BaseTokenizer, text: str) -> tuple[list[int], list[str]]:
    """Return the tokens of a text as in training, and the part of the text each stands for.

    The parts, joined, are the text.  Of tokens that share a character, such as the bytes of one,
    the first has it and the others have nothing, as begin and end of text do.  An end of text
    that the host adds has no part.

    Raises:
        ValueError: The tokenizer is not a Hugging Face one, and does not tell where tokens are.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        msg = f"{type(tokenizer).__qualname__} does not tell where in a text its tokens are"
        raise ValueError(msg)  # noqa: TRY004 - it is the config that is wrong
    found = tokenizer.tokenizer.encode(text)
    adds_begin = tokenizer.bos_id is not None and not tokenizer.hf_adds_bos
    pieces, done = [""] * adds_begin, 0
    for _, end in found.offsets:
        pieces.append(text[done : max(done, end)])
        done = max(done, end)
    pieces[-1] += text[done:]  # what a tokenizer leaves out
    return tokenizer.encode(text, add_bos=True, add_eos=True), pieces


def notes(fn: Weighting, lengths: Sequence[int]) -> Iterator[str]:
    """Yield over what weights have mean one, and what else a single text does to them.

    Args:
        fn: A built spec.
        lengths: Tokens of each window.
    """
    levels = {steps[-1].level for steps in fn.plan.factors.values()}
    if fn.spec.normalize == "mean_one":
        yield f"The mean is one over the {sum(lengths):,} tokens here, in training over a batch's."
    else:
        yield "Weights are as the spec leaves them: it says normalize: none."
    for level in sorted(levels & {"sequence", "document"}):
        if len(lengths) == 1:
            yield f"It weighs each {level}, and the text is one: all tokens weigh the same."
        else:
            yield f"It weighs each {level}, here {_windows(lengths)}, by how they compare."
    if "domain" in levels:
        yield "It weighs domains, and the text is of one."
    if fn.state_dict():
        yield "It remembers earlier batches, and this text is its first."


def _tokens(
    batch: Batch, weights: Sequence[Sequence[float]], pieces: Sequence[str]
) -> Iterator[shading.Token]:
    """Yield the tokens of a text with what is known of each.

    Args:
        batch: Its windows.
        weights: By every spec, of every token but the first.
        pieces: As from `encoded`.
    """
    if pieces[0]:  # No token begins a text, so nothing predicts its first one.
        yield shading.Token(pieces[0])
    window = (batch.valid.nonzero()[:, 0] + 1).tolist()
    loss, entropy = (batch.signals[name][batch.valid].tolist() for name in ("loss", "entropy"))
    scores = [*zip(window, loss, entropy, zip(*weights, strict=True), strict=True)]
    shown = [(piece, "▪") for piece in pieces[1:]]
    shown += [("", "‹end›")] * (len(scores) - len(shown))
    for (piece, mark), score in zip(shown, scores, strict=True):
        yield shading.Token(piece, *score, mark)


def _windows(lengths: Sequence[int]) -> str:
    first, *more = lengths
    if not more:
        return "one window"
    last = f", the last of {more[-1]}" if more[-1] != first else ""
    return f"{len(lengths):,} windows of {first}{last}"


def _name(spec: Spec, given: str) -> str:
    unnamed = spec.name == Spec.model_fields["name"].default
    return given if unnamed else spec.name


def _check_page(html: str | None, text: Path) -> None:
    if html is None:
        return
    path = Path(html)
    if path.is_dir() or not path.parent.is_dir():
        msg = f"--html {html}: no file can be written there; name one in a folder that exists"
        raise ValueError(msg)
    if path.exists() and path.samefile(text):
        msg = f"--html {html}: that is the text itself; choose another name"
        raise ValueError(msg)


def _write(path: Path, page: str) -> None:
    """Put the page in place in one step."""
    try:
        write_whole(path, page)
    except OSError as error:
        msg = f"--html {path}: cannot write it: {error.strerror}"
        raise ValueError(msg) from error


def _config(args: Options) -> Trainer.Config:
    """Return the host's configuration; refuse what takes more than one process."""
    flags = [*launch.host_flags(args, "uniform", "outputs/tokens"), *args.flags]
    try:
        config = cast("Trainer.Config", parse(flags))
    except ImportError as error:
        msg = f"--module {args.module}: {error}"
        raise ValueError(msg) from error
    names = [f"{kind}_parallel_degree" for kind in ("pipeline", "context", "tensor", "expert")]
    names += ["data_parallel_replicate_degree", "data_parallel_shard_degree"]
    for name in names:
        if getattr(config.parallelism, name) > 1:
            msg = f"one process runs the model here; set --parallelism.{name} 1"
            raise ValueError(msg)
    return config


def _be_the_only_rank() -> None:
    """Tell the host what torchrun would; any free port will do."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}

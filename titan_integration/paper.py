r"""The models and recipes of two papers, for machines with GPUs.

    weighting train linupper-gpt2 --config paper_124m --dump_folder outputs/124m-linupper
    weighting train linupper-1p4b --config paper_1p4b --dump_folder outputs/1p4b-linupper
    weighting train mile --config mile_468m --dump_folder outputs/468m-mile

The numbers are those of Sow et al., ICLR 2025 (arXiv:2502.06733), Tables 6 and 7, and of the
configurations released with Su et al., MiLe Loss, NAACL Findings 2024 (arXiv:2310.19531).  Data is
streamed; tokenizers have to be there beforehand (Llama's takes Meta's permission):

    hf download openai-community/gpt2 tokenizer.json tokenizer_config.json \
        --local-dir assets/hf/gpt2
    hf download meta-llama/Llama-2-7b-hf tokenizer.json tokenizer_config.json \
        --local-dir assets/hf/Llama-2-7b

Any number of ranks will do that divides the minibatch.  Each takes its part at once, and weights
look at all of it, as theirs do.  A few GPUs with a large model accumulate gradients, and so do
ranks with a part of a row or a layer, unless `--training.local_batch_size` says what they take
together; weights then look at one microbatch on all ranks, or write `scope: step` into the spec.

Differs:

- The tables do not say AdamW's betas, nor which parameters decay: here they are the host's, 0.9 and
  0.95, and all of them.  Precision is the host's too: bfloat16, with gradients added in float32.
- A token attends to its own document only, and predicts none of the next.
- GPT-2's sizes have Llama's blocks: rotary positions, RMS norm, a gated feed-forward part of width
  2,048, no biases, no dropout.  There are as many parameters, within 0.4 %.
- Validation reads about 20,000 rows of the split `validation`, in its mixture; theirs draws
  as many of `test`, from all domains alike.  The mean over domains counts them alike either way.
- Llama's sizes read a random part of FineWeb, the sample of 350 billion tokens, in its own order;
  which part theirs read, and in which order, is not known.
- MiLe's sizes read a copy of the Pile without what was withdrawn from it since, in its own order
  and mixture, where theirs draws domains by rates of its own; and Llama 2's tokenizer, which is of
  the size of theirs.  Its first weights are the host's.
- MiLe's steps are those of the optimizer: theirs of 468M and 1.2B count the batches that two
  gradients are added up from, and are half as many.

Checkpoints are kept at every step that a paper evaluates or saves at, each 12 bytes a parameter:
1.5 GB at 124M, 80 GB at 7B.  `--checkpoint.keep_latest_k 2` keeps two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.models.common import ComplexRoPE, compute_ffn_hidden_dim

# The underscored ones make the host's own first weights; its version is pinned.
from torchtitan.models.llama3 import (
    Llama3Model,
    _build_llama3_layers,
    _output_linear_init,
    model_registry,
)
from torchtitan.trainer import Trainer

from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.trainer.plug_in import with_weighting

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec

    from titan_integration.trainer.trainer import WeightedTrainer


class Row(NamedTuple):
    """A model and its recipe: for Sow et al. a row of Table 6 and its line of Table 7.

    Gradient norm 1.0 and the schedule's form are the same in all.
    """

    layers: int
    heads: int
    width: int
    batch: int
    """Sequences of a step, over all ranks."""
    lr: float
    lr_end: float
    warmup: int
    """Steps in which the learning rate rises linearly; it falls as a cosine after them."""
    steps: int
    at_once: int
    """Most sequences that a rank takes at once; what fits 80 GB is an estimate, not measured."""
    kept: int
    """A checkpoint is kept every so many steps."""
    decay: float = 0.01
    hidden: int | None = None
    """Width of the feed-forward part; 8/3 of the width, rounded up, for None."""


ROWS = {
    "124M": Row(12, 12, 768, 32, 5e-4, 1e-4, 500, 20_000, at_once=32, kept=1_000),
    "210M": Row(24, 16, 768, 48, 5e-4, 1e-4, 500, 20_000, at_once=48, kept=1_000),
    "300M": Row(36, 24, 768, 48, 5e-4, 1e-4, 500, 20_000, at_once=48, kept=2_000),
    "1.4B": Row(24, 16, 2048, 128, 3e-4, 3e-5, 2_000, 100_000, at_once=4, kept=5_000),
    "7B": Row(32, 32, 4096, 128, 3e-4, 3e-5, 2_000, 170_000, at_once=2, kept=5_000),
}

MILE = {
    size: Row(layers, heads, width, batch, 3e-4, 0, warmup, steps, once, 5_000, 0.1, hidden)
    for size, layers, heads, width, hidden, batch, warmup, steps, once in (
        ("468M", 24, 16, 1024, 4096, 1024, 1_000, 100_000, 32),
        ("1.2B", 16, 8, 2048, 8192, 1024, 1_000, 100_000, 16),
        ("6.7B", 32, 32, 4096, 11008, 2048, 2_000, 25_000, 4),
    )
}
"""Models and recipes of MiLe's released configurations; the rate falls to 0."""

SLIMPAJAMA = (
    "RedPajamaArXiv",
    "RedPajamaBook",
    "RedPajamaC4",
    "RedPajamaCommonCrawl",
    "RedPajamaGithub",
    "RedPajamaStackExchange",
    "RedPajamaWikipedia",
)
"""The domains of SlimPajama, in the order of their ids."""


PILE = (
    "ArXiv",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
)
"""The domains of the Pile that are still there; theirs had five more, of books and subtitles."""


def on_slimpajama(size: str) -> WeightedTrainer.Config:
    """Return the recipe of a GPT-2 size: rows of 512 tokens, GPT-2's vocabulary, tied embeddings.

    A row is of one domain, and domains are drawn alike, each read in its own order, unless the spec
    or `--weighting.mixture` gives other proportions.  A stream is read once for each domain; to
    download everything first, and read it shuffled: `--dataloader.no-streaming`.

    Every 1,000 steps, and so at the last, the validation reports the loss of each domain and their
    mean, `domain_mean_loss`, which the paper's tables call (log-)perplexity.
    """
    row = ROWS[size]
    config = _config(row, _llama(row, size, like="1B", vocabulary=50_257), seq_len=512)
    config.hf_assets_path = "./assets/hf/gpt2"
    config.dataloader = DomainTextDataLoader.Config(
        dataset="DKYoon/SlimPajama-6B",
        domain_column="meta.redpajama_set_name",
        domains=[*SLIMPAJAMA],
        streaming=True,
        rows="drawn",
    )
    config.validator = Validator.Config(
        enable=True,
        freq=1_000,
        steps=20_000 // row.batch,
        dataloader=replace(config.dataloader, split="validation", rows="mixed"),
    )
    return with_weighting(config)


def on_fineweb(size: str) -> WeightedTrainer.Config:
    """Return the recipe of a Llama size: rows of 8,192 tokens, Llama 2's vocabulary.

    FineWeb has no domains of its own; another of its columns will do, with all of its values:
    `--dataloader.domain_column dump --dataloader.domains CC-MAIN-2013-20 CC-MAIN-2013-48 ...`.
    It has no validation split either: `--validator.enable` reads C4's.
    """
    row = ROWS[size]
    config = _config(row, _llama(row, size, like="8B", vocabulary=32_000), seq_len=8_192)
    config.hf_assets_path = "./assets/hf/Llama-2-7b"
    stream = DomainTextDataLoader.Config(domain_column="", streaming=True)
    config.dataloader = replace(stream, dataset="HuggingFaceFW/fineweb", hf_name="sample-350BT")
    config.validator = Validator.Config(
        freq=1_000,
        steps=100,
        dataloader=replace(stream, dataset="allenai/c4", hf_name="en", split="validation"),
    )
    return with_weighting(config)


def on_pile(size: str) -> WeightedTrainer.Config:
    """Return a recipe of MiLe: rows of 1,024 tokens, 2,048 at 6.7B, of the Pile.

    Documents have the domains of `meta.pile_set_name`; validation is on the Pile's own split.
    """
    row = MILE[size]
    seq_len = 2_048 if size == "6.7B" else 1_024
    config = _config(row, _llama(row, size, like="8B", vocabulary=32_000), seq_len=seq_len)
    config.hf_assets_path = "./assets/hf/Llama-2-7b"
    config.dataloader = DomainTextDataLoader.Config(
        dataset="monology/pile-uncopyrighted",
        domain_column="meta.pile_set_name",
        domains=[*PILE],
        streaming=True,
    )
    config.validator = Validator.Config(
        enable=True,
        freq=5_000,
        steps=100,
        dataloader=replace(config.dataloader, split="validation"),
    )
    return with_weighting(config)


def shrunk(config: WeightedTrainer.Config) -> WeightedTrainer.Config:
    """Return the same recipe with a small model of the same kind: 2 layers, 4 heads, width 64.

    It is how to try a config on a laptop before renting GPUs.  Vocabulary, data and all else stay,
    and flags make the rest small.  With this in a file `mine.py`,

        from titan_integration.config_registry import paper_7b
        from titan_integration.paper import shrunk

        def small():
            return shrunk(paper_7b())

    it is `weighting train linupper-7b --module mine --config small --training.steps 5`, and
    `--training.seq_len 128 --training.local_batch_size 8 --training.global_batch_size 8`.

    Raises:
        ValueError: The model is not torchtitan's Llama.
    """
    assert config.model_spec is not None
    return replace(config, model_spec=resized(config.model_spec, layers=2, heads=4, width=64))


def resized(
    spec: ModelSpec, *, layers: int, heads: int, width: int, hidden: int | None = None
) -> ModelSpec:
    """Return a Llama of another size; vocabulary, tying, rotary positions and attention stay.

    The feed-forward part is `hidden`, or 8/3 of the width, up to a multiple of 256.  Where several
    heads shared keys, as many do, if there are as many.

    Raises:
        ValueError: The model is not torchtitan's Llama.
    """
    old = spec.model
    if not isinstance(old, Llama3Model.Config):
        msg = f"cannot resize a {type(old).__qualname__}; only torchtitan's Llama3Model"
        raise ValueError(msg)  # noqa: TRY004 - a user's error
    attention = old.layers[0].attention
    shared = attention.n_heads // (attention.n_kv_heads or attention.n_heads)
    blocks = _build_llama3_layers(
        n_layers=layers,
        dim=width,
        n_heads=heads,
        n_kv_heads=None if shared == 1 else max(1, heads // shared),
        hidden_dim=hidden or compute_ffn_hidden_dim(width, multiple_of=256),
        rope=replace(attention.rope, dim=width // heads),
        attn_backend="flex",
    )
    for block in blocks:
        block.attention.inner_attention = attention.inner_attention
    model = replace(
        old,
        dim=width,
        layers=blocks,
        tok_embeddings=replace(old.tok_embeddings, embedding_dim=width),
        norm=replace(old.norm, normalized_shape=width),
        lm_head=replace(old.lm_head, in_features=width, param_init=_output_linear_init(width)),
    )
    return replace(spec, model=model)


class EndOfTextTokenizer(HuggingFaceTokenizer):
    """A tokenizer that ends documents with `<|endoftext|>` where its files, as GPT-2's, name none.

    Raises:
        ValueError: The files are not there.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        """The host's fields."""

    def __init__(self, config: Config | None = None, *, tokenizer_path: str) -> None:
        """Read the files of a folder, and add what they leave out."""
        try:
            super().__init__(config, tokenizer_path=tokenizer_path)
        except FileNotFoundError as error:
            msg = f"{error}; get it by `hf download`, or set --hf_assets_path to where it is"
            raise ValueError(msg) from None
        if self.eos_id is None:
            self.eos_token = "<|endoftext|>"  # noqa: S105 - not that kind of token
            self.eos_id = self.tokenizer.token_to_id(self.eos_token)


def _llama(row: Row, flavor: str, *, like: str, vocabulary: int) -> ModelSpec:
    """Return a row's model; embeddings are tied, or not, as those of the host's model `like`."""
    stock = model_registry(like)
    model = stock.model
    assert isinstance(model, Llama3Model.Config)
    for block in model.layers:
        block.attention.n_kv_heads = None
        # Llama 2's: 10,000, not scaled.  The host cuts the table to the length of the rows.
        block.attention.rope = ComplexRoPE.Config(dim=0, max_seq_len=131_072)
    model = replace(
        model,
        vocab_size=vocabulary,
        tok_embeddings=replace(model.tok_embeddings, num_embeddings=vocabulary),
        lm_head=replace(model.lm_head, out_features=vocabulary),
    )
    spec = replace(stock, flavor=flavor, model=model)
    return resized(spec, layers=row.layers, heads=row.heads, width=row.width, hidden=row.hidden)


def _config(row: Row, spec: ModelSpec, seq_len: int) -> Trainer.Config:
    model = spec.model
    assert isinstance(model, Llama3Model.Config)
    # The host asks for what a rank takes, not what all do.
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)
        ),
        optimizer=default_adamw(lr=row.lr, weight_decay=row.decay),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=row.warmup,
            decay_type="cosine",
            min_lr_factor=row.lr_end / row.lr,
        ),
        training=TrainingConfig(
            global_batch_size=row.batch,
            local_batch_size=min(row.at_once, max(1, row.batch // ranks)),
            seq_len=seq_len,
            max_norm=1.0,
            steps=row.steps,
        ),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=row.kept, keep_latest_k=0, last_save_model_only=False
        ),
        metrics=MetricsProcessor.Config(enable_tensorboard=True),
        tokenizer=EndOfTextTokenizer.Config(),
        # So that all weightings start from the same model.
        debug=DebugConfig(seed=42),
    )

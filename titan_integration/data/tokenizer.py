"""A small byte-level BPE tokenizer for the embedded data set, trained at first use and cached."""

import hashlib
import json
import logging
import os
import platform
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_integration.data.builtin_text import stdlib_text
from weighting.runs.files import write_whole

logger = logging.getLogger(__name__)

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
SPECIAL_TOKENS = [BOS, EOS]

# Characters of each domain that the tokenizer is trained on: enough for a few thousand merges,
# seconds on one core.
SAMPLE_CHARS = 400_000
# Raise this when the way of training changes, so that older caches are not used.
RECIPE = 1


def ensure_tokenizer(vocab_size: int = 2048) -> Path:
    """Return the directory of a tokenizer with exactly this vocabulary, training it if need be.

    Safe when several processes do this at once: all write the same bytes, and a file appears whole
    or not at all.

    Args:
        vocab_size: Number of tokens, at least 258 (256 bytes and the two special tokens, whose ids
            are 0 and 1).

    Returns:
        Directory with ``tokenizer.json`` and ``tokenizer_config.json``, fit for
        ``--hf_assets_path``.

    Raises:
        ValueError: If the vocabulary is too small, or larger than the text allows, or the cache
            cannot be written.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        msg = (
            f"vocab_size {vocab_size} is too small: bytes and special tokens already make "
            f"{smallest}"
        )
        raise ValueError(msg)
    sample = _sample()
    folder = (
        cache_dir()
        / "tokenizers"
        / f"py{platform.python_version()}-{vocab_size}-{_key(sample, vocab_size)}"
    )
    if _is_whole(folder, vocab_size):
        return folder
    logger.info(
        "Training a tokenizer of %d tokens on the standard library's text, into %s.",
        vocab_size,
        folder,
    )
    tokenizer = _train(sample, vocab_size)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    except OSError as error:
        msg = (
            f"cannot write the tokenizer cache {folder} ({error.strerror}); "
            "set WEIGHTING_CACHE to a directory that you can write"
        )
        raise ValueError(msg) from error
    return folder


def cache_dir() -> Path:
    """Return ``$WEIGHTING_CACHE``, or else ``weighting-dsl`` in the user's cache directory."""
    if own := os.environ.get("WEIGHTING_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "weighting-dsl"


def _sample() -> list[str]:
    texts: list[str] = []
    chars: dict[str, int] = {}
    # In order of a hash, so that the part that fits is not all from the first directories.
    for t in sorted(stdlib_text("train"), key=lambda t: hashlib.sha256(t.name.encode()).digest()):
        if chars.get(t.domain, 0) < SAMPLE_CHARS:
            chars[t.domain] = chars.get(t.domain, 0) + len(t.text)
            texts.append(t.text)
    return texts


def _key(sample: list[str], vocab_size: int) -> str:
    recipe = [RECIPE, tokenizers.__version__, vocab_size, SPECIAL_TOKENS, sample]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def _train(sample: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        msg = (
            f"vocab_size {vocab_size} is too large: the embedded text yields "
            f"{tokenizer.get_vocab_size()} tokens"
        )
        raise ValueError(msg)
    return tokenizer


def _is_whole(folder: Path, vocab_size: int) -> bool:
    try:
        json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001 -- tokenizers raises bare Exception for a missing or broken file
        return False
    return tokenizer.get_vocab_size() == vocab_size

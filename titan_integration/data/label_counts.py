"""How often each token is a label of the data: counted once into a file, looked up in training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from xxhash import xxh3_64_hexdigest

from titan_integration.data.contents import encoded
from titan_integration.data.identity import tokenizer_digest
from weighting.runs.files import json_text, read_text, write_whole

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.components.tokenizer import BaseTokenizer

    from titan_integration.data.documents import Documents
    from titan_integration.data.packing import Encode

_KIND = "weighting label counts, 1"
_MOST = 2**53
"""Counts below this are exact in float64, and finite in float32."""
_COUNT_AGAIN = "count again: weighting count --data DATA --out COUNTS"


@dataclass(frozen=True)
class LabelCounts:
    """How often each token of a vocabulary was a label, float32 [V]; and a digest of the counts."""

    counts: Tensor
    digest: str

    def of(self, labels: Tensor) -> Tensor:
        """Return how often each label was counted, of the shape of the labels."""
        return self.counts[labels.clamp(min=0)]


def vocabulary(tokenizer: BaseTokenizer) -> int:
    """Return one more than the largest token id; added tokens may leave numbers out."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return max(tokenizer.get_vocab().values(), default=-1) + 1
    return tokenizer.get_vocab_size()


def count_labels(documents: Documents, encode: Encode, size: int) -> np.ndarray:
    """Return how often each token is predicted in all documents, int64 [size].

    As in training: each token of a document but the first, begin and end of text included, unless
    the document says which are predicted.

    Raises:
        ValueError: A document cannot be encoded; names its place.
    """
    counts = np.zeros(size, np.int64)
    for i, content in enumerate(documents.texts):
        whole = encoded(encode, content, partial(documents.place_of, i))
        labels = np.asarray(whole.ids, np.int64)[1:]
        if whole.predicted is not None:
            labels = labels[whole.predicted]
        np.add.at(counts, labels, 1)  # a document costs its tokens, not the vocabulary
    return counts


def write_counts(path: Path, counts: np.ndarray, tokenizer: BaseTokenizer, **made: object) -> None:
    """Write counts as JSON, with what they are of.

    Raises:
        ValueError: The file cannot be written.
    """
    facts = {"kind": _KIND, "tokenizer": tokenizer_digest(tokenizer), **made}
    try:
        write_whole(path, json_text({**facts, "counts": counts.tolist()}) + "\n")
    except OSError as error:
        msg = f"--out {path}: cannot write it: {error.strerror or error}"
        raise ValueError(msg) from error


def read_counts(path: str, tokenizer: BaseTokenizer) -> LabelCounts:
    """Return what `write_counts` wrote, if it was counted with this tokenizer.

    Raises:
        ValueError: There is no such file, it holds something else, or of another tokenizer.
    """
    name = f"--dataloader.label_counts {path}"
    try:
        held: Any = json.loads(read_text(Path(path), name))
    except (json.JSONDecodeError, RecursionError):
        held = None
    if not isinstance(held, dict) or held.get("kind") != _KIND:
        msg = f"{name}: holds no counts of labels; {_COUNT_AGAIN}"
        raise ValueError(msg)
    counts, size = held.get("counts"), vocabulary(tokenizer)
    if not isinstance(counts, list) or not all(type(x) is int and 0 <= x < _MOST for x in counts):
        msg = f"{name}: its counts are not whole numbers from 0 on; {_COUNT_AGAIN}"
        raise ValueError(msg)
    if len(counts) != size:
        msg = f"{name}: counts {len(counts)} tokens, and the tokenizer has {size}; {_COUNT_AGAIN}"
        raise ValueError(msg)
    if held.get("tokenizer") != tokenizer_digest(tokenizer):
        msg = f"{name}: was counted with another tokenizer; {_COUNT_AGAIN}"
        raise ValueError(msg)
    if not any(counts):
        msg = f"{name}: every count is 0; {_COUNT_AGAIN}"
        raise ValueError(msg)
    numbers = torch.tensor(counts, dtype=torch.float64).float()
    return LabelCounts(numbers, xxh3_64_hexdigest(json.dumps(counts).encode()))

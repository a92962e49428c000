"""Pack text of several domains into one file of tokens, for a machine that has nothing else.

    python benchmarks/pack.py --data FOLDER --tokenizer FOLDER --out tokens.npz

The data's folder holds `train/` and `valid/` with .parquet or .jsonl files of the columns `text`
and `domain`, the tokenizer's holds `tokenizer.json`.  A row has seq_len + 1 tokens of one domain:
its documents in the order of the files, each with an end-of-text token behind it, cut wherever a
row is full.  What is left over at the end of a domain is dropped, and rows are shuffled once.

The file, for numpy's `load`:

    train, valid                [R, seq_len + 1] uint16
    train_domain, valid_domain  [R] uint16, places in the list of domains
    train_bytes, valid_bytes    [R] int64, of the text behind all tokens of a row but the first,
                                which nothing predicts; for bits per byte
    counts                      [V] int64, how often each token is in `train`
    about                       JSON: domains, vocabulary, seq_len, end, and where it comes from
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from titan_integration.data.data_files import local_files
from titan_integration.data.formats import read_records
from titan_integration.data.records import Columns, domain_of, text_of
from weighting.runs.files import write_whole

SEQ_LEN = 512
LARGEST = 2**16
"""Tokens that two bytes can tell apart."""
SEED = 0
"""Of the shuffle."""
SPLITS = {"train": "train", "valid": "validation"}
"""By name here; the loaders' name for the second, whose folder may be called either."""
END = "<|endoftext|>"
"""What ends a document where a tokenizer's files name nothing, as GPT-2's."""


def main(arguments: list[str] | None = None) -> int:
    """Pack, and say how much it was; status 2 for what a user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seq_len", type=int, default=SEQ_LEN)
    args = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        found = pack(args.data, args.tokenizer, args.seq_len)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    packed = io.BytesIO()
    np.savez_compressed(packed, **found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, packed.getvalue())
    about = json.loads(str(found["about"]))
    for split in SPLITS:
        rows = np.bincount(found[f"{split}_domain"], minlength=len(about["domains"]))
        each = ", ".join(f"{x} {n}" for x, n in zip(about["domains"], rows, strict=True))
        print(f"{split}: {rows.sum():,} rows, {found[split].size:,} tokens ({each})")
    size, seconds = args.out.stat().st_size / 1e6, time.monotonic() - began
    print(f"{args.out}: {size:.1f} MB, {seconds:.0f} s")
    return 0


def pack(data: Path, tokenizer: Path, seq_len: int = SEQ_LEN) -> dict[str, np.ndarray]:
    """Return the arrays of the file.

    Raises:
        ValueError: The data or the tokenizer cannot be read, the vocabulary does not go into two
            bytes, or a domain has no row.
    """
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        msg = f"{path}: no such file; give the folder that holds a tokenizer.json"
        raise ValueError(msg)
    cutter = Tokenizer.from_file(str(path))
    vocabulary = cutter.get_vocab_size()
    if vocabulary > LARGEST:
        msg = (
            f"{path} has {vocabulary:,} tokens, and two bytes tell {LARGEST:,} apart; take a "
            "tokenizer with fewer"
        )
        raise ValueError(msg)
    cutter.encode_special_tokens = True  # a text that spells one means its letters
    cutter.no_padding()
    cutter.no_truncation()
    end = end_of(cutter, tokenizer)
    files = {split: local_files(data, name) for split, name in SPLITS.items()}
    if files["train"] == files["valid"]:
        msg = f"{data}: put what to train on into train/, and what to evaluate on into valid/"
        raise ValueError(msg)
    texts = {split: texts_by_domain(files[split]) for split in SPLITS}
    domains = sorted(texts["train"])
    if unknown := sorted(texts["valid"].keys() - texts["train"].keys()):
        msg = f"{data}: valid has a domain that train has not: {unknown[0]!r}; add it, or drop it"
        raise ValueError(msg)
    arrays: dict[str, np.ndarray] = {}
    for split, by_domain in texts.items():
        parts = []
        for domain in domains:
            rows, sizes = cut(cutter, by_domain.get(domain, []), end, seq_len + 1)
            if not len(rows):
                msg = (
                    f"{data}: domain {domain!r} has no whole row of {seq_len + 1} tokens in "
                    f"{split}; give it more text, leave it out, or set a smaller --seq_len"
                )
                raise ValueError(msg)
            parts.append((rows, sizes, np.full(len(rows), domains.index(domain), np.uint16)))
        rows, sizes, ids = (np.concatenate(x) for x in zip(*parts, strict=True))
        order = np.random.default_rng(SEED).permutation(len(rows))
        arrays[split] = rows[order]
        arrays[f"{split}_domain"] = ids[order]
        arrays[f"{split}_bytes"] = sizes[order, 1:].sum(1)
    arrays["counts"] = np.bincount(arrays["train"].ravel(), minlength=vocabulary)
    about = {
        "domains": domains,
        "vocabulary": vocabulary,
        "seq_len": seq_len,
        "end": end,
        "documents": {x: sum(map(len, texts[x].values())) for x in texts},
        "tokenizer": hashlib.sha256(path.read_bytes()).hexdigest(),
        "corpus": fingerprint(data, [*files["train"], *files["valid"]]),
    }
    return {**arrays, "about": np.array(json.dumps(about))}


def end_of(cutter: Tokenizer, folder: Path) -> int:
    """Return the id of the token that ends a document.

    Raises:
        ValueError: There is no such token.
    """
    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    name = named.get("eos_token") or END
    name = name["content"] if isinstance(name, dict) else name
    end = cutter.token_to_id(name)
    if end is None:
        msg = f"{folder}: the vocabulary has no {name!r}; name one as eos_token in {config.name}"
        raise ValueError(msg)
    return end


def texts_by_domain(files: list[Path]) -> dict[str, list[str]]:
    """Return the texts of each domain, in the order of the files.

    Raises:
        ValueError: A record lacks its text or domain; names the place.
    """
    columns = Columns()
    found: dict[str, list[str]] = {}
    for file in files:
        for place, record in read_records(file, columns):
            domain = domain_of(record, columns, place)
            if domain is None:
                msg = f"{place}: no column 'domain'; give every record one"
                raise ValueError(msg)
            found.setdefault(domain, []).append(text_of(record, columns, place))
    return found


def cut(
    cutter: Tokenizer, texts: list[str], end: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as whole rows of tokens, [R, length] uint16, and the bytes of each token."""
    ids, sizes = [np.empty(0, np.uint16)], [np.empty(0, np.int64)]
    for first in range(0, len(texts), 256):
        some = texts[first : first + 256]
        encoded = cutter.encode_batch(some, add_special_tokens=False)
        for text, found in zip(some, encoded, strict=True):
            ids.append(np.array([*found.ids, end], np.uint16))
            sizes.append(np.append(bytes_of(text, found.offsets), 0))
    rows = sum(map(len, ids)) // length
    whole = rows * length
    return (
        np.concatenate(ids)[:whole].reshape(rows, length),
        np.concatenate(sizes)[:whole].reshape(rows, length),
    )


def bytes_of(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return for each token how many bytes of UTF-8 it ends behind the tokens before it.

    Several tokens may share a character; the first has its bytes.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    upto = np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))  # noqa: PLR2004
    ends = np.array([stop for _, stop in offsets], np.int64)
    upto = np.concatenate([[0], upto])[ends]
    return np.diff(np.maximum.accumulate(upto), prepend=0)


def fingerprint(data: Path, files: list[Path]) -> str:
    """Return a hash of the names and contents of all files that are read."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.relative_to(data).as_posix().encode() + b"\0")
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

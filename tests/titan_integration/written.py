"""One small set of records in every format that data may have, and the rows that they give."""

import csv
import functools
import gzip
import io
import json
import tempfile
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from titan_integration.data.loader import DomainTextDataLoader

DOMAINS = ["a", "b"]
RECORDS = [
    {"text": f"document {i}, é 'quoted', \"twice\"\nand on " * (1 + i % 7), "domain": "ab"[i % 2]}
    for i in range(40)
]


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    eos_id = 257

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids."""
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


def build(path, tokenizer=None, **config):
    """Build a loader of short rows."""
    config = {"dataset_path": str(path), "domains": DOMAINS} | config
    return DomainTextDataLoader.Config(**config).build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=tokenizer or Letters(),
        seq_len=32,
        local_batch_size=2,
    )


def taken(batches, count):
    """Return inputs, positions, domains and labels of some batches as one tensor."""
    return torch.stack(
        [
            torch.stack([x["input"], x["positions"], x["domain_ids"], y])
            for x, y in islice(batches, count)
        ]
    )


def lines(records):
    """Return records as JSON, one a line."""
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def as_csv(records):
    """Return records as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "domain"])
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


def packed_bytes(content):
    """Compress bytes as one frame."""
    sink = pa.BufferOutputStream()
    file = pa.CompressedOutputStream(sink, "zstd")
    file.write(content)
    file.close()
    return sink.getvalue().to_pybytes()


def parquet(records):
    """Return records as Parquet of small row groups."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def arrow(records, new=pa.ipc.new_file):
    """Return records as an Arrow file, or as a stream."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(records)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "x.jsonl": lines,
    "x.NDJSON": lines,
    "lines.json": lines,
    "array.json": lambda r: json.dumps(r, indent=1).encode(),
    "x.jsonl.gz": lambda r: gzip.compress(lines(r), mtime=0),
    "x.jsonl.zst": lambda r: packed_bytes(lines(r)),
    "x.csv": as_csv,
    "x.csv.gz": lambda r: gzip.compress(as_csv(r), mtime=0),
    "x.parquet": parquet,
    "x.arrow": arrow,
    "stream.arrow": functools.partial(arrow, new=pa.ipc.new_stream),
}


def unquoted(content):
    """Return JSON of which the first name has no end."""
    return content.replace(b'"text"', b'"text', 1)


def with_a_row_too_long(content):
    """Return CSV with one more row, of three fields."""
    return content + b"one,two,three\n"


BROKEN = {
    "x.jsonl": (unquoted, r"x\.jsonl:1: invalid JSON"),
    "x.NDJSON": (unquoted, r"x\.NDJSON:1: invalid JSON"),
    "lines.json": (unquoted, r"lines\.json:1: invalid JSON"),
    "array.json": (unquoted, r"array\.json:3: invalid JSON"),
    "x.jsonl.gz": (lambda b: b[:-20], r"x\.jsonl\.gz: cannot be read"),
    "x.jsonl.zst": (lambda b: b"no" + b[2:], r"x\.jsonl\.zst: cannot be read"),
    "x.csv": (with_a_row_too_long, r"x\.csv:\d+: 3 fields, but .* 2"),
    "x.csv.gz": (
        lambda b: gzip.compress(with_a_row_too_long(gzip.decompress(b)), mtime=0),
        r"x\.csv\.gz:\d+: 3 fields, but .* 2",
    ),
    "x.parquet": (lambda b: b[:-20], r"x\.parquet: not a readable Parquet file"),
    "x.arrow": (lambda b: b[:60], r"x\.arrow: not a readable Arrow file"),
    "stream.arrow": (lambda b: b[: len(b) // 2], r"stream\.arrow: not a readable Arrow file"),
}
"""How a file of each format is broken, and what is said of it."""


def write(folder, name, records):
    """Write records in the format that a name tells."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(FORMATS[name](records))
    return folder / name


@functools.cache
def expected_rows():
    """Return the rows of the records as plain lines, by index and as a stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "x.jsonl", RECORDS)
        return {
            streaming: taken(build(path, streaming=streaming), 40) for streaming in (False, True)
        }


def check(path):
    """Check that data has the rows that are expected, also from a state in their middle."""
    expected = expected_rows()
    for streaming in (False, True):
        assert torch.equal(taken(build(path, streaming=streaming), 40), expected[streaming])
        stopped = build(path, streaming=streaming)
        assert torch.equal(taken(stopped, 11), expected[streaming][:11])
        resumed = build(path, streaming=streaming)
        resumed.load_state_dict(stopped.state_dict())
        assert torch.equal(taken(resumed, 29), expected[streaming][11:])

"""Rows of local files stay, token by token, those of version 0.1.0."""

import hashlib
import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from titan_integration.data.loader import DomainTextDataLoader


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids."""
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a file of JSON lines and one of Parquet, of three domains of uneven size."""
    path = tmp_path_factory.mktemp("golden")
    records = [
        {
            "text": f"document {i} " + "é, words and more " * (i * 7 % 23),
            "domain": "abbcccc"[i % 7],
            "score": i / 8,
        }
        for i in range(120)
    ]
    records[5]["text"] = ""
    (path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:80]))
    pq.write_table(pa.Table.from_pylist(records[80:]), path / "b.parquet")
    return path


def digest(loaders, steps=40):
    """Hash the batches of all ranks, of some steps, with every tensor in them."""
    found = hashlib.sha256()
    for loader in loaders:
        for inputs, labels in islice(loader, steps):
            for tensor in (*inputs.values(), labels):
                assert tensor.dtype in {torch.int64, torch.float32}
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


GOLDEN = {
    ("mixed", False, 1, 4): "aff33cc24522d10e",
    ("mixed", False, 2, 6): "be482f9822a3f062",
    ("mixed", False, 5, 1): "8793799d8dde2c08",
    ("mixed", True, 1, 4): "d9d32a3efae656fc",
    ("mixed", True, 2, 6): "855cd809db200429",
    ("mixed", True, 5, 1): "edd98cc86af1794a",
    ("drawn", False, 1, 4): "a1dedbd4488a5b0e",
    ("drawn", False, 2, 6): "ff1803e4a264d1d0",
    ("drawn", False, 5, 1): "04a541d257cdd4a2",
    ("drawn", True, 1, 4): "b977624b15e075c6",
    ("drawn", True, 2, 6): "d23eee1e07ae9a61",
    ("drawn", True, 5, 1): "e6fa4c3cf091120b",
    ("turns", False, 1, 4): "0e60d9e7a73a2bdf",
    ("turns", False, 2, 6): "b0abe2513b9f232e",
    ("turns", False, 5, 1): "19fee9641e5f8809",
    ("turns", True, 1, 4): "5edc49472b6b33dc",
    ("turns", True, 2, 6): "7fc94e657d1fd568",
    ("turns", True, 5, 1): "c94ba61523cd81ef",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_rows_are_those_of_0_1_0(folder, case):
    """Every mode of rows, by index and as a stream, on one rank and on several."""
    rows, streaming, ranks, local_batch = case
    loaders = [
        DomainTextDataLoader.Config(
            dataset_path=str(folder),
            rows=rows,
            streaming=streaming,
            domains=["a", "b", "c"],
            columns=["score"],
            seed=3,
        ).build(
            dp_world_size=ranks,
            dp_rank=rank,
            tokenizer=Letters(),
            seq_len=64,
            local_batch_size=local_batch,
        )
        for rank in range(ranks)
    ]
    assert digest(loaders) == GOLDEN[case]

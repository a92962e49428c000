"""A stream that rows of many domains are drawn from is read once."""

import json

import pytest
import torch

from titan_integration.data import one_reading
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.stream_sources import LocalStream


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids."""
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


COUNT = 300
DOMAINS = [f"d{i:03d}" for i in range(COUNT)]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build a loader of a stream of 300 domains, and count what it reads."""
    records = [{"text": f"{i} text " * 3, "domain": DOMAINS[i % COUNT]} for i in range(1200)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    read = []
    source = LocalStream.read

    def counted(self, epoch, position):
        for item in source(self, epoch, position):
            read.append(epoch)
            yield item

    monkeypatch.setattr(LocalStream, "read", counted)

    def build(rows="turns"):
        config = DomainTextDataLoader.Config(
            dataset_path=str(path), streaming=True, domains=DOMAINS, rows=rows
        )
        return config.build(
            dp_world_size=1, dp_rank=0, tokenizer=Letters(), seq_len=16, local_batch_size=1
        )

    return build, read


def taken(batches, count):
    """Return inputs and labels of some batches."""
    pairs = [next(batches) for _ in range(count)]
    return torch.stack([torch.stack([x["input"], y]) for x, y in pairs])


def test_each_record_is_read_once_for_300_domains(build):
    """In turns, of two rows of each; a resumed run reads no more than what is left."""
    make, read = build
    loader = make()
    batches = iter(loader)
    taken(batches, 2 * COUNT)
    assert len(read) <= 1201
    state = loader.state_dict()
    expected = taken(batches, 2 * COUNT)
    resumed = make()
    resumed.load_state_dict(state)
    read.clear()
    assert torch.equal(taken(iter(resumed), 2 * COUNT), expected)
    assert len(read) <= 1201


@pytest.mark.parametrize("most", [0, 200])
def test_a_domain_whose_records_pile_up_reads_for_itself(build, monkeypatch, most):
    """The rows are the same however little may wait."""
    make, _ = build
    expected = taken(iter(make("drawn")), 900)
    monkeypatch.setattr(one_reading, "_MOST_WAITING", most)
    assert torch.equal(taken(iter(make("drawn")), 900), expected)

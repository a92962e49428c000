"""Local files that rows of many domains are drawn from are read once, however often each ends."""

import gzip
import json

import datasets
import pytest
import torch

from titan_integration.data import one_reading, spots
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.stream_sources import HubStream, LocalStream


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids."""
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


RECORDS = 600
ROWS = 6


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build a loader of a stream, of 300 domains unless told; and note the epochs of what it reads.

    A record that is read again is noted as such.
    """
    read = []
    source, file = LocalStream.read, LocalStream.read_file

    def counted(self, epoch, position):
        for item in source(self, epoch, position):
            read.append(epoch)
            yield item

    def counted_file(self, number, start, *, again=False):
        for item in file(self, number, start, again=again):
            read.append("again" if again else number)
            yield item

    monkeypatch.setattr(LocalStream, "read", counted)
    monkeypatch.setattr(LocalStream, "read_file", counted_file)

    def build(rows="turns", domains=300, name="x.jsonl", **config):
        records = [
            {"text": f"{i} text " * 3, "domain": f"d{i % domains:03d}"} for i in range(RECORDS)
        ]
        text = "".join(json.dumps(r) + "\n" for r in records).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        names = [f"d{i:03d}" for i in range(domains)]
        config = {"dataset_path": str(path), "domains": names, "rows": rows} | config
        return DomainTextDataLoader.Config(streaming=True, **config).build(
            dp_world_size=1, dp_rank=0, tokenizer=Letters(), seq_len=32, local_batch_size=ROWS
        )

    return build, read


def taken(batches, count):
    """Return inputs and labels of some batches."""
    pairs = [next(batches) for _ in range(count)]
    return torch.stack([torch.stack([x["input"], y]) for x, y in pairs])


@pytest.fixture
def short_and_long(build, tmp_path):
    """Build a loader of a file with two long domains and two short ones; and note what it reads."""
    _, read = build

    def make(name):
        names = ["long0", "long1", "short0", "short1"]
        records = [
            {"text": f"{i} text " * 3, "domain": names[i % 2 + 2 * (i % 100 > 97)]}
            for i in range(RECORDS)
        ]
        text = "".join(json.dumps(r) + "\n" for r in records).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        config = DomainTextDataLoader.Config(
            dataset_path=str(path), domains=names, rows="turns", streaming=True
        )
        return config.build(
            dp_world_size=1, dp_rank=0, tokenizer=Letters(), seq_len=32, local_batch_size=ROWS
        )

    return make, read


@pytest.mark.parametrize("domains", [3, 300])
@pytest.mark.parametrize("rows", ["turns", "drawn"])
def test_each_record_is_read_once_however_many_domains_and_epochs(build, rows, domains):
    """Of 1,800 rows, whose domains come to their ends apart; and a state has what was begun."""
    make, read = build
    loader = make(rows, domains)
    batches = iter(loader)
    taken(batches, 5)
    begun = json.loads(loader.state_dict()["dp_rank_0"])
    assert len(begun) <= 5 * ROWS
    taken(batches, 300)
    assert len(read) <= RECORDS + 1
    assert max(epoch for _, epoch, *_ in json.loads(loader.state_dict()["dp_rank_0"])) > 0


def test_a_resumed_run_reads_no_more_than_once(build):
    """From the first place that a domain needs."""
    make, read = build
    loader = make()
    batches = iter(loader)
    taken(batches, 90)
    state = loader.state_dict()
    expected = taken(batches, 90)
    resumed = make()
    resumed.load_state_dict(state)
    read.clear()
    assert torch.equal(taken(iter(resumed), 90), expected)
    assert len(read) <= RECORDS + 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("most", [0, 1000])
def test_rows_are_the_same_however_little_may_wait(build, monkeypatch, name, most):
    """Plain lines are read again at their places; of a packed file a domain reads for itself."""
    make, read = build
    expected = taken(iter(make("drawn", 30)), 90)
    read.clear()
    monkeypatch.setattr(spots, "_MOST_TEXT", most)
    monkeypatch.setattr(one_reading, "_MOST_WAITING", most)
    assert torch.equal(taken(iter(make("drawn", 30, name)), 90), expected)
    assert ("again" in read) == (name == "x.jsonl")


def test_rows_go_on_where_more_places_are_known_than_are_kept(build, monkeypatch):
    """In the middle of a run: from there on the files are read once an epoch."""
    make, _ = build
    expected = taken(iter(make("drawn", 30)), 90)
    monkeypatch.setattr(spots, "_MOST_SPOTS", 250)
    assert torch.equal(taken(iter(make("drawn", 30)), 90), expected)


def test_short_domains_of_a_packed_file_cost_no_pass_though_long_ones_do_not_fit(
    short_and_long, monkeypatch
):
    """They stay in memory, while two long ones share a reading an epoch."""
    make, read = short_and_long
    expected = taken(iter(make("x.jsonl")), 150)
    monkeypatch.setattr(spots, "_MOST_TEXT", 8_000)
    read.clear()
    loader = make("x.jsonl.gz")
    batches = iter(loader)
    assert torch.equal(taken(batches, 150), expected)
    at = {i: epoch for i, epoch, *_ in json.loads(loader.state_dict()["dp_rank_0"])}
    assert min(at[2], at[3]) > 30, "short ones have come to many ends"
    assert max(at[0], at[1]) < 3
    assert len(read) <= (1 + 3) * RECORDS
    resumed = make("x.jsonl.gz")
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(taken(iter(resumed), 30), taken(batches, 30))


@pytest.mark.parametrize("most", [1 << 26, 8_000])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_of_one_file_of_hugging_face_is_read_once_too(tmp_path, monkeypatch, ranks, most):
    """Its order is the same in every epoch, also of the part that a rank takes.

    With rows and states as before, when it was read once an epoch.
    """
    datasets.disable_progress_bars()
    names = ["long0", "long1", "short0", "short1"]
    records = [
        {"text": f"{i} text " * 3, "domain": names[i // 2 % 2 + 2 * (i % 100 > 95)]}
        for i in range(RECORDS)
    ]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    read = []
    source = HubStream.read

    def counted(self, epoch, position):
        for item in source(self, epoch, position):
            read.append(epoch)
            yield item

    def build():
        return DomainTextDataLoader.Config(
            dataset_path=str(tmp_path / "saved"), domains=names, rows="drawn", streaming=True
        ).build(
            dp_world_size=ranks,
            dp_rank=ranks - 1,
            tokenizer=Letters(),
            seq_len=32,
            local_batch_size=ROWS,
        )

    monkeypatch.setattr(HubStream, "read", counted)
    monkeypatch.setattr(spots, "_MOST_TEXT", most)
    with monkeypatch.context() as patch:
        patch.setattr(HubStream, "files", lambda *_: None)
        before = build()
        batches = iter(before)
        expected = taken(batches, 60)
        state, later = before.state_dict(), taken(batches, 20)
    assert len(read) > 10 * RECORDS / ranks
    read.clear()
    loader = build()
    assert torch.equal(taken(iter(loader), 60), expected)
    assert loader.state_dict() == state
    assert len(read) <= (1 + 3 * (most < 10_000)) * RECORDS / ranks + 1
    resumed = build()
    resumed.load_state_dict(state)
    assert torch.equal(taken(iter(resumed), 20), later)


def test_a_record_that_has_gone_when_it_is_read_again_is_said(build, monkeypatch, tmp_path):
    """A file that was written anew under a run trains nothing of another domain."""
    monkeypatch.setattr(spots, "_MOST_TEXT", 0)
    make, _ = build
    batches = iter(make())
    taken(batches, 40)
    lines = (tmp_path / "x.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(ValueError, match=r"x.jsonl:\d+: .*the file has changed"):
        taken(batches, 300)


def test_bad_records_are_counted_once_though_others_are_read_again(build, monkeypatch, tmp_path):
    """Those between two places of a domain."""
    monkeypatch.setattr(spots, "_MOST_TEXT", 0)
    make, read = build
    loader = make(on_bad_record="skip")
    lines = (tmp_path / "x.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_text("".join(["{\n", *lines[:5], "{\n", "\n", *lines[5:]]))
    taken(iter(loader), 150)
    assert "again" in read
    assert loader.bad_records == 2

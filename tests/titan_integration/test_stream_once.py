"""Local files that rows of many domains are drawn from are read once, however often each ends."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import datasets
import huggingface_hub
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
        path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
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
        path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Build a loader of a data set of Hugging Face in so many files; and note what it reads."""
    names, read = ["long0", "long1", "short0", "short1"], []
    found = HubStream._records

    def counted(*given):
        for item in found(*given):
            read.append(given)
            yield item

    monkeypatch.setattr(HubStream, "_records", counted)

    def build(files, rank, ranks):
        size = RECORDS // files
        paths = [tmp_path / f"{i}-of-{files}.jsonl" for i in range(files)]
        for i, path in enumerate(paths):
            records = [
                {"text": f"{j} text " * 3, "domain": names[j // 2 % 2 + 2 * (j % 100 > 95)]}
                for j in range(i * size, (i + 1) * size)
            ]
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
        given = {"data_files": [*map(str, paths)], "split": "train", "streaming": True}
        stream = datasets.load_dataset("json", **given)
        monkeypatch.setattr("titan_integration.data.loader.open_hub", lambda *_, **__: stream)
        config = DomainTextDataLoader.Config(
            dataset="some/data", domains=names, rows="drawn", streaming=True
        )
        common = {"tokenizer": Letters(), "seq_len": 32, "local_batch_size": ROWS}
        return config.build(dp_world_size=ranks, dp_rank=rank, **common)

    return build, read


@pytest.mark.slow
@pytest.mark.parametrize("most", [1 << 26, 8_000], ids=["all in memory", "the short in memory"])
@pytest.mark.parametrize(("files", "rank", "ranks"), [(1, 1, 2), (4, 0, 1), (4, 1, 2)])
def test_data_of_hugging_face_is_read_once_with_the_rows_of_before(
    hub, monkeypatch, files, rank, ranks, most
):
    """When it was read once an epoch, in whose order files still come; old states go on as then."""
    build, read = hub
    monkeypatch.setattr(spots, "_MOST_TEXT", most)
    with monkeypatch.context() as patch:
        patch.setattr(HubStream, "files", lambda *_: None)
        batches = iter(before := build(files, rank, ranks))
        expected = taken(batches, 40)
        old, later = before.state_dict(), taken(batches, 10)
    assert len(read) > 6 * RECORDS
    read.clear()
    loader = build(files, rank, ranks)
    assert torch.equal(taken(iter(loader), 40), expected)
    assert len(read) <= (1 + 2 * (most < 10_000)) * RECORDS + 10  # and to check the first
    for state in (old, loader.state_dict()):
        resumed = build(files, rank, ranks)
        resumed.load_state_dict(state)
        assert torch.equal(taken(iter(resumed), 10), later)


def test_data_of_hugging_face_is_read_though_another_thread_has_opened_some(hub):
    """Its file systems are kept for each thread, and one is made anew where a copy is."""
    build, _ = hub
    loader = build(4, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(huggingface_hub.HfFileSystem, endpoint="https://hub.test").result()
    assert len(taken(iter(loader), 1)) == 1


def test_a_saved_place_in_data_of_hugging_face_that_cannot_be_is_refused(hub):
    """Files were added since, or the checkpoint is damaged."""
    build, _ = hub
    loader = build(4, 0, 1)
    taken(iter(loader), 5)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"some/data is at .*, and has 3 files; it has changed"):
        build(3, 0, 1).load_state_dict(state)
    places = json.loads(state["dp_rank_0"])
    places[0][2]["record"] = -1
    with pytest.raises(ValueError, match=r"some/data is at .*the checkpoint is damaged"):
        build(4, 0, 1).load_state_dict(state | {"dp_rank_0": json.dumps(places)})


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

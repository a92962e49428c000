"""Data at addresses: in a store of S3, on a server of HTTP or of Hugging Face, and in memory."""

import contextlib
import importlib
import os
import socket

import datasets
import fsspec
import pytest
import stores
import torch
from written import FORMATS, RECORDS, build, check, expected_rows, lines, taken, write

from titan_integration.data import spots, urls
from titan_integration.data.loader import DomainTextDataLoader, load_documents


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(urls, "_WAITS", (0.0, 0.0))


@pytest.fixture
def expected():
    """Take rows of the records as plain lines, by index and as a stream."""
    return expected_rows()


# --- S3 ---


@pytest.fixture(scope="module")
def s3():
    """Return the files of a store of S3, whose bucket has every format."""
    with stores.s3() as files:
        for name, written in FORMATS.items():
            files.pipe(f"bucket/all/train/{name}", written(RECORDS))
        files.pipe("bucket/all/validation/y.jsonl", lines(RECORDS[:3]))
        yield files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv.gz", "x.parquet", "x.arrow"])
def test_a_store_of_s3_is_read_as_files_are(s3, expected, name):
    """One file, a folder of a split, or a pattern, by index and as a stream, and resumed."""
    del s3
    check(f"s3://bucket/all/train/{name}")
    assert torch.equal(taken(build(f"s3://bucket/all/*/{name}"), 3), expected[False][:3])


def test_what_is_wrong_in_a_store_of_s3_is_said_with_its_address(s3):
    """No bucket, no file, no split, a broken file and a bad record: one message each."""
    for name, content in {
        "bad.jsonl": lines(RECORDS[:2]) + b"{oops\n",
        "half.parquet": FORMATS["x.parquet"](RECORDS)[:-9],
    }.items():
        s3.pipe(f"bucket/broken/{name}", content)
    for address, message in [
        ("s3://nowhere/x.jsonl", r"^s3://nowhere/x\.jsonl: no such file$"),
        ("s3://bucket/none.jsonl", r"^s3://bucket/none\.jsonl: no such file$"),
        ("s3://bucket/none/", r"^s3://bucket/none/: no \.jsonl.* file there$"),
        ("s3://bucket/broken/bad.jsonl", r"^s3://bucket/broken/bad\.jsonl:3: invalid JSON"),
        ("s3://bucket/broken/half.parquet", r"^s3://.*/half\.parquet: not a readable Parquet file"),
    ]:
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message) as error:
                taken(build(address, streaming=streaming), 40)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no folder for split 'test'; there are train, valid"):
        build("s3://bucket/all", split="test")


@pytest.mark.parametrize(
    ("address", "package"),
    [
        ("gs://bucket/x.jsonl", "gcsfs"),
        ("s3://bucket/x.jsonl", "s3fs"),
        ("hf://datasets/me/data/x.jsonl", "huggingface_hub"),
        ("https://localhost:1/x.jsonl", "aiohttp"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_a_store_whose_package_is_missing_names_it(monkeypatch, address, package, streaming):
    """As soon as the data is opened, without another try."""
    of_fsspec = importlib.import_module("fsspec.registry")
    scheme = address.partition(":")[0]
    known = of_fsspec.known_implementations[scheme] | {"class": "not_installed.FileSystem"}
    monkeypatch.setitem(of_fsspec.known_implementations, scheme, known)
    monkeypatch.delitem(of_fsspec._registry, scheme, raising=False)
    with pytest.raises(ValueError, match=rf"^{address}: cannot be reached: .*{package}"):
        build(address, streaming=streaming)


def test_a_store_that_nothing_knows_is_named():
    """By the beginning of the address."""
    with pytest.raises(ValueError, match=r"^s4://bucket/x\.jsonl: .*not known: s4"):
        build("s4://bucket/x.jsonl")


# --- memory ---


@pytest.fixture
def memory():
    """Return a file system in memory, empty."""
    files = fsspec.filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        files.rm("/", recursive=True)
    return files


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.zst", "x.parquet", "array.json"])
def test_addresses_are_read_as_files_are(memory, expected, name):
    """One file, a folder of a split, or a pattern, by index and as a stream."""
    memory.pipe(f"/data/train/{name}", FORMATS[name](RECORDS))
    memory.pipe("/data/validation/y.jsonl", lines(RECORDS[:3]))
    memory.pipe("/data/train/notes.txt", b"")
    check(f"memory://data/train/{name}")
    assert torch.equal(taken(build("memory://data"), 3), expected[False][:3])
    assert torch.equal(taken(build(f"memory://data/t*/{name[:3]}*"), 3), expected[False][:3])
    with pytest.raises(ValueError, match=r"no folder for split 'test'; there are train, valid"):
        build("memory://data", split="test")
    with pytest.raises(ValueError, match=r"memory://nothing.*: no .* file there"):
        build("memory://nothing/")
    with pytest.raises(ValueError, match=r"memory://nothing/x\.jsonl: no such file"):
        build("memory://nothing/x.jsonl")


def test_an_address_of_this_machine_is_read_as_its_file_is(tmp_path):
    """With `file://` before it."""
    check(f"file://{write(tmp_path, 'x.parquet', RECORDS)}")


def test_a_stream_at_an_address_is_not_asked_for_each_record(memory, monkeypatch):
    """Where text does not fit: of a store, once for each reading of a file."""
    memory.pipe("/x.jsonl", lines(RECORDS))
    config = {"streaming": True, "rows": "drawn"}
    expected = taken(build("memory://x.jsonl", **config), 30)
    monkeypatch.setattr(spots, "_MOST_TEXT", 3000)
    asked = []
    told = urls.Url.told
    monkeypatch.setattr(urls.Url, "told", lambda self: asked.append(self) or told(self))
    assert torch.equal(taken(build("memory://x.jsonl", **config), 30), expected)
    assert len(asked) < 10


def test_a_bad_record_at_an_address_is_named_by_it(memory):
    """Not by where the cache has it."""
    memory.pipe("/x.jsonl", b'{"text": "fine"}\n{oops\n')
    with pytest.raises(ValueError, match=r"^memory:///?x\.jsonl:2: invalid JSON"):
        build("memory://x.jsonl", domains=None)


def test_a_file_that_has_not_changed_is_fetched_once(memory, monkeypatch):
    """For all loaders, also of later runs."""
    memory.pipe("/x.jsonl", lines(RECORDS))
    check("memory://x.jsonl")
    monkeypatch.setattr(urls.Url, "_fetch", lambda *_: pytest.fail("fetched again"))
    check("memory://x.jsonl")


def test_a_changed_file_at_an_address_is_fetched_again(memory):
    """The cache is asked by size and time, too."""
    for text in ("one", "three"):
        memory.pipe("/x.jsonl", lines([{"text": text}]))
        config = DomainTextDataLoader.Config(dataset="memory://x.jsonl")
        assert load_documents(config)[0] == (text, "all")


@pytest.mark.parametrize("place", ["memory", "http"])
def test_a_stream_of_other_bytes_in_the_same_size_is_not_resumed(memory, server, place):
    """Where a store has no mark of content, samples of the bytes tell; a copy goes on."""
    folder, address, _ = server
    where = "memory://x.jsonl" if place == "memory" else f"{address}/x.jsonl"

    def put(records):
        memory.pipe("/x.jsonl", lines(records))
        (folder / "x.jsonl").write_bytes(lines(records))

    put(RECORDS)
    loader = build(where, streaming=True)
    taken(loader, 3)
    state = loader.state_dict()
    put(RECORDS)
    build(where, streaming=True).load_state_dict(state)
    put(RECORDS[::-1])
    with pytest.raises(ValueError, match=r"files have another name, size or content: x\.jsonl"):
        build(where, streaming=True).load_state_dict(state)


@pytest.mark.parametrize("name", ["a#b.jsonl", "what?.jsonl", "b[1].jsonl", "with space.jsonl"])
def test_a_name_may_have_marks_that_mean_something_elsewhere(memory, expected, name):
    """In an address of HTTP, or in a pattern; a file of that very name is read, and in its folder.

    It was refused, and left out of its folder in silence.
    """
    memory.pipe(f"/data/{name}", lines(RECORDS))
    assert torch.equal(taken(build(f"memory://data/{name}"), 3), expected[False][:3])
    assert torch.equal(taken(build("memory://data"), 3), expected[False][:3])


@pytest.mark.parametrize("address", ["memory://data", "memory://data/**"])
def test_hidden_files_and_folders_at_an_address_are_left_out(memory, expected, address):
    """As they are on a disk: copies that a notebook has made are not trained on."""
    memory.pipe("/data/train/x.jsonl", lines(RECORDS))
    for name in ("train/.y.jsonl", "train/.checkpoints/x.jsonl", ".old/z.jsonl"):
        memory.pipe(f"/data/{name}", lines(RECORDS))
    loader = build(address)
    assert len(loader.documents) == len(RECORDS)
    assert torch.equal(taken(loader, 3), expected[False][:3])


def test_what_save_to_disk_wrote_is_read_at_an_address(tmp_path):
    """Its Arrow files, and not what lies beside them."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved", num_shards=3)
    check(f"file://{tmp_path}/saved")


# --- HTTP ---


@pytest.fixture
def server(tmp_path):
    """Serve files over HTTP; return their folder, the address, and what is asked of the server."""
    folder = tmp_path / "served"
    folder.mkdir()
    with stores.served(folder) as (address, asked):
        yield folder, address, asked


def test_a_server_that_fails_is_asked_again(server, caplog):
    """Twice it fails, then it gives the file; of one that fails on and on the reason is said."""
    folder, address, asked = server
    write(folder, "x.jsonl.gz", RECORDS)
    asked["failures"] += [503, 500]
    check(f"{address}/x.jsonl.gz")
    assert "trying again" in caplog.text
    write(folder, "x.jsonl", RECORDS)
    asked["failures"] += [503] * 9
    with pytest.raises(ValueError, match=r"x\.jsonl: cannot be reached: 503"):
        build(f"{address}/x.jsonl")


@pytest.mark.parametrize(
    ("status", "tries", "message"),
    [
        (404, 1, r"no such file$"),
        (403, 1, r"cannot be reached: 403, .*Forbidden"),
        (503, 3, r"cannot be reached: 503, .*Service Unavailable"),
    ],
)
def test_a_server_that_refuses_is_not_taken_for_one_without_the_file(
    server, status, tries, message, caplog
):
    """Only 404 says that there is none; whom a server forbids is not told so again and again."""
    _, address, asked = server
    asked["refuses"] = status
    with pytest.raises(ValueError, match=rf"x\.jsonl: {message}"):
        build(f"{address}/x.jsonl")
    assert caplog.text.count("trying again") == tries - 1


def test_a_server_that_is_away_is_said():
    """It was said that there is no such file."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(ValueError, match=r"x\.jsonl: cannot be reached: Cannot connect"):
            build(f"http://127.0.0.1:{taken.getsockname()[1]}/x.jsonl")


def test_what_an_address_cuts_off_is_said(server):
    """What follows a # is never sent to a server."""
    _, address, _ = server
    with pytest.raises(ValueError, match=r"no \.jsonl.* file there; write # as %23"):
        build(f"{address}/a#b.jsonl")


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole"])
def test_a_file_that_is_long_is_fetched_in_parts(server, ranges):
    """And whole from a server that sends no ranges."""
    folder, address, asked = server
    asked["ranges"] = ranges
    content = lines([{"text": f"{i} " * 5_000} for i in range(600)])
    (folder / "x.jsonl").write_bytes(content)
    assert len(content) > 2 * 5 * 2**20, "more than a block of fsspec's"
    config = DomainTextDataLoader.Config(dataset=f"{address}/x.jsonl")
    assert load_documents(config)[599][0] == "599 " * 5_000
    assert (len(asked["served"]) > 1) == ranges


def test_a_fetch_that_breaks_off_goes_on_where_it_was(server, monkeypatch):
    """The second block fails once; the first is not asked for again."""
    folder, address, asked = server
    content = lines([{"text": f"{i} " * 5_000} for i in range(600)])
    (folder / "x.jsonl").write_bytes(content)
    rest = urls._rest

    def breaking(source, target):
        if not target.tell():
            target.write(source.read(6 << 20))
            target.flush()
            asked["served"].clear()
            msg = "the connection was lost"
            raise ConnectionResetError(msg)
        rest(source, target)

    monkeypatch.setattr(urls, "_rest", breaking)
    documents = load_documents(DomainTextDataLoader.Config(dataset=f"{address}/x.jsonl"))
    assert documents[599][0] == "599 " * 5_000
    assert min(first for first, _ in asked["served"]) >= 6 << 20


def test_a_file_that_was_written_again_in_the_same_size_is_fetched_again(server):
    """By its time, where the server tells no tag of its content."""
    folder, address, _ = server
    for i, text in enumerate(("one", "two")):
        (folder / "x.jsonl").write_bytes(lines([{"text": text}]))
        os.utime(folder / "x.jsonl", (i, i))
        config = DomainTextDataLoader.Config(dataset=f"{address}/x.jsonl")
        assert load_documents(config)[0] == (text, "all")


def test_signatures_of_addresses_are_not_shown(server):
    """What follows a question mark is sent, and is in no message."""
    folder, address, _ = server
    (folder / "x.jsonl").write_bytes(b"{oops\n")
    with pytest.raises(ValueError, match=r"x\.jsonl\?\.\.\.:1: invalid JSON") as error:
        build(f"{address}/x.jsonl?signature=secret")
    assert "secret" not in str(error.value)


# --- Hugging Face ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return where the files of a data set `me/data` are that a server has as Hugging Face does."""
    with stores.served(tmp_path, stores.OfHuggingFace) as (address, _):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        yield tmp_path / stores.RESOLVED


def test_files_of_hugging_face_are_read_as_files_are(hub, expected):
    """One file, or a folder of a split; what is not there is said with its address."""
    write(hub / "train", "x.parquet", RECORDS)
    check("hf://datasets/me/data/train/x.parquet")
    assert torch.equal(taken(build("hf://datasets/me/data"), 3), expected[False][:3])
    for name in ("me/data/none.jsonl", "no/such/x.jsonl"):
        with pytest.raises(ValueError, match=rf"^hf://datasets/{name}: no such file"):
            build(f"hf://datasets/{name}")

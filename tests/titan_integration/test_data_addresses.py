"""Data at addresses: in a store of S3, on a server of HTTP or of Hugging Face, and in memory."""

import contextlib
import functools
import http.server
import importlib
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import s3fs
import torch
from faulty import check_resumed, whole_and_resumed
from moto.server import ThreadedMotoServer
from written import FORMATS, RECORDS, build, check, expected_rows, lines, taken, write

from titan_integration.data import spots, urls
from titan_integration.data.loader import DomainTextDataLoader, load_documents
from titan_integration.data.tokenizer import cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Return an empty cache; but for tokenizers, which take seconds to make."""
    cache, tokenizers = tmp_path_factory.mktemp("cache"), cache_dir() / "tokenizers"
    tokenizers.mkdir(parents=True, exist_ok=True)
    (cache / "tokenizers").symlink_to(tokenizers)
    monkeypatch.setenv("WEIGHTING_CACHE", str(cache))
    monkeypatch.setattr(urls, "_WAITS", (0.0, 0.0))
    return cache


@pytest.fixture
def expected():
    """Take rows of the records as plain lines, by index and as a stream."""
    return expected_rows()


# --- S3 ---


@pytest.fixture(scope="module")
def s3():
    """Serve what speaks as S3 does, with a bucket that has every format, and return its files."""
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        for name, written in FORMATS.items():
            files.pipe(f"bucket/all/train/{name}", written(RECORDS))
        files.pipe("bucket/all/validation/y.jsonl", lines(RECORDS[:3]))
        yield files
        store.stop()
        s3fs.S3FileSystem.clear_instance_cache()


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


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_on_a_store_of_s3_stops_and_resumes_on_the_same_tokens(s3, tmp_path, own_cache):
    """A folder of all formats at once; from the cache, the second run asks for no file again."""
    del s3
    flags = ["--config=tiny", "--dataloader.dataset=s3://bucket/all"]
    found = []
    for metrics in whole_and_resumed(tmp_path, *flags, "--training.local_batch_size=2"):
        found.append(metrics)
        fetched = {
            x: x.stat().st_ino for x in (own_cache / "files").iterdir() if ".lock" not in x.name
        }
        assert len(fetched) == len(FORMATS)
    check_resumed(*found, "domain/a/share")


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


def test_a_changed_file_at_an_address_is_fetched_again(memory):
    """The cache is asked by size and time, too."""
    for text in ("one", "three"):
        memory.pipe("/x.jsonl", lines([{"text": text}]))
        config = DomainTextDataLoader.Config(dataset="memory://x.jsonl")
        assert load_documents(config)[0] == (text, "all")


# --- HTTP ---


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder; fails, or reads ranges, as it is asked."""

    def __init__(self, *given, asked, **more):
        self.asked = asked
        super().__init__(*given, **more)

    def do_GET(self):
        """Send a file, or a range of it."""
        path = Path(self.translate_path(unquote(urlsplit(self.path).path)))
        if self.asked["failures"]:
            self.send_error(self.asked["failures"].pop())
            return
        if not path.is_file():
            super().do_GET()
            return
        content, length = path.read_bytes(), path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and self.asked["ranges"]:
            first, last = int(found[1]), min(int(found[2]), length - 1)
            self.asked["served"].append((first, last))
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{length}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(tmp_path):
    """Serve files over HTTP; return their folder, the address, and what is asked of the server."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = {"failures": [], "ranges": True, "served": []}
    handler = functools.partial(Handler, directory=str(folder), asked=asked)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()
        thread.join()


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
def hub(server, monkeypatch):
    """Answer as Hugging Face does about a data set `me/data` of the served files."""
    folder, address, _ = server
    get, base = Handler.do_GET, folder / "datasets/me/data/resolve/main"
    base.mkdir(parents=True)

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/"):
            get(self)
            return
        _, _, _, *name = path.split("/")
        if name[:2] != ["me", "data"]:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            told = {"error": "Repository not found"}
        elif "tree" in name:
            self.send_response(200)
            below = base / "/".join(name[name.index("main") + 1 :])
            told = [
                {
                    "type": "directory" if x.is_dir() else "file",
                    "path": str(x.relative_to(base)),
                    "size": x.stat().st_size,
                    "oid": f"{hash(x.read_bytes()):x}" if x.is_file() else "0",
                }
                for x in below.glob("**/*" if "recursive=true" in self.path.lower() else "*")
            ]
        else:
            self.send_response(200)
            told = {"id": "me/data", "sha": "0", "private": False, "tags": [], "downloads": 0}
            told |= {"siblings": [], "gated": False, "disabled": False, "likes": 0}
        content = json.dumps(told).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    monkeypatch.setattr(Handler, "do_GET", answer)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
    return base


def test_files_of_hugging_face_are_read_as_files_are(hub, expected):
    """One file, or a folder of a split; what is not there is said with its address."""
    write(hub / "train", "x.parquet", RECORDS)
    check("hf://datasets/me/data/train/x.parquet")
    assert torch.equal(taken(build("hf://datasets/me/data"), 3), expected[False][:3])
    for name in ("me/data/none.jsonl", "no/such/x.jsonl"):
        with pytest.raises(ValueError, match=rf"^hf://datasets/{name}: no such file"):
            build(f"hf://datasets/{name}")

"""Which files of a folder are read, what is said of the others, and what damaged ones end in."""

import gzip
import json
import logging
import os
import re

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from titan_integration.commands.score_data import open_source
from titan_integration.data.data_files import local_files, saved_dataset
from titan_integration.data.loader import DomainTextDataLoader, load_documents

TEXT = "enough letters to fill a row or two of sixteen tokens"
GOOD = {"text": TEXT, "domain": "a"}


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids; text that is no text fails as it does in tokenizers."""
        try:
            return [256] * add_bos + list(text.encode()) + [257] * add_eos
        except UnicodeEncodeError:
            msg = "TextInputSequence must be str"
            raise TypeError(msg) from None

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


def build(path, rank=0, num_ranks=1, **config):
    """Build a loader of short rows."""
    return DomainTextDataLoader.Config(dataset_path=str(path), **config).build(
        dp_world_size=num_ranks, dp_rank=rank, tokenizer=Letters(), seq_len=16, local_batch_size=1
    )


def read(path, streaming, steps=60, **config):
    """Open data, by index or as a stream of one domain `a`, and take some batches."""
    if streaming:
        config = {"domains": ["a"]} | config
    batches = iter(build(path, streaming=streaming, **config))
    return [next(batches) for _ in range(steps)]


def texts(path, **config):
    """Return text and domain of all documents."""
    documents = load_documents(DomainTextDataLoader.Config(dataset_path=str(path), **config))
    return [documents[i] for i in range(len(documents))]


def lines(*records):
    """Return records as JSON, one a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def put(path, content):
    """Write a file and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def record(text, **more):
    """Return a record of one line."""
    return lines({"text": text, **more})


def warnings_of(caplog, folder):
    """Return what was warned about a folder."""
    return [r.message for r in caplog.records if str(folder) in r.message]


both = pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])


def test_every_kind_of_data_file_in_a_folder_is_read(tmp_path):
    """Suffixes in capitals, .ndjson and compressed files count, in the order of their paths."""
    put(tmp_path / "a/a.jsonl", record("one"))
    put(tmp_path / "b.JSONL", record("two"))
    put(tmp_path / "c.ndjson", record("three"))
    put(
        tmp_path / "d.jsonl.gz",
        gzip.compress(record("four"), mtime=0) + gzip.compress(record("five")),
    )
    put(tmp_path / "e.JSON.GZ", gzip.compress(b'[{"text": "six"}]', mtime=0))
    with (
        pa.OSFile(str(tmp_path / "f.jsonl.zst"), "wb") as file,
        pa.CompressedOutputStream(file, "zstd") as packed,
    ):
        packed.write(record("seven"))
    pq.write_table(pa.table({"text": ["eight"]}), tmp_path / "g.PARQUET")
    put(tmp_path / "h.jsonl/h.jsonl", record("nine"))
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [text for text, _ in texts(tmp_path)] == words
    assert texts(tmp_path / "b.JSONL") == [("two", "all")]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    """Loops end, and a file with several names is read under its own."""
    folder = tmp_path / "data"
    put(tmp_path / "elsewhere/x.jsonl", record("linked"))
    put(folder / "m/m.jsonl", record("own"))
    (folder / "a.jsonl").symlink_to("m/m.jsonl")
    (folder / "b").symlink_to("../elsewhere")
    (folder / "c").symlink_to("m")
    (folder / "m/loop").symlink_to("..")
    os.link(folder / "m/m.jsonl", folder / "m/z.jsonl")
    found = [str(f.relative_to(folder)) for f in local_files(folder, "train")]
    assert found == ["b/x.jsonl", "m/m.jsonl"]


def test_what_is_not_read_is_named_in_one_warning(tmp_path, caplog):
    """Hidden, dangling and other files are named with the reason, once."""
    put(tmp_path / "a.jsonl", record("one"))
    put(tmp_path / ".ipynb_checkpoints/a-checkpoint.jsonl", record("old"))
    put(tmp_path / "notes.txt", b"")
    put(tmp_path / "bad\x1bname.txt", b"")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for _ in range(2):
        assert texts(tmp_path) == [("one", "all")]
    (warning,) = warnings_of(caplog, tmp_path)
    for part in (
        ".ipynb_checkpoints (hidden)",
        "'bad\\x1bname.txt', notes.txt (not .jsonl",
        "gone.jsonl (links to nothing)",
        "pipe.jsonl (neither a file nor a directory)",
    ):
        assert part in warning
    put(tmp_path / "b.jsonl", record("two"))


def test_a_file_beside_its_packed_copy_is_warned_of(tmp_path, caplog):
    """As `gzip -k` leaves both, which would be trained on twice."""
    for name in ("x.jsonl", "x.jsonl.gz", "y.jsonl", "z.jsonl.gz"):
        put(tmp_path / name, b"")
    assert len(local_files(tmp_path, "train")) == 4
    (warning,) = warnings_of(caplog, tmp_path)
    assert "both are read of x.jsonl and x.jsonl.gz; if one is" in warning
    assert "y.jsonl" not in warning


def test_many_passed_over_files_are_counted(tmp_path, caplog):
    """A warning stays a line, and other ranks than the first say nothing."""
    put(tmp_path / "a.jsonl", record("one"))
    for i in range(100):
        put(tmp_path / f"{i:03d}.txt", b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        texts(tmp_path)
    assert not warnings_of(caplog, tmp_path)
    with caplog.at_level(logging.WARNING):
        texts(tmp_path)
    (warning,) = warnings_of(caplog, tmp_path)
    assert "009.txt and 90 more (not" in warning


def test_a_file_beside_the_folders_of_splits_is_named(tmp_path, caplog):
    """What lies beside train/ belongs to no split."""
    put(tmp_path / "train/a.jsonl", record("one"))
    put(tmp_path / "b.jsonl", record("two"))
    assert texts(tmp_path) == [("one", "all")]
    assert "b.jsonl (beside train/, which has the split)" in warnings_of(caplog, tmp_path)[0]


def test_folders_of_hive_give_columns(tmp_path):
    """A part key=value of the path is a column of all records below it."""
    path = tmp_path / "domain=web%2Fnews/score=2.5/x.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["one"]}), path)
    put(tmp_path / "domain=books/score=3/x.jsonl", record("two") + record("three", domain="books"))
    documents = load_documents(
        DomainTextDataLoader.Config(dataset_path=str(tmp_path), columns=["score"])
    )
    assert [documents[i] for i in range(3)] == [
        ("two", "books"),
        ("three", "books"),
        ("one", "web/news"),
    ]
    assert list(documents.numbers[0]) == [3.0, 3.0, 2.5]
    assert texts(path) == [("one", "web/news")]
    source = open_source(DomainTextDataLoader.Config(dataset_path=str(tmp_path)))
    assert set(source.schema.names) == {"text", "domain", "score"}
    assert [r["domain"] for _, r in source.records()] == ["books", "books", "web/news"]


@both
def test_a_record_that_contradicts_its_folder_is_refused(tmp_path, streaming):
    """Neither the folder nor the record is believed silently."""
    put(tmp_path / "domain=b/x.jsonl", lines(GOOD))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: column 'domain' holds 'a', .*domain=b"):
        read(tmp_path, streaming, domains=["b"])


@both
def test_what_save_to_disk_wrote_is_read(tmp_path, streaming):
    """A data set, or a dictionary of splits, as a folder of its own."""
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list([GOOD, {**GOOD, "text": ""}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        read(tmp_path / name, streaming)
        assert texts(tmp_path / name) == [(TEXT, "a")]
        source = open_source(DomainTextDataLoader.Config(dataset_path=str(tmp_path / name)))
        assert source.total == 2
    assert saved_dataset(tmp_path / "dict", "train") == tmp_path / "dict/train"
    with pytest.raises(ValueError, match=r"train: .*save_to_disk wrote.*--data .*train"):
        read(put(tmp_path / "x.jsonl", lines(GOOD)).parent, streaming)
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"one: looks like .* cannot be opened.*save it again"):
        read(tmp_path / "one", streaming)


@both
@pytest.mark.parametrize(
    "content",
    [
        lines({**GOOD, "x": 1}, GOOD, {**GOOD, "x": 2}),
        b"\xef\xbb\xbf" + lines(GOOD) + b"\xef\xbb\xbf" + lines(GOOD),
        lines({**GOOD, "n": 1}, {**GOOD, "n": 2**70}),
        lines({**GOOD, "k": 1}, {**GOOD, "k": "s"}, {**GOOD, "k": [1]}),
        lines(*[{"text": "2024-01-02T03:04:05", "domain": "a"}] * 30),
        lines(GOOD).replace(b"\n", b"  \r\n\r\n"),
        lines(GOOD, {"text": ""}, GOOD),
        b'{"text": "1", "text": "' + TEXT.encode() + b'", "domain": "a", "n": NaN}',
        lines({**GOOD, "text": "word " * 100_000}),
    ],
    ids=["key", "mark", "2**70", "types", "dates", "ends", "empty", "NaN", "long"],
)
def test_index_and_stream_take_the_same_files(tmp_path, content, streaming):
    """Columns that are not in use do not matter, nor do marks, ends of lines and empty texts."""
    put(tmp_path / "a.jsonl", content)
    put(tmp_path / "b.jsonl", lines({**GOOD, "new": 1}))
    read(tmp_path, streaming)


@both
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{oops", "invalid JSON: Expecting"),
        (b'{"text": "bad \\ud83d end", "domain": "a"}', r"'text' holds half a surrog.*'.ud83d' at"),
        (b'{"text": "t", "domain": "\\ud83d"}', "column 'domain' holds half a surrogate"),
        (b'{"text": "bad \xed\xa0\xbd end", "domain": "a"}', "not UTF-8 text"),
        (b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "brackets are nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"invalid JSON: Exceeds the limit \(4300 digits\)$"),
        (b"\0" * 50, "it has NUL bytes, so it is damaged"),
        (b"[1]", "a record must be a JSON object, not list"),
        (b'{"text": 7, "domain": "a"}', "text column 'text' holds int"),
    ],
)
def test_index_and_stream_refuse_the_same_lines(tmp_path, content, message, streaming):
    """A line that cannot be used is named by file and line, when it is read."""
    put(tmp_path / "a.jsonl", lines(GOOD, GOOD) + content + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{message}") as error:
        read(tmp_path, streaming)
    assert type(error.value) is ValueError


@both
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(GOOD).decode().encode("utf-16"), ":1: not UTF-8 text but UTF-16; save"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(GOOD, GOOD), mtime=0)[:-8],
            ": cannot be read: Compressed f",
        ),
        ("a.jsonl.gz", lines(GOOD), ": cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", lines(GOOD), ": cannot be read: "),
        ("a.json", b"\n\n[\n{oops\n]", ":4: invalid JSON"),
        ("a.json", b'["a"]', ": record 0: a record must be a JSON object, not str"),
    ],
)
def test_index_and_stream_refuse_the_same_files(tmp_path, name, content, message, streaming):
    """A file that cannot be read is named, with what to do about it."""
    put(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name}{message}") as error:
        read(tmp_path, streaming)
    assert type(error.value) is ValueError


@both
def test_errors_of_the_disk_are_said_with_the_file(tmp_path, streaming):
    """Reading this process's memory from 0 on fails like a broken disk."""
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read: Input/output error"):
        read(tmp_path, streaming)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        read(tmp_path / ("x" * 300), streaming)
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        read("/dev/null", streaming)
    with pytest.raises(ValueError, match=r"~nobody.here: no such file"):
        read("~nobody.here", streaming)


@both
def test_parquet_of_any_type_of_text_and_any_other_column(tmp_path, streaming):
    """Only the columns in use are looked at; text may be dictionary encoded or large."""
    when = pa.array([2**62 // 10**3] * 2, pa.timestamp("us"))  # no date that Python could hold
    names = ["text", "domain", "when"]
    for i, text in enumerate([pa.array([TEXT] * 2, pa.large_string()), pa.array([TEXT] * 2)]):
        columns = [text if i == 0 else text.dictionary_encode(), ["a"] * 2, when]
        pq.write_table(pa.table(columns, names), tmp_path / f"{i}.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    read(tmp_path, streaming)
    pq.write_table(pa.table([[TEXT] * 2, when], ["text", "when"]), tmp_path / "0.parquet")
    read(tmp_path / "0.parquet", streaming, domains=["all"])


@both
def test_parquet_text_that_is_not_utf8_is_named_by_row(tmp_path, streaming):
    """Nothing checks it before Python does."""
    ends = pa.array([0, 60, 62], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"a" * 60 + b"\xff\xfe"))
    pq.write_table(pa.table([text, ["a"] * 2], ["text", "domain"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1: cannot be read: text that is not UTF-8"):
        read(tmp_path, streaming)


@both
@pytest.mark.parametrize("content", [b"", lines(*[{"text": "", "domain": "a"}] * 5)])
def test_data_without_text_is_an_error(tmp_path, content, streaming):
    """A stream does not search for ever."""
    put(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=r"no text (in any record|to predict)"):
        read(tmp_path, streaming)


def test_empty_hub_texts_are_skipped_and_missing_ones_refused(tmp_path):
    """Empty texts are left out and missing ones named, as in files."""
    rows = [{**GOOD, "text": ""}, GOOD, {**GOOD, "text": None}]
    for name, some in (("one", rows[:2]), ("none", rows[:1]), ("null", rows)):
        datasets.Dataset.from_list(some).save_to_disk(tmp_path / name)
    assert texts(tmp_path / "one") == [(TEXT, "a")]
    with pytest.raises(ValueError, match="none: no text in any record"):
        texts(tmp_path / "none")
    with pytest.raises(ValueError, match="null: record 2: text column 'text' holds NoneType"):
        texts(tmp_path / "null")


# --- streams ---


def test_a_stream_goes_on_where_it_was_or_names_the_file_that_is_gone(tmp_path):
    """The state has the name of the file it is in."""
    for name in "abc":
        put(tmp_path / f"{name}.jsonl", lines(*[GOOD] * 4))
    config = {"streaming": True, "domains": ["a"]}
    first = build(tmp_path, **config)
    batches = iter(first)
    for _ in range(20):
        next(batches)
    state = first.state_dict()
    expected = [next(batches)[1].tolist() for _ in range(40)]
    again = build(tmp_path, **config)
    again.load_state_dict(state)
    batches = iter(again)
    assert [next(batches)[1].tolist() for _ in range(40)] == expected
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    with pytest.raises(ValueError, match=r"files have another name, .*: a\.jsonl, z\.jsonl"):
        build(tmp_path, **config).load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "file", "number"),
    [
        # After 3 records of the second file, counted from there or from the first file's end.
        ({"previous_state": None, "examples_iterable": [1, 3], "chunks": 0}, 1, 3),
        ({"previous_state": [1, 0], "examples_iterable": [1, 4], "chunks": 3}, 1, 3),
        ({"previous_state": [0, 4], "examples_iterable": [1, 4], "chunks": 3}, 1, 3),
        ({"previous_state": [0, 0], "examples_iterable": [1, 4], "chunks": 7}, 1, 3),
    ],
)
def test_a_stream_resumes_from_a_state_of_0_1_0(tmp_path, caplog, saved, file, number):
    """It was Hugging Face's, and counted records in chunks of one."""
    for name in "abc":
        rows = [{**GOOD, "text": f"{TEXT} {name}{i}"} for i in range(4)]
        put(tmp_path / f"{name}.jsonl", lines(*rows))

    def arrow(at):
        kind = {"type": "ArrowExamplesIterable"}
        return at and {"shard_idx": at[0], "shard_example_idx": at[1]} | kind

    rebatched = {
        "examples_iterable": arrow(saved["examples_iterable"]),
        "previous_state": arrow(saved["previous_state"]),
        "batch_idx": 7,
        "num_chunks_since_previous_state": saved["chunks"],
        "cropped_chunk_length": 0,
        "type": "RebatchedArrowExamplesIterable",
    }
    loader = build(tmp_path, streaming=True, domains=["a"])
    position = [[0, {"examples_iterable": rebatched, "epoch": 0}, 5]]
    loader.load_state_dict(loader.state_dict() | {"row": 9, "dp_rank_0": json.dumps(position)})
    inputs, _ = next(iter(loader))
    text = f"{TEXT} {'abc'[file]}{number}"
    assert bytes(inputs["input"][0].tolist()).decode() == text[4:20]
    assert len([m for m in warnings_of(caplog, tmp_path) if "older version" in m]) == 1


@pytest.mark.parametrize("position", [{"examples_iterable": 3}, {"file": 9, "record": 0}, {}])
def test_an_impossible_position_is_refused(tmp_path, position):
    """An empty dict is none at all; the others name the way out."""
    put(tmp_path / "a.jsonl", lines(GOOD))
    loader = build(tmp_path, streaming=True, domains=["a"])
    state = loader.state_dict() | {"dp_rank_0": json.dumps([[0, position, 0]])}
    if not position:
        loader.load_state_dict(state)
        return
    with pytest.raises(ValueError, match=r"which cannot be; .*exclude_from_loading dataloader"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("num_files", [4, 3])
def test_ranks_share_a_stream_as_hugging_face_would(tmp_path, num_files):
    """Whole files where their number allows it, and else every second record, in every epoch."""
    every = []
    for i in range(num_files):
        rows = [{**GOOD, "text": f"{i}{j}"} for j in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{i}.parquet", row_group_size=2)
        every.append(str(tmp_path / f"{i}.parquet"))
    stream = datasets.load_dataset("parquet", data_files=every, split="train", streaming=True)
    for rank in range(2):
        part = datasets.distributed.split_dataset_by_node(stream, rank, 2)
        loader = build(tmp_path, rank, 2, streaming=True, domains=["a"])
        for epoch in range(3):
            part.set_epoch(epoch)
            read = loader._rows._source.read(epoch, None)
            assert [r["text"] for _, r, _ in read] == [r["text"] for r in part]


def test_errors_of_a_hub_stream_are_said_with_the_record(monkeypatch):
    """Whatever Hugging Face raises in the middle becomes one error with a place."""

    def rows():
        yield from [GOOD] * 3
        msg = "the connection was lost\nat length"
        raise ConnectionError(msg)

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: datasets.IterableDataset.from_generator(rows),
    )
    config = DomainTextDataLoader.Config(dataset="some/data", streaming=True, domains=["a"])
    loader = config.build(
        dp_world_size=1, dp_rank=0, tokenizer=Letters(), seq_len=16, local_batch_size=1
    )
    with pytest.raises(ValueError, match=r"some/data: record 3 of .*: ConnectionError: .*lost$"):
        list(loader)


@pytest.mark.parametrize(
    ("files", "given", "reason"),
    [
        (
            ["a.bin", "a.idx"],
            "a.bin",
            ".bin and .idx, as Megatron writes them, are not read: their",
        ),
        (["a.bin", "a.idx"], "a", "as Megatron writes them"),
        (["a.bin", "a.idx"], "", "as Megatron writes them"),
        (["a.bin", "a.idx"], "a*", "as Megatron writes them"),
        (
            ["index.json", "shard.00000.mds"],
            "",
            "MosaicML's MDS is not read: its reader, mosaicml-streaming,",
        ),
        (["shard.00000.mds.zstd"], "shard.00000.mds.zstd", "MosaicML's MDS"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_files_of_other_trainers_are_refused_by_their_kind(
    tmp_path, files, given, reason, streaming
):
    """Here or at an address; the message says why, and what to convert them to."""
    memory = fsspec.filesystem("memory")
    for name in files:
        (tmp_path / name).write_text('{"version": 2, "shards": []}')
        memory.pipe(f"{tmp_path}/{name}", b'{"version": 2, "shards": []}')
    convert = r".*Convert it once, .* 'input_ids' or a 'text' a record: docs/data.md has the lines"
    for place in (f"{tmp_path}/{given}", f"memory://{tmp_path}/{given}"):
        if "://" not in place or given != "a":  # an address is not asked for its neighbours
            kept = {"dataset_path": None, "dataset": place.rstrip("/")}
            with pytest.raises(ValueError, match=re.escape(reason)):
                load_documents(DomainTextDataLoader.Config(**kept))
            with pytest.raises(ValueError, match=re.escape(reason) + convert):
                build(place.rstrip("/"), streaming=streaming, domains=["a"])

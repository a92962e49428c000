"""Every format of data: opened, cut into rows, stopped and resumed; and each broken on purpose."""

import gzip
import json

import datasets
import pytest
import torch
from written import (
    BROKEN,
    FORMATS,
    RECORDS,
    Letters,
    build,
    check,
    expected_rows,
    lines,
    packed_bytes,
    taken,
    write,
)

from titan_integration.data import stored
from titan_integration.data.formats import read_records
from titan_integration.data.loader import DomainTextDataLoader, load_documents
from titan_integration.data.records import Columns


class Talking(Letters):
    """One with a chat template: the role's first letter, a colon and the content, on a line."""

    def apply_chat_template(self, messages, *, add_generation_prompt=False):
        """Return the messages as text."""
        text = "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages)
        return text + "a:" * add_generation_prompt


@pytest.fixture
def expected():
    """Take rows of the records as plain lines, by index and as a stream."""
    return expected_rows()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_and_resumes(tmp_path, expected, name):
    """By index and as a stream, a file or a folder or a pattern."""
    path = write(tmp_path, name, RECORDS)
    check(path)
    assert torch.equal(taken(build(tmp_path), 3), expected[False][:3])
    assert torch.equal(taken(build(tmp_path / "*"), 3), expected[False][:3])


def test_copies_of_packed_text_leave_memory(tmp_path, monkeypatch):
    """They are in one file of the cache, which loaders of the same text share."""
    monkeypatch.setattr(stored, "_IN_MEMORY", 100)
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, "x.jsonl.gz", RECORDS)
    check(path)
    assert len([*(tmp_path / "cache/texts").iterdir()]) == 1


def test_a_saved_dataset_gives_the_same_rows_and_resumes(tmp_path):
    """What `save_to_disk` wrote is read as the files are."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    check(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_a_broken_saved_dataset_is_named(tmp_path, streaming):
    """Its folder, and the reason, in one message."""
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"/saved: .*cannot be opened: .*; save it again") as error:
        build(tmp_path / "saved", streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_file_is_named_with_its_record(tmp_path, name):
    """In one message, by index and as a stream."""
    breaks, message = BROKEN[name]
    path = write(tmp_path, name, RECORDS)
    path.write_bytes(breaks(path.read_bytes()))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            taken(build(path, streaming=streaming), 400)
        assert "\n" not in str(error.value)


def test_csv_has_its_own_faults(tmp_path):
    """Two columns of one name, other marks than commas, an open quote, text that is not UTF-8."""
    for content, message in [
        (b"text;domain\na;b\n", r"x\.csv:1: fields are parted by ';'; save it with commas"),
        (b"text,text\na,b\n", r"x\.csv:1: two columns have one name"),
        (b'text\n"open\n', r"x\.csv:2: invalid CSV"),
        (b"text\nfine\n\xff\xfe\n", r"x\.csv:3: not UTF-8"),
    ]:
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "x.csv", domains=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", json.dumps(RECORDS[0], indent=1), r"x\.json:\d: .*a record is one line, or"),
        ("x.json", '{"text": ["a", "b"]}', r"x\.json:1: column 'text' holds a list of strings"),
        ("x.jsonl.gz", '{"text": "plain"}', r"x\.jsonl\.gz: cannot be read: Not a gzipped file"),
    ],
)
def test_what_looks_like_data_and_is_not_says_how_it_should_look(tmp_path, name, content, message):
    """A record over several lines, columns in one record, a suffix that lies."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / name, domains=None)


def test_frames_that_follow_each_other_are_all_read_and_a_cut_one_is_said(tmp_path):
    """As `cat a.zst b.zst` and `cat a.gz b.gz` leave them."""
    some, more = lines(RECORDS[:20]), lines(RECORDS[20:])
    for name, pack in (("x.jsonl.zst", packed_bytes), ("x.jsonl.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(some) + pack(more))
        check(path)
        path.write_bytes(pack(some) + pack(more)[:-1])
        with pytest.raises(ValueError, match=rf"{name}: cannot be read: "):
            build(path)


def test_a_link_that_leads_nowhere_is_said(tmp_path):
    """And not that there is no file of this name, as there is."""
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"x\.jsonl: a link that leads nowhere"):
        build(tmp_path / "x.jsonl")


# --- bad records ---

BAD = [
    b"{oops\n",
    b"[1]\n",
    b'{"text": 7, "domain": "a"}\n',
    b'{"domain": "a"}\n',
    b'{"text": "half \\ud83d", "domain": "a"}\n',
    b"\xff\n",
]


@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_bad_records_are_counted_and_passed_over_if_asked(tmp_path, expected, streaming, caplog):
    """The rows are those of the good records, and the first bad ones are named."""
    good = lines(RECORDS).splitlines(keepends=True)
    mixed = [*good[:5], *BAD[:3], *good[5:30], *BAD[3:], *good[30:]]
    (tmp_path / "x.jsonl").write_bytes(b"".join(mixed))
    loader = build(tmp_path, streaming=streaming, on_bad_record="skip")
    assert torch.equal(taken(loader, 40), expected[streaming])
    assert loader.bad_records == (3 if streaming else 6)  # a stream has come so far
    assert "x.jsonl:6: invalid JSON" in caplog.text
    with pytest.raises(ValueError, match=r"x\.jsonl:6: invalid JSON"):
        taken(build(tmp_path, streaming=streaming), 400)


def test_if_every_record_is_bad_that_is_said(tmp_path):
    """Skipping does not hide that a column has another name."""
    (tmp_path / "x.jsonl").write_bytes(lines([{"body": "text"}] * 9))
    with pytest.raises(ValueError, match=r"no text in any record.*9 bad records were passed over"):
        build(tmp_path, on_bad_record="skip")
    with pytest.raises(ValueError, match=r"set --dataloader\.on_bad_record to refuse or skip"):
        build(tmp_path, on_bad_record="ignore")


# --- token ids and messages ---


def ids_of(text):
    """Return what Letters makes of a text."""
    return Letters().encode(text, add_bos=True, add_eos=True)


TOKENISED = [{"input_ids": ids_of(r["text"]), "domain": r["domain"]} for r in RECORDS]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.arrow", "array.json", "x.jsonl.zst"])
def test_token_ids_give_the_rows_of_their_text(tmp_path, name):
    """They stay as they are, in every format that has lists, and resume."""
    check(write(tmp_path, name, TOKENISED))


def test_token_ids_of_a_saved_dataset(tmp_path, expected):
    """A data set in memory maps is tokenised as well."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(TOKENISED).save_to_disk(tmp_path / "saved")
    assert torch.equal(taken(build(tmp_path / "saved"), 40), expected[False])


def test_labels_and_masks_say_what_is_predicted(tmp_path, expected):
    """Every other label is ignored, said as `labels`, as `loss_mask`, or by both."""
    for more in (
        lambda ids: {"labels": [x if i % 2 else -100 for i, x in enumerate(ids)]},
        lambda ids: {"loss_mask": [i % 2 for i in range(len(ids))]},
        lambda ids: {"labels": ids, "loss_mask": [i % 2 == 1 for i in range(len(ids))]},
    ):
        records = [r | more(r["input_ids"]) for r in TOKENISED]
        path = write(tmp_path, "x.jsonl", records)
        for streaming in (False, True):
            rows = taken(build(path, streaming=streaming), 40)
            assert torch.equal(rows[:, :3], expected[streaming][:, :3])
            first = rows[0, :, 0]  # the first row begins with a document
            is_second = first[1] % 2 == 1
            assert (first[3][is_second] == -100).all()
            ignored = rows[:, 3] == -100
            assert torch.equal(rows[:, 3][~ignored], expected[streaming][:, 3][~ignored])
            assert 0.4 < ignored.float().mean() < 0.6


@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
@pytest.mark.parametrize("mask", [{"loss_mask": 0}, {"labels": -100}], ids=["mask", "labels"])
def test_data_of_which_nothing_is_predicted_is_refused(tmp_path, mask, streaming):
    """Before training, which would change nothing at every step."""
    records = [r | {k: [x] * len(r["input_ids"]) for k, x in mask.items()} for r in TOKENISED]
    path = write(tmp_path, "x.jsonl", records)
    with pytest.raises(ValueError, match=r"too little text: 0 tokens|no text to predict"):
        build(path, streaming=streaming)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [1, 2, 258] * 20}, r":41: token id 258, but the tokenizer has 258, from 0"),
        ({"input_ids": [1, -1]}, r":41: column 'input_ids' holds -1 at 1, which is no token id"),
        ({"input_ids": [1, 2.5]}, r":41: column 'input_ids' holds 2.5 at 1, not a token id"),
        ({"input_ids": [1, "x"]}, r":41: column 'input_ids' holds 'x' at 1, not a token id"),
        ({"input_ids": "[1, 2]"}, r":41: text column 'input_ids' holds str, not a list of token"),
        ({"input_ids": [1, 2], "labels": [1]}, r":41: column 'labels' holds 1, but there are 2"),
        ({"input_ids": [1, 2], "labels": [2, 3]}, r":41: label 2 at 0, where .* not shifted"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, r":41: 'loss_mask' holds 2 at 1, not 0 or 1"),
    ],
)
def test_token_ids_that_cannot_be_are_refused_before_training(tmp_path, record, message):
    """With file, record and reason; a stream says it when it reads them."""
    path = write(tmp_path, "x.jsonl", [*TOKENISED, record | {"domain": "a"}])
    with pytest.raises(ValueError, match=message):
        build(path)
    with pytest.raises(ValueError, match=message):
        taken(build(path, streaming=True), 400)


CHAT = [
    {
        "domain": "ab"[i % 2],
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": "an answer"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "more"},
        ],
    }
    for i in range(9)
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_of_a_chat_the_answers_are_predicted(tmp_path, name, streaming):
    """In the tokenizer's template; questions are read and not predicted."""
    path = write(tmp_path, name, CHAT)
    rows = taken(build(path, Talking(), streaming=streaming), 9)
    row = rows.transpose(0, 1).flatten(1)
    predicted = bytes(x for x in row[3].tolist() if 0 <= x < 256).decode()
    assert "question" not in predicted
    assert "then" not in predicted
    assert "an answermorean answermore" in predicted or "an answeran answer" in predicted
    assert (row[3] == Talking.eos_id).any()
    read = bytes(x for x in row[0].tolist() if x < 256).decode()
    assert "u:question" in read


def test_a_chat_without_a_template_is_refused(tmp_path):
    """With the record and what to do."""
    path = write(tmp_path, "x.jsonl", CHAT)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"x\.jsonl:\d+: the tokenizer's chat template.*hf_a"):
            build(path, streaming=streaming)
    bad = [{"domain": "a", "messages": [{"role": "user"}]}]
    with pytest.raises(ValueError, match=r":1: message 0 of 'messages' has no text as its 'cont"):
        build(write(tmp_path, "x.jsonl", bad), Talking())


def test_a_file_that_is_long_is_not_read_again_to_resume(tmp_path):
    """A stream goes on at the byte where it was."""
    path = write(tmp_path, "x.jsonl", RECORDS * 50)
    first = build(path, streaming=True)
    rows = taken(first, 300)
    expected = taken(build(path, streaming=True), 310)
    assert torch.equal(rows, expected[:300])
    (spot,) = json.loads(first.state_dict()["dp_rank_0"])
    assert spot[1]["byte"] > 10_000
    resumed = build(path, streaming=True)
    resumed.load_state_dict(first.state_dict())
    with path.open("r+b") as file:  # what came before is never looked at
        file.write(b"#" * spot[1]["byte"])
    assert torch.equal(taken(resumed, 10), expected[300:])


def test_a_file_that_changes_under_a_run_is_refused(tmp_path):
    """Documents are read when they are needed, so the file must stay."""
    path = write(tmp_path, "x.jsonl", RECORDS)
    documents = load_documents(DomainTextDataLoader.Config(dataset_path=str(path)))
    path.write_bytes(lines(RECORDS[1:]))
    with pytest.raises(ValueError, match=r"x\.jsonl: has changed since it was opened"):
        documents[0]


def test_read_records_passes_over_what_came_before(tmp_path):
    """In every format, by the number of records."""
    for name in FORMATS:
        path = write(tmp_path, name, RECORDS)
        texts = [record["text"] for _, record in read_records(path, Columns(), 23)]
        assert texts == [record["text"] for record in RECORDS[23:]], name

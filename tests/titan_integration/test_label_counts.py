"""`weighting count`, and the counts of labels in training: exact, checked, and told apart."""

import json
from collections import Counter
from itertools import islice

import click.testing
import pytest
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer

import weighting as wt
from titan_integration import config_registry
from titan_integration.commands import count
from titan_integration.data.label_counts import read_counts
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.trainer.preflight import ask_for_columns, open_data
from weighting.build import plan_of
from weighting.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SPEC = "column(label_count) -> clip(min=1) -> pow(-1) -> mean_one"
TEXTS = ["loss weight token " * n for n in (1, 30, 7)]
IDS = [5, 9, 9, 300, 9]
MASK = [1, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def tokenizer():
    """Load the embedded tokenizer."""
    return HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write texts, and token ids of which some are not predicted."""
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    records = [{"text": text} for text in TEXTS] + [{"input_ids": IDS, "loss_mask": MASK}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def counted(data, out, *more):
    """Count in this process; return what the command did."""
    words = ["count", f"--data={data}", f"--out={out}", *more]
    return click.testing.CliRunner().invoke(main, words, catch_exceptions=False)


@pytest.fixture(scope="module")
def counts(data, tmp_path_factory):
    """Count the data, and return the file and what was said."""
    out = tmp_path_factory.mktemp("counts") / "counts.json"
    done = counted(data, out)
    assert done.exit_code == 0, done.output
    return out, done.output


def build(data, tokenizer, **config):
    """Build a loader of one rank."""
    return DomainTextDataLoader.Config(dataset=str(data), **config).build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=16, local_batch_size=2
    )


def changed(path, out, **facts):
    """Write counts with other facts; return the file."""
    out.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return out


def test_the_labels_of_all_documents_are_counted_once(counts, tokenizer):
    """Each predicted token of each document is counted, as written out here one by one."""
    expected = Counter()
    for text in TEXTS:
        expected.update(tokenizer.encode(text, add_bos=True, add_eos=True)[1:])
    expected.update(x for x, is_label in zip(IDS[1:], MASK[1:], strict=True) if is_label)
    path, said = counts
    held = json.loads(path.read_text())
    assert len(held["counts"]) == tokenizer.get_vocab_size()
    assert {i: n for i, n in enumerate(held["counts"]) if n} == expected
    assert held["labels"] == sum(expected.values())
    assert held["documents"] == 4
    assert f"4 documents, {held['labels']:,} labels, {len(expected):,} of 2,048 tokens" in said


def test_what_training_sees_in_an_epoch_is_what_was_counted(counts, data, tokenizer):
    """The labels that the loader yields until the text ends are among those of the file."""
    numbers = torch.tensor(json.loads(counts[0].read_text())["counts"])
    given = {"columns": ["label_count"], "label_counts": str(counts[0])}
    seen = torch.zeros_like(numbers)
    for inputs, labels in build(data, tokenizer, infinite=False, **given):
        valid = labels != -100
        assert torch.equal(inputs["columns.label_count"][valid], numbers[labels[valid]].float())
        assert inputs["columns.label_count"].dtype == torch.float32
        seen += torch.bincount(labels[valid], minlength=len(numbers))
    assert (seen <= numbers).all()
    assert seen.sum() > 0.8 * numbers.sum()  # the last row is not full


def test_a_stream_gives_the_same_counts(counts, data, tokenizer):
    """Streamed batches have the counts of their labels as well."""
    numbers = torch.tensor(json.loads(counts[0].read_text())["counts"]).float()
    given = {"columns": ["label_count"], "label_counts": str(counts[0]), "domain_column": ""}
    for inputs, labels in islice(build(data, tokenizer, streaming=True, **given), 3):
        assert torch.equal(inputs["columns.label_count"], numbers[labels.clamp(min=0)])


def test_weights_are_those_of_the_counts(counts, data, tokenizer):
    """From file to weights: each token weighs one over its label's count, scaled to mean one."""
    given = {"columns": ["label_count"], "label_counts": str(counts[0])}
    inputs, labels = next(iter(build(data, tokenizer, **given)))
    held = json.loads(counts[0].read_text())["counts"]
    valid = labels != -100
    signals = wt.Signals(
        loss=torch.ones(labels.shape),
        valid=valid,
        columns={"label_count": inputs["columns.label_count"]},
    )
    weights = wt.build(wt.loads(SPEC))(signals, 1).token[valid].tolist()
    inverse = [1 / held[label] for label in labels[valid].tolist()]
    mean = sum(inverse) / len(inverse)
    assert weights == pytest.approx([x / mean for x in inverse], rel=1e-6)


def test_another_table_is_noticed_on_resume_and_across_ranks(counts, data, tokenizer, tmp_path):
    """The digest of the counts is part of what rows are made from; the file's name is not."""
    given = {"columns": ["label_count"], "label_counts": str(counts[0])}
    loader = build(data, tokenizer, **given)
    next(iter(loader))
    state = loader.state_dict()
    held = json.loads(counts[0].read_text())["counts"]
    copy = changed(counts[0], tmp_path / "copy.json", note="moved")
    build(data, tokenizer, **given | {"label_counts": str(copy)}).load_state_dict(state)

    other = changed(counts[0], tmp_path / "other.json", counts=[held[0] + 1, *held[1:]])
    second = build(data, tokenizer, **given | {"label_counts": str(other)})
    assert second.identity != loader.identity
    with pytest.raises(ValueError, match=r"saved for other rows: label_counts = '.*', now it is"):
        second.load_state_dict(state)


def test_a_run_may_begin_without_counts_and_go_on_with_them(counts, data, tokenizer):
    """As with columns: the rows are the same, so a changed spec may read counts after a resume."""
    plain = build(data, tokenizer)
    next(iter(plain))
    given = {"columns": ["label_count"], "label_counts": str(counts[0])}
    rich = build(data, tokenizer, **given)
    rich.load_state_dict(plain.state_dict())
    inputs, labels = next(iter(rich))
    plain.load_state_dict(rich.state_dict())
    assert inputs["columns.label_count"].shape == labels.shape


def test_workers_and_masked_labels_get_counts_too(counts, tmp_path, tokenizer):
    """Rows made in a worker process have their counts; labels that are not predicted, any."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"input_ids": [3, 5] * 40, "loss_mask": [0, 1] * 40}) + "\n")
    given = {"columns": ["label_count"], "label_counts": str(counts[0]), "num_workers": 1}
    numbers = torch.tensor(json.loads(counts[0].read_text())["counts"]).float()
    inputs, labels = next(iter(build(path, tokenizer, **given)))
    assert (labels == -100).any()
    valid = labels != -100
    assert (inputs["columns.label_count"][valid] == numbers[5]).all()


def test_a_run_that_reads_no_counts_does_not_open_the_file(data, tokenizer):
    """In a comparison the flag is given to all runs; those that read no counts go without."""
    loader = build(data, tokenizer, label_counts="nowhere.json")
    assert "columns.label_count" not in next(iter(loader))[0]
    assert "label_counts" not in loader.identity


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "spec"}, "holds no counts of labels"),
        ({"tokenizer": "0" * 16}, "was counted with another tokenizer"),
        ({"counts": [1, 2]}, "counts 2 tokens, and the tokenizer has 2048"),
        ({"counts": [-1] + [1] * 2047}, "its counts are not whole numbers from 0 on"),
        ({"counts": [0.5] + [1] * 2047}, "its counts are not whole numbers from 0 on"),
        ({"counts": [10**400] + [1] * 2047}, "its counts are not whole numbers from 0 on"),
        ({"counts": [True] + [1] * 2047}, "its counts are not whole numbers from 0 on"),
        ({"counts": None}, "its counts are not whole numbers from 0 on"),
        ({"counts": [0] * 2048}, "every count is 0"),
    ],
)
def test_a_file_of_other_counts_is_refused_with_the_fix(
    counts, tokenizer, tmp_path, facts, message
):
    """Before anything is built, with the flag and the file, and how to count again."""
    path = changed(counts[0], tmp_path / "x.json", **facts)
    with pytest.raises(ValueError, match=rf"--dataloader.label_counts .*x\.json: {message}") as got:
        read_counts(str(path), tokenizer)
    assert "count again: weighting count --data DATA --out COUNTS" in str(got.value)


@pytest.mark.parametrize("text", ["", "[", "[1, 2]", "name: x", "\x00"])
def test_a_file_of_something_else_is_refused(tokenizer, tmp_path, text):
    """No JSON, or other JSON, is no table of counts."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="holds no counts of labels"):
        read_counts(str(tmp_path / "x.json"), tokenizer)


def test_a_file_that_is_not_there_is_refused(tokenizer):
    """With the flag, and what the system says."""
    with pytest.raises(ValueError, match=r"--dataloader.label_counts nowhere.json: No such file"):
        read_counts("nowhere.json", tokenizer)


def test_a_run_without_counts_is_refused_before_it_starts(data):
    """The message says how counts are made, and by which flag they are given."""
    config = config_registry.llama3_debugmodel()
    config.dataloader = DomainTextDataLoader.Config(dataset=str(data))
    config.training.seq_len = 16
    plan = plan_of(wt.loads(SPEC))
    ask_for_columns(config, plan.needs)
    with pytest.raises(ValueError, match=r"no column 'label_count'.* weighting count .* --datal"):
        open_data(config, plan)


@pytest.mark.slow
def test_counting_refuses_what_would_end_in_vain(data, tmp_path):
    """A file that exists, a stream, data without text, a tokenizer that is not there."""
    out = tmp_path / "counts.json"
    out.write_text("old")
    done = counted(data, out)
    assert done.exit_code == 2
    assert f"--out {out}: exists already" in done.output
    assert out.read_text() == "old"
    assert counted(data, out, "--overwrite").exit_code == 0
    assert json.loads(out.read_text())["kind"]

    new = tmp_path / "new.json"
    done = counted(data, new, "--dataloader.streaming")
    assert "is streamed, and has no end" in done.output
    done = counted(tmp_path / "none.jsonl", new)
    assert "no such file" in done.output
    done = counted(data, new, f"--hf_assets_path={tmp_path}")
    assert "no tokenizer there" in done.output
    done = counted(data, tmp_path / "new.txt")
    assert "give it a name that ends in .json" in done.output
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": [3, 99_999]}) + "\n")
    assert "token id 99999, but the tokenizer has 2048" in counted(ids, new).output
    ids.write_text(json.dumps({"input_ids": [3, 4], "loss_mask": [1, 0]}) + "\n")
    assert "no token to predict in any document" in counted(ids, new).output
    assert not new.exists()


def test_flags_and_data_go_to_the_reader(monkeypatch, data):
    """Further flags are torchtitan's, as for a run."""
    called = {}
    monkeypatch.setattr(count, "main", lambda **options: called.update(options) or 0)
    assert counted(data, "x.json", "--dataloader.text_column", "t").exit_code == 0
    assert called["flags"] == ["--dataloader.text_column", "t"]
    assert called["data"] == str(data)

"""`weighting score`: the losses it stores against one model run window by window, and their use."""

import json
import random
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import click.testing
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from runs import drive, seed_checkpoint
from warm import weighting
from whole import whole_model

from titan_integration import config_registry
from titan_integration.commands import score, score_data, score_windows
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.packing import Cut
from titan_integration.data.records import Columns
from titan_integration.host import cpu
from weighting.cli import main
from weighting.loss.cross_entropy import token_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:'set_vital' is deprecated:UserWarning",
)

MODEL = ["--module=small", "--config=debugmodel"]
SEQ_LEN = 32
SMALL = [f"--training.seq_len={SEQ_LEN}", "--training.local_batch_size=4"]


def write_lines(path, records):
    """Write records as a jsonl file."""
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write documents of many lengths, below and above a row's, one of them empty."""
    draw = random.Random(3)
    words = ["alpha", "beta", "gamma", "delta", "def", "return", "import", "class"]
    records = [
        {
            "id": f"document-{i}",
            "text": " ".join(draw.choices(words, k=length)),
            "domain": "prose" if i % 3 else "verse",
            "quality": i / 4,
            "meta": {"length": length},
        }
        for i, length in enumerate([0, 1, 2, 5, 9, 40, 70, *draw.choices(range(1, 45), k=20)])
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", records)


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of the debug model."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), f"--training.seq_len={SEQ_LEN}")


@pytest.fixture(scope="module")
def scored(seed, data, tmp_path_factory):
    """Score the data, and return what was written for a number of ranks and what for."""
    folder = tmp_path_factory.mktemp("scored")

    def scored(ranks, per):
        out = folder / f"{ranks}-{per}.parquet"
        if not out.exists():
            given = ["--data", data, "--out", out, "--per", per, "--ranks", ranks]
            done = weighting("score", seed, *given, *MODEL, *SMALL)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert done.stdout.endswith(f"scored: {out}\n")
            assert "\x1b" not in done.stdout, "no colour codes in a pipe"
        return out

    return scored


@pytest.fixture(scope="module")
def encode():
    """Return the debug model's tokenizer as training calls it."""
    config = config_registry.llama3_debugmodel()
    tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    return partial(tokenizer.encode, add_bos=True, add_eos=True)


@pytest.fixture(scope="module")
def model(seed):
    """Build the debug model here, whole and without any parallelism, with the seed's parameters."""
    return whole_model(small.debugmodel(), SEQ_LEN, seed).eval()


@torch.no_grad()
def slow_losses(model, tokens):
    """Return the loss of every token but the first, with the model run on each window alone."""
    losses = []
    for start in range(0, len(tokens) - 1, SEQ_LEN):
        window = torch.tensor(tokens[start : start + SEQ_LEN + 1])
        positions = torch.arange(len(window) - 1)[None]
        masks = model.get_attention_masks(positions=positions)
        logits = model(window[None, :-1], positions, masks)
        losses.append(token_loss(logits[0], window[1:]))
    return torch.cat(losses)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_a_model_run_window_by_window(ranks, scored, data, model, encode):
    """All records in order with all columns, and for each token but the first its loss."""
    table = pq.read_table(scored(ranks, "token"))
    given = [json.loads(line) for line in data.read_text().splitlines()]
    losses = table["ref_loss"].to_pylist()
    assert table.drop_columns("ref_loss").to_pylist() == given
    assert table.schema.field("ref_loss").type == pa.list_(pa.float32())
    lengths = []
    for record, found in zip(given, losses, strict=True):
        tokens = encode(record["text"])
        # Another order of float32 sums in a batch; losses are about 8.
        torch.testing.assert_close(
            torch.tensor(found), slow_losses(model, tokens), rtol=0, atol=1e-5
        )
        lengths.append(len(found))
    assert max(lengths) > 2 * SEQ_LEN
    assert min(lengths) == 1


@pytest.mark.processes
def test_two_ranks_find_what_one_finds(scored):
    """The number of ranks changes who scores a document, and nothing else."""
    one, two = (pq.read_table(scored(ranks, "token"))["ref_loss"] for ranks in (1, 2))
    for a, b in zip(one.to_pylist(), two.to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-5)  # another order of float32 sums


@pytest.mark.processes
def test_per_document_is_the_mean_of_its_tokens(scored):
    """One float32 for each document."""
    tokens = pq.read_table(scored(1, "token"))["ref_loss"].to_pylist()
    documents = pq.read_table(scored(2, "document"))
    assert documents.schema.field("ref_loss").type == pa.float32()
    expected = [sum(x) / len(x) for x in tokens]
    assert documents["ref_loss"].to_pylist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.processes
def test_references_of_several_names_stand_side_by_side(tmp_path):
    """Each has a column of its own, and the next one keeps those that are there."""
    losses = [np.array([1.0, 2.0], np.float32)]
    for name, before in (("a", {}), ("b", {"ref_loss_a": [3.0, 4.0]})):
        records = write_lines(tmp_path / "x.jsonl", [{"text": "t", **before}])
        config = DomainTextDataLoader.Config(dataset=str(records), domain_column="")
        source = score_data.open_source(config, column=f"ref_loss_{name}")
        made = {"column": f"ref_loss_{name}", "per": "token", "checkpoint": "it"}
        blocks = iter([([*source.records()], losses)])
        score_data.write(tmp_path / "out.parquet", source.schema, blocks, made)
        found = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
        assert found.pop(f"ref_loss_{name}") == [1.0, 2.0]
        assert found == {"text": "t", **before}
    words = ["score", "c", "--out", "s.parquet", "--name", "a b"]
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "'a b' is no name" in done.output


@pytest.mark.slow
def test_a_file_says_how_it_was_made(scored, seed, data):
    """Which checkpoint, at which step, and with what row length; what else it takes to redo it."""
    made = score_data.provenance(scored(2, "document"))
    assert made["checkpoint"] == str((seed / "step-0").resolve())
    assert made["step"] == 0
    assert made["config"] == "small.debugmodel"
    assert made["model"] == "llama3 debugmodel"
    assert (made["seq_len"], made["per"], made["data"]) == (SEQ_LEN, "document", str(data))
    assert set(made["versions"]) == {"torch", "torchtitan", "weighting"}
    assert made["documents"] == 27
    whole = score_data.provenance(scored(1, "token"))
    assert made["tokenizer"] == whole["tokenizer"]
    losses = pq.read_table(scored(1, "token"))["ref_loss"].combine_chunks().flatten().to_numpy()
    assert whole["tokens"] == len(losses)
    assert whole["mean_loss"] == pytest.approx(losses.mean(dtype=np.float64))


@pytest.mark.processes
def test_doremi_trains_on_a_loss_per_document(scored, tmp_path):
    """The file is data like any other, and the spec finds the column by itself."""
    flags = [*MODEL, *SMALL, "--training.steps=2", f"--dump_folder={tmp_path}"]
    done = weighting("train", "doremi-proxy", "--data", scored(2, "document"), *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "weighting" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.processes
def test_training_reads_a_token_s_loss_at_that_token(scored, seed, tmp_path):
    """A model that starts as the checkpoint is ahead of it nowhere; one step later it is."""
    shutil.copytree(seed, tmp_path / "dump" / "checkpoint")
    flags = [f"--dataloader.dataset_path={scored(1, 'token')}", "--checkpoint.enable"]
    flags += ["--weighting.spec=excess_loss -> temperature(1)", "--checkpoint.interval=1000"]
    flags += [*SMALL, "--training.steps=2"]
    drive(tmp_path, 1, "noting", "debugmodel", *flags)
    first, second = torch.load(tmp_path / "dump" / "notes0.pt")
    # Rows of the first batch start with the beginning of a document; so do documents within a row.
    torch.testing.assert_close(first["loss"], first["ref_loss"], rtol=0, atol=1e-5)
    assert (second["loss"] - second["ref_loss"]).abs().max() > 1e-2


@pytest.mark.processes
def test_a_checkpoint_of_another_model_is_one_message_and_status_2(data, model, tmp_path):
    """Two ranks agree and the first one says what does not fit; there is no file, nor half one."""
    other, out = tmp_path / "step-7", tmp_path / "out"
    out.mkdir()
    state = model.state_dict() | {"layers.0.attention_norm.weight": torch.ones(32)}
    dcp.save(state, checkpoint_id=other, no_dist=True)
    given = ["--data", data, "--out", out / "a.parquet", "--ranks", 2]
    done = weighting("score", other, *given, *MODEL, *SMALL)
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert output.count("error: ") == 1
    message = f"CHECKPOINT: {other} is no checkpoint of llama3 debugmodel: layers.0.attention_norm"
    assert f"error: {message}" in output
    assert "weighting score takes any, with the --config it was trained with" in output
    assert "Traceback" not in output
    assert list(out.iterdir()) == []


@pytest.fixture
def one_rank():
    """Join a process group of this process alone."""
    cpu.use_cpu()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def labels_and_places(inputs, positions, labels):
    """Return what tells where a loss came from: the label, and its place in the window."""
    assert inputs.shape == positions.shape == labels.shape == (3, SEQ_LEN)
    starts = (positions == 0) & (labels != -100)
    assert inputs[starts].eq(0).all(), "every window of these documents begins with a 0"
    return labels.float() + positions.float() / 1024


def with_zeros(text):
    """Return tokens that are their own places but for a 0 where a window begins."""
    return [0 if i % SEQ_LEN == 0 else i for i in range(int(text))]


@pytest.mark.usefixtures("one_rank")
def test_every_loss_is_put_where_its_token_is(monkeypatch, caplog):
    """Whatever the lengths, and however many records are written at once; each time it is told."""
    monkeypatch.setattr(score_windows, "_BLOCK", (7, 1_000))
    lengths = [0, 1, 2, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, 10 * SEQ_LEN + 5]
    lengths += torch.randint(0, 3 * SEQ_LEN, (40,)).tolist()
    records = [(f"record {i}", {"text": str(length)}) for i, length in enumerate(lengths)]
    source = score_data.Source("it", Columns(), pa.schema([]), len(records), lambda: iter(records))
    cut = Cut(SEQ_LEN, 3, 0, 1)
    with caplog.at_level("INFO"):
        blocks = [*score_windows.scored_blocks(source, with_zeros, labels_and_places, cut)]

    told = [record.message for record in caplog.records]
    assert told == [f"Scored {done} of 47 documents" for done in (*range(7, 47, 7), 47)]
    assert [len(found) for _, found in blocks] == [7] * 6 + [5]
    assert [record for some, _ in blocks for record in some] == records
    found = [losses for _, some in blocks for losses in some]
    for length, losses in zip(lengths, found, strict=True):
        tokens = with_zeros(length)[1:]
        expected = [token + i % SEQ_LEN / 1024 for i, token in enumerate(tokens)]
        assert losses.tolist() == expected
        assert losses.dtype == np.float32


def test_rows_are_full_where_windows_allow_it():
    """Every window is in one row, no row is too long, and few tokens are padding."""
    lengths = torch.randint(1, 4 * SEQ_LEN, (300,)).tolist()
    pieces = score_windows.windows(lengths, SEQ_LEN)
    rows = score_windows.packed(pieces, SEQ_LEN)
    assert sorted(i for row in rows for piece in row for i in piece) == [*range(sum(lengths))]
    assert all(sum(map(len, row)) <= SEQ_LEN for row in rows)
    assert sum(lengths) > 0.95 * SEQ_LEN * len(rows)


def opened(path, **settings):
    """Open a source as the loader's configuration would."""
    replaces = settings.pop("replaces", False)
    config = DomainTextDataLoader.Config(dataset_path=str(path), **settings)
    return score_data.open_source(config, replaces=replaces)


def read_back(source, tmp_path):
    """Write a source with a loss of 1 for each document, and read the file."""
    records = [*source.records()]
    losses = [np.ones(2, np.float32)] * len(records)
    made = {"column": "ref_loss", "per": "document", "checkpoint": "it"}
    score_data.write(tmp_path / "out.parquet", source.schema, iter([(records, losses)]), made)
    return pq.read_table(tmp_path / "out.parquet").drop_columns("ref_loss").to_pylist()


def test_columns_are_kept_if_parquet_can_hold_them(tmp_path, caplog):
    """Missing values, numbers that turn out to have fractions, records within records."""
    records = [{"text": "a", "n": 1, "late": None, "this": 1, "that": {}, "meta": {"k": [1]}}]
    records *= 1_500
    records += [{"text": "b", "n": 2.5, "late": "x", "this": "y", "meta": {"k": [2], "j": "z"}}]
    source = opened(write_lines(tmp_path / "data.jsonl", records), domain_column="")
    assert "Left out, as Parquet cannot hold such columns: this, that" in caplog.text
    found = read_back(source, tmp_path)
    assert source.total == len(found) == 1_501
    assert found[0] == {"text": "a", "n": 1, "late": None, "meta": {"k": [1], "j": None}}
    assert found[-1] == {"text": "b", "n": 2.5, "late": "x", "meta": {"k": [2], "j": "z"}}


def test_files_of_a_folder_are_joined_in_order(tmp_path):
    """Parquet keeps its own types, and a column that only some files have."""
    folder = tmp_path / "data"
    folder.mkdir()
    table = pa.table({"body": ["c", ""], "small": pa.array([1, 2], pa.int16())})
    pq.write_table(table, folder / "b.parquet")
    write_lines(folder / "a.jsonl", [{"body": "a", "meta": {"kind": "x"}}])
    pq.write_table(table.drop_columns("small"), folder / "c.parquet")
    source = opened(folder, text_column="body")
    assert source.schema.field("small").type == pa.int16()
    assert [(x["body"], x["small"], x["meta"]) for x in read_back(source, tmp_path)] == [
        ("a", None, {"kind": "x"}),
        ("c", 1, None),
        ("", 2, None),
        ("c", None, None),
        ("", None, None),
    ]


def test_a_hugging_face_data_set_and_the_built_in_text_are_sources(tmp_path, monkeypatch):
    """By index, with all columns; a streamed one is refused."""
    rows = [{"text": f"t{i}", "kind": {"name": "x"}} for i in range(3)]
    monkeypatch.setattr(
        score_data, "open_hub", lambda *_args, **_: datasets.Dataset.from_list(rows)
    )
    config = DomainTextDataLoader.Config(dataset="some/data", domain_column="kind.name")
    assert read_back(score_data.open_source(config), tmp_path) == rows
    config.streaming = True
    with pytest.raises(ValueError, match=r"some/data is streamed.*--dataloader.no-streaming"):
        score_data.open_source(config)
    built_in = score_data.open_source(DomainTextDataLoader.Config(split="validation"))
    found = read_back(built_in, tmp_path)
    assert set(found[0]) == {"text", "domain"}
    assert len(found) == built_in.total > 10


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([{"body": "x"}], {}, r"data.jsonl:1: no column 'text'.* are: body. Set --dataloader.text"),
        ([{"text": "x"}, {"text": 3}], {}, r"data.jsonl:2: text column 'text' holds int"),
        ([{"text": ""}], {}, r"data.jsonl: no text in any record of split 'train'"),
        ([{"text": "x"}], {"domain_column": "kind"}, r"data.jsonl:1: no column 'kind'"),
        (
            [{"text": "x", "domain": 1}, {"text": "x", "domain": "a"}],
            {},
            r"column 'domain' holds values of several types",
        ),
        (
            [{"text": "x", "ref_loss": 1.0}],
            {},
            r"has a column 'ref_loss' already; --overwrite replaces it",
        ),
    ],
)
def test_wrong_data_is_named_before_anything_is_scored(records, settings, message, tmp_path):
    """With the place and what to do."""
    path = write_lines(tmp_path / "data.jsonl", records)
    with pytest.raises(ValueError, match=message):
        opened(path, **settings)


def test_files_that_are_not_there_or_broken_are_named(tmp_path):
    """As the loader would."""
    with pytest.raises(ValueError, match=r"nothing.jsonl: no such file or directory"):
        opened(tmp_path / "nothing.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(ValueError, match=r"bad.parquet: not a readable Parquet file"):
        opened(tmp_path / "bad.parquet")


def test_a_column_of_that_name_is_replaced_when_asked(tmp_path):
    """A file that was scored before can be scored again."""
    path = write_lines(tmp_path / "data.jsonl", [{"text": "x", "ref_loss": 7.0}])
    source = opened(path, replaces=True)
    assert source.schema.names == ["text"]


WRITTEN = pa.schema([("text", pa.string())])


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path):
    """One message, the old file as it was, and no part of a new one."""
    out = tmp_path / "out.parquet"
    out.write_text("old")
    block = [("record 0", {"text": "x"})], [np.ones(3, np.float32)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if 100 bytes were free
    try:
        with pytest.raises(ValueError, match=r"--out .*out.parquet: cannot write it: File too l"):
            score_data.write(
                out,
                WRITTEN,
                iter([block]),
                {"column": "ref_loss", "per": "token", "checkpoint": "it"},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert out.read_text() == "old"


def test_a_model_gone_wrong_leaves_nothing_behind(tmp_path):
    """A loss that is no number is refused here, as training would refuse it."""
    good = [("record 0", {"text": "x"})], [np.ones(3, np.float32)]
    bad = [("record 1", {"text": "y"})], [np.array([1, np.nan], np.float32)]
    made = {"column": "ref_loss", "per": "token", "checkpoint": "the checkpoint"}
    with pytest.raises(ValueError, match=r"record 1: a loss is NaN or infinite under the checkp"):
        score_data.write(tmp_path / "out.parquet", WRITTEN, iter([good, bad]), made)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_predict_counts_as_no_loss(tmp_path):
    """A document of a single token has no loss per token, and a mean that training accepts."""
    block = [("record 0", {"text": ""})], [np.ones(0, np.float32)]
    for per, expected in {"token": [], "document": 0.0}.items():
        made = {"column": "ref_loss", "per": per, "checkpoint": "it"}
        score_data.write(tmp_path / "out.parquet", WRITTEN, iter([block]), made)
        assert pq.read_table(tmp_path / "out.parquet")["ref_loss"].to_pylist() == [expected]


def test_another_tokenizer_has_another_fingerprint(tmp_path):
    """Even one of the same size; and the same one has the same."""
    config = config_registry.llama3_debugmodel()
    assets = Path(config.hf_assets_path)
    tokenizer = config.tokenizer.build(tokenizer_path=str(assets))
    shutil.copytree(assets, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    other = config.tokenizer.build(tokenizer_path=str(path.parent))
    assert other.get_vocab_size() == tokenizer.get_vocab_size()
    again = config.tokenizer.build(tokenizer_path=str(assets))
    assert score.fingerprint(tokenizer) == score.fingerprint(again) != score.fingerprint(other)


@pytest.mark.parametrize(
    ("checkpoint", "more", "message"),
    [
        ("nothing", [], "error: CHECKPOINT {tmp}/nothing: no such folder"),
        (".", [], "error: CHECKPOINT {tmp}: no checkpoint here, neither .metadata nor"),
        (".", ["--out", "{tmp}/a.jsonl"], "--out {tmp}/a.jsonl: give it a name that ends in .par"),
        (".", ["--out", "{tmp}/b/a.parquet"], "--out {tmp}/b/a.parquet: no folder {tmp}/b"),
        (".", ["--out", "{tmp}/old.parquet"], "error: --out {tmp}/old.parquet: exists already; ch"),
        (".", ["--config", "llama3_9b"], "error: no config function 'llama3_9b'; did you mean 'l"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(checkpoint, more, message, tmp_path):
    """One line, status 2."""
    (tmp_path / "old.parquet").touch()
    given = [str(tmp_path / checkpoint), "--out", "{tmp}/new.parquet", *more]
    done = run(*(word.format(tmp=tmp_path) for word in given))
    assert done.exit_code == 2
    assert done.stderr.startswith(message.format(tmp=tmp_path))
    assert done.stderr.count("\n") == 1


def test_layouts_that_cut_layers_or_rows_are_refused():
    """With the flag that undoes it."""
    for name in ("pipeline", "context"):
        config = config_registry.llama3_debugmodel()
        score._refuse_unsupported(config)
        setattr(config.parallelism, f"{name}_parallel_degree", 2)
        with pytest.raises(ValueError, match=f"set --parallelism.{name}_parallel_degree 1"):
            score._refuse_unsupported(config)


def run(*arguments):
    """Return what the command did in this process."""
    return click.testing.CliRunner().invoke(main, ["score", *arguments])


def test_help_fits_a_terminal_and_has_examples():
    """80 columns; each example is a line of its own."""
    done = run("--help")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "    weighting train rho-1 --data s.parquet" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["here"], "Missing option '--out'"),
        (["here", "--out", "a.parquet", "--per", "word"], "'word' is not one of 'token', 'docum"),
        (["here", "--out", "a.parquet", "--ranks", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_is_status_2(arguments, message):
    """Said by the command line itself, at once."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_options_and_torchtitans_flags_are_told_apart(monkeypatch):
    """Options come by name, further flags as they were written."""
    called = {}
    monkeypatch.setattr(score, "main", lambda **options: called.update(options) or 0)
    done = run("here", "--out", "a.parquet", "--overwrite", "--config=a", "--training.seq_len=8")
    assert done.exit_code == 0
    flags = called.pop("flags")
    assert [*flags] == ["--training.seq_len=8"]
    assert {name: value for name, value in called.items() if value is not None} == {
        "checkpoint": "here",
        "config": "a",
        "module": "titan_integration",
        "out": "a.parquet",
        "overwrite": True,
        "per": "token",
    }

"""Columns of numbers: each document's own, or each token's, exactly, down to the weights."""

import functools
import itertools
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import drive, torchrun
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

import weighting as wt
from titan_integration import config_registry
from titan_integration.data import loader as loading
from titan_integration.data.documents import hub_documents
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.packing import Cut, PackedRows
from titan_integration.data.records import Columns
from titan_integration.data.signals import data_columns, of_the_text, short_contexts
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.state.run import start
from titan_integration.trainer.preflight import ask_for_columns, refuse_unsupported
from weighting.build import plan_of
from weighting.contract.levels import documents

COUNT = 60
NAMES = ["score", "meta.quality", "ref_loss"]
RECORDS = [
    {
        "text": f"{i} " + "loss weight token " * (1 + i * 7 % 40),
        "domain": f"document {i:02d}",  # Its own, so that a token's domain tells its document.
        "score": [0.1 + i, i, -1e-8 * i][i % 3],
        "meta": {"quality": i / 7},
        "ref_loss": 6 + i % 5 / 2,
    }
    for i in range(COUNT)
]
SCORES = torch.tensor([r["score"] for r in RECORDS], dtype=torch.float32)
QUALITIES = torch.tensor([r["meta"]["quality"] for r in RECORDS], dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    """Load the embedded tokenizer, which the trainers of this module load too."""
    return HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write the records, one a line."""
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def build(tokenizer):
    """Build one rank's loader: ``build(path, rank, num_ranks, **config)``."""

    def build(path, rank=0, num_ranks=1, local_batch=4, seq_len=64, **config):
        return DomainTextDataLoader.Config(dataset=str(path), **config).build(
            dp_world_size=num_ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=local_batch,
        )

    return build


def agrees(batches):
    """Check every token's numbers against those of its document, exactly; return the batches."""
    batches = list(batches)
    assert batches
    for inputs, _ in batches:
        assert inputs["columns.score"].dtype == torch.float32
        assert torch.equal(inputs["columns.score"], SCORES[inputs["domain_ids"]])
        assert torch.equal(inputs["columns.meta.quality"], QUALITIES[inputs["domain_ids"]])
    return batches


def same(batches, others):
    """Tell whether two lists of batches are equal."""
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a[name], b[name]) for (a, _), (b, _) in pairs for name in a)


def taken(loader, steps):
    """Take a few batches."""
    return list(itertools.islice(loader, steps))


@pytest.mark.slow
def test_every_token_has_its_documents_numbers(build, file):
    """On one rank and on three, over two epochs, with a worker, and from a resumed state."""
    whole = agrees(taken(build(file, columns=NAMES, local_batch=6), 30))
    parts = [taken(build(file, r, 3, local_batch=2, columns=NAMES), 30) for r in range(3)]
    for (inputs, _), *ranks in zip(whole, *parts, strict=True):
        for name, value in inputs.items():
            assert torch.equal(value, torch.cat([rank[name] for rank, _ in ranks])), name
    assert same(whole[:9], taken(build(file, columns=NAMES, local_batch=6, num_workers=2), 9))

    first = build(file, columns=NAMES, local_batch=6)
    taken(first, 7)
    second = build(file, columns=NAMES, local_batch=6)
    second.load_state_dict(first.state_dict())
    assert same(agrees(taken(second, 5)), whole[7:12])


def test_columns_change_nothing_else(build, file):
    """The rows are those without columns, and so is the saved state, but for their digests."""
    plain, rich = build(file), build(file, columns=NAMES)
    for (a, x), (b, y) in zip(taken(plain, 5), taken(rich, 5), strict=True):
        assert b.keys() - a.keys() == {f"columns.{name}" for name in NAMES}
        assert torch.equal(x, y)
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    states = plain.state_dict(), rich.state_dict()
    made_from = [json.loads(state.pop("made_from")) for state in states]
    content = [facts.pop("content") for facts in made_from]
    assert states[0] == states[1]
    assert made_from[0] == made_from[1]
    assert (content[0]["columns"], [*content[1]["columns"]]) == ({}, sorted(NAMES))


def test_every_kind_of_source_has_columns(build, file, tmp_path):
    """Parquet, streamed files, and data sets of Hugging Face give the same numbers."""
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
    expected = taken(build(file, columns=NAMES), 8)
    assert same(expected, taken(build(tmp_path / "x.parquet", columns=NAMES), 8))

    names = [record["domain"] for record in RECORDS]
    for path in (file, tmp_path / "x.parquet"):
        agrees(taken(build(path, columns=NAMES, streaming=True, domains=names), 8))

    hub = datasets.Dataset.from_list(RECORDS)
    documents = hub_documents(hub, Columns(numbers=tuple(NAMES)), None, "hub")
    assert documents.columns == tuple(NAMES)
    assert np.array_equal(documents.numbers[0], SCORES.numpy())
    assert np.array_equal(documents.numbers[1], QUALITIES.numpy())
    bare = hub_documents(hub.select_columns(["text"]), Columns(), None, "hub")
    assert bare.names == ("all",)


def test_documents_are_numbered_where_a_spec_remembers_examples(build, file, monkeypatch):
    """From 0 in the order of the data, beside other columns; a stream has a column of its own."""
    domains = [record["domain"] for record in RECORDS]
    loader = build(file, columns=["score", "example"], domains=domains)
    for inputs, _ in itertools.islice(loader, 5):
        assert torch.equal(inputs["columns.example"], inputs["domain_ids"].float())
        assert torch.equal(inputs["columns.score"], SCORES[inputs["domain_ids"]])
    with pytest.raises(ValueError, match="no column 'example'"):
        next(iter(build(file, columns=["example"], streaming=True, domains=domains)))
    monkeypatch.setattr(loading, "_MOST_EXAMPLES", COUNT - 1)
    with pytest.raises(
        ValueError, match=rf"{COUNT} documents, and at most {COUNT - 1} can be told"
    ):
        build(file, columns=["example"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r":2: no column 'score'; there are: text\. .*give every record a number 'score'$"),
        ({"scores": 1}, r":2: no column 'score' \(did you mean scores\?\)"),
        ({"score": None}, ":2: column 'score' holds no value, not a number"),
        ({"score": "1.5"}, ":2: column 'score' holds str, not a number"),
        ({"score": True}, ":2: column 'score' holds bool, not a number"),
        ({"score": {}}, "holds dict, not a number; a column has one number for each document, or"),
        ({"score": [1, "2"]}, r":2: column 'score\[1\]' holds str, not a number; .* or a list of"),
        ({"score": [False, 1]}, r":2: column 'score\[0\]' holds bool, not a number"),
        ({"score": [1, 2, None]}, r":2: column 'score\[2\]' holds no value, not a number"),
        ({"score": [[1.0]]}, r":2: column 'score\[0\]' holds list, not a number"),
        ({"score": [0.5, float("nan")]}, r":2: column 'score\[1\]' holds nan, which is not a fin"),
        ({"score": [1e39]}, r":2: column 'score\[0\]' holds 1e\+39, which is not a finite 32-bit"),
        ({"score": float("nan")}, ":2: column 'score' holds nan, which is not a finite 32-bit"),
        ({"score": float("-inf")}, ":2: column 'score' holds -inf"),
        ({"score": 1e39}, r":2: column 'score' holds 1e\+39, .*; repair the value or drop"),
        ({"score": 10**400}, ":2: column 'score' holds 1000"),
    ],
)
def test_a_bad_value_is_named_with_its_place(build, tmp_path, value, message):
    """What is no number is found when the loader is built."""
    lines = [{"text": "good", "score": 1}, {"text": "bad"} | value]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, columns=["score"])


def test_every_kind_of_source_names_a_missing_column(build, file, tmp_path):
    """So do Parquet, streams, Hugging Face and the built-in text; ref_loss has another way out."""
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 0: no column 'nope'; there are: text, domain, sc"):
        build(tmp_path, columns=["nope"])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: no column 'meta\.nope'"):
        build(file, columns=["meta.nope"], streaming=True, domain_column="")
    with pytest.raises(ValueError, match=r"hub: record 0: no column 'nope'"):
        hub_documents(datasets.Dataset.from_list(RECORDS), Columns(numbers=("nope",)), None, "hub")
    bad = datasets.Dataset.from_list([*RECORDS, RECORDS[0] | {"score": None}])
    with pytest.raises(ValueError, match=r"hub: record 60: column 'score' holds no value"):
        hub_documents(bad, Columns(numbers=("score",)), None, "hub")
    with pytest.raises(ValueError, match=r"'stdlib': no column 'ref_loss'; .* --weighting\.ref"):
        build("stdlib", columns=["ref_loss"])
    without = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "y.jsonl").write_text("\n".join(map(json.dumps, without)))
    both = r"give every record a number 'ref_loss', or give a model.*--weighting\.reference CHECK"
    with pytest.raises(ValueError, match=both):
        build(tmp_path / "y.jsonl", columns=["ref_loss"])


@pytest.fixture(scope="module")
def scored(tokenizer):
    """Return records whose numbers are the labels themselves, one for each predicted token."""
    encode = [tokenizer.encode(r["text"], add_bos=True, add_eos=True) for r in RECORDS]
    return [
        {"text": r["text"], "domain": "ab"[i % 2], "ref_loss": [x + 0.5 for x in ids[1:]]}
        for i, (r, ids) in enumerate(zip(RECORDS, encode, strict=True))
    ]


def follows_the_labels(batches):
    """Check that every token's number is the one of its label; return the batches."""
    batches = list(batches)
    for inputs, labels in batches:
        assert inputs["columns.ref_loss"].dtype == torch.float32
        assert torch.equal(inputs["columns.ref_loss"], labels + 0.5)
    assert batches
    return batches


@pytest.mark.slow
def test_a_number_for_each_token_stays_with_its_label(build, scored, tmp_path):
    """Across cuts, epochs, ranks, workers and resumed states, and in rows of one domain."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in scored))
    common = {"columns": ["ref_loss"], "local_batch": 6}
    whole = follows_the_labels(taken(build(path, **common), 60))
    parts = [taken(build(path, r, 3, local_batch=2, columns=["ref_loss"]), 20) for r in range(3)]
    for rank in parts:
        follows_the_labels(rank)
    assert same(whole[:9], follows_the_labels(taken(build(path, **common, num_workers=2), 9)))
    first, second = build(path, **common), build(path, **common)
    taken(first, 7)
    second.load_state_dict(first.state_dict())
    assert same(follows_the_labels(taken(second, 5)), whole[7:12])
    follows_the_labels(taken(build(path, **common, rows="drawn"), 60))
    follows_the_labels(taken(build(path, **common, rows="turns"), 60))


@pytest.mark.slow
def test_every_kind_of_source_has_numbers_for_each_token(build, scored, tokenizer, tmp_path):
    """Parquet, streamed files, and data sets of Hugging Face."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in scored))
    pq.write_table(pa.Table.from_pylist(scored), tmp_path / "x.parquet")
    expected = taken(build(tmp_path / "x.jsonl", columns=["ref_loss"]), 20)
    assert same(expected, taken(build(tmp_path / "x.parquet", columns=["ref_loss"]), 20))
    streamed = {"columns": ["ref_loss"], "streaming": True, "domains": ["a", "b"]}
    for path in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        for rows in ("mixed", "turns"):
            follows_the_labels(taken(build(path, rows=rows, **streamed), 60))

    hub = datasets.Dataset.from_list(scored)
    documents = hub_documents(hub, Columns(numbers=("ref_loss",)), None, "hub")
    assert all(values.dtype == np.float32 for values in documents.numbers[0])
    encode = functools.partial(tokenizer.encode, add_bos=True, add_eos=True)
    rows = PackedRows(documents, encode, Cut(64, 4, 0, 1), rows="mixed", seed=0, infinite=True)
    assert same(expected, [(inputs, labels) for inputs, labels, _ in itertools.islice(rows, 20)])


def test_documents_may_have_one_number_or_many(build, scored, tmp_path):
    """In one column some documents have a number for each token and others one for all."""
    some = [r | ({"ref_loss": 7} if r["domain"] == "a" else {}) for r in scored]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    for inputs, labels in taken(build(tmp_path / "x.jsonl", columns=["ref_loss"]), 40):
        expected = torch.where(inputs["domain_ids"] == 0, 7.0, labels + 0.5)
        assert torch.equal(inputs["columns.ref_loss"], expected)


def test_numbers_of_another_tokenizer_are_refused(build, scored, tokenizer, tmp_path):
    """With the place, both lengths, and what to do; a single one too many, from every source."""
    need = len(scored[0]["ref_loss"])
    bad = [scored[0] | {"ref_loss": [1.0] * (need + 1)}, *scored[1:]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
    what = (
        rf"column 'ref_loss' has {need + 1} numbers, but the text has {need} tokens to predict; "
        "score the data again with this tokenizer: weighting score"
    )
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: {what}"):
        build(tmp_path / "x.jsonl", columns=["ref_loss"])
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: {what}"):
        build(tmp_path / "x.jsonl", columns=["ref_loss"], streaming=True, domains=["a", "b"])
    columns = Columns(numbers=("ref_loss",))
    hub = hub_documents(datasets.Dataset.from_list(bad), columns, None, "hub")
    encode = functools.partial(tokenizer.encode, add_bos=True, add_eos=True)
    rows = PackedRows(hub, encode, Cut(64, 4, 0, 1), rows="mixed", seed=0, infinite=True)
    with pytest.raises(ValueError, match=f"hub: record 0: {what}"):
        rows.check_size("hub")
    # Not the first document of the file: found when it is read.
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in [*scored[1:], bad[0]])
    )
    with pytest.raises(ValueError, match=rf"x\.jsonl:60: {what}"):
        taken(build(tmp_path / "x.jsonl", columns=["ref_loss"]), 60)


def test_names_of_computed_columns_are_no_data():
    """A loss on a short context and an entropy of the largest logits are in no file."""
    needs = frozenset(
        {"loss", "columns.score", "columns.a.b", "columns.short_loss_32", "columns.topk_entropy_20"}
    )
    assert data_columns(needs) == ["a.b", "score"]
    assert short_contexts(needs) == {"columns.short_loss_32": 32}
    odd = frozenset({"columns.short_loss_0", "columns.short_loss_x", "columns.my_short_loss_3"})
    assert short_contexts(odd) == {}
    assert len(data_columns(odd)) == 3


def test_the_loader_is_asked_for_what_the_spec_reads():
    """Columns are added to the user's; ref_loss unless there is a model; a validator's stay."""
    config = config_registry.llama3_debugmodel()
    config.validator.dataloader = config.dataloader = DomainTextDataLoader.Config(columns=["b"])
    ask_for_columns(config, frozenset({"loss"}))
    assert config.dataloader.columns == ["b"]
    ask_for_columns(config, frozenset({"columns.a", "columns.b", "columns.short_loss_8"}))
    assert config.dataloader.columns == ["b", "a"]
    assert config.validator.dataloader.columns == ["b"]
    config.weighting.reference = "somewhere"
    ask_for_columns(config, frozenset({"ref_loss"}))
    assert config.dataloader.columns == ["b", "a"]
    config.weighting.reference = ""
    ask_for_columns(config, frozenset({"ref_loss"}))
    assert config.dataloader.columns == ["b", "a", "ref_loss"]

    config.dataloader = HuggingFaceTextDataLoader.Config()
    ask_for_columns(config, frozenset({"columns.a"}))
    refuse_unsupported(config, plan_of(wt.loads("column(a) -> mean_one")))


def test_a_loader_without_the_signals_is_named():
    """What a loader does not yield is said at the first batch; tensors stay where they are."""
    fn = wt.build(wt.loads("column(a) -> mean_one"))
    run = start(fn, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"reads columns.a, but the data loader yields no 'col"):
        run.microbatches.set_batch({"domain_ids": torch.zeros(1, 2, dtype=torch.int64)})
    run.microbatches.set_batch(
        {"columns.a": torch.tensor([[1.0, 3.0]]), "columns.b": torch.ones(1, 2)}
    )
    assert run.microbatches._current.given.keys() == {"columns.a"}
    address = run.microbatches._current.given["columns.a"].data_ptr()
    run.microbatches.set_batch({"columns.a": torch.tensor([[1.0, 4.0]])})
    assert run.microbatches._current.given["columns.a"].data_ptr() == address
    known = run.microbatches._current.known(torch.ones(1, 2, dtype=torch.int64))
    out = run.weigh({**known, "loss": torch.ones(1, 2)})
    torch.testing.assert_close(out.token, torch.tensor([[0.4, 1.6]]))

    fn = wt.build(wt.loads("excess_loss -> select(0.6)"))
    run = start(fn, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no 'columns.ref_loss'; .*or give a model: --weighting"):
        run.microbatches.set_batch({})


def test_documents_of_packed_rows_count_alike(build, file):
    """With reduction: document_mean each piece of a document in a row of the loader has one say."""
    inputs, labels = next(iter(build(file, seq_len=256)))
    assert (inputs["positions"] == 0).sum() > len(labels)  # several documents in a row
    loss = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) * 5
    fn = wt.build(wt.loads("version: 1\nreduction: document_mean\npipeline: uniform\n"))
    segments = documents(inputs["positions"])
    weights = fn(wt.Signals(loss=loss, segment_ids=segments), 1).token

    pieces = []
    for places, losses in zip(inputs["positions"].tolist(), loss.tolist(), strict=True):
        for place, x in zip(places, losses, strict=True):
            if place == 0:
                pieces.append([])
            pieces[-1].append(x)
    expected = sum(sum(piece) / len(piece) for piece in pieces) / len(pieces)
    assert ((weights * loss).sum() / loss.numel()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.processes
def test_a_column_is_the_weight_on_two_ranks(build, file, tmp_path):
    """Five steps of column(meta.quality) weigh each token by the number of its document."""
    flags = ["--weighting.spec=column(meta.quality) -> mean_one", "--training.local_batch_size=2"]
    flags += [f"--dataloader.dataset_path={file}", "--validator.enable", "--validator.freq=5"]
    flags += ["--validator.steps=1"]  # on the built-in text, which has no columns
    two = drive(tmp_path, 2, "small", "debugmodel", *flags)

    batches = agrees(taken(build(file, columns=NAMES), 5))
    assert len(two[0]["weights"]) == 5
    assert two[0]["validations"]
    for step, (inputs, labels) in enumerate(batches):
        expected = inputs["columns.meta.quality"] * (labels != -100)
        expected = expected / expected.sum() * (labels != -100).sum()
        found = torch.cat([rank["weights"][step] for rank in two])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.processes
def test_losses_from_a_column_select_and_resume(file, tmp_path):
    """Five steps of Rho-1's selection from a column, and three and two more, are the same."""
    common = ["--weighting.spec=excess_loss -> select(0.6)", "--training.local_batch_size=4"]
    common += [f"--dataloader.dataset_path={file}", "--checkpoint.enable"]
    entry = ("small", "debugmodel")
    (five,) = drive(tmp_path, 1, *entry, *common, "--checkpoint.interval=3")
    shutil.rmtree(tmp_path / "dump" / "checkpoint" / "step-5")
    (rest,) = drive(tmp_path, 1, *entry, *common, "--checkpoint.interval=3")

    assert [step for step, _ in five["losses"]] == [1, 2, 3, 4, 5]
    for weights in five["weights"]:
        kept = weights[weights > 0]
        assert len(kept) == pytest.approx(0.6 * weights.numel(), abs=1)
        torch.testing.assert_close(kept, kept.mean().expand_as(kept))
    assert rest["losses"] == five["losses"][3:]
    for ours, theirs in zip(rest["weights"], five["weights"][3:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.processes
def test_a_missing_column_ends_with_one_message_and_status_2():
    """The built-in text has no losses of a reference; the two ways to give them are named."""
    flags = ["--module=small", "--config=debugmodel", "--training.seq_len=64"]
    done = torchrun(1, "-m", "torchtitan.train", *flags, "--weighting.spec=rho-1")
    assert done.returncode == 2
    assert done.stderr.count("error: 'stdlib': no column 'ref_loss'") == 1
    assert "--dataloader.dataset_path" in done.stderr
    assert "--weighting.reference" in done.stderr


def test_a_batch_tells_places_and_labels():
    """Positions and labels come from the batch, when a spec reads them, and not from its data."""
    needs = frozenset({"columns.position", "columns.token_id", "columns.quality", "loss"})
    labels = torch.tensor([[5, -100, 7]])
    told = of_the_text(needs, torch.tensor([[3, 0, 1]]), labels)
    assert {name: x.tolist() for name, x in told.items()} == {
        "columns.position": [[3.0, 0.0, 1.0]],
        "columns.token_id": [[5.0, 0.0, 7.0]],
    }
    assert of_the_text(needs, None, labels)["columns.position"].tolist() == [[0.0, 1.0, 2.0]]
    assert of_the_text(frozenset({"loss"}), None, labels) == {}
    assert data_columns(needs) == ["quality"]

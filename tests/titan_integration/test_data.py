"""The data loader: the same rows however they are cut, resumable, and clear about what is wrong."""

import functools
import itertools
import json
import logging
import os
import random
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forked import process
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_integration.data.builtin_text import DOMAINS, MAX_CHARS, read_stdlib, stdlib_text
from titan_integration.data.documents import hub_documents
from titan_integration.data.identity import tokenizer_digest
from titan_integration.data.loader import DomainTextDataLoader, load_documents
from titan_integration.data.packing import NUM_SHARDS
from titan_integration.data.records import Columns
from titan_integration.data.tokenizer import ensure_tokenizer

SEQ_LEN = 128
KEYS = ("input", "positions", "domain_ids")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Load the embedded tokenizer, from a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTING_CACHE", str(tmp_path_factory.mktemp("cache")))
        return HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))


@pytest.fixture
def build(tokenizer):
    """Build one rank's loader: ``build(rank, num_ranks, local_batch, **config)``."""

    def build(rank=0, num_ranks=1, local_batch=4, seq_len=SEQ_LEN, **config):
        return DomainTextDataLoader.Config(**config).build(
            dp_world_size=num_ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=local_batch,
        )

    return build


@pytest.fixture
def ranks(build, files):
    """Build the loaders of all ranks on local files: ``ranks(num_ranks, global_batch, ...)``."""

    def ranks(num_ranks, global_batch, **config):
        local_batch = global_batch // num_ranks
        config = {"dataset": str(files)} | config
        return [build(rank, num_ranks, local_batch, **config) for rank in range(num_ranks)]

    return ranks


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Write a directory with a JSON and a Parquet file of documents in three domains."""
    folder = tmp_path_factory.mktemp("files")
    records = make_records(300)
    write_json(folder / "a.jsonl", records[:200])
    pq.write_table(pa.Table.from_pylist(records[200:]), folder / "b.parquet")
    return folder


def make_records(count, start=0):
    """Make records of random words, between 1 and about 400 tokens long."""
    rng = random.Random(start)
    words = ["loss", "weight", "naïve", "token", "(x)", "42", "\n"]
    return [
        {
            "text": " ".join(rng.choices(words, k=rng.randint(1, 150))) + f" {i}",
            "domain": "cab"[i % 3],
            "meta": {"set": "xyz"[i % 3]},
        }
        for i in range(start, start + count)
    ]


def write_json(path, records):
    """Write one record a line."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def rows(loaders_or_iterators, steps):
    """Take the global batches of some steps: tensor [steps, 4, global batch, length]."""
    iterators = [iter(x) for x in loaders_or_iterators]
    taken = []
    for _ in range(steps):
        batches = [next(iterator) for iterator in iterators]
        parts = [torch.stack([*(x[k] for k in KEYS), y]) for x, y in batches]
        taken.append(torch.cat(parts, dim=1))
    return torch.stack(taken) if taken else None


def saved(loaders):
    """Merge the states of all ranks, as a distributed checkpoint does."""
    return functools.reduce(lambda a, b: a | b, [loader.state_dict() for loader in loaders])


def reference(documents, encode, count, seq_len=SEQ_LEN, seed=0):
    """Make global rows slowly, from the definition: deal, pack token by token, take turns."""
    num_shards = min(NUM_SHARDS, len(documents))

    def tokens(shard):
        for epoch in itertools.count():
            order = np.random.default_rng([seed, epoch]).permutation(len(documents))
            for i in order[shard::num_shards]:
                text, domain = documents[int(i)]
                ids = encode(text, add_bos=True, add_eos=True)
                for offset, (token, label) in enumerate(itertools.pairwise(ids)):
                    yield token, offset == 0, documents.names.index(domain), label

    streams = [tokens(shard) for shard in range(num_shards)]
    for g in range(count):
        row = list(itertools.islice(streams[g % num_shards], seq_len))
        positions, position = [], 0
        for _, starts, _, _ in row:
            position = 0 if starts else position
            positions.append(position)
            position += 1
        inputs, _, domain_ids, labels = zip(*row, strict=True)
        yield torch.tensor([inputs, positions, domain_ids, labels])


@pytest.mark.slow
def test_rows_agree_with_a_slow_reference(build, tokenizer):
    """Inputs, positions, domain ids and labels are those of the definition, over two turns."""
    loader = build(local_batch=8)
    documents = load_documents(DomainTextDataLoader.Config())
    assert loader.domains == documents.names
    steps = 2 * NUM_SHARDS // 8 + 1
    expected = torch.stack(list(reference(documents, tokenizer.encode, steps * 8)), dim=1)
    assert torch.equal(torch.cat(list(rows([loader], steps)), dim=1), expected)


@pytest.mark.slow
def test_small_data_repeats_and_agrees_with_the_reference(files, build, tokenizer):
    """Two epochs and more of local files, each in another order, are those of the definition."""
    small = files / "b.parquet"
    loader = build(local_batch=20, dataset=str(small), seed=5)
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(small)))
    expected = torch.stack(list(reference(documents, tokenizer.encode, 600, seed=5)), dim=1)
    assert torch.equal(torch.cat(list(rows([loader], 30)), dim=1), expected)
    assert max(loader.state_dict()[f"shard_{s:03d}"][0][0] for s in range(100)) >= 2


def test_a_batch_has_the_shapes_and_types_of_the_trainer(build):
    """A batch is what the trainer expects: int64 [B, L] tensors, labels apart."""
    inputs, labels = next(iter(build(local_batch=3)))
    assert set(inputs) == set(KEYS)
    for tensor in (*inputs.values(), labels):
        assert tensor.shape == (3, SEQ_LEN)
        assert tensor.dtype == torch.int64


@pytest.mark.slow
def test_segments_never_mix_documents(build, tokenizer):
    """In a segment labels are the next inputs, the domain is one, and ends are only at the end."""
    for inputs, positions, domain_ids, labels in rows([build()], 50).transpose(1, 2).flatten(0, 1):
        assert positions[0] == 0
        starts = [*(positions == 0).nonzero().flatten().tolist(), SEQ_LEN]
        for a, b in itertools.pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            assert torch.equal(labels[a : b - 1], inputs[a + 1 : b])
            assert len(domain_ids[a:b].unique()) == 1
            assert tokenizer.eos_id not in inputs[a:b]
            assert tokenizer.bos_id not in labels[a:b]
            if b < SEQ_LEN:
                assert labels[b - 1] == tokenizer.eos_id
            if a > 0:
                assert inputs[a] == tokenizer.bos_id


@pytest.mark.parametrize("global_batch", [12, 60, 7 * 12])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(ranks, num_ranks, global_batch):
    """Ranks together yield the rows of one rank, also where they have to share shards."""
    expected = rows(ranks(1, global_batch), 8)
    assert torch.equal(rows(ranks(num_ranks, global_batch), 8), expected)


def test_accumulated_batches_are_the_same_rows(ranks):
    """Two microbatches of half the size hold the rows of one, for gradient accumulation."""
    whole = torch.cat(list(rows(ranks(2, 8), 6)), dim=1)
    halves = torch.cat(list(rows(ranks(2, 4), 12)), dim=1)
    assert torch.equal(whole, halves)


def test_ranks_read_only_their_own_shards(ranks):
    """When the global batch divides the number of shards, no text is tokenized twice."""
    loaders = ranks(4, 8)
    rows(loaders, 3)
    shards = [{k for k in loader.state_dict() if k.startswith("shard")} for loader in loaders]
    assert sum(map(len, shards)) == NUM_SHARDS
    assert len(set.union(*shards)) == NUM_SHARDS


@pytest.mark.slow
def test_resumed_rows_are_the_uninterrupted_ones(ranks):
    """A state of some ranks continues exactly on as many or others, at any step."""
    expected = rows(ranks(1, 12), 65)
    for before, others in {1: (1, 2), 2: (2, 1), 3: (4,), 4: (3,)}.items():
        first, taken = ranks(before, 12), 0
        running = [iter(loader) for loader in first]
        for at in (0, 1, 7, 60):
            rows(running, at - taken)
            taken, state = at, saved(first)
            for after in others:
                second = ranks(after, 12)
                for loader in second:
                    loader.load_state_dict(state)
                assert torch.equal(rows(second, 5), expected[at : at + 5]), (before, after, at)


def test_resuming_where_ranks_share_shards(ranks):
    """Any rank's view of a shard will do, even when five ranks all read all of them."""
    expected = rows(ranks(1, 5), 60)[50:]
    first = ranks(5, 5)
    rows(first, 50)
    for states in (first, first[::-1]):
        second = ranks(1, 5)
        second[0].load_state_dict(saved(states))
        assert torch.equal(rows(second, 10), expected)


def test_a_state_resumes_twice_and_with_another_batch_size(ranks):
    """A state goes on from its row, also when the global batch is another one now."""
    expected = torch.cat(list(rows(ranks(1, 4), 30)), dim=1)
    first = ranks(2, 8)
    rows(first, 5)
    second = ranks(3, 6)
    for loader in second:
        loader.load_state_dict(saved(first))
    rows(second, 4)
    third = ranks(1, 4)
    third[0].load_state_dict(saved(second))
    assert torch.equal(torch.cat(list(rows(third, 5)), dim=1), expected[:, 64:84])


def test_iterating_again_starts_over(build):
    """A second iterator is not affected by the first."""
    loader = build()
    assert torch.equal(rows([loader], 3), rows([loader], 3))


@pytest.mark.processes
def test_worker_processes_change_nothing(build):
    """Two workers yield the same rows, and their state resumes without them."""
    expected = rows([build()], 14)
    loader = build(num_workers=2)
    iterator = iter(loader)
    assert torch.equal(rows([iterator], 9), expected[:9])
    resumed = build()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(rows([resumed], 5), expected[9:])
    del iterator


def save_as_rank(rank, rendezvous, checkpoint, tokenizer, files):
    """Be one of two ranks that save a checkpoint at step 5."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    loader = DomainTextDataLoader.Config(dataset=files).build(
        dp_world_size=2,
        dp_rank=rank,
        seq_len=128,
        local_batch_size=4,
        tokenizer=HuggingFaceTokenizer(tokenizer_path=tokenizer),
    )
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    dcp.save({"dataloader": loader}, checkpoint_id=checkpoint)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoint_of_two(tmp_path_factory, tokenizer, files):
    """Save a checkpoint at step 5 from two real ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    given = folder / "rendezvous", folder / "checkpoint", tokenizer.tokenizer_path, str(files)
    processes = [process(save_as_rank, rank, *given) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(300)
    assert [each.exitcode for each in processes] == [0, 0]
    return folder / "checkpoint"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_distributed_checkpoint_carries_the_state(ranks, num_ranks, checkpoint_of_two):
    """What two processes saved with torch's distributed checkpoint loads into one or four."""
    loaders = ranks(num_ranks, 8)
    for loader in loaders:
        dcp.load({"dataloader": loader}, checkpoint_id=checkpoint_of_two, no_dist=True)
    assert torch.equal(rows(loaders, 3), rows(ranks(1, 8), 8)[5:])
    assert sum(f.stat().st_size for f in checkpoint_of_two.iterdir()) < 1_000_000


@pytest.mark.slow
def test_finite_ranks_stop_together(ranks):
    """All ranks yield equally many batches, and leave out less than one global batch."""
    expected = list(ranks(1, 12, infinite=False)[0])
    for num_ranks in (2, 3, 4):
        loaders = [list(x) for x in ranks(num_ranks, 12, infinite=False)]
        assert {len(batches) for batches in loaders} == {len(expected)}
        for parts, (_, labels) in zip(zip(*loaders, strict=True), expected, strict=True):
            assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    single = list(ranks(1, 1, infinite=False)[0])
    assert len(single) // 12 == len(expected)


def test_finite_rows_hold_every_document_once(files, build, tokenizer):
    """One pass has all tokens of the text, but for the last row that is not full."""
    loader = build(local_batch=1, dataset=str(files), infinite=False)
    labels = torch.cat([labels.flatten() for _, labels in loader])
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(files)))
    total = sum(len(tokenizer.encode(text)) + 1 for text, _ in documents)
    assert len(labels) == total // SEQ_LEN * SEQ_LEN
    assert (labels == tokenizer.eos_id).sum() >= len(documents) - SEQ_LEN


@pytest.mark.slow
def test_a_finite_stream_resumes(build):
    """The end of a pass is reached from a state in the middle of it."""
    config = {"split": "validation", "infinite": False}
    expected = [labels for _, labels in build(**config)]
    loader = build(**config)
    rows([loader], 10)
    resumed = build(**config)
    resumed.load_state_dict(loader.state_dict())
    rest = [labels for _, labels in resumed]
    assert torch.equal(torch.stack(rest), torch.stack(expected[10:]))


def test_another_seed_gives_other_rows(build):
    """Which documents are in a row depends on the seed."""
    assert not torch.equal(rows([build(seed=1)], 2), rows([build(seed=2)], 2))


def test_every_epoch_has_an_order_of_its_own(build, tmp_path):
    """Of four documents, each shard gets others in the epochs of its first row."""
    path = tmp_path / "four.jsonl"
    write_json(path, [{"text": "x " * 40, "domain": name} for name in "abcd"])
    inputs, _ = next(iter(build(local_batch=4, dataset=str(path))))
    assert all(len({*row}) > 1 for row in inputs["domain_ids"].tolist())


@pytest.mark.slow
def test_the_validator_can_change_infinite(tokenizer):
    """The host replaces one field of the configuration and builds it."""
    config = replace(DomainTextDataLoader.Config(split="validation"), infinite=False)
    loader = config.build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=512, local_batch_size=2
    )
    assert sum(1 for _ in loader) > 5


# --- the embedded text ---


def test_embedded_text_has_five_domains_of_many_documents():
    """Every domain is in both splits, in documents of bounded length with names of their own."""
    train, validation = stdlib_text("train"), stdlib_text("validation")
    assert {t.domain for t in train} == set(DOMAINS) == {t.domain for t in validation}
    assert all(0 < len(t.text) <= MAX_CHARS and t.text.strip() for t in train)
    names = [(t.domain, t.name) for t in (*train, *validation)]
    assert len(set(names)) == len(names)
    chars = {
        split: sum(len(t.text) for t in stdlib_text(split)) for split in ("train", "validation")
    }
    assert 0.02 < chars["validation"] / sum(chars.values()) < 0.1


def test_embedded_text_is_deterministic():
    """Reading the library again gives the same documents in the same order."""
    texts = read_stdlib(Path(sysconfig.get_path("stdlib")))
    assert texts == sorted([*stdlib_text("train"), *stdlib_text("validation")])


def test_no_file_is_in_both_splits():
    """All pieces of a file are held out together."""
    files = [
        {(t.domain, t.name.split("#")[0]) for t in stdlib_text(s)} for s in ("train", "validation")
    ]
    assert not files[0] & files[1]


def test_a_stripped_library_has_fewer_domains(tmp_path, caplog):
    """Without data files and encodings those domains are left out, and a line says so."""
    (tmp_path / "a.py").write_text("x = 1\n" * 3000)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "unittest").mkdir()
    (tmp_path / "unittest" / "case.py").write_text("y = 2\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("z = 3\n")
    with caplog.at_level(logging.INFO):
        texts = read_stdlib(tmp_path)
    assert {t.domain for t in texts} - {"docs"} == {"code", "tests"}
    code = [t for t in texts if t.domain == "code"]
    assert [t.name for t in code] == ["a.py#000", "a.py#001", "a.py#002"]
    assert "".join(t.text for t in code) == "x = 1\n" * 3000
    assert sum("has no text for" in r.message for r in caplog.records) == 1
    assert "tables" in caplog.text


# --- local files and Hugging Face ---


def test_jsonl_and_parquet_files_of_a_folder_are_read_in_order(files):
    """A directory is read in order of its paths, with sorted domain names."""
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(files)))
    records = make_records(300)
    assert documents.names == ("a", "b", "c")
    assert [documents[i] for i in range(300)] == [(r["text"], r["domain"]) for r in records]


def test_declared_order_and_dotted_columns(files):
    """Ids follow the declared names, and a dotted path reaches into a record."""
    config = DomainTextDataLoader.Config(
        dataset="ignored",
        dataset_path=str(files),
        domain_column="meta.set",
        domains=["z", "x", "y"],
    )
    documents = load_documents(config)
    assert documents.names == ("z", "x", "y")
    assert list(documents.domain_ids[:6]) == [1, 2, 0, 1, 2, 0]


def test_a_split_is_read_from_its_subfolder(tmp_path):
    """A split is read from its sub-directory, which may be called valid or validation."""
    for name, start in (("train", 0), ("valid", 50)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "x.jsonl", make_records(3, start))
    for split, start in (("train", 0), ("validation", 50)):
        config = DomainTextDataLoader.Config(dataset=str(tmp_path), split=split)
        assert load_documents(config)[0][0] == make_records(1, start)[0]["text"]
    with pytest.raises(ValueError, match=r"no sub-directory for split 'test'.*train, valid"):
        load_documents(DomainTextDataLoader.Config(dataset=str(tmp_path), split="test"))


def test_a_missing_default_column_is_one_domain(tmp_path):
    """Text without domains, or with an empty column name, belongs to the domain "all"."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": ""}, {"text": "two"}]))
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(path)))
    assert [documents[i] for i in range(len(documents))] == [("one", "all"), ("two", "all")]


def test_hub_data_is_wrapped(files):
    """A map-style Hugging Face data set gives the same documents as the files it came from."""
    records = make_records(300)
    documents = hub_documents(datasets.Dataset.from_list(records), Columns(), None, "hub")
    local = load_documents(DomainTextDataLoader.Config(dataset=str(files)))
    assert [documents[i] for i in range(300)] == [local[i] for i in range(300)]
    nested = hub_documents(
        datasets.Dataset.from_list(records), Columns(domain="meta.set"), ["x", "y", "z"], "hub"
    )
    assert nested[1] == (records[1]["text"], "y")
    plain = datasets.Dataset.from_list([{"text": "t"}])
    assert hub_documents(plain, Columns(), None, "hub").names == ("all",)
    with pytest.raises(ValueError, match=r"hub: record 0: no column 'txt' \(did you mean text"):
        hub_documents(plain, Columns(text="txt"), None, "hub")
    with pytest.raises(ValueError, match="hub: the data set has no records"):
        hub_documents(plain.select([]), Columns(), None, "hub")


@pytest.fixture
def stream_files(tmp_path, monkeypatch):
    """Write files for Hugging Face to stream, without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for i in range(4):
        write_json(tmp_path / f"{i}.jsonl", make_records(15, 15 * i))
    return {"dataset": str(tmp_path), "streaming": True, "domains": ["a", "b", "c"]}


def test_a_stream_holds_every_document_in_order(stream_files, build, tokenizer):
    """One rank's finite stream is the files' text, packed in order, with its domains."""
    loader = build(local_batch=1, infinite=False, **stream_files)
    labels = torch.cat([labels.flatten() for _, labels in loader])
    domain_ids = torch.cat([inputs["domain_ids"].flatten() for inputs, _ in loader])
    expected, ids = [], []
    for record in itertools.chain.from_iterable(make_records(15, 15 * i) for i in range(4)):
        tokens = tokenizer.encode(record["text"], add_bos=True, add_eos=True)[1:]
        expected += tokens
        ids += ["abc".index(record["domain"])] * len(tokens)
    assert len(expected) - len(labels) < SEQ_LEN
    assert labels.tolist() == expected[: len(labels)]
    assert domain_ids.tolist() == ids[: len(labels)]


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("at", [0, 3, 20])
def test_a_stream_resumes(stream_files, build, tmp_path, at, kind):
    """Each rank goes on in the middle of a document and over epochs."""
    if kind == "parquet":
        for path in sorted(tmp_path.glob("*.jsonl")):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"))
            path.unlink()
    first = [build(rank, 2, 2, **stream_files) for rank in range(2)]
    whole = [build(rank, 2, 2, **stream_files) for rank in range(2)]
    expected = rows(whole, at + 30)[at:]
    rows(first, at)
    state = saved(first)
    second = [build(rank, 2, 2, **stream_files) for rank in range(2)]
    for loader in second:
        loader.load_state_dict(state)
    assert torch.equal(rows(second, 30), expected)
    assert json.loads(second[0].state_dict()["dp_rank_0"])[0][0] > 0  # it came to a later epoch


def test_a_streams_state_needs_as_many_ranks(stream_files, build):
    """Other ranks would see other text, so their number is checked."""
    state = build(0, 2, 2, **stream_files).state_dict()
    with pytest.raises(ValueError, match="saved with 2 data-parallel ranks, now there are 1"):
        build(0, 1, 2, **stream_files).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "stdlib"}, "cannot be streamed"),
        ({"domains": None}, "does not tell its domains.*--dataloader.domains"),
        ({"infinite": False}, "2 ranks could stop at different steps"),
        ({"num_workers": 2}, "at most one worker"),
        ({"domains": ["a", "b"]}, "domain 'c' must be one of 'domains' .a, b"),
        ({"domain_column": "dom"}, r"no column 'dom' .did you mean domain"),
        ({"text_column": "body"}, "no column 'body'; there are: text, domain, meta.set"),
    ],
)
def test_streams_that_cannot_work(stream_files, build, change, message):
    """What a stream cannot do is said before training."""
    with pytest.raises(ValueError, match=message):
        build(0, 2, **{**stream_files, **change})


# --- mistakes ---

GOOD = json.dumps({"text": "some text", "domain": "a"})


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (GOOD + "\n{oops\n", {}, r"x\.jsonl:2: invalid JSON"),
        ('{"text": "\xff"}', {}, r"x\.jsonl:1: not UTF-8"),
        (GOOD + "\n[1]\n", {}, r"x\.jsonl:2: a record must be a JSON object, not list"),
        (GOOD, {"text_column": "txt"}, r":1: no column 'txt' .did you mean text.*text, domain"),
        (GOOD, {"domain_column": "meta.set"}, r"no column 'meta.set'; there are: text, domain"),
        ('{"text": 7}', {}, r"x\.jsonl:1: text column 'text' holds int, not a string"),
        ('{"text": "t", "domain": null}', {}, r"x\.jsonl:1: domain column .* holds None"),
        (GOOD + '\n{"text": "t"}\n', {}, r"x\.jsonl:2: no 'domain' here, but other records"),
        (GOOD, {"domains": ["a", "b"]}, "empty domain 'b'.*declared: a, b; in the data: a"),
        (GOOD, {"domains": ["b"]}, "empty domain 'b'"),
        (GOOD + GOOD.replace('"a"', '"b"').join("\n\n"), {"domains": ["a"]}, "domain 'b' is in"),
        (GOOD, {"domains": ["a", "a"]}, "declared twice"),
        ('{"text": ""}', {}, "no text in any record"),
        (GOOD, {}, "too little text: .* tokens, but one row needs 128"),
        (GOOD * 0, {}, "no text in any record"),
        (GOOD, {"seed": -1}, "seed -1 is negative"),
    ],
)
def test_bad_records_are_refused_with_their_place(build, tmp_path, content, config, message):
    """What is wrong in a file is found when the loader is built, with the place."""
    (tmp_path / "x.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        build(dataset=str(tmp_path / "x.jsonl"), **config)


def test_too_little_text_for_one_batch_is_refused(build, tmp_path):
    """A finite pass must fill a batch of all ranks, or validation would have nothing."""
    write_json(tmp_path / "x.jsonl", make_records(4))
    with pytest.raises(ValueError, match="one batch of 400 rows needs"):
        build(0, 4, 100, dataset=str(tmp_path), infinite=False)


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"{}"])
def test_a_corrupt_parquet_file_is_refused_by_name(build, tmp_path, content):
    """A broken file is named."""
    (tmp_path / "broken.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable Parquet file"):
        build(dataset=str(tmp_path))


def test_cut_off_parquet(build, files, tmp_path):
    """A file whose end is intact but whose middle is not is named too."""
    content = bytearray((files / "b.parquet").read_bytes())
    content[4:2000] = bytes(1996)
    (tmp_path / "broken.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable Parquet file"):
        build(dataset=str(tmp_path))


def test_a_missing_parquet_column_is_refused_with_those_there_are(build, files):
    """The columns that there are include nested ones."""
    with pytest.raises(
        ValueError, match=r"row 0: no column 'body'; there are: text, domain, meta\.set"
    ):
        build(dataset=str(files / "b.parquet"), text_column="body")


def test_a_missing_path_is_refused_with_names_that_are_near(build, files, tmp_path):
    """A path that is not there is met with the names that are near."""
    with pytest.raises(ValueError, match=r"no such file or directory .did you mean a\.jsonl"):
        build(dataset=str(files / "a.json"))
    with pytest.raises(ValueError, match=r"no \.jsonl, .*\.parquet file in this directory"):
        build(dataset=str(tmp_path))
    (tmp_path / "x.txt").write_text("a,b")
    with pytest.raises(ValueError, match=r"cannot read \.txt; use \.jsonl"):
        build(dataset=str(tmp_path / "x.txt"))


def test_unknown_splits_and_names(build, monkeypatch):
    """An unknown embedded split, and a name that is nothing at all, say what was tried."""
    with pytest.raises(ValueError, match="no split 'test'; use one of train, validation"):
        build(split="test")

    def offline(*_, **__):
        msg = "offline"
        raise ConnectionError(msg)

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"did you mean stdlib.*ConnectionError: offline"):
        build(dataset="stdlb")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made_from": "nonsense"}, "'made_from' is 'nonsense'; the checkpoint is damaged"),
        ({"made_from": None}, "another loader"),
        ({"row": -1}, "'row' is -1"),
        ({"row": "x"}, "'row' is 'x'"),
        ({"shard_003": None}, "'shard_003' is None"),
        ({"shard_003": [[9, 0, 0, 0]]}, "'shard_003' is ..9, 0, 0, 0.. at row 8"),
        ({"shard_003": [9, 0, 0]}, "which cannot be"),
        ({"shard_003": [[0, -1, 0]]}, "which cannot be"),
        ({"shard_003": [[0, 0, 0], [0, 0, 0]]}, "which cannot be"),
    ],
)
def test_a_damaged_loader_state_is_refused(build, change, message):
    """A state that cannot be is refused, with the entry."""
    loader = build()
    rows([loader], 2)
    with pytest.raises(ValueError, match=message):
        build().load_state_dict(loader.state_dict() | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seq_len": 64}, "seq_len = 128, now it is 64"),
        ({"seed": 3}, "seed = 0, now it is 3"),
        ({"domains": [*reversed(DOMAINS)]}, "domains = .'code'"),
        ({"split": "validation"}, "shards|documents"),
        ({"infinite": False}, "shards = 192, now it is 1"),
    ],
)
def test_a_state_of_other_data_is_refused(build, config, message):
    """A state made from other data is refused, with what differs and the way out."""
    state = build().state_dict()
    with pytest.raises(ValueError, match=f"{message}.*exclude_from_loading dataloader|{message}"):
        build(**config).load_state_dict(state)


def test_an_empty_state_changes_nothing(build):
    """The host may load nothing."""
    loader = build()
    loader.load_state_dict({})
    assert torch.equal(rows([loader], 1), rows([build()], 1))


# --- changed data ---


@pytest.fixture
def scored(tmp_path):
    """Return a function that writes 300 scored documents, changed by another function."""

    def write(change=lambda _, record: record, count=300):
        records = [r | {"ref_loss": i / 8} for i, r in enumerate(make_records(count))]
        return write_json(tmp_path / "x.jsonl", [change(i, r) for i, r in enumerate(records)])

    return write


def unsampled(key, value):
    """Return a change of five in six records, those that a sample of every fourth may miss."""
    return lambda i, r: r | ({key: value(r[key])} if i % 12 not in {0, 4} else {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (unsampled("text", lambda text: text[::-1]), "texts of documents differ; look at x.jsonl"),
        (unsampled("ref_loss", lambda x: x + 1), "values of column 'ref_loss' differ; look at x"),
        (
            lambda i, r: r | {"domain": "cab"[(i - 1) % 3 if i % 4 in {1, 2} else i % 3]},
            "domains of documents differ; look at x.jsonl",
        ),
    ],
    ids=["text", "column", "domain"],
)
def test_changed_documents_are_refused_on_resume(build, scored, change, told):
    """Also where a sample of the documents is the same; the message names what and where."""
    config = {"dataset": str(scored()), "columns": ["ref_loss"]}
    state = build(**config).state_dict()
    scored(change)
    with pytest.raises(ValueError, match=rf"saved for other rows: {told}.*exclude_from_loading"):
        build(**config).load_state_dict(state)


def test_one_changed_number_of_a_token_is_refused(build, tokenizer, tmp_path):
    """Also where a column has a number for each token."""
    ids = tokenizer.encode("some text", add_bos=True, add_eos=True)
    records = [{"text": "some text", "score": [0.5] * (len(ids) - 1)} for _ in range(100)]
    config = {"dataset": str(write_json(tmp_path / "x.jsonl", records)), "columns": ["score"]}
    state = build(**config).state_dict()
    build(**config).load_state_dict(state)
    records[50]["score"] = [0.5] * (len(ids) - 2) + [0.25]
    write_json(tmp_path / "x.jsonl", records)
    with pytest.raises(ValueError, match="values of column 'score' differ"):
        build(**config).load_state_dict(state)


def test_fewer_documents_are_refused_with_their_number(build, scored):
    """And of a folder the files are named that have changed."""
    path = scored()
    write_json(path.with_name("y.jsonl"), make_records(10))
    config = {"dataset": str(path.parent)}
    state = build(**config).state_dict()
    scored(count=150)
    with pytest.raises(ValueError, match=r"documents = 310, now it is 160; look at x\.jsonl\. Res"):
        build(**config).load_state_dict(state)


def test_copied_and_touched_files_are_the_same_data(build, scored, tmp_path, caplog):
    """So are those in another place, or with a column more that nobody uses."""
    config = {"columns": ["ref_loss"]}
    state = build(dataset=str(scored()), **config).state_dict()
    copy = tmp_path / "elsewhere" / "other.jsonl"
    copy.parent.mkdir()
    scored(lambda _, r: {"unused": 1} | r).rename(copy)
    os.utime(copy, (1, 1))
    build(dataset=str(copy), **config).load_state_dict(state)
    assert not caplog.records


def older(state):
    """Return a state as version 0.1.0 saved it."""
    facts = json.loads(state["made_from"])
    kept = ("seq_len", "vocab_size", "rows", "seed", "shards", "documents", "text", "domains")
    return state | {"made_from": json.dumps({key: facts[key] for key in kept})}


def test_states_of_an_earlier_version_resume_with_a_warning(build, scored, caplog):
    """What they tell is compared as then: the number of documents, and a sample of the text."""
    config = {"dataset": str(scored())}
    state = older(build(**config).state_dict())
    build(**config).load_state_dict(state)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "the checkpoint is of an earlier version" in warning
    scored(lambda _, r: r | {"text": r["text"][::-1]})
    with pytest.raises(ValueError, match="texts of documents differ"):
        build(**config).load_state_dict(state)


def test_a_sample_of_the_text_is_what_it_was_in_an_earlier_version(build, tmp_path):
    """So that its states can be compared: these digits are those of version 0.1.0."""
    path = write_json(tmp_path / "x.jsonl", make_records(300))
    facts = json.loads(build(dataset=str(path)).state_dict()["made_from"])
    assert facts["text"] == "7246697d5bc598ab"


@pytest.mark.parametrize("change", ["rewritten", "longer", "another"])
def test_changed_files_of_a_stream_are_refused(stream_files, build, tmp_path, change):
    """A stream does not read them whole: names, sizes and samples of their bytes tell."""
    state = build(**stream_files).state_dict()
    path = tmp_path / "2.jsonl"
    text = path.read_text()
    if change == "rewritten":
        path.write_text(text.replace("weight", "height"))
    elif change == "longer":
        path.write_text(text + text.splitlines()[0])
    else:
        path.rename(tmp_path / "20.jsonl")
    with pytest.raises(ValueError, match=r"files have another name, size or content: 2"):
        build(**stream_files).load_state_dict(state)


def test_a_stream_of_copied_files_resumes_with_a_warning(stream_files, build, tmp_path, caplog):
    """Their content was not compared whole, which is said once, by the first rank."""
    loader = build(**stream_files)
    rows([loader], 3)
    state = loader.state_dict()
    build(**stream_files).load_state_dict(state)
    assert not [r for r in caplog.records if "data loader state" in r.getMessage()]
    expected = rows([build(**stream_files)], 6)[3:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in sorted(tmp_path.glob("*.jsonl")):
        os.utime(path.rename(elsewhere / path.name), (1, 1))
    second = build(**stream_files | {"dataset": str(elsewhere)})
    second.load_state_dict(state)
    warnings = [r.getMessage() for r in caplog.records if "data loader state" in r.getMessage()]
    assert len(warnings) == 1
    assert "files of the data were written or copied since" in warnings[0]
    assert torch.equal(rows([second], 3), expected)


def test_a_stream_of_another_column_is_refused(stream_files, build):
    """Its text would be another one, in the same files."""
    state = build(**stream_files).state_dict()
    other = build(**stream_files | {"domain_column": "", "domains": None})
    with pytest.raises(ValueError, match="domain_column = 'domain', now it is ''"):
        other.load_state_dict(state)


def test_another_tokenizer_of_the_same_size_is_refused(build, tokenizer, tmp_path):
    """Two entries of its vocabulary have changed places."""
    folder = tmp_path / "other"
    shutil.copytree(tokenizer.tokenizer_path, folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    other = HuggingFaceTokenizer(tokenizer_path=str(folder))
    again = HuggingFaceTokenizer(tokenizer_path=tokenizer.tokenizer_path)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(again) != tokenizer_digest(other)
    loader = DomainTextDataLoader.Config().build(
        dp_world_size=1, dp_rank=0, tokenizer=other, seq_len=SEQ_LEN, local_batch_size=4
    )
    with pytest.raises(ValueError, match=r"tokenizer = .*, now it is"):
        loader.load_state_dict(build().state_dict())


def test_a_changed_column_or_file_of_a_downloaded_data_set_is_refused(
    build, files, monkeypatch, tmp_path
):
    """Its texts stay on disk: they are told by the files of the cache, its columns are read."""
    open_file = datasets.load_dataset
    path = str(files / "a.jsonl")

    def built(change):
        hub = open_file("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
        hub = hub.map(change, cache_file_name=str(tmp_path / f"{change.__name__}.arrow"))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
        return build(dataset="someone/something", columns=["n"])

    def one(record):
        return {"n": float(len(record["text"]))}

    def two(record):
        return {"n": float(len(record["text"]) + 1)}

    state = built(one).state_dict()
    built(one).load_state_dict(state)
    with pytest.raises(ValueError, match="values of column 'n' differ; files have another name"):
        built(two).load_state_dict(state)

"""Rows of one domain each: drawn as asked, in turns, the same however they are cut."""

import functools
import hashlib
import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_integration.data.documents import Documents
from titan_integration.data.loader import DomainTextDataLoader, load_documents, scaled
from titan_integration.data.packing import Cut, PackedRows
from titan_integration.data.tokenizer import ensure_tokenizer

SEQ_LEN = 16
KEYS = ("input", "positions", "domain_ids")
DOMAINS = ("big", "one", "small")
SIZES = {"big": 400, "one": 1, "small": 50}
EARLY, LATE = (0.5, 0.2, 0.3), (1, 1, 6)


@pytest.fixture(scope="module")
def tokenizer():
    """Load the embedded tokenizer."""
    return HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write documents of 3 to 50 tokens in three domains, in mixed order, with their numbers."""
    rng = random.Random(0)
    domains = rng.sample(DOMAINS, counts=SIZES.values(), k=sum(SIZES.values()))
    words = ["loss", "weight", "naïve", "(x)", "42", "\n"]
    records = [
        {"text": f"{i} " + " ".join(rng.choices(words, k=rng.randint(0, 20))), "domain": d, "i": i}
        for i, d in enumerate(domains)
    ]
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def build(file, tokenizer):
    """Build one rank's loader: ``build(rank, num_ranks, local_batch, **config)``."""

    def build(rank=0, num_ranks=1, local_batch=8, seq_len=SEQ_LEN, **config):
        return DomainTextDataLoader.Config(
            **{"dataset": str(file), "rows": "drawn"} | config
        ).build(
            dp_world_size=num_ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=local_batch,
        )

    return build


@pytest.fixture
def ranks(build):
    """Build the loaders of all ranks: ``ranks(num_ranks, global_batch, **config)``."""

    def ranks(num_ranks, global_batch, **config):
        local_batch = global_batch // num_ranks
        return [build(rank, num_ranks, local_batch, **config) for rank in range(num_ranks)]

    return ranks


def rows(loaders, steps, first=0, change=None):
    """Take the global batches of some steps, [steps, 4, global batch, length].

    If drawn, with EARLY proportions and from step ``change`` on with LATE ones; ``first`` is the
    number of steps taken before.
    """
    iterators = [iter(loader) for loader in loaders]
    if change is not None:
        for loader in loaders:
            loader.proportions = EARLY if first < change else LATE
    taken = []
    for step in range(first, first + steps):
        if step == change:
            for loader in loaders:
                loader.proportions = LATE
        batches = [next(iterator) for iterator in iterators]
        parts = [torch.stack([*(x[k] for k in KEYS), y]) for x, y in batches]
        taken.append(torch.cat(parts, dim=1))
    return torch.stack(taken) if taken else None


def saved(loaders):
    """Merge the states of all ranks, as a distributed checkpoint does."""
    return functools.reduce(lambda a, b: a | b, [loader.state_dict() for loader in loaders])


SHARDS = {"big": 192, "one": 1, "small": 48}


def slow_rows(file, tokenizer, domain_and_turn, seed=0):
    """Pack rows from the definition, token by token; ``domain_and_turn`` are those of each row.

    Each domain's documents are shuffled and dealt to the largest divisor of 192 shards that leaves
    each a document, and its row of turn ``n`` is the next of shard ``n mod shards``.
    """
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(file)))
    assert documents.names == DOMAINS
    num_shards = SHARDS

    def tokens(domain, shard):
        members = [i for i in range(len(documents)) if documents[i][1] == domain]
        for epoch in itertools.count():
            key = [seed, epoch, DOMAINS.index(domain) + 1]
            order = np.random.default_rng(key).permutation(len(members))
            for i in order[shard :: num_shards[domain]]:
                ids = tokenizer.encode(documents.texts[members[i]], add_bos=True, add_eos=True)
                for offset, (token, label) in enumerate(itertools.pairwise(ids)):
                    yield token, offset == 0, label

    streams = {(d, s): tokens(d, s) for d in DOMAINS for s in range(num_shards[d])}
    for domain, turn in domain_and_turn:
        row = list(itertools.islice(streams[domain, turn % num_shards[domain]], SEQ_LEN))
        positions, position = [], 0
        for _, starts, _ in row:
            position = 0 if starts else position
            positions.append(position)
            position += 1
        inputs, _, labels = zip(*row, strict=True)
        yield torch.tensor([inputs, positions, [DOMAINS.index(domain)] * SEQ_LEN, labels])


@pytest.mark.slow
def test_drawn_rows_agree_with_a_slow_packer(file, tokenizer, build):
    """Inputs, positions, domains and labels are those of the definition, over several epochs."""
    steps, change, size = 385, 117, 6  # Philox makes four numbers at once; batches begin in between

    def draws():
        numbers = np.random.Generator(np.random.Philox(7))
        for g in range(steps * size):
            number, proportions = numbers.random(), EARLY if g < change * size else LATE
            borders = itertools.accumulate(p / sum(proportions) for p in proportions)
            yield next(d for d, b in zip(DOMAINS, borders, strict=True) if number < b), g

    expected = torch.stack(list(slow_rows(file, tokenizer, draws(), seed=7)), dim=1)
    loader = build(local_batch=size, seed=7)
    found = rows([loader], steps, change=change)
    assert torch.equal(torch.cat(list(found), dim=1), expected)
    entries = [v for key, v in loader.state_dict().items() if key.startswith("shard_")]
    for pool, least in enumerate([1, 50, 2]):
        assert max(epoch for v in entries for of, epoch, *_ in v if of == pool) >= least


@pytest.mark.slow
def test_turns_agree_with_a_slow_packer(file, tokenizer, build):
    """Batch i is of domain i mod 3, whose rows are dealt to its shards one by one."""
    turns = [(DOMAINS[i % 3], i // 3 * 8 + j) for i in range(300) for j in range(8)]
    expected = torch.stack(list(slow_rows(file, tokenizer, turns)), dim=1)
    found = rows([build(rows="turns")], 300)
    assert torch.equal(torch.cat(list(found), dim=1), expected)


def test_mixed_rows_are_what_they_always_were():
    """A digest of rows that were packed before rows could be of one domain (see test_data too)."""
    texts = [f"{i} " * (1 + i * 37 % 60) for i in range(400)]
    documents = Documents(texts, [i % 3 for i in range(400)], ("a", "b", "c"))
    packed = PackedRows(
        documents,
        lambda text: [1, *text.encode(), 2],
        Cut(seq_len=64, local_batch=6, rank=1, num_ranks=2),
        rows="mixed",
        seed=3,
        infinite=True,
    )
    digest = hashlib.sha256()
    for inputs, labels, _ in itertools.islice(packed, 80):
        for x in (*inputs.values(), labels):
            digest.update(x.numpy().tobytes())
    assert digest.hexdigest() == "6ad47c9838c35eca10abeced5c63f9e014e555310463620e51dedac176e3ba3d"


# --- how often ---


def p_value(counts, proportions):
    """Return the chance of counts as far off, if these are the proportions."""
    from scipy.stats import chisquare  # noqa: PLC0415 - takes a second, of every process

    return chisquare(counts, np.array(scaled(proportions, DOMAINS)) * sum(counts)).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(0.5, 0.3, 0.2), (1, 8, 3)])
def test_domains_are_drawn_as_often_as_asked(build, wanted):
    """10,000 rows fit the proportions, and do not fit ones that are 10 % off."""
    loader = build(seq_len=8, local_batch=100, seed=1)
    loader.proportions = wanted
    domains = torch.cat([inputs["domain_ids"][:, 0] for inputs, _ in itertools.islice(loader, 100)])
    counts = domains.bincount(minlength=3).numpy()
    assert counts.sum() == 10_000
    assert p_value(counts, wanted) > 1e-3
    others = np.array(wanted) * (1.1, 0.9, 1.1), np.array(wanted) * (0.9, 1.1, 0.9)
    assert max(p_value(counts, other) for other in others) < 1e-3


@pytest.mark.parametrize("wanted", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 3), (1e308, 1e308, 0)])
def test_a_domain_of_proportion_zero_is_never_drawn(build, wanted):
    """Wherever it stands; the others are."""
    loader = build(local_batch=500, seq_len=4)
    loader.proportions = wanted
    (domains,) = (inputs["domain_ids"] for inputs, _ in itertools.islice(loader, 1))
    assert domains.unique().tolist() == [d for d in range(3) if wanted[d]]


def test_draws_of_a_seed_are_its_own(build):
    """Two seeds draw other domains, one seed the same."""
    first, again, other = (rows([build(seed=seed)], 10)[:, 2] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", ["drawn", "turns"])
def test_every_row_is_of_one_domain(build, mode):
    """All tokens of a row carry one id, and in turns all rows of a batch."""
    ids = rows([build(rows=mode)], 90)[:, 2]
    assert (ids == ids[..., :1]).all()
    assert ids.unique().tolist() == [0, 1, 2]
    if mode == "turns":
        assert (ids == (torch.arange(90) % 3)[:, None, None]).all()
    else:
        assert (ids != ids[:, :1, :1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["drawn", "turns"])
def test_a_domains_text_is_read_once_before_it_is_read_again(file, tokenizer, build, mode):
    """When every shard is through its first epoch, each token of each document has been seen.

    In turns, of 8 rows and 3 domains: would rows be dealt by their own number, a domain would visit
    every third shard only, and never see the others' documents.
    """
    loader = build(rows=mode, columns=["i"])
    documents = load_documents(DomainTextDataLoader.Config(dataset=str(file)))
    seen = torch.zeros(len(documents), dtype=torch.int64)
    for batch, (inputs, _) in enumerate(itertools.islice(loader, 3000)):
        of_documents = inputs["columns.i"].long().flatten()
        seen += of_documents.bincount(minlength=len(documents))
        if batch % 4:  # a state takes longer than a batch
            continue
        entries = [v for key, v in loader.state_dict().items() if key.startswith("shard")]
        epochs = [epoch for entry in entries for _, epoch, _, _ in entry]
        if through := len(epochs) == sum(SHARDS.values()) and min(epochs) == 1:
            break
    assert through
    there = [len(tokenizer.encode(t, add_bos=True, add_eos=True)) - 1 for t in documents.texts]
    assert (seen >= torch.tensor(there)).all()


# --- however they are cut ---


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["drawn", "turns"])
@pytest.mark.parametrize("global_batch", [12, 60])
def test_the_global_batch_does_not_depend_on_the_ranks(ranks, global_batch, mode):
    """Two, three and four ranks yield the rows of one, with proportions that change in between."""
    change = 20 if mode == "drawn" else None
    expected = rows(ranks(1, global_batch, rows=mode), 40, change=change)
    for num_ranks in (2, 3, 4):
        found = rows(ranks(num_ranks, global_batch, rows=mode), 40, change=change)
        assert torch.equal(found, expected), num_ranks


@pytest.mark.slow
def test_resumed_rows_are_the_uninterrupted_ones(ranks):
    """From a state of some ranks, on as many or others; proportions change at step 20."""
    expected = rows(ranks(1, 12), 65, change=20)
    for before, others in {1: (1, 3), 2: (2, 1), 3: (4,)}.items():
        for at in (0, 1, 7, 20, 50):
            first = ranks(before, 12)
            rows(first, at, change=20)
            state = saved(first)
            for after in others:
                second = ranks(after, 12)
                for loader in second:
                    loader.load_state_dict(state)
                found = rows(second, 15, first=at, change=20)
                assert torch.equal(found, expected[at : at + 15]), (before, after, at)


@pytest.mark.parametrize("at", [1, 31])
def test_turns_go_on_where_they_were(ranks, at):
    """In the middle of a round, on other ranks."""
    expected = rows(ranks(1, 12, rows="turns"), at + 15)[at:]
    first, second = ranks(2, 12, rows="turns"), ranks(3, 12, rows="turns")
    rows(first, at)
    for loader in second:
        loader.load_state_dict(saved(first))
    assert torch.equal(rows(second, 15), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_carries_the_state(build, tmp_path):
    """Saved with torch's distributed checkpoint, and loaded into a loader that has not begun."""
    expected = rows([build()], 15)
    first, second = build(), build()
    rows([first], 10)
    dcp.save({"dataloader": first}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"dataloader": second}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(rows([second], 5), expected[10:])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mixed", "drawn", "turns"])
def test_worker_processes_change_nothing(build, mode):
    """None, one and two yield the same batches, and their state resumes without them."""
    change = 0 if mode == "drawn" else None
    expected = rows([build(rows=mode)], 24, change=change)
    for num_workers in (1, 2):
        loader = build(rows=mode, num_workers=num_workers)
        assert torch.equal(rows([loader], 19, change=change), expected[:19])
        resumed = build(rows=mode)
        resumed.load_state_dict(loader.state_dict())
        assert torch.equal(rows([resumed], 5, change=change), expected[19:])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_rows_of_a_step_are_drawn_in_what_is_told_of_it(build, num_workers):
    """By the process itself or by workers, which wait for it; two batches a step."""
    plain, told = build(), build(num_workers=num_workers)
    told.draw_step_by_step(2)
    both = [], []
    batches = [iter(plain), iter(told)]
    told.tell(EARLY)
    for proportions in (EARLY, LATE, (0, 1, 0), EARLY):
        plain.proportions = proportions
        for found, loader in zip(both, batches, strict=True):
            found += [next(loader), next(loader)]
        told.tell({EARLY: LATE, LATE: (0, 1, 0)}.get(proportions, EARLY))
    for (inputs, labels), (others, same) in zip(*both, strict=True):
        assert torch.equal(labels, same)
        assert torch.equal(inputs["domain_ids"], others["domain_ids"])
    assert plain.state_dict() == told.state_dict()


def test_new_proportions_count_from_the_next_batch_on(build):
    """Set before the first batch or between two."""
    loader = build()
    assert loader.proportions == pytest.approx((1 / 3,) * 3)
    loader.proportions = [0, 2, 0]
    assert loader.proportions == (0, 1, 0)
    batches = iter(loader)
    for domain in (1, 0, 2):
        assert next(batches)[0]["domain_ids"].unique().item() == domain
        following = np.eye(3)[{1: 0, 0: 2, 2: 2}[domain]]
        loader.proportions = torch.tensor(following)


def test_one_domain_is_enough(build):
    """All rows are then of it, drawn or in turns."""
    for mode in ("drawn", "turns"):
        loader = build(rows=mode, domain_column="")
        assert loader.domains == ("all",)
        assert not rows([loader], 5)[:, 2].any()


def test_text_is_tokenized_by_the_rank_that_reads_it(build, ranks):
    """Four ranks tokenize a large domain's documents no more often than one does."""
    counts = []
    for loader in [build(local_batch=8), *ranks(4, 8)]:
        loader.proportions = (1, 0, 0)
        encoded, encode = [], loader._rows._encode
        loader._rows._encode = lambda text, e=encode, seen=encoded: seen.append(text) or e(text)
        rows([loader], 24)
        counts.append(len(encoded))
    one, *four = counts
    assert sum(four) == one


# --- streams ---


@pytest.fixture
def streamed(monkeypatch):
    """Return what it takes to stream the file, without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return {"streaming": True, "domains": list(DOMAINS)}


@pytest.mark.parametrize("mode", ["drawn", "turns"])
def test_a_stream_has_one_stream_for_each_domain(file, tokenizer, build, streamed, mode):
    """The rows of a domain are its documents in their order, over epochs, in drawn places."""
    change = 20 if mode == "drawn" else None
    places = rows([build(rows=mode)], 40, change=change)[:, 2, :, 0].flatten()
    found = rows([build(rows=mode, **streamed)], 40, change=change)
    found = found.transpose(1, 2).flatten(0, 1)
    assert torch.equal(found[:, 2], places[:, None].expand(-1, SEQ_LEN))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for d, domain in enumerate(DOMAINS):
        texts = [record["text"] for record in records if record["domain"] == domain]
        labels = [x for t in texts for x in tokenizer.encode(t, add_bos=True, add_eos=True)[1:]]
        mine = found[places == d][:, 3].flatten().tolist()
        assert mine == list(itertools.islice(itertools.cycle(labels), len(mine)))
        assert domain == "big" or len(mine) > len(labels)


@pytest.fixture
def folder(tmp_path, streamed):
    """Write four files of documents in three domains, for two ranks to stream two each."""
    for i in range(4):
        records = [{"text": f"{j} " * (j % 20), "domain": "abc"[j % 3]} for j in range(i, 15 + i)]
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return streamed | {"dataset": str(tmp_path), "domains": ["a", "b", "c"]}


@pytest.mark.parametrize("at", [0, 3, 20, 33])
def test_a_stream_resumes(build, ranks, folder, at):
    """Each of two ranks goes on in each domain; the domains drawn are those of one rank."""
    whole = rows(ranks(2, 8, **folder), at + 15, change=20)
    assert torch.equal(whole[:, 2, :, 0], rows([build()], at + 15, change=20)[:, 2, :, 0])
    first, second = ranks(2, 8, **folder), ranks(2, 8, **folder)
    rows(first, at, change=20)
    for loader in second:
        loader.load_state_dict(saved(first))
    assert torch.equal(rows(second, 15, first=at, change=20), whole[at:])
    if at == 33:  # it came to a later epoch of every domain
        assert min(epoch for _, epoch, *_ in json.loads(second[1].state_dict()["dp_rank_1"])) > 0


def test_a_streams_state_of_0_1_0_goes_on(build, folder):
    """It has a place for every domain, in their order, also for those that have not begun."""
    loader = build(**folder)
    expected = rows([loader], 12)
    loader = build(**folder)
    rows([loader], 1)
    state = loader.state_dict()
    begun = {i: moved for i, *moved in json.loads(state["dp_rank_0"])}
    each = [begun.get(i, [0, None, 0]) for i in range(3)]
    resumed = build(**folder)
    resumed.load_state_dict(state | {"dp_rank_0": json.dumps(each)})
    assert torch.equal(rows([resumed], 11), expected[1:])


def test_a_streams_worker_changes_nothing(build, folder):
    """One worker process reads the same, and its state resumes without it."""
    expected = rows([build(**folder)], 12)
    loader = build(num_workers=1, **folder)
    assert torch.equal(rows([loader], 9), expected[:9])
    resumed = build(**folder)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(rows([resumed], 3), expected[9:])


def test_a_domain_missing_from_a_stream_is_refused_when_drawn(build, folder):
    """Is named when a row of it is drawn, with those found; one that is never drawn may miss."""
    folder["domains"].append("d")
    loader = build(**folder)
    loader.proportions = (1, 1, 1, 0)
    rows([loader], 5)
    loader.proportions = (1, 0, 0, 1)
    with pytest.raises(ValueError, match=r"no text of domain 'd' to predict .*found: a, b, c"):
        rows([loader], 5)


def test_a_domain_that_one_ranks_files_lack_says_what_to_do(ranks, folder, tmp_path):
    """Each of two ranks reads one file, of one domain."""
    for i, name in enumerate("ab"):
        record = {"text": "some words " * 9, "domain": name}
        (tmp_path / f"of/{i}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"of/{i}.jsonl").write_text(json.dumps(record) + "\n")
    given = folder | {"dataset": str(tmp_path / "of"), "domains": ["a", "b"]}
    with pytest.raises(ValueError, match=r"no text of domain '.*give every rank's files some of"):
        rows(ranks(2, 8, **given), 5)


def test_a_domain_that_was_not_declared_is_refused(build, folder):
    """Is an error, also in the stream of another domain."""
    folder["domains"].remove("c")
    with pytest.raises(ValueError, match=r"domain 'c' must be one of 'domains' \(a, b\)"):
        rows([build(**folder)], 5)


def test_a_stream_of_nothing_to_predict_ends(build, folder, tmp_path):
    """Not even the ends of a text can be predicted where the tokenizer adds none."""
    loader = build(**folder)
    loader._rows._encode = lambda text: [1] * min(1, len(text))
    with pytest.raises(ValueError, match=f"{tmp_path}: this rank's .* no text of domain '[abc]'"):
        rows([loader], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": None}, "'row' is None; the checkpoint is damaged"),
        ({"row": -1}, "'row' is -1"),
        ({"dp_rank_0": "[[0, null, 0]]"}, "'dp_rank_0' is .*; the checkpoint is damaged"),
        ({"dp_rank_0": "[[0, null, 0], [0, null, 0], [0, 1, 0]]"}, "'dp_rank_0' is"),
        ({"dp_rank_0": "[[3, 0, null, 0]]"}, "'dp_rank_0' is"),
        ({"dp_rank_0": "[[1, 0, null, 0], [1, 1, null, 0]]"}, "'dp_rank_0' is"),
        ({"dp_rank_0": "[[1, 0, null, -1]]"}, "'dp_rank_0' is"),
        ({"dp_rank_0": "7"}, "'dp_rank_0' is '7'"),
    ],
)
def test_a_damaged_stream_state_is_refused(build, folder, change, message):
    """A state that cannot be is refused, with the entry."""
    with pytest.raises(ValueError, match=message):
        build(**folder).load_state_dict(build(**folder).state_dict() | change)


# --- mistakes ---


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ([1, 1], r"2 proportions for 3 domains; give one for each of big, one, small, in this"),
        ([1, -1, 1], r"domain 'one' is -1\.0; give finite numbers from 0 on"),
        ([1, 1, float("nan")], "domain 'small' is nan"),
        ([float("inf"), 1, 1], "domain 'big' is inf"),
        ([0, 0, 0], "every proportion is 0, so that no row can be drawn; make one positive"),
    ],
)
def test_impossible_proportions_are_refused_and_change_nothing(build, proportions, message):
    """Are refused with the reason, and change nothing."""
    loader = build()
    with pytest.raises(ValueError, match=message):
        loader.proportions = proportions
    assert loader.proportions == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize("mode", ["mixed", "turns"])
def test_other_rows_have_no_proportions(build, mode):
    """Neither to set nor to read."""
    loader = build(rows=mode)
    message = f"rows '{mode}' are not drawn and have no proportions; set --dataloader.rows drawn"
    with pytest.raises(ValueError, match=message):
        loader.proportions = EARLY
    with pytest.raises(ValueError, match=message):
        _ = loader.proportions


def test_workers_draw_ahead(build):
    """With them proportions can be set before the first batch only."""
    loader = build(num_workers=1)
    loader.proportions = EARLY
    batches = iter(loader)
    loader.proportions = (0, 1, 0)
    assert next(batches)[0]["domain_ids"].unique().tolist() == [1]
    with pytest.raises(ValueError, match="worker processes draw rows ahead; set --datal"):
        loader.proportions = EARLY


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"infinite": False}, "rows 'drawn' of a text that is read once: .*domain by domain; set"),
        ({"rows": "turns", "infinite": False}, "rows 'turns' of a text that is read once"),
        ({"rows": "turn"}, "rows 'turn'; set --dataloader.rows to mixed, drawn, turns"),
    ],
)
def test_impossible_kinds_of_rows_are_refused(build, config, message):
    """Are refused when the loader is built."""
    with pytest.raises(ValueError, match=message):
        build(**config)


@pytest.mark.parametrize("texts", [["a" * 500, "b"], ["a" * 500]])
def test_a_domain_with_no_token_to_predict_is_refused(texts):
    """Is named: rows of it could never be filled; where rows are mixed it does no harm."""
    documents = Documents(texts, range(len(texts)), ("a", "b"))
    for mode in ("mixed", "drawn"):
        cut = Cut(seq_len=8, local_batch=2, rank=0, num_ranks=1)
        packed = PackedRows(
            documents, lambda text: [*text.encode()], cut, rows=mode, seed=0, infinite=True
        )
        if mode == "mixed":
            packed.check_size("here")
        else:
            with pytest.raises(ValueError, match="here: domain 'b' has no token to predict"):
                packed.check_size("here")


def test_a_state_of_another_kind_of_rows_is_refused(build, streamed):
    """A state is of one kind of rows."""
    for config in ({}, streamed):
        state = build(**config).state_dict()
        for mode in ("mixed", "turns"):
            with pytest.raises(ValueError, match=f"rows = 'drawn', now it is '{mode}'"):
                build(rows=mode, **config).load_state_dict(state)
    with pytest.raises(ValueError, match="saved for other rows: seed = 0, now it is 1"):
        build(seed=1, **streamed).load_state_dict(build(**streamed).state_dict())


def as_0_1_0(state):
    """Return a state as version 0.1.0 saved it: in every lane the cursors of all domains."""
    moved = {
        (pool, int(key[6:])): cursor
        for key, entry in state.items()
        if key.startswith("shard_")
        for pool, *cursor in entry
    }
    return state | {
        f"shard_{lane:03d}": [
            moved.get((pool, lane % SHARDS[name]), [0, 0, 0]) for pool, name in enumerate(DOMAINS)
        ]
        for lane in range(192)
    }


def test_a_state_of_0_1_0_goes_on(build):
    """It has the cursors of all domains in every lane; those that disagree are refused."""
    loader = build()
    batches = iter(loader)
    rows([batches], 3)
    state = as_0_1_0(loader.state_dict())
    resumed = build()
    resumed.load_state_dict(state)
    assert torch.equal(rows([resumed], 5), rows([batches], 5))
    entry = [list(cursor) for cursor in state["shard_100"]]
    entry[DOMAINS.index("one")][0] += 1
    with pytest.raises(ValueError, match=r"'shard_100' is .* at row 24, which cannot be"):
        build().load_state_dict(state | {"shard_100": entry})


def test_a_saved_state_has_what_was_opened(build):
    """Of a batch of eight rows, at most eight cursors have moved."""
    loader = build()
    rows([loader], 1)
    state = loader.state_dict()
    assert 1 < sum(len(v) for key, v in state.items() if key.startswith("shard_")) <= 8


@pytest.mark.parametrize("num_ranks", [5, 128, 250])
def test_no_document_is_tokenized_by_two_ranks(num_ranks):
    """However many there are: the number of shards is a multiple of the global batch."""
    documents = Documents([f"{i}" * 40 for i in range(2000)], [0] * 2000, ("a",))
    calls = []

    def encode(text):
        calls.append(text)
        return [*text.encode()]

    for rank in range(num_ranks):
        cut = Cut(seq_len=32, local_batch=2, rank=rank, num_ranks=num_ranks)
        packed = PackedRows(documents, encode, cut, rows="mixed", seed=0, infinite=True)
        for _ in itertools.islice(packed, 3):
            pass
    assert len(calls) == len(set(calls))


def test_a_state_with_another_number_of_shards_goes_on_with_it(build):
    """As of version 0.1.0, which had 192 for every batch, or of another batch size."""
    first = build(local_batch=7)
    first.take_shards(192)
    batches = iter(first)
    rows([batches], 9)
    resumed = build(local_batch=7)
    assert resumed.state_dict().keys() != first.state_dict().keys()
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(rows([resumed], 9), rows([batches], 9))


def test_a_short_text_that_two_rows_share_is_tokenized_once():
    """However many texts a row has; a shard goes on 24 batches later, in the middle of a text."""
    texts = Documents([f"{i:020}" for i in range(4000)], [0] * 4000, ("all",))
    tokenized = []

    def encode(text):
        tokenized.append(text)
        return [*text.encode()]

    loader = PackedRows(texts, encode, Cut(64, 8, 0, 1), rows="mixed", seed=1, infinite=True)
    for _ in itertools.islice(loader, 72):
        pass
    assert len(tokenized) == len(set(tokenized))

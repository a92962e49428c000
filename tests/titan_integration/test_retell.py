"""Texts of recorded sequences against what the loaders gave, in a real run and in runs by hand."""

import json
import random
import re
from dataclasses import asdict
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recorded import steps_of
from runs import drive
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from warm import weighting

from titan_integration.commands.replay_text import texts
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import BOS, EOS, ensure_tokenizer
from weighting.cli import main
from weighting.language.read import resolve
from weighting.runs.record_reader import ABOUT, FOLDER, read_record

SEQ_LEN, RANKS, CALLS, ROWS = 24, 2, 3, 2  # of a run by hand; calls of a step, rows of a call
STEP = RANKS * CALLS * ROWS
DRAWN = """
version: 1
name: drawn
apply: sampling
pipeline: table(code=5, prose=1) -> mean_one
"""


@pytest.fixture(scope="module")
def tokenizer():
    """Load the embedded tokenizer."""
    return HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))


def text_of(tokenizer, ids):
    """Return the text of a row, its documents apart, in words."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return words(text.replace(BOS, " ").replace(EOS, " "))


def words(text):
    """Return a text whose white space is single spaces."""
    return " ".join(text.split())


def told_again(run, wanted):
    """Return what is told again, in words."""
    return {place: words(" ".join(parts)) for place, parts in texts(run, wanted).items()}


def write_data(path, count=300):
    """Write documents of 1 to 60 words in two domains, and return the file."""
    draw = random.Random(1)
    words = ["loss", "weight", "naïve", "重み", "def f(x):", "\n\t", "42"]
    records = [
        {
            "text": f"document {i}: " + " ".join(draw.choices(words, k=draw.randint(1, 60))),
            "domain": draw.choice(["code", "prose"]),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record_by_hand(run, steps, spec):
    """Write a record as a run leaves it, of losses nobody looks at."""
    count = STEP * len(steps)
    columns = {
        "step": [step for step in steps for _ in range(STEP)],
        "row": [*range(STEP)] * len(steps),
        "domain": ["code"] * count,
        "tokens": [SEQ_LEN] * count,
        "mean_weight": [1.0] * count,
        "loss": torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist(),
    }
    said = {"name": spec.name, "hash": spec.hash, "spec": str(spec), "domains": ["code", "prose"]}
    said |= {"every": 1, "ranks": RANKS, "rank_rows": ROWS, "batch_rows": RANKS * ROWS}
    (run / FOLDER).mkdir(parents=True)
    table = pa.table(columns)
    with pq.ParquetWriter(run / FOLDER / "sequences-000001.parquet", table.schema) as to:
        to.write_table(table)
        to.add_key_value_metadata({ABOUT: json.dumps(said)})


def by_hand(folder, tokenizer, spec="uniform", proportions=None, **config):
    """Leave what a run of four steps leaves; return its folder and the text of each sequence."""
    run, spec = folder / "run", resolve(spec)
    config = {"dataset": str(write_data(folder / "data.jsonl"))} | config
    loaders = [
        DomainTextDataLoader.Config(**config).build(
            dp_world_size=RANKS,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=SEQ_LEN,
            local_batch_size=ROWS,
        )
        for rank in range(RANKS)
    ]
    made_from = json.loads(loaders[0].state_dict()["made_from"])
    found, ahead = {}, [iter(loader) for loader in loaders]
    for loader in loaders if proportions else []:
        loader.proportions = proportions
    for step in (1, 2, 3, 4):
        # As in a real run: every call takes a batch on every rank.
        batches = [batch for _ in range(CALLS) for batch in map(next, ahead)]
        rows = torch.cat([inputs["input"] for inputs, _ in batches]).tolist()
        for row, ids in enumerate(rows):
            found[step, row] = text_of(tokenizer, ids)
    assert len({*found.values()}) > 3 * STEP, "rows that differ"
    record_by_hand(run, (1, 2, 3, 4), spec)
    start = {"step": 1, "spec": spec.hash, "data": {"made_from": made_from, "next_row": 0}}
    told = {
        "config": {
            "dataloader": asdict(DomainTextDataLoader.Config(**config)),
            "hf_assets_path": str(ensure_tokenizer()),
            "training": {"seq_len": SEQ_LEN},
        },
        "starts": [start],
    }
    (run / "weighting" / "run.json").write_text(json.dumps(told))
    return run, found


@pytest.mark.parametrize(
    ("spec", "proportions", "config"),
    [
        ("uniform", None, {}),
        ("uniform", None, {"infinite": False, "seed": 3}),
        ("uniform", None, {"domain_column": ""}),
        ("uniform", None, {"rows": "turns"}),
        ("uniform", None, {"rows": "drawn"}),
        (DRAWN, [5, 1], {"rows": "drawn", "seed": 7}),
    ],
)
def test_a_text_is_that_of_the_row_in_every_order_of_rows(
    spec, proportions, config, tmp_path, tokenizer
):
    """Also where batches are of one domain, rows are drawn, or the text is read once."""
    if "apply" in spec:
        (tmp_path / "spec.yaml").write_text(spec)
        spec = str(tmp_path / "spec.yaml")
    run, given = by_hand(tmp_path, tokenizer, spec, proportions, **config)
    change(run, num_workers=1)  # of the run; here it is read without
    assert told_again(run, [*given]) == given
    assert told_again(run, [(3, 4)]) == {(3, 4): given[3, 4]}
    assert texts(run, []) == {}
    # A row may begin within a document, and end just after one has begun.
    later = [text for _, *others in texts(run, [*given]).values() for text in others]
    assert len(later) >= 2
    assert all(re.match(r"document \d+:", text) for text in later if len(text) > 12)
    assert all(text.count("document ") <= 1 for text in later)


def change(run, **changes):
    """Change what a run says of itself: its loader's fields, or whole entries."""
    path = run / "weighting" / "run.json"
    told = json.loads(path.read_text())
    for name, value in changes.items():
        if name in told:
            told[name] = value
        else:
            told["config"]["dataloader"][name] = value
    path.write_text(json.dumps(told))


def starts(run):
    """Return what a run says of its starts."""
    return json.loads((run / "weighting" / "run.json").read_text())["starts"]


def older(run):
    """Leave out what older versions did not write."""
    start = starts(run)[0]
    del start["data"]
    change(run, starts=[start])


def other_data(run):
    """Resume onto another text."""
    (start,) = starts(run)
    made = start["data"]["made_from"] | {"text": "0"}
    data = {"made_from": made, "next_row": 2 * STEP}
    change(run, starts=[start, {**start, "step": 3, "data": data}])


def afresh(run):
    """Resume with the text from its beginning."""
    (start,) = starts(run)
    change(run, starts=[start, {**start, "step": 3}])


def other_run(run):
    """Train again without a record in the same folder."""
    change(run, starts=[{**starts(run)[0], "spec": "0"}])


def other_loader(run):
    """Read the text by a loader that is not ours."""
    change(run, starts=[{**starts(run)[0], "data": None}], hf_dataset="c4")


def other_documents(run):
    """Change the text."""
    write_data(run.parent / "data.jsonl", 299)


def other_words(run):
    """Change a text without changing how many there are."""
    path = run.parent / "data.jsonl"
    path.write_text(path.read_text().replace("document 0:", "document O:"))


def no_tokenizer(run):
    """Lose the tokenizer."""
    told = json.loads((run / "weighting" / "run.json").read_text())
    change(run, config=told["config"] | {"hf_assets_path": "/nowhere"})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (older, "run.json: an older version wrote it, and it does not say where"),
        (lambda run: (run / "weighting/run.json").unlink(), "run.json: No such file or directory,"),
        (lambda run: (run / "weighting/run.json").write_text("{}"), "so it is damaged; leave out"),
        (lambda run: change(run, starts=[{"data": {}}]), "so it is damaged; leave out --text"),
        (lambda run: change(run, starts=[]), "by another loader than"),
        (other_loader, "by another loader than DomainTextDataLoader; leave out --text"),
        (lambda run: change(run, streaming=True), "data.jsonl, was streamed, and is not read tw"),
        (lambda run: change(run, dataset="allenai/c4"), "allenai/c4, is not here: it is on a hub"),
        (lambda run: (run.parent / "data.jsonl").unlink(), "data.jsonl, is not here: it is on a"),
        (other_documents, "has changed: documents = 300, now it is 299; look at data.jsonl; rest"),
        (other_words, "has changed: texts of documents differ; look at data.jsonl; restore it"),
        (lambda run: change(run, seed=5), "has changed: seed = 0, now it is 5; restore it"),
        (other_data, "resumed at step 3 onto other data; leave out --text"),
        (afresh, "began step 3 at row 0 of its text, where steps of 12 sequences are at row 24"),
        (other_run, "run.json is of a later run than the record, of another spec; leave out"),
        (no_tokenizer, "its tokenizer is not in /nowhere: "),
    ],
)
def test_what_is_not_there_to_read_again_is_refused(what, said, tmp_path, tokenizer):
    """One message says what and what to do; a wrong text is never shown."""
    run, _ = by_hand(tmp_path, tokenizer)
    what(run)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        texts(run, [(2, 1)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("leave out --text")


def test_rows_that_were_drawn_by_moving_proportions_are_refused(tmp_path, tokenizer):
    """The record does not tell the proportions of a step."""
    moving = DRAWN.replace("-> mean_one", "-> temperature(linear(2, 1, over=4))")
    (tmp_path / "spec.yaml").write_text(moving)
    run, _ = by_hand(tmp_path, tokenizer, str(tmp_path / "spec.yaml"), rows="drawn")
    with pytest.raises(ValueError, match="proportions of domains moved while its text was drawn"):
        texts(run, [(2, 1)])


# What is printed.


def replayed(run, capsys, *more):
    """Return status and output of `weighting replay --text`."""
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(run), "--spec", "prop1", "upper", "--text", *more])
    return stopped.value.code, *capsys.readouterr()


def test_below_each_sequence_is_how_it_begins(tmp_path, tokenizer, capsys):
    """In one line of 80 columns at most; letters that take two count as two."""
    run, given = by_hand(tmp_path, tokenizer)
    code, out, _ = replayed(run, capsys)
    lines = out.splitlines()
    assert code == 0
    assert "the text is read again" in " ".join(out.split())
    shown = 0
    for line, below in pairwise(lines):
        if not below.startswith(" " * 10 + '"'):
            continue
        shown += 1
        step, row, *_ = line.split()
        start = below.strip().strip('"').rstrip("…")
        assert len(start) > 10
        assert given[int(step), int(row)].startswith(start)
        assert len(below) + sum(c in "重み" for c in below) <= 80
    assert shown == sum(len(line.split()) == 6 and line.split()[2] == "code" for line in lines)
    assert shown == 12


def test_a_refusal_ends_with_status_2_and_nothing_is_printed(tmp_path, tokenizer, capsys):
    """One line, as those of the command itself."""
    run, _ = by_hand(tmp_path, tokenizer)
    older(run)
    code, out, err = replayed(run, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


# A real run.

SIGNALS = ("loss", "entropy")
SPEC = "temperature(0.5)"


@pytest.mark.processes
def test_texts_are_those_that_two_ranks_with_accumulation_had(tmp_path, tokenizer):
    """Each recorded sequence is known by its mean loss and entropy."""
    data = write_data(tmp_path / "data.jsonl", 900)
    flags = ["--weighting.spec=linupper-x-mile", "--weighting.record=every=2", "--training.steps=4"]
    flags += ["--training.local_batch_size=2", "--training.global_batch_size=8"]
    drive(tmp_path, 2, "noting", "debugmodel", *flags, f"--dataloader.dataset_path={data}")
    run = tmp_path / "dump"
    notes = [note for rank in range(2) for note in torch.load(run / f"notes{rank}.pt")]
    ids = torch.cat([note["input"] for note in notes])
    means = {name: torch.cat([note[name].mean(1) for note in notes]) for name in SIGNALS}
    given = {}
    for step in steps_of(read_record(run)):
        for row in step.row.tolist():
            # Recorded with 16 significant bits.
            alike = [(means[x] / step.signals[x][row] - 1).abs() < 2e-5 for x in SIGNALS]
            (match,) = torch.stack(alike).all(0).nonzero().flatten().tolist()
            given[step.step, row] = text_of(tokenizer, ids[match].tolist())
    assert [*given] == [(step, row) for step in (2, 4) for row in range(8)]
    assert len({*given.values()}) == 16
    assert told_again(run, [*given]) == given

    done = weighting("replay", run, "--spec", SPEC, "--text")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith(" " * 10 + '"')]
    assert len(shown) == 6

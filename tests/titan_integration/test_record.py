"""The recorder: what it writes, on any layout, through a kill, and how much of it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from recorded import steps_of
from runs import drive, seed_checkpoint, torchrun
from test_resume import KEPT, SAVED, STEPS, kill_after_saving
from test_retell import write_data

import weighting as wt
from titan_integration.observe.recorder import POSITION, ROOM, Layout, Recorder, asked
from weighting.language.read import resolve
from weighting.runs.files import read_lines
from weighting.runs.record_reader import DOMAIN, FOLDER, ROW, STEP, TOKENS, WEIGHT, read_record
from weighting.runs.replay import left_out, replay

DOMAINS = ("code", "docs")
CPU = torch.device("cpu")


# What is asked for.


def test_words_say_what_to_record():
    """Steps are needed, tokens and documents may be left out, in any order."""
    assert asked("every=10") == (10, 0, 0)
    assert asked("tokens=64, every=1,documents=8") == (1, 64, 8)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("evry=10", "unknown word 'evry'; did you mean 'every'?; write every=10, or "),
        ("every=10,rows", "unknown word 'rows'; known: documents, every, tokens; write "),
        ("every=10,documents", "documents= is no whole number from 1 on; write every=10, or "),
        ("every=0", "every=0 is no whole number from 1 on; write every=10, or "),
        ("every=ten", "every=ten is no whole number from 1 on; write every=10, or "),
        ("every=5,tokens=-1", "tokens=-1 is no whole number from 1 on; write every=10, or "),
        ("every=5,every=6", "every twice; write every=10, or "),
        ("tokens=64", "it does not say when; write every=10,tokens=64"),
    ],
)
def test_wrong_words_are_refused_with_place_and_fix(text, wrong):
    """The message names the flag as it was given, what is wrong, and what to write."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        asked(text)
    assert str(error.value).startswith(f"--weighting.record {text}: {wrong}")


@pytest.mark.processes
def test_a_run_refuses_wrong_words_at_once(tmp_path):
    """One message and status 2, before anything is built or written."""
    flags = ["--weighting.spec=linupper", "--weighting.record=every", f"--dump_folder={tmp_path}"]
    entry = ["--module=small", "--config=debugmodel", *flags]
    done = torchrun(1, "-m", "torchtitan.train", *entry)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: --weighting.record every: every= is no whole number from 1 on" in done.stderr
    assert not (tmp_path / FOLDER).exists()


# The recorder alone.


def recorder(folder, text, spec="linupper", calls=1):
    """Return a recorder on a single rank, of steps of some calls."""
    fn = wt.build(resolve(spec), domains=DOMAINS)
    return Recorder(asked(text), fn, Layout(calls, 3, 8, 1), folder / FOLDER, device=CPU)


def call_of(seed, rows=3, length=8):
    """Return the signals and the weights of a call."""
    of = torch.Generator().manual_seed(seed)
    loss, token, entropy = (torch.rand(rows, length, generator=of) * 4 for _ in range(3))
    valid = torch.rand(rows, length, generator=of) < 0.7
    valid[:, 0] = True
    ids = torch.where(valid, torch.randint(2, valid.shape, generator=of), 99)  # ignored: anything
    loss, token = torch.where(valid, loss, torch.nan), torch.where(valid, token, 0)
    document = (torch.rand(rows, length, generator=of) < 0.4).cumsum(1)
    document -= document[:, :1].clone()
    given = {"domain_ids": ids, "segment_ids": torch.where(valid, document, 99)}
    return {"loss": loss, "entropy": entropy, "valid": valid, **given}, token


def take(noting, step, calls):
    """Take a step of some calls."""
    noting.begin_step(step)
    for signals, token in calls:
        noting.add(noting.next_call(None), signals, token)
    noting.end_step()


def test_a_sequence_is_the_mean_over_its_valid_tokens(tmp_path):
    """Losses, entropies and weights at ignored tokens mean nothing; the domain is that of most."""
    noting = recorder(tmp_path, "every=2", "linupper-x-mile", calls=2)
    data = {step: [call_of(10 * step + call) for call in (1, 2)] for step in (1, 2, 3, 4)}
    for step, calls in data.items():
        take(noting, step, calls)
    noting.begin_step(6)  # and then the data ends
    noting.add(noting.next_call(None), *call_of(1))
    noting.flush()
    record = read_record(tmp_path)
    assert [step.step for step in steps_of(record)] == [2, 4], "the last one was not taken"
    assert record.known == {"loss", "entropy"}
    assert record.about["name"] == "linupper-x-mile"
    for found in steps_of(record):
        assert found.row.tolist() == [*range(6)]
        for row in found.row:
            signals, token = data[found.step][row // 3]
            valid = signals["valid"][row % 3]
            assert found.tokens[row] == valid.sum()
            # Recorded with 16 significant bits.
            for name, x in {**signals, WEIGHT: token}.items():
                if name in {"loss", "entropy", WEIGHT}:
                    recorded = found.weight if name == WEIGHT else found.signals[name]
                    assert recorded[row] == pytest.approx(x[row % 3][valid].mean(), rel=2**-16)
            ids = signals["domain_ids"][row % 3][valid]
            assert (ids == found.domain[row]).sum() >= (ids != found.domain[row]).sum()


def test_a_document_is_the_mean_over_its_valid_tokens(tmp_path):
    """So many of each sequence are kept, each with its place; how many there are is said."""
    noting = recorder(tmp_path, "every=1,documents=2", "linupper-x-mile", calls=2)
    data = {step: [call_of(10 * step + call) for call in (1, 2)] for step in (1, 2, 3, 4)}
    for step, calls in data.items():
        take(noting, step, calls)
    noting.flush()
    record = read_record(tmp_path, "document")
    expected, there, longest = {}, 0, 0
    for step, calls in data.items():
        for row in range(6):
            signals, token = calls[row // 3]
            valid, document = (signals[name][row % 3] for name in ("valid", "segment_ids"))
            number = int(document[valid].max()) + 1
            there, longest = there + number, max(longest, number)
            for one in range(2):
                own = valid & (document == one)
                if own.any():
                    of = (signals["loss"], signals["entropy"], token)
                    means = [x[row % 3][own].mean().item() for x in of]
                    ids = signals["domain_ids"][row % 3][own]
                    expected[step, row, one] = (number, own.sum().item(), *means), ids
    assert longest > 2, "some are left out"
    found = {}
    for step in steps_of(record):
        for i, (row, one) in enumerate(zip(step.row.tolist(), step.document.tolist(), strict=True)):
            means = (*(step.signals[name][i] for name in ("loss", "entropy")), step.weight[i])
            found[step.step, row, one] = (
                step.documents[i].item(),
                step.tokens[i].item(),
                *(x.item() for x in means),
            )
            ids = expected[step.step, row, one][1]
            assert (ids == step.domain[i]).sum() >= (ids != step.domain[i]).sum()
    assert [*found] == [*expected], "in the order of the data"
    for place, numbers in found.items():
        # Recorded with 16 significant bits.
        assert numbers == pytest.approx(expected[place][0], rel=2**-16)
    assert left_out(record) == (there - len(expected), there)


def test_with_and_without_documents_sequences_are_the_same(tmp_path):
    """They are put together from their documents, those left out among them."""
    for text in ("every=1", "every=1,documents=2"):
        noting = recorder(tmp_path / text, text)
        take(noting, 1, [call_of(1)])
        noting.flush()
    (a,), (b,) = (steps_of(read_record(folder)) for folder in sorted(tmp_path.iterdir()))
    for name in ("row", "domain", "tokens"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    # Other orders of sums, and 16 significant bits.
    torch.testing.assert_close(a.signals["loss"], b.signals["loss"], rtol=2**-15, atol=0)
    torch.testing.assert_close(a.weight, b.weight, rtol=2**-15, atol=0)


def test_documents_count_beside_the_sequences_of_their_step(tmp_path):
    """What was trained again without them has none; nor do those count whose file stands alone."""
    for text, steps in (("every=1,documents=2", (1, 2, 3)), ("every=1", (3, 4))):
        noting = recorder(tmp_path, text)
        for step in steps:
            take(noting, step, [call_of(step)])
        noting.flush()
    alone = tmp_path / FOLDER / "documents-000003.parquet"
    alone.write_bytes(b"of a run that was killed before it wrote the sequences")
    assert [step.step for step in steps_of(read_record(tmp_path, "document"))] == [1, 2]
    assert [step.step for step in steps_of(read_record(tmp_path))] == [1, 2, 3, 4]


def test_sampled_tokens_are_those_of_the_batch(tmp_path):
    """Each has its row, position, domain, loss and weight; ignored ones are left out."""
    noting = recorder(tmp_path, "every=1,tokens=40", calls=2)
    data = {step: [call_of(10 * step + call) for call in (1, 2)] for step in (1, 2)}
    for step, calls in data.items():
        take(noting, step, calls)
    noting.flush()
    (file,) = (tmp_path / FOLDER).glob(f"{TOKENS}-*.parquet")
    tokens = pq.read_table(file).to_pylist()
    assert 20 <= len(tokens) < 80
    assert len({(x[STEP], x[ROW], x[POSITION]) for x in tokens}) > 20
    for token in tokens:
        signals, weights = data[token[STEP]][token[ROW] // 3]
        at = token[ROW] % 3, token[POSITION]
        assert signals["valid"][at]
        assert token["loss"] == pytest.approx(signals["loss"][at].item(), rel=2**-16)
        assert token[WEIGHT] == pytest.approx(weights[at].item(), rel=2**-16)
        assert token[DOMAIN] == DOMAINS[signals["domain_ids"][at]]


def test_target_probability_is_taken_from_the_loss(tmp_path):
    """The mean of the tokens' probabilities, which the loss does not bring along."""
    noting = recorder(tmp_path, "every=1", "dft")
    signals, token = call_of(1)
    take(noting, 1, [(signals, token)])
    noting.flush()
    (step,) = steps_of(read_record(tmp_path))
    rows = zip(signals["loss"], signals["valid"], strict=True)
    expected = [(-loss[valid]).exp().mean() for loss, valid in rows]
    torch.testing.assert_close(
        step.signals["target_prob"], torch.stack(expected), rtol=2**-16, atol=0
    )


def test_without_token_losses_the_loss_is_nan_and_the_weight_one(tmp_path):
    """So it is with uniform weights, whose loss is the host's own."""
    noting = recorder(tmp_path, "every=1", "uniform")
    signals, _ = call_of(1)
    del signals["loss"]
    take(noting, 1, [(signals, signals["valid"].float())])
    noting.flush()
    (step,) = steps_of(read_record(tmp_path))
    assert step.signals["loss"].isnan().all()
    assert step.weight.tolist() == [1, 1, 1]
    assert step.tokens.tolist() == signals["valid"].sum(1).tolist()


@pytest.mark.slow
def test_a_captured_step_records_like_any_other(tmp_path):
    """Whether and where a call is noted is a matter of tensors: one graph serves all steps."""
    noting = recorder(tmp_path, "every=2,tokens=8,documents=2")
    # fullgraph refuses whatever would wait for the device.
    add = torch.compile(noting.add, fullgraph=True, backend="eager")
    number, data = None, {step: call_of(step) for step in range(1, 7)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, (signals, token) in data.items():
            noting.begin_step(step)
            before, number = number, noting.next_call(number)
            assert before is None or before.data_ptr() == number.data_ptr()
            add(number, signals, token)
            noting.end_step()
    noting.flush()
    record = read_record(tmp_path)
    assert [step.step for step in steps_of(record)] == [2, 4, 6]
    for found in steps_of(record):
        signals, _ = data[found.step]
        means = torch.where(signals["valid"], signals["loss"], 0).sum(1) / signals["valid"].sum(1)
        torch.testing.assert_close(found.signals["loss"], means, rtol=2**-16, atol=0)


def test_files_are_whole_and_old_ones_stay(tmp_path):
    """Each flush adds a file, at the latest when there is no more room; a fresh run begins anew."""
    noting = recorder(tmp_path, "every=1")
    for step in range(1, ROOM + 3):
        take(noting, step, [call_of(step)])
    folder = tmp_path / FOLDER
    first = folder / "sequences-000001.parquet"
    assert [*folder.iterdir()] == [first]
    content = first.read_bytes()
    (folder / "sequences-000002.parquet.part").write_bytes(b"what a kill left")

    resumed = recorder(tmp_path, "every=1")
    for step in range(ROOM, ROOM + 6):
        take(resumed, step, [call_of(1000 + step)])
    resumed.flush()
    assert first.read_bytes() == content
    record = read_record(tmp_path)
    assert [step.step for step in steps_of(record)] == [*range(1, ROOM + 6)]
    (signals, _), found = call_of(1000 + ROOM), steps_of(record)[ROOM - 1]
    assert found.tokens.tolist() == signals["valid"].sum(1).tolist(), "the later record counts"

    fresh = recorder(tmp_path, "every=1")
    take(fresh, 1, [call_of(1)])
    fresh.flush()
    assert len(steps_of(read_record(tmp_path))) == 1
    assert (folder.with_name("record.1") / first.name).read_bytes() == content


def test_what_cannot_be_written_ends_the_run(tmp_path):
    """The message says which steps and where; a run that goes on notes them again."""
    noting = recorder(tmp_path, "every=1")
    take(noting, 3, [call_of(1)])
    (tmp_path / "weighting").write_text("no folder can be here")
    with pytest.raises(ValueError, match=r"cannot write \S*/weighting/record, steps 3 to 3: "):
        noting.flush()


@pytest.mark.slow
def test_twenty_thousand_steps_of_128_sequences_take_less_than_20_megabytes(tmp_path):
    """Recorded at every step, with a second signal, and ten domains without any order."""
    layout = Layout(1, 128, 2048, 1)
    fn = wt.build(wt.load("linupper-x-mile"), domains=[f"domain-{i}" for i in range(10)])
    noting = Recorder(asked("every=1"), fn, layout, tmp_path / FOLDER, device=CPU)
    of = torch.Generator().manual_seed(0)
    for first in range(1, 20_001, ROOM):
        steps = [*range(first, min(first + ROOM, 20_001))]
        shape = len(steps), 128, 1
        # Losses that fall from 11 to 3 nats over the run, spread by half a nat.
        centre = 3 + 8 * torch.exp(-torch.tensor(steps) / 3000).view(-1, 1, 1)
        loss = centre + 0.5 * torch.randn(shape, generator=of)
        entropy = 0.9 * loss + 0.2 * torch.randn(shape, generator=of)
        weight = (loss - centre).exp().clamp(max=2)
        domain = torch.randint(10, shape[:2], generator=of)
        sums = torch.cat([torch.ones(shape), weight, loss, entropy], dim=2)
        counts = torch.nn.functional.one_hot(domain, 10)
        noting._rows[: len(steps), :, 0] = 2048 * torch.cat([sums, counts], dim=2)
        noting._steps = steps
        noting.flush()
    files = [*(tmp_path / FOLDER).iterdir()]
    assert len(files) == -(-20_000 // ROOM)
    assert sum(pq.read_metadata(file).num_rows for file in files) == 20_000 * 128
    size = sum(file.stat().st_size for file in files)
    assert size <= 20e6, f"{size / 1e6:.1f} MB, {size / 20_000 / 128:.2f} bytes a sequence"


# Real runs.

STEPWISE = """
version: 1
name: stepwise
scope: step
factors:
  instance: normalize -> linupper(alpha=1) -> temperature(0.4) -> clamp(1.5/n)
  token: entropy(gamma=1) -> token_scale
"""
LENGTH = "--training.seq_len=256"  # the least that two context-parallel ranks can share
LAYOUTS = {
    "FSDP2 x 2, accumulation x 2": ["--training.local_batch_size=2"],
    "CP x 2": ["--training.local_batch_size=8", "--parallelism.context_parallel_degree=2"],
    "PP x 2": [
        "--training.local_batch_size=8",
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=1F1B",
        "--parallelism.pipeline_parallel_microbatch_size=2",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains from one seed checkpoint, and the run on one rank."""
    folder = tmp_path_factory.mktemp("record")
    data = write_data(folder / "data.jsonl")  # of many documents in a row
    seed = seed_checkpoint(folder / "seed") / "step-0"
    spec = folder / "spec.yaml"
    spec.write_text(STEPWISE)

    def train(name, ranks, *flags):
        record = "every=2,tokens=16,documents=3"
        common = [f"--weighting.spec={spec}", f"--weighting.record={record}", LENGTH]
        common += [f"--dataloader.dataset_path={data}"]
        common += ["--checkpoint.enable", f"--checkpoint.initial_load_path={seed}"]
        common += ["--training.steps=4", "--training.global_batch_size=8", *flags]
        drive(folder / name, ranks, "small", "debugmodel", *common)
        return folder / name / "dump"

    return train, train("one", 1, "--training.local_batch_size=8")


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_records_the_same(name, runs):
    """Same rows, documents, domains, losses, entropies and weights, and the same tokens."""
    train, one = runs
    other = train(name.partition(",")[0].replace(" ", ""), 2, *LAYOUTS[name])
    both = [[read_record(run, of) for of in ("sequence", "document")] for run in (one, other)]
    (ours, our_documents), (theirs, their_documents) = both
    assert (
        [step.step for step in steps_of(theirs)] == [step.step for step in steps_of(ours)] == [2, 4]
    )
    assert theirs.domains == ours.domains
    assert left_out(our_documents)[0] > 0
    pairs = zip(steps_of(our_documents), steps_of(their_documents), strict=True)
    for a, b in [*zip(steps_of(ours), steps_of(theirs), strict=True), *pairs]:
        for x in ("row", "document", "documents", "domain", "tokens"):
            assert torch.equal(getattr(a, x), getattr(b, x)), x
        assert a.signals.keys() == b.signals.keys() == {"loss", "entropy"}
        # Other orders of sums; weights magnify them, as losses are normalised.
        for x, y in [(a.signals[name], b.signals[name]) for name in a.signals]:
            torch.testing.assert_close(x, y, rtol=5e-4, atol=0)
        torch.testing.assert_close(a.weight, b.weight, rtol=2e-3, atol=2e-3)
    sampled = []
    for run in (one, other):
        # One rank writes, once: of several files with a step none is the whole of it.
        assert len([*(run / FOLDER).iterdir()]) == 3
        (file,) = (run / FOLDER).glob(f"{TOKENS}-*.parquet")
        sampled.append(pq.read_table(file).to_pydict())
    a, b = sampled
    assert len(a[STEP]) == 32
    for column in (STEP, ROW, POSITION, DOMAIN):
        assert a[column] == b[column]
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=5e-4)


@pytest.mark.processes
def test_a_killed_run_completes_its_record(tmp_path):
    """What was written before a kill -9 stays, the rest is recorded again, as the metrics say."""
    size = ["--training.local_batch_size=8", "--debug.seed=1"]
    flags = ["--weighting.spec=linupper", "--weighting.record=every=1,documents=2", *size]
    kill_after_saving(tmp_path, *flags)
    run = tmp_path / "dump"
    written = {file: file.read_bytes() for file in (run / FOLDER).iterdir()}
    assert [step.step for step in steps_of(read_record(run))] == [*range(1, SAVED + 1)]
    (run / FOLDER / "sequences-000002.parquet.part").write_bytes(b"PAR1, and then a kill")

    drive(tmp_path, 1, "small", "debugmodel", *flags, *KEPT)
    for file, content in written.items():
        assert file.read_bytes() == content
    record = read_record(run)
    assert [step.step for step in steps_of(record)] == [*range(1, STEPS + 1)]
    documents = read_record(run, "document")
    assert [step.step for step in steps_of(documents)] == [*range(1, STEPS + 1)]
    places = [(step.row, step.document) for step in steps_of(documents)]
    assert all(len(torch.stack(at).unique(dim=1).T) == len(at[0]) for at in places), "no doubles"

    lines = read_lines(run / "weighting" / "metrics.jsonl")
    by_step = replay(wt.load("linupper"), record).weight.split(8)
    for step, line, weight in zip(steps_of(record), lines, by_step, strict=True):
        count = step.tokens.sum()
        loss = step.signals["loss"]
        # Each number was rounded to 16 significant bits, and the sums are of float32.
        for name, found in {
            "weight/max": step.weight.max(),
            "weight/min": step.weight.min(),
            "unweighted_loss": (loss * step.tokens).sum() / count,
            "weighted_loss": (step.weight * loss * step.tokens).sum() / count,
        }.items():
            assert found.item() == pytest.approx(line[name], rel=3e-5), (step.step, name)
        # Losses of 8 nats that were rounded by 6e-5 differ by half a nat, and r is 0.4.
        torch.testing.assert_close(weight, step.weight, rtol=2e-3, atol=2e-3)

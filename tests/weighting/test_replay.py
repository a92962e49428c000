"""Replaying specs on what a run recorded: the numbers, what is refused, what is printed."""

import json
from itertools import pairwise

import click.testing
import pytest
import torch
from recorded import steps_of

import weighting as wt
from weighting.build import plan_of
from weighting.cli import main
from weighting.cli.replay_report import report
from weighting.language.read import resolve
from weighting.report.charts import number
from weighting.runs.record_reader import ABOUT, FOLDER, read_record
from weighting.runs.replay import left_out, obstacle, replay, summary, unit_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DOMAINS = ("code", "docs", "data")
N, LENGTH = 24, 16
PER_DOCUMENT = "mean(document) -> temperature(0.5)"
PLAIN = "normalize -> linupper(alpha=1) -> temperature(0.4) -> clamp(1.2/n)"


def about(spec=PLAIN, *, batch=N, rank=N, ranks=1, domains=DOMAINS):
    """Return what a file says of its run."""
    spec = wt.loads(spec)
    named = {"name": spec.name, "hash": spec.hash, "spec": str(spec), "domains": list(domains)}
    return {**named, "every": 1, "ranks": ranks, "rank_rows": rank, "batch_rows": batch}


def write(run, steps, said, number=1, kind="sequences"):
    """Write a file of a record: for each step a dict of columns."""
    first = next(iter(steps.values()))
    columns = {name: [x for step in steps.values() for x in step[name]] for name in first}
    columns["step"] = [step for step, found in steps.items() for _ in found["row"]]
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(folder / f"{kind}-{number:06}.parquet", pa.table(columns).schema) as to:
        to.write_table(pa.table(columns))
        to.add_key_value_metadata({ABOUT: json.dumps(said)})
    return run


def step_of(seed, *, ragged=False):
    """Return the sequences of a step; all of the same length unless ragged."""
    of = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, LENGTH, (N,), generator=of) if ragged else torch.full((N,), LENGTH)
    loss, ref, weight = (torch.rand(N, generator=of) * 4 for _ in range(3))
    domain = torch.randint(len(DOMAINS), (N,), generator=of)
    return {
        "row": [*range(N)],
        "domain": [DOMAINS[i] for i in domain],
        "tokens": tokens.tolist(),
        "mean_weight": (weight / weight.mean()).tolist(),
        "loss": loss.tolist(),
        "ref_loss": ref.tolist(),
    }


def documents_of(step, seed):
    """Return two or three documents of each sequence of a step, and all that is known of them."""
    of = torch.Generator().manual_seed(seed)
    rows = []
    for row, (tokens, domain) in enumerate(zip(step["tokens"], step["domain"], strict=True)):
        ends = sorted({*torch.randint(1, tokens, (2,), generator=of).tolist(), tokens})
        for document, (start, end) in enumerate(pairwise([0, *ends])):
            known = {"row": row, "document": document, "documents": len(ends), "domain": domain}
            loss, ref, weight = (torch.rand(3, generator=of) * 4).tolist()
            known |= {"tokens": end - start, "mean_weight": weight, "loss": loss, "ref_loss": ref}
            rows.append(known)
    return {name: [row[name] for row in rows] for name in rows[0]}


DATA = {step: step_of(step) for step in (1, 2, 5)}
RAGGED = {step: step_of(step, ragged=True) for step in (1, 2, 5)}
DOCUMENTS = {step: documents_of(found, step) for step, found in RAGGED.items()}


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run that recorded three steps."""
    return write(tmp_path / "run", DATA, about())


# The numbers.


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        "prop1",
        "irdro-rank",
        "rho-loss",
        "linupper-1p4b",
        "quadratic",
        "group-dro",
        "table(code=1, docs=2, data=0.5) -> mean_one",
        "excess_loss -> mean(sequence) -> temperature(linear(2, 0.5, over=4))",
    ],
)
def test_a_replay_is_a_simulation_of_each_step(spec, run):
    """Where all sequences are as long, each step weighs as wt.simulate does at that step."""
    spec = resolve(spec)
    record = read_record(run)
    found = [*zip(steps_of(record), replay(spec, record).weight.split(N), strict=True)]
    # A simulation has no memory: with one, only the first step is the same.
    for step, weight in found[:1] if plan_of(spec).has_state else found:
        data = DATA[step.step]
        signals = {"ref_loss": data["ref_loss"]} if "ref_loss" in plan_of(spec).needs else {}
        domain = data["domain"] if "domain_ids" in plan_of(spec).needs else None
        expected = wt.simulate(spec, data["loss"], step.step, domain=domain, **signals)
        # Sums in another order.
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["mean_one", "none"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "domain_mean"])
@pytest.mark.parametrize(
    "pipeline",
    [
        "normalize -> temperature(0.5) -> clamp(2/n)",
        "table(code=1, docs=2, data=0.5) -> as_is",
        "mean(domain) -> exponentiated(step_size=0.5, smoothing=0)",
    ],
)
def test_tokens_count_as_they_did_in_the_run(pipeline, reduction, normalize, tmp_path):
    """Sequences of unequal length weigh, on average over their tokens, what the tokens did."""
    spec = wt.loads(
        f"version: 1\nreduction: {reduction}\nnormalize: {normalize}\npipeline: {pipeline}\n"
    )
    # A domain's mean is over tokens, which a record tells where sequences are as long.
    steps = {1: DATA[1]} if "domain)" in pipeline else RAGGED
    record = read_record(write(tmp_path, steps, about()))
    fn, found = wt.build(spec, domains=DOMAINS), replay(spec, record).weight.split(N)
    for weight, (step, data) in zip(found, steps.items(), strict=True):
        tokens = torch.tensor(data["tokens"])
        signals = wt.Signals(
            loss=torch.tensor(data["loss"])[:, None].expand(-1, LENGTH),
            valid=torch.arange(LENGTH) < tokens[:, None],
            domain_ids=torch.tensor([[DOMAINS.index(x)] * LENGTH for x in data["domain"]]),
        )
        expected = fn(signals, step).token.sum(1) / tokens
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "domain_mean"])
@pytest.mark.parametrize(
    "pipeline",
    [
        "mean(document) -> temperature(0.5) -> clamp(2/n)",
        "excess_loss -> mean(document) -> normalize -> temperature(0.5)",
    ],
)
def test_documents_weigh_as_in_the_run(pipeline, reduction, tmp_path):
    """A document's mean weight is that of its tokens, where all of every row were recorded."""
    spec = wt.loads(f"version: 1\nreduction: {reduction}\npipeline: {pipeline}\n")
    write(tmp_path, RAGGED, about())
    write(tmp_path, DOCUMENTS, about(), kind="documents")
    record = read_record(tmp_path, "document")
    assert left_out(record)[0] == 0
    fn, found = wt.build(spec, domains=DOMAINS), replay(spec, record).weight
    assert unit_of(fn.plan) == "document"
    assert obstacle(fn.plan, record) is None
    sizes = [len(step.row) for step in steps_of(record)]
    for weight, (step, data) in zip(found.split(sizes), DOCUMENTS.items(), strict=True):
        rows, tokens = torch.tensor(data["row"]), torch.tensor(data["tokens"])
        signals = {
            name: torch.zeros(N, LENGTH, dtype=torch.float32 if "loss" in name else torch.long)
            for name in ("loss", "ref_loss", "domain_ids", "segment_ids")
        }
        valid = torch.zeros(N, LENGTH, dtype=torch.bool)
        places = []
        for i, row in enumerate(rows):
            start = int(valid[row].sum())
            place = row, slice(start, start + int(tokens[i]))
            places.append(place)
            valid[place] = True
            signals["loss"][place], signals["ref_loss"][place] = (
                data[name][i] for name in ("loss", "ref_loss")
            )
            signals["domain_ids"][place] = DOMAINS.index(data["domain"][i])
            signals["segment_ids"][place] = data["document"][i]
        out = fn(wt.Signals(valid=valid, **signals), step).token
        expected = torch.stack([out[place].mean() for place in places])
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scope", "together"),
    [
        ("step", [range(24)]),
        ("microbatch", [range(12), range(12, 24)]),
        ("rank", [range(6), range(6, 12), range(12, 18), range(18, 24)]),
    ],
)
def test_a_scope_weighs_together_what_the_run_did(scope, together, tmp_path):
    """Two microbatches on two ranks: statistics run over the step, each of them, or a rank's."""
    spec = wt.loads(f"version: 1\nscope: {scope}\npipeline: temperature(0.5)\n")
    record = read_record(write(tmp_path, DATA, about(batch=12, rank=6, ranks=2)))
    weight = replay(spec, record).weight[:N]
    for rows in together:
        losses = [DATA[1]["loss"][i] for i in rows]
        expected = wt.simulate("temperature(0.5)", losses)
        torch.testing.assert_close(weight[list(rows)], expected, rtol=1e-5, atol=1e-6)


def test_rows_tell_apart_the_microbatches_of_a_pipeline(tmp_path):
    """Calls of two microbatches that are weighed together alternate between ranks."""
    record = read_record(write(tmp_path, DATA, about(batch=24, rank=6, ranks=2)))
    places, sizes, steps = record.batches("rank")
    own = [found.tolist() for found in places.split(sizes.tolist())]
    assert own[:2] == [[*range(6), *range(12, 18)], [*range(6, 12), *range(18, 24)]]
    assert own[2:4] == [[N + i for i in found] for found in own[:2]]
    assert steps.tolist() == [1, 1, 2, 2, 5, 5]


def test_a_memory_moves_with_the_recorded_steps(run):
    """A spec that remembers is built once, and sees one step after the other."""
    spec = wt.loads("mean(domain) -> exponentiated(step_size=0.5, smoothing=0)")
    fn = wt.build(spec, domains=DOMAINS)
    for step, weight in zip(DATA, replay(spec, read_record(run)).weight.split(N), strict=True):
        ids = torch.tensor([[DOMAINS.index(name)] for name in DATA[step]["domain"]])
        loss = torch.tensor(DATA[step]["loss"])[:, None]
        expected = fn(wt.Signals(loss=loss, domain_ids=ids), step).token[:, 0]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_what_weights_come_to(tmp_path):
    """ESS, the largest, domain shares by tokens, and the tenth in common, computed by hand."""
    step = {**DATA[1], "tokens": [10] * 12 + [20] * 12, "domain": ["code"] * 12 + ["docs"] * 12}
    step["mean_weight"] = [3.0, 2.0, 1.0, *[0.5] * 21]
    record = read_record(write(tmp_path, {7: step}, about()))
    found = summary(record, torch.tensor([0.5, 2.0, 1.0, 1.0, *[0.25] * 20]))
    total, squares = 4.5 + 5, 0.25 + 4 + 2 + 20 / 16
    assert found.ess == pytest.approx(total**2 / (24 * squares))
    assert found.largest == 2
    code, docs = (4.5 + 8 * 0.25) * 10, 12 * 0.25 * 20
    assert found.shares == pytest.approx([code / (code + docs), docs / (code + docs), 0])
    # The tenth of 24 is 3: rows 0, 1, 2 as recorded; here 1, and 2 and 3 tie for two places.
    assert found.top == pytest.approx(2 / 3)
    level = [1.0] * 24
    assert summary(record, torch.tensor(level)).top == pytest.approx(3 * (3 / 24) / 3)
    assert summary(record, record.weight).top == 1


def test_the_share_at_the_cap_is_that_of_units(run):
    """It is what the spec's own statistics say, over all steps."""
    found = replay(wt.loads(PLAIN), read_record(run))
    fn = wt.build(wt.loads(PLAIN))
    shares = [
        fn(wt.Signals(loss=torch.tensor(data["loss"])[:, None])).metrics["pipeline/capped_frac"]
        for data in DATA.values()
    ]
    assert found.capped == pytest.approx(torch.stack(shares).mean().item())
    assert found.capped > 0
    assert replay(wt.loads("temperature(1)"), read_record(run)).capped is None


# What is read, and what is refused.


def test_the_later_record_of_a_step_counts(tmp_path):
    """What a resumed run records again takes the place of what was lost with it."""
    again = {step: step_of(10 + step) for step in (5, 6)}
    write(tmp_path, DATA, about())
    record = read_record(write(tmp_path, again, about(), number=2))
    assert [step.step for step in steps_of(record)] == [1, 2, 5, 6]
    expected = [DATA[1], DATA[2], again[5], again[6]]
    for step, data in zip(steps_of(record), expected, strict=True):
        assert step.signals["loss"].tolist() == pytest.approx(data["loss"])


def test_domains_of_all_files_have_one_index(tmp_path):
    """The order is that of the last file; a domain that only an older one knows comes after."""
    few = {2: {**DATA[2], "domain": ["docs", "data"] * 12}}
    write(tmp_path, {1: DATA[1]}, about())
    record = read_record(write(tmp_path, few, about(domains=("docs", "data")), number=2))
    assert record.domains == ("docs", "data", "code")
    for step, data in zip(steps_of(record), (DATA[1], few[2]), strict=True):
        assert [record.domains[i] for i in step.domain] == data["domain"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mile", "it weighs per token, and sequences were recorded"),
        ("linupper-x-mile", "token weighs per token, and sequences were recorded"),
        (
            PER_DOCUMENT,
            "it weighs per document, and sequences were recorded; record documents too: --weightin",
        ),
        ("max(sequence) -> temperature(1)", "takes the max over tokens, and their mean was recor"),
        (
            "loss -> pow(2) -> mean(sequence) -> temperature(1)",
            "takes pow of each token, and the means",
        ),
        ("focal -> mean(sequence) -> temperature(1)", "takes focal of each token, and the means"),
        ("importance", "it reads error_norm, which the run's own spec did not"),
        ("column(quality) -> mean(sequence) -> temperature(1)", "it reads quality, which the run"),
        ("doge-proxy", "it waits for gradients, and only batches were recorded"),
    ],
)
def test_what_was_not_recorded_is_said_in_a_line(spec, reason, run):
    """Specs that ask for more than the means over sequences are refused, with what that is."""
    found = obstacle(plan_of(resolve(spec)), read_record(run))
    assert reason in found
    assert "\n" not in found


def test_a_record_without_losses_says_how_to_get_them(tmp_path):
    """A run with uniform weights records NaN; what reads no loss can be replayed all the same."""
    blank = {1: {**DATA[1], "loss": [float("nan")] * N}}
    record = read_record(write(tmp_path, blank, about("uniform")))
    refused = obstacle(plan_of(resolve("linupper")), record)
    assert refused == "it reads loss, which uniform records only with --loss.memory late"
    table = wt.loads("table(code=1, docs=2, data=0.5) -> mean_one")
    assert obstacle(plan_of(table), record) is None
    assert replay(table, record).weight.unique().numel() == 3


def test_a_folder_without_a_record_and_a_damaged_file_are_named(tmp_path, run):
    """Each message has the place and what to do."""
    with pytest.raises(ValueError, match=r"absent: no such folder; give the --dump_folder of a ru"):
        read_record(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no record in weighting/record; give the --dump_folder"):
        read_record(tmp_path)
    (run / FOLDER / "sequences-000002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"sequences-000002.parquet: no file of a record, or a da"):
        read_record(run)


# What is printed.


def printed(*arguments):
    """Return what the command prints; it must end well."""
    done = click.testing.CliRunner().invoke(main, ["replay", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_report_fits_a_terminal_and_a_pipe(run):
    """Many specs go below each other, the recorded weights first; no colours, no wide lines."""
    many = ["prop1", "upper", "extremes", "linupper-gpt2", "loss -> mean(sequence) -> mean_one"]
    text = printed(run, "--spec", *many)
    assert max(map(len, text.splitlines()[1:])) <= 80  # the first line is the user's own path
    assert "\x1b" not in text
    headings = [line.split() for line in text.splitlines() if line.split()[:1] == ["recorded"]]
    assert [line[0] for line in headings] == ["recorded"] * len(headings)
    assert [word for line in headings for word in line[1:5] if word in many] == many[:4]
    assert len(headings) > 1


def test_the_report_says_what_the_numbers_are(run):
    """Numbers stand in the row and column of their name."""
    text = printed(run, "--spec", "prop1", "--spec", "mile", "temperature(2)")
    record = read_record(run)
    found = summary(record, replay(resolve("prop1"), record).weight)
    lines = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
    recorded = summary(record, record.weight)
    assert lines["largest weight"][:2] == [f"{recorded.largest:.4f}", f"{found.largest:.4f}"]
    assert lines["ESS / n, mean over steps"][1] == f"{found.ess:.4f}"
    assert lines["top tenth in common"][0] == "1.0000"
    assert lines["share at the cap"][2] == "-"
    (code,) = (line for line in text.splitlines() if line.startswith("code "))
    assert code.split()[2:4] == [f"{x.shares[0]:.4f}" for x in (recorded, found)]
    assert "mile is not replayed: it weighs per token, and sequences were recorded" in text
    assert "the text is not recorded; --text reads the data again" in " ".join(text.split())


def test_the_sequences_most_moved_are_shown(run):
    """They are those of all steps whose weight a spec raises, or lowers, by the most."""
    record = read_record(run)
    change = replay(resolve("prop1"), record).weight - record.weight
    text = printed(run, "--spec", "prop1")
    raised, lowered = text.partition("most raised by prop1")[2].split("most lowered by prop1")
    for part, order in ((raised, change.argsort(descending=True)), (lowered, change.argsort())):
        shown = [line.split() for line in part.splitlines()[2:5]]
        for cells, i in zip(shown, order[:3].tolist(), strict=True):
            step, row = list(DATA)[i // N], i % N
            loss, domain = DATA[step]["loss"][row], DATA[step]["domain"][row]
            assert cells[:4] == [str(step), str(row), domain, f"{loss:.4f}"]


BOTH = """
version: 1
name: both
factors:
  instance: temperature(2)
  document: mean(document) -> temperature(2)
"""


def test_documents_have_numbers_and_texts_of_their_own(tmp_path, capsys):
    """Below those of sequences; each that is most moved with its place and how it begins."""
    write(tmp_path, RAGGED, about())
    few = {
        step: {**found, "documents": [9] * len(found["row"])} for step, found in DOCUMENTS.items()
    }
    write(tmp_path, few, about(), kind="documents")
    (tmp_path / "both.yaml").write_text(BOTH)
    specs = ["prop1", PER_DOCUMENT, str(tmp_path / "both.yaml")]

    def texts(wanted):
        return {(a, b): [f"{i} of {a} {b}" for i in range(9)] for a, b in wanted}

    report(tmp_path, specs, plugins=False, texts=texts)
    sequences, documents = capsys.readouterr().out.split("documents: 3 steps from 1 to 5, ")
    assert max(map(len, documents.splitlines())) <= 80
    assert "prop1" in sequences
    assert "prop1" not in documents
    record = read_record(tmp_path, "document")
    weight, own = replay(wt.loads(PER_DOCUMENT), record).weight, record.weight
    assert f"{summary(record, weight).ess:.4f}" in documents.split("largest weight")[0]
    at = [torch.stack([step.row, step.document], 1).tolist() for step in steps_of(record)]
    places = [
        (s.step, *place) for s, own in zip(steps_of(record), at, strict=True) for place in own
    ]
    lines = documents.partition("most raised")[2].splitlines()[2:8]
    for i, (line, below) in zip(
        (weight - own).topk(3).indices, zip(lines[::2], lines[1::2], strict=True), strict=True
    ):
        step, row, document = places[i]
        assert line.split()[:3] == [str(step), str(row), str(document)]
        assert below.strip() == f'"{document} of {step} {row}"'
    said = " ".join(documents.split())
    assert "both is not replayed: instance weighs per sequence and another factor per docu" in said
    count = len(own)
    there = 9 * sum(len({*found["row"]}) for found in few.values())
    assert f"{there - count} of {there} were left out" in said


def test_a_report_shows_how_recorded_weights_are_spread(run, tmp_path):
    """A line for each of some quantiles; a record that cannot be read is a sentence."""
    losses = [{"step": i, "unweighted_loss": 2.0, "weighted_loss": 2.0} for i in (1, 5)]
    lines = "".join(f"{json.dumps(line)}\n" for line in losses)
    (run / "weighting" / "metrics.jsonl").write_text(lines)
    out = str(tmp_path / "r.html")
    for spread in (True, False):
        done = click.testing.CliRunner().invoke(main, ["report", str(run), "--out", out])
        assert done.exit_code == 0, done.output
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert ("Distribution of weights, run" in page) == spread
        assert ("The record cannot be read here: " in page) != spread
        if spread:
            chart = page.partition("Distribution of weights, run")[2].partition("</figure>")[0]
            for x in torch.tensor(DATA[5]["mean_weight"]).quantile(torch.tensor([0.1, 0.5, 0.9])):
                assert f"{number(x.item())}" in chart
        (run / FOLDER / "sequences-000002.parquet").write_bytes(b"PAR1 and no more")


def test_a_wrong_spec_or_folder_ends_with_status_2(run, tmp_path):
    """Nothing is printed but the message."""
    for arguments in ([run, "--spec", "linuper.yaml"], [tmp_path / "absent"]):
        done = click.testing.CliRunner().invoke(main, ["replay", *map(str, arguments)])
        assert done.exit_code == 2
        assert len(done.output.splitlines()) == 1


def test_texts_take_torchtitan(run, monkeypatch):
    """`--text` reads the run's data again; where torchtitan is missing that is said."""
    asked = []

    def from_host(module, name):
        asked.append((module, name))
        return lambda run, *, plugins: asked.append((run, plugins))

    arguments = ["replay", str(run), "--spec", "prop1", "upper", "--text", "--allow-plugins"]
    with monkeypatch.context() as patch:
        patch.setattr("weighting.cli.replay.from_host", from_host)
        done = click.testing.CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert asked[:2] == [("replay_text", "texts_of"), (run, True)]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = click.testing.CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.output == "this needs torchtitan: pip install 'weighting-dsl[titan]'\n"


def test_the_beginning_of_a_text_fits_a_line_and_moves_no_cursor(run, capsys):
    """White space is collapsed, control characters are question marks, wide letters are two."""
    odd = {0: "a\n\n  b\x1b[31m \x07c", 1: "重み" * 50, 2: "x" * 200, 3: "y" * 68, 4: ""}
    shown = {
        0: "a b?[31m ?c",
        1: "重み" * 16 + "重…",
        2: "x" * 67 + "…",
        3: "y" * 68,
        4: "",
    }

    def texts(wanted):
        return {place: [odd[i]] for i, place in enumerate(wanted) if i in odd}

    report(run, ["prop1"], plugins=False, texts=texts)
    out = capsys.readouterr().out
    found = [line for line in out.splitlines() if line.startswith(" " * 10 + '"')]
    assert found == [f'          "{shown[i]}"' for i in range(5)]
    assert "the text is read again" in " ".join(out.split())


def test_the_runs_own_weights_need_no_spec(run):
    """Without a spec there is one column, and nobody is raised or lowered."""
    text = printed(run)
    assert "recorded" in text
    assert "raised" not in text


def test_names_in_a_record_cannot_move_the_cursor(tmp_path, monkeypatch):
    """A spec's name, a hash, a domain and a folder from elsewhere are printed in one line each."""
    bad = "a\x1b[2Jb\nerror: c\u202ed\x85e\r"
    said = about(domains=(bad, *DOMAINS[1:])) | {"name": bad, "hash": bad}
    steps = {
        step: {**found, "domain": [bad if x == DOMAINS[0] else x for x in found["domain"]]}
        for step, found in DATA.items()
    }
    monkeypatch.chdir(tmp_path)
    run = write(tmp_path / "evil\x1b[2J", steps, said)
    words = ["replay", str(run), "--spec", "linupper"]
    done = click.testing.CliRunner().invoke(main, words, color=True)
    assert done.exit_code == 0
    assert "recorded under a?[2Jb?error: c?d?e? (a?[2Jb" in done.output
    assert all(c.isprintable() for line in done.output.split("\n") for c in line)
    assert not any(line.startswith("error") for line in done.output.split("\n"))


@pytest.mark.parametrize("words", [["report"], ["replay"], ["check"], ["explain"]])
def test_file_names_cannot_move_the_cursor(words, tmp_path):
    """What is not there is named in printable characters."""
    name = str(tmp_path / "a\x1b[2J\u202e.yaml")
    more = ["--out", f"{tmp_path}/r.html"] if words == ["report"] else []
    done = click.testing.CliRunner().invoke(main, [*words, name, *more], color=True)
    assert done.exit_code == 2
    assert "a?[2J?.yaml" in done.output
    assert all(c.isprintable() or c == "\n" for c in done.output)


@pytest.mark.parametrize("scope", ["step", "rank"])
@pytest.mark.parametrize("spec", [PLAIN, "rank -> mean_one", "group-dro"])
def test_steps_that_are_weighed_at_once_do_not_mix(spec, scope, run, monkeypatch):
    """Each has the weights that it has alone; a spec that remembers goes step by step anyway."""
    spec = resolve(spec).model_copy(update={"scope": scope})
    record = read_record(run)
    together = replay(spec, record)
    monkeypatch.setattr("weighting.runs.replay._AT_ONCE", 1)
    alone = replay(spec, record)
    assert torch.equal(together.weight, alone.weight)
    assert together.capped == alone.capped

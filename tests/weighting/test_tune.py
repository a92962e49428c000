"""`weighting tune` over recorded weights: which values it finds, what it prints and refuses."""

import json

import click.testing
import pytest
import torch
from recorded import steps_of

import weighting as wt
from weighting.cli import main
from weighting.language.read import resolve
from weighting.runs.record_reader import ABOUT, FOLDER, read_record
from weighting.runs.tune import Wish, of_record, scan, told
from weighting.runs.vary import number_named, numbers_of, values_of, varied

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DOMAINS = ("code", "web")
N = 32
CAPPED = "normalize -> temperature(0.4) -> clamp(2/n)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run that recorded two steps; the losses of code are the higher."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    spec = wt.loads(CAPPED)
    said = {"name": spec.name, "hash": spec.hash, "spec": str(spec), "domains": [*DOMAINS]}
    said |= {"every": 1, "ranks": 1, "rank_rows": N, "batch_rows": N}
    loss = torch.rand(2 * N, generator=torch.Generator().manual_seed(3)) * 3 + 1
    loss += (torch.arange(2 * N) % 2 == 0).float()
    columns = {"step": [1 + i // N for i in range(2 * N)], "row": [i % N for i in range(2 * N)]}
    columns |= {"domain": [DOMAINS[i % 2] for i in range(2 * N)], "tokens": [16] * (2 * N)}
    columns |= {"mean_weight": [1.0] * (2 * N), "loss": loss.tolist()}
    path = folder / FOLDER / "sequences-000001.parquet"
    path.parent.mkdir(parents=True)
    table = pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(said)})
    pq.write_table(table, path)
    return folder


def scanned(spec, number, values, wishes, run):
    """Return what a scan finds over the recorded run."""
    spec, record = resolve(spec), read_record(run)
    found = number_named(spec, number)
    return scan(spec, found, values_of(values), wishes, lambda x: of_record(x, record))


def slow_ess(run, tau):
    """Return ESS/n of softmax(h / tau), the mean over the recorded steps, by loops."""
    total = 0.0
    for step in steps_of(read_record(run)):
        loss = step.signals["loss"].double().tolist()
        low, high = min(loss), max(loss)
        e = [2.718281828459045 ** ((2 * (x - low) / (high - low) - 1) / tau) for x in loss]
        total += sum(e) ** 2 / (len(e) * sum(x * x for x in e))
    return total / len(steps_of(read_record(run)))


# What it finds.


def test_the_edge_is_where_the_effective_sample_size_is_what_was_asked_for(run):
    """Halving finds it between two values that were looked at, to three digits."""
    found = scanned("normalize -> temperature(1)", "tau", "0.1:10", [Wish("ess", 0.7, 1)], run)
    [(low, high)] = found.spans
    assert high == 10
    assert slow_ess(run, low) == pytest.approx(0.7, abs=1e-3)
    assert slow_ess(run, low) >= 0.7 > slow_ess(run, low / 1.002)
    assert [point.met for point in found.points] == [point.value >= low for point in found.points]
    for point in found.points:
        assert point.found.ess == pytest.approx(slow_ess(run, point.value), rel=1e-4)


@pytest.mark.slow
def test_several_wishes_are_met_together(run):
    """Each alone keeps a stretch; both keep what these have in common."""
    ess, mass = Wish("ess", 0.5, 1), Wish("code", 0.6, 1, "code")
    alone = [scanned("normalize -> temperature(1)", "tau", "0.1:10", [x], run) for x in (ess, mass)]
    both = scanned("normalize -> temperature(1)", "tau", "0.1:10", [ess, mass], run)
    [(low, _)], [(_, high)] = (x.spans for x in alone)
    assert both.spans == [pytest.approx((low, high), rel=1e-3)]


def test_a_range_in_the_middle_has_two_edges_and_two_stretches_are_told_apart(run):
    """Of a temperature from below and above; of an affine scale, whose sign does not matter."""
    middle = scanned("normalize -> temperature(1)", "tau", "0.1:10", [Wish("ess", 0.5, 0.9)], run)
    [(low, high)] = middle.spans
    assert slow_ess(run, low) == pytest.approx(0.5, abs=1e-3)
    assert slow_ess(run, high) == pytest.approx(0.9, abs=1e-3)
    outer = scanned(
        "normalize -> affine(2) -> temperature(1)", "scale", "-3:3", [Wish("ess", 0, 0.9)], run
    )
    assert len(outer.spans) == 2
    assert outer.spans[0][0] == -3
    assert outer.spans[1][1] == 3
    assert outer.spans[0][1] < 0 < outer.spans[1][0]


def test_a_list_is_taken_as_it_is(run):
    """No value between is looked at, and none is told."""
    found = scanned("normalize -> temperature(1)", "tau", "2,0.1,1", [Wish("ess", 0.7, 1)], run)
    assert [point.value for point in found.points] == [0.1, 1, 2]
    assert found.spans == [(1, 2)]


def test_what_remembers_moves_over_the_record(run):
    """A step size of zero leaves the domains alike; a large one does not."""
    spec = "mean(domain) -> exponentiated(0.5)"
    found = scanned(spec, "step_size", "0,1", [Wish("ess", 0.99, 1)], run)
    assert [point.met for point in found.points] == [True, False]


# Numbers of a spec.


def test_every_number_of_a_spec_has_a_name():
    """Numbers, schedules, statistics, whole numbers and domains' weights; no words."""
    spec = wt.loads(
        "version: 1\nfactors:\n"
        "  a: normalize -> temperature(step(100, 0.4, at=500)) -> clamp(2/n)\n"
        "  b: loss -> temperature(median, within=sequence)\n"
        "  c: table(code=1, web=2) -> as_is\n"
        "  d: entropy(gamma=1) -> token_scale\n"
    )
    found = {f"{x.factor}.{x.label}": x.value for x in numbers_of(spec)}
    assert found["a.temperature.tau"] is None
    assert found["a.clamp.max"] == 2
    assert found["b.temperature.tau"] is None
    assert found["c.table.web"] == 2
    assert found["d.entropy.gamma"] == 1
    assert "b.temperature.within" not in found


def test_a_varied_spec_is_the_one_that_says_so():
    """Its text is that of the spec with the number written in it."""
    spec = wt.loads("pipeline: table(code=1, web=2) -> as_is\nversion: 1\nname: t\n")
    new = varied(spec, number_named(spec, "table.web"), 0.25)
    assert str(new) == str(spec).replace("web=2", "web=0.25").replace("name: t", "name: t-web-0.25")
    spec = resolve("linupper")
    new = varied(spec, number_named(spec, "temperature.tau"), 0.125)
    assert new.hash == resolve(str(new)).hash != spec.hash
    assert number_named(new, "tau").value == 0.125


def test_a_shipped_spec_varied_to_its_own_number_is_itself():
    """All numbers of all shipped specs can be varied."""
    for name in wt.language.find.shipped():
        spec = resolve(name)
        for number in numbers_of(spec):
            if number.value is not None and "/n" not in str(spec):
                same = varied(spec, number, number.value)
                assert same.factors == spec.factors, (name, number.label)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:", "gives no values"),
        ("a,b", "gives no values"),
        ("1:nan", "gives no values"),
        ("2:1", "is no range"),
        ("1:1", "is no range"),
    ],
)
def test_values_that_are_none_are_refused(text, message):
    """With what to write."""
    with pytest.raises(ValueError, match=message):
        values_of(text)


def test_ends_are_told_on_the_inside():
    """Three digits are enough, but never outside what keeps."""
    assert [*told([(0.41849, 3.9996)], inward=True)] == ["from 0.419 to 3.99"]
    assert [*told([(-3, -0.41849)], inward=True)] == ["from -3 to -0.419"]
    assert [*told([(0.400001, 0.400002)], inward=True)] == ["from 0.400001 to 0.400002"]
    assert [*told([(1, 1), (2, 2.5)], inward=False)] == ["1", "from 2 to 2.5"]


# The command.


def command(*arguments):
    """Return what it did."""
    return click.testing.CliRunner().invoke(main, ["tune", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_value_and_draws_them(run, tmp_path):
    """Those that keep what is asked for are marked, and told in a sentence."""
    out = tmp_path / "t.svg"
    wishes = ("--ess", "0.6", "--capped", "0.3", "--mass", "code=0.5:0.7")
    done = command(CAPPED, "tau=0.1:10", "--run", run, *wishes, "--plot", out)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == f"temperature.tau of unnamed, over {run}"
    assert lines[2].split() == ["temperature.tau", "ESS/n", "at", "cap", "largest", "code"]
    rows = [line for line in lines[3:] if line[2:26].strip().replace(".", "").isdigit()]
    assert len(rows) == 13
    assert {row[0] for row in rows} == {"*", " "}
    told_of = " ".join(done.output.split())
    assert "keeps ESS/n from 0.6 to 1 and at cap from 0 to 0.3 and the share of code from 0.5" in (
        told_of
    )
    assert "as it is written, temperature.tau is 0.4" in lines
    drawn = out.read_text()
    assert drawn.count("asked for") == 1
    for label in ("ESS/n", "at cap", "the share of code", "temperature.tau"):
        assert label in drawn


def test_no_value_is_said_and_told_by_the_status(run):
    """So that a script can tell."""
    done = command(CAPPED, "tau=0.1:0.2", "--run", run, "--ess", "0.99")
    assert done.exit_code == 1
    assert "no value keeps ESS/n from 0.99 to 1" in done.output


def test_a_file_of_tokens_does_for_specs_per_token(tmp_path):
    """Focal's gamma over tokens: higher ones weigh fewer."""
    units = [{"loss": 0.1 + i % 7, "step": 1 + i // 70} for i in range(140)]
    path = tmp_path / "tokens.jsonl"
    path.write_text("\n".join(map(json.dumps, units)))
    given = ("--losses", path, "--per", "token", "--ess", "0.9")
    done = command("focal", "gamma=0,1,30", *given)
    assert done.exit_code == 0, done.output
    marks = [line[0] for line in done.output.splitlines() if line[2:].strip()[:1].isdigit()]
    assert marks == ["*", " ", " "]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linupper", "tau", "--train"], "'tau' says no values; write NUMBER=VALUES"),
        (["linupper", "tau=1:2"], "give one of --run FOLDER, --losses FILE and --train"),
        (["linupper", "tau=1:2", "--run=x", "--train"], "give one of --run FOLDER, --losses"),
        (["linupper", "tau=1:2", "--train", "--ess=0.7"], "judge recorded weights"),
        (["linupper", "tau=1:2", "--run=x"], "say what the values are to keep: --ess 0.7"),
        (["linupper", "tau=1:2", "--run=x", "--ess=2"], "'2' is no range within 0 and 1"),
        (["linupper", "tau=1:2", "--run=x", "--ess=0.7", "--steps=2"], "--steps is of a run"),
        (["linupper", "tau=1:2", "--run=x", "--mass=code"], "names no domain and range"),
        (["linupper", "tua=1:2", "--run=x", "--ess=0.7"], "linupper has no number 'tua'"),
        (["linupper", "tau=2:1", "--run=x", "--ess=0.7"], "'2:1' is no range"),
        (["linupper", "tau=1:2", "--run=x", "--ess=0.7"], "x: no such folder"),
        (
            ["uniform", "tau=1:2", "--run=x", "--ess=0.7"],
            "no number 'tau'; it has none",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(words, message):
    """Each with what to do, and status 2."""
    done = command(*words)
    assert done.exit_code == 2
    assert message in done.output


def test_what_a_record_cannot_tell_is_refused(run):
    """Specs per token, values that a number cannot have, and domains that are not there."""
    done = command("mile", "gamma=0:2", "--run", run, "--ess", "0.7")
    assert "mile cannot be tuned over" in done.output
    assert "read with --losses" in done.output
    done = command(CAPPED, "tau=0:2", "--run", run, "--ess", "0.7")
    assert "temperature.tau = 0: tau of temperature: must be positive" in done.output
    done = command(CAPPED, "tau=1:2", "--run", run, "--mass", "cod=0:1")
    assert "has no domain 'cod'; did you mean 'code'?" in done.output


def test_a_number_that_stands_twice_is_asked_for_by_its_factor():
    """Or, in one pipeline, not at all."""
    two = wt.loads("version: 1\nfactors:\n  a: normalize -> temperature(1)\n  b: temperature(2)\n")
    with pytest.raises(ValueError, match=r"tau stands 2 times in .*write a\.temperature\.tau or b"):
        number_named(two, "tau")
    assert number_named(two, "b.temperature.tau").value == 2
    again = wt.loads("mean(sequence) -> clip(max=3) -> affine(2) -> clip(max=4) -> temperature(1)")
    with pytest.raises(ValueError, match=r"clip.max stands 2 times .* in which it stands once"):
        number_named(again, "clip.max")

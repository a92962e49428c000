"""`weighting plot`: pictures are whole, the same at every run, and say what they show."""

import json
import re
import sys
import xml.etree.ElementTree as ET

import click.testing
import matplotlib as mpl
import pytest
import torch
from matplotlib import image

import weighting as wt
from weighting.build.targets import targets_of
from weighting.cli import main
from weighting.cli.figures import COLOURS, picture
from weighting.cli.named import read_named
from weighting.cli.panels import (
    Line,
    Panel,
    against_recorded,
    against_signals,
    histogram,
    schedules,
)
from weighting.language.find import shipped
from weighting.runs.loss_files import recorded

SVG = "{http://www.w3.org/2000/svg}"
STEP = "normalize -> temperature(step(100, 0.4, at=500)) -> clamp(linear(2, 4, over=900))"


def run(*arguments):
    """Return what the command did."""
    return click.testing.CliRunner().invoke(main, ["plot", *map(str, arguments)])


def drawn(path, *arguments):
    """Return the texts of a picture that the command draws, as SVG."""
    done = run(*arguments, "--out", path)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == f"wrote {path}"
    return texts(path.read_bytes())


def texts(data):
    """Return all texts of an SVG."""
    root = ET.fromstring(data)
    assert root.tag == f"{SVG}svg"
    return ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


def batch(folder, count=30):
    """Write a recorded batch and return its path."""
    g = torch.Generator().manual_seed(0)
    units = [
        {"loss": x, "entropy": x * 0.8, "domain": "code" if i % 2 else "web"}
        for i, x in enumerate((torch.rand(count, generator=g) * 5).tolist())
    ]
    path = folder / "batch.jsonl"
    path.write_text("".join(json.dumps(unit) + "\n" for unit in units))
    return path


def test_weights_have_a_panel_for_each_signal(tmp_path):
    """Title, axes with their units, and every spec's name are in the picture."""
    found = drawn(tmp_path / "w.svg", "linupper", "mile", "linupper-x-mile", "uniform")
    assert "Weights of 129 evenly spread units" in found
    assert [x for x in found if x.startswith("against ")] == ["against loss", "against entropy"]
    for text in ("loss (nats)", "entropy (nats)", "linupper", "mile", "linupper-x-mile", "uniform"):
        assert found.count(text) == 1
    assert found.count("weight (mean one)") == 2


def test_schedules_have_a_panel_for_each_measure(tmp_path):
    """Weights, shares and what has no other measure have axes of their own."""
    found = drawn(tmp_path / "s.svg", STEP, "linupper-gpt2", "--kind", "schedules")
    assert "Numbers that change over the run" in found
    for axis in ("temperature.tau", "weight (mean one)", "share (from 0 to 1)"):
        assert axis in found
    assert found.count("optimizer step (steps)") == 3
    assert "linupper-gpt2: pipeline.interpolate.lam" in found
    assert any(x.endswith(": pipeline.clamp.max") for x in found)


def test_a_recorded_batch_is_drawn_as_a_histogram(tmp_path):
    """It says how many units it is of, and what its axes count."""
    losses = batch(tmp_path)
    arguments = ["linupper", "mile", "--kind", "histogram", "--losses", losses]
    found = drawn(tmp_path / "h.svg", *arguments)
    for text in ("Weights of 30 recorded units", "weight (mean one)", "number of units", "mile"):
        assert text in found


def test_steps_are_lines_of_their_own(tmp_path):
    """A spec that changes has a line at each step, named for both; another has one."""
    found = drawn(tmp_path / "w.svg", "linupper-gpt2", "prop1", "--steps", "1000,1001")
    assert "Weights of 129 evenly spread units against loss, steps 1000, 1001" in found
    assert {"linupper-gpt2, step 1000", "linupper-gpt2, step 1001", "prop1"} <= {*found}
    last = drawn(tmp_path / "w.svg", "linupper-gpt2")
    assert "Weights of 129 evenly spread units against loss, step 1001" in last


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_a_picture_is_whole_and_the_same_at_every_run(suffix, tmp_path):
    """Both formats parse, have lines on them, and differ in no byte from one run to the next."""
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        assert run("linupper", "prop1", "--out", path).exit_code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len([*tmp_path.iterdir()]) == 2, "nothing else is left"
    if suffix == ".svg":
        assert "prop1" in texts(paths[0].read_bytes())
        assert b"dc:date" not in paths[0].read_bytes()
        return
    pixels = torch.from_numpy(image.imread(paths[0], format="png").copy())[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    for colour in COLOURS[:2]:
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert ((pixels - rgb).abs().amax(-1) < 0.01).sum() > 200, f"no line of {colour}"
    assert bool((pixels[0, 0] == 1).all()), "the ground is white"


@pytest.mark.slow
def test_the_users_own_style_changes_nothing(tmp_path):
    """A picture has this style whatever matplotlib was told before, and leaves that alone."""
    before = drawn(tmp_path / "a.svg", "linupper")
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": False}):
        drawn(tmp_path / "b.svg", "linupper")
        assert mpl.rcParams["font.size"] == 30
    assert before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_name_with_a_dollar_is_a_name(tmp_path):
    """Columns may be called anything; nothing in a label is taken for a formula."""
    found = drawn(tmp_path / "a.svg", "column('a$b$c_d^2') -> mean_one")
    assert "column a$b$c_d^2" in found


def test_no_two_lines_look_alike():
    """Of twenty lines each has its own pair of colour and dashes."""
    lines = [Line(f"line {i}", [0, 1], [i, i + 1], i, i) for i in range(20)]
    svg = picture("", [Panel("", "x", "y", lines)], ".svg").decode()
    looks = re.findall(r'd="M [\d. ]+\nL [\d. ]+\n" clip-path[^>]*style="([^"]*)"', svg)
    assert len(looks) == 20
    assert len({*looks}) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_every_shipped_spec_is_drawn_or_says_why_not(name, tmp_path):
    """Weights of every spec are drawn, but of those that only draw data, which say so."""
    done = run(name, "--out", tmp_path / "w.svg")
    if {*targets_of(wt.load(name)).values()} == {"sampling"}:
        assert done.exit_code == 2
        assert done.output == f"{name} only draws data: every loss weighs 1; leave it out\n"
        return
    assert done.exit_code == 0, done.output
    assert name in texts((tmp_path / "w.svg").read_bytes())


def test_lines_are_the_weights_of_simulate():
    """Every point of a line is what `wt.simulate` gives to the spread signal."""
    named = read_named(["prop1", "linupper-x-mile"], plugins=False)
    spread, middle = torch.linspace(1, 5, 129), torch.full((129,), 3.0)
    loss, entropy = against_signals(named, [1], one=False)
    assert [line.label for line in loss.lines] == ["prop1", "linupper-x-mile"]
    assert loss.lines[0].x == spread.tolist()
    assert loss.lines[0].y == wt.simulate("prop1", spread, 1).tolist()
    expected = wt.simulate("linupper-x-mile", spread, 1, entropy=middle)
    assert loss.lines[1].y == expected.tolist()
    assert [line.label for line in entropy.lines] == ["linupper-x-mile"]
    expected = wt.simulate("linupper-x-mile", middle, 1, entropy=spread)
    assert entropy.lines[0].y == expected.tolist()


def test_a_table_is_drawn_against_its_domains():
    """Domains that a spec names are points on an axis, weighed as the table says."""
    named = read_named(["table-x-linupper"], plugins=False)
    _, domain = against_signals(named, [1], one=False)
    table = wt.load("table-x-linupper").factors["domain"][0].weights
    entries = torch.tensor([table[name].value for name in domain.lines[0].x])
    assert domain.kind == "points"
    assert torch.allclose(torch.tensor(domain.lines[0].y), entries / entries.mean())


def test_recorded_units_are_points(tmp_path):
    """With losses, weights are drawn as they are in the batch, and counted in a histogram."""
    losses = recorded(str(batch(tmp_path)), ["entropy"])
    named = read_named(["linupper", "mile"], plugins=False)
    loss, _ = against_recorded(named, [1], losses, one=False)
    weight = wt.simulate("linupper", losses.numbers("loss"), 1)
    assert (loss.kind, loss.lines[0].x) == ("points", losses.numbers("loss"))
    assert loss.lines[0].y == weight.tolist()
    [counts] = histogram(named, [1], losses, one=False)
    edges, tally = counts.lines[0].x, counts.lines[0].y
    assert sum(tally) == 30
    low, high = edges[3], edges[17]
    inside = sum(tally[3:17])
    assert inside == ((weight >= low) & (weight < high)).sum().item() > 0


def test_schedules_are_drawn_with_their_jumps():
    """A jump is between two neighbouring steps, and the run goes on as long again."""
    panels = schedules(read_named([STEP], plugins=False), [])
    tau, cap = (panel.lines[0] for panel in panels)
    at = dict(zip(tau.x, tau.y, strict=True))
    assert (at[499], at[500]) == (100, pytest.approx(0.4))
    assert (min(tau.x), max(tau.x)) == (1, 1800)
    assert dict(zip(cap.x, cap.y, strict=True))[900] == 4
    ends = schedules(read_named([STEP], plugins=False), [100, 2000])[0].lines[0].x
    assert (min(ends), max(ends)) == (100, 2000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linupper", "--out", "w.jpg"], "--out w.jpg: give it a name that ends in .png or .svg"),
        (["linupper", "--out", "w"], "--out w: give it a name that ends in .png or .svg"),
        (["linupper", "--out", "no/w.svg"], "--out no/w.svg: no folder no; make it first"),
        (
            ["linupper", "uniform", "--out", "w.svg", "--kind", "schedules"],
            "linupper, uniform: every number is constant, there is no schedule to draw",
        ),
        (
            ["linupper-gpt2", "--out", "w.svg", "--kind", "schedules", "--losses", "1,2"],
            "schedules do not depend on losses; leave --losses out",
        ),
        (
            ["linupper", "--out", "w.svg", "--kind", "histogram"],
            "a histogram is one of recorded losses; give --losses batch.jsonl",
        ),
        (
            ["mile", "--out", "w.svg", "--losses", "1,2"],
            'mile reads entropy, and "1,2" has loss; give a file with it, a value for each unit',
        ),
    ],
)
def test_a_wrong_name_kind_or_file_is_refused_in_one_line(
    arguments, message, tmp_path, monkeypatch
):
    """A wrong name, kind or file is one line, status 2, and no file."""
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.exit_code, done.output) == (2, f"{message}\n")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("steps", ["", "1,x", "-5", "1.5"])
def test_steps_that_are_no_whole_numbers_are_refused(steps, tmp_path):
    """Steps are whole numbers."""
    done = run("linupper", "--out", tmp_path / "w.svg", "--steps", steps)
    assert done.exit_code == 2
    assert "are no steps; write whole numbers, as in 1,500,2000" in " ".join(done.output.split())


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    """One line says which extra to install, and nothing is written."""
    monkeypatch.delitem(sys.modules, "weighting.cli.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("linupper", "--out", tmp_path / "w.svg")
    message = "this needs matplotlib: pip install 'weighting-dsl[plot]'\n"
    assert (done.exit_code, done.output) == (2, message)
    assert not [*tmp_path.iterdir()]


FULL = "No space left on device; choose another place"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """When writing fails, what was there before is still there, and nothing else."""
    path = tmp_path / "w.svg"
    path.write_text("before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    done = run("linupper", "--out", path)
    assert (done.exit_code, done.output) == (2, f"--out {path}: {FULL}\n")
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]
    monkeypatch.undo()
    assert run("linupper", "--out", path).exit_code == 0, "it is written over"
    assert texts(path.read_bytes())

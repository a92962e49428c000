"""The report of runs: what is on the page, that it holds together, and that it fits a browser."""

import base64
import dataclasses
import hashlib
import html
import html.parser
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess

import click.testing
import pytest
import torch

import weighting as wt
from weighting.cli import main
from weighting.report.charts import POINTS, Line, line_chart, number, thinned, ticks
from weighting.report.figures import by_domain, domain_mass, loss_shift, paired
from weighting.report.points import Points
from weighting.report.read import read_runs
from weighting.report.tables import as_text, by_seed, interval, most_moved, over_seeds, settings
from weighting.runs import run_json
from weighting.runs.record_reader import Record

DOMAINS = ("code", "prose")
CHARTS = {
    "Unweighted loss": "loss (nats)",
    "Weighted loss": "loss (nats)",
    "Maximum weight": "largest weight (mean = 1)",
    "Effective sample size": "ESS (share of tokens)",
    "Share at the cap": "share of units",
    "Weighted minus unweighted loss": "weighted − unweighted (nats)",
    "Throughput": "tokens/s",
    "Validation loss: code": "loss (nats)",
    "Validation loss: prose": "loss (nats)",
    "Validation loss: mean over domains": "loss (nats)",
    "Mixture as it stands, one": "share",
}


class Page(html.parser.HTMLParser):
    """What a page holds; fails on a tag that is closed wrongly."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.figures, self.words = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        """Note a tag that opens."""
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append("")
        if tag != "meta":  # the only one here that HTML never closes
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Note a tag that is closed at once."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        """Close the tag that was opened last, and no other."""
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Note the words, those in figures also by figure."""
        self.words += data
        if "figure" in self.open and self.open[-1] != "title":
            self.figures[-1] += f"{data}\n"


def line(step, shift=0.0, domains=DOMAINS, factor="instance"):
    """Return a line of metrics as the trainer writes it; the second domain now and then lacks."""
    loss = 3 + 5 / (1 + step) + shift + 0.1 * math.sin(step)
    weights = {"min": 0.2, "max": 1.5 + 0.5 * math.sin(step), "ess_frac": 0.8, "capped_frac": 0.1}
    told = {"step": step, "unweighted_loss": loss, "weighted_loss": loss + 0.25}
    told |= {f"{name}/{key}": x for name in (factor, "weight") for key, x in weights.items()}
    first, *others = domains
    told |= {f"domain/{first}/share": 0.75, f"domain/{first}/weight": 0.8}
    told |= {f"domain/{name}/share": 0.25 / len(others) for name in others}
    told |= {f"domain/{name}/weight": 1.6 for name in others if step % 3}
    told |= {f"domain/{name}/mixture": (0.5 + 0.1 * math.sin(step)) for name in domains}
    return {**told, "grad_norm": 1.0, "tps": 1000.0 + step}


def validation(step, shift=0.0, domains=DOMAINS):
    """Return a line of a validation."""
    losses = {name: 3 + i + shift + 1 / step for i, name in enumerate(domains)}
    told = {"step": step, "loss": 3.3 + shift, "domain_mean_loss": 3.5 + shift + 1 / step}
    told["domain_mean_perplexity"] = 40.0
    for name, loss in losses.items():
        told |= {f"{name}/tokens": 1000, f"{name}/loss": loss, f"{name}/perplexity": math.exp(loss)}
    return told


def write_run(folder, lines, validations=(), about=None):
    """Write what a run leaves, and return its folder."""
    (folder / "weighting").mkdir(parents=True)
    for name, told in {"metrics.jsonl": lines, "validation.jsonl": validations}.items():
        if told or name == "metrics.jsonl":
            text = "".join(json.dumps(x) + "\n" for x in told)
            (folder / "weighting" / name).write_text(text, encoding="utf-8")
    if about is not None:
        (folder / "weighting" / "run.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def about(spec, **config):
    """Return what a run says of itself."""
    spec = wt.loads(spec)
    start = {"time": "2026-11-20T10:00:00+00:00", "step": 1, "ranks": 2, "device": "a device"}
    start["versions"] = {"torch": "2.15.0"}
    told = {"name": spec.name, "hash": spec.hash, "text": str(spec)}
    return {"spec": told, "domains": DOMAINS, "config": config, "starts": [start]}


def report(out, *folders, flags=()):
    """Return what the command did."""
    words = ["report", *map(str, folders), "--out", str(out), *flags]
    return click.testing.CliRunner().invoke(main, words)


@pytest.fixture
def two(tmp_path):
    """Two runs: `one` with all there can be, `two` as an older version left it."""
    spec = "version: 1\nname: lin\npipeline: normalize -> temperature(0.4) -> clamp(1.5/n)\n"
    told = about(spec, training={"steps": 30, "dtype": "float32"})
    one = write_run(
        tmp_path / "one",
        [line(s) for s in range(1, 31)],
        [validation(s) for s in (10, 30)],
        told,
    )
    two = write_run(
        tmp_path / "two",
        [line(s, 0.5) for s in range(2, 31, 2)],
        [validation(s, 0.2) for s in (10, 20)],
    )
    return one, two


def test_every_chart_has_title_axes_units_and_legend(two, tmp_path):
    """Each chart is there with what it takes to read it, and tells values on hover."""
    done = report(tmp_path / "r.html", *two)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)

    found = {words.strip().splitlines()[0]: words.splitlines() for words in page.figures}
    for title, y_label in {
        **CHARTS,
        "Unweighted loss, difference to one": "difference (nats)",
    }.items():
        words = found[title]
        assert y_label in words, title
        assert "step" in words
        assert ("perplexity" in words) == title.startswith("Validation"), title
        legend = {"two"} if "difference" in title else {"one"}
        legend = set(DOMAINS) if title.startswith("Mixture") else legend
        assert legend <= {word.strip() for word in words}, title
    drawings = [attrs for tag, attrs in page.tags if tag == "svg" and "role" in attrs]
    assert len(drawings) == len(page.figures)
    assert all(x["role"] == "img" and x["aria-label"] for x in drawings)
    assert f"step 2\none: {number(line(2)['unweighted_loss'])}\ntwo: " in page.words


def test_the_page_holds_numbers_spec_settings_and_what_is_missing(two, tmp_path):
    """Tables have the numbers of the files; what an older run does not say is named."""
    assert report(tmp_path / "r.html", *two).exit_code == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))

    spec = wt.loads(json.loads((two[0] / "weighting/run.json").read_text())["spec"]["text"])
    assert f"lin {spec.hash}" in page.words
    assert "clamp(max=1.5/n)" in page.words or "clamp(1.5/n)" in page.words
    assert "one weight per sequence" in page.words
    assert "2/n, twice the mean" in page.words
    assert "one: cap of pipeline" in page.words
    for setting in ("training.dtype", "float32", "torch 2.15.0", "a device"):
        assert setting in page.words
    assert f"{line(30)['unweighted_loss']:.4f}" in page.words
    # Both were validated at step 10, where the second is worse by 0.2 nats.
    assert "Validation loss (nats) and perplexity by domain at step 10" in page.words
    assert "+0.2000" in page.words
    assert page.words.count("No run.json: spec, configuration and versions are unknown.") == 1
    assert [tag for tag, _ in page.tags if tag in {"h1", "h2", "h3"}][:2] == ["h1", "h2"]


@pytest.mark.parametrize("flags", [(), ("--static",)])
def test_the_page_is_whole_in_itself(two, tmp_path, flags):
    """Nothing to fetch, no handler, and no script but the one that the policy names."""
    assert report(tmp_path / "r.html", *two, flags=flags).exit_code == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"}
    named = {name for _, attrs in page.tags for name in attrs}
    assert not named & {"src", "xlink:href", "srcset", "action"}
    links = [attrs["href"] for _, attrs in page.tags if "href" in attrs]
    assert all(link.startswith("#") for link in links)
    assert not [name for name in named if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == [tag for tag, _ in page.tags].count("script") == (0 if flags else 1)
    assert ("script-src" in policy) == ("data-x" in text) == (not flags)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert len(script.splitlines()) < 120


def test_numbers_that_are_compared(two):
    """Differences of runs at steps of both, of losses in one line; masses over all lines."""
    one, other = read_runs(two)
    assert [*paired(other, one)] == [(s, pytest.approx(0.5)) for s in range(2, 31, 2)]
    assert [*loss_shift(one)] == [(s, pytest.approx(0.25)) for s in range(1, 31)]
    assert domain_mass(one, "code") == (pytest.approx(0.75), pytest.approx(0.6))
    # Two steps of three had a weight of 1.6 on a quarter of the tokens.
    assert domain_mass(one, "prose") == (pytest.approx(0.25), pytest.approx(0.4 * 2 / 3))


def test_without_validations_the_training_loss_of_each_domain_is_drawn(tmp_path):
    """The first 24 domains have a chart each, and the last of these says of how many."""
    names = [f"domain-{i}" for i in range(30)]
    losses = {f"domain/{name}/loss": float(i) for i, name in enumerate(names)}
    run = write_run(tmp_path / "run", [{**line(s, domains=names), **losses} for s in (1, 2)])
    charts = by_domain(read_runs([run]))
    assert [chart.title for chart in charts] == [f"Training loss: {name}" for name in names[:24]]
    assert [chart.note for chart in charts if chart.note] == ["The first 24 of 30 are drawn."]


def repeats(folder, spec, shifts, **config):
    """Write a run for each shift of the loss, seeded by its place from 0; return the folders."""
    return [
        write_run(
            folder / f"{wt.loads(spec).name}-{seed}",
            [line(s, shift) for s in (1, 2, 3, 4)],
            [validation(4, shift)],
            about(
                spec,
                dump_folder=f"{folder}/{seed}",
                debug={"seed": seed},
                init=f"<function normal_ at 0x{seed:x}>",
                **config,
            ),
        )
        for seed, shift in enumerate(shifts)
    ]


PLAIN, OTHER = (f"version: 1\nname: {x}\npipeline: {x}\n" for x in ("uniform", "abs"))


def test_repeats_with_other_seeds_give_a_mean_difference_and_its_interval(tmp_path):
    """Runs are paired by seed; a configuration that differs otherwise is no repeat."""
    first = repeats(tmp_path, PLAIN, (0.0, 0.5, -0.5))
    # Against the same seeds: -0.1, -0.2 and -0.3, so the standard error is 0.1 / sqrt(3).
    second = repeats(tmp_path, OTHER, (-0.1, 0.3, -0.8))
    table = over_seeds(read_runs([*first, *second]))
    rows = {row[1]: row[2:] for row in table.rows}
    half = 4.3027 * 0.1 / math.sqrt(3)
    expected = ("3", "-0.2000", f"{-0.2 - half:+.4f}", f"{-0.2 + half:+.4f}")
    assert rows == dict.fromkeys(
        (
            "training, last quarter, unweighted",
            *(f"validation, {name}" for name in (*DOMAINS, "all tokens", "mean over domains")),
        ),
        expected,
    )
    assert "abs-0, abs-1, abs-2" in {row[0] for row in table.rows}
    warmer = repeats(tmp_path / "warmer", OTHER, (0.0,), lr=2)
    assert over_seeds(read_runs([*first, *second[:1], *warmer])) is None


def test_a_comparison_over_seeds_ends_in_losses_by_domain_with_their_intervals(tmp_path):
    """Of each spec the mean and interval over seeds; from the second on also of differences."""
    groups = {
        "uniform": read_runs(repeats(tmp_path, PLAIN, (0.0, 0.5, -0.5))),
        "abs": read_runs(repeats(tmp_path, OTHER, (-0.1, 0.3, -0.8))),
    }
    table = by_seed(groups)
    labels = [row[0] for row in table.rows if row[0]]
    names = (*DOMAINS, "all tokens", "mean over domains")
    assert labels == [*(f"validation, {name}" for name in names), labels[-1]]
    assert labels[-1] == "training, last quarter, unweighted"
    last = validation(4, 0.0)[f"{DOMAINS[0]}/loss"]
    wide, half = (4.3027 * x / math.sqrt(3) for x in (0.5, 0.1))
    plain, other = table.rows[:2]
    assert plain[1:] == ("uniform", *(f"{last + x:.4f}" for x in (0, -wide, wide)), "", "", "")
    assert other[:2] == ("", "abs")
    assert other[5:] == tuple(f"{-0.2 + x:+.4f}" for x in (0, -half, half))
    lines = as_text(table).splitlines()
    assert lines[0].split() == [*table.head]
    assert lines[-1] == table.caption
    assert len({line.index(plain[2]) for line in lines if plain[2] in line}) == 1


def test_sequences_most_raised_and_lowered_are_listed_where_they_were_recorded(tmp_path):
    """Those of more and of less weight than one, the furthest first; none of no token."""
    [run] = read_runs([write_run(tmp_path / "a", [line(1)])])
    assert most_moved(run) == []
    weight = torch.tensor([1.0, 1.5, 0.25, 3.0, 9.0])
    zeros, ones = torch.zeros(5).long(), torch.ones(5).long()
    record = Record(
        about={},
        domains=("prose", "verse"),
        numbers=torch.tensor([1200]),
        sizes=torch.tensor([5]),
        told=[{}],
        row=torch.arange(5),
        document=zeros,
        documents=ones,
        domain=ones,
        tokens=torch.tensor([8.0, 8, 8, 8, 0]),
        weight=weight,
        signals={"loss": torch.arange(5) / 2},
    )
    raised, lowered = most_moved(dataclasses.replace(run, record=record))
    assert raised.rows == [
        ("verse", "1,200", "3", "8", "1.5000", "3.0000"),
        ("verse", "1,200", "1", "8", "0.5000", "1.5000"),
    ]
    assert lowered.rows == [("verse", "1,200", "2", "8", "1.0000", "0.2500")]
    bare = dataclasses.replace(record, domains=(), signals={})
    raised, _ = most_moved(dataclasses.replace(run, record=bare))
    assert raised.rows[0] == ("–", "1,200", "3", "8", "–", "3.0000")


def test_without_repeats_there_is_no_table_over_seeds(two):
    """One run of a spec, or runs that do not say what they are, have no interval."""
    assert over_seeds(read_runs(two)) is None
    assert over_seeds(read_runs(two[::-1])) is None


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (11, 2.2281), (12, 2.2010), (31, 2.0423)])
def test_intervals_use_students_t(n, t):
    """The half width over the standard error is the quantile that tables of t have."""
    values = [float(i % 2) for i in range(n)]
    low, high = interval(values)
    error = statistics.stdev(values) / math.sqrt(n)
    assert (high - low) / 2 / error == pytest.approx(t, abs=0.003)


def test_names_are_escaped(tmp_path):
    """Names of specs, folders, domains and settings cannot become tags or attributes."""
    bad = "<b title='x'>&\"quoted\"</b>"
    names = (bad, "plain")
    told = about("version: 1\npipeline: uniform\n", note=bad)
    told["spec"]["name"] = bad
    folder = write_run(
        tmp_path / 'a <i>&"b"',
        [line(s, domains=names, factor=bad.replace("/", "|")) for s in (1, 2, 3)],
        [validation(3, domains=names)],
        told,
    )
    assert report(tmp_path / "r.html", folder).exit_code == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.tags} & {"b", "i"}
    assert bad in page.words
    assert 'a <i>&"b"' in page.words


def test_names_cannot_turn_the_page_around(tmp_path):
    """Control characters and marks of direction in names are question marks on the page."""
    bad = "a\x1b[31mb\u202ec\x85d"
    told = about("version: 1\npipeline: uniform\n", note=bad)
    told["spec"] |= {"name": bad, "text": bad}
    folder = write_run(
        tmp_path / bad,
        [line(s, domains=(bad, "plain"), factor=bad) for s in (1, 2, 3)],
        [validation(3, domains=(bad, "plain"))],
        told,
    )
    assert report(tmp_path / "r.html", folder).exit_code == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in page)
    assert "a?[31mb?c?d" in page


def test_the_contents_link_to_every_section(two, tmp_path):
    """Each link at the top leads to a place of the page, and each section has one."""
    assert report(tmp_path / "r.html", *two).exit_code == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    places = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert links == [f"#{place}" for place in places]
    sections = [attrs for tag, attrs in page.tags if tag == "section"]
    assert all("id" in attrs for attrs in sections)


def test_host_and_command_of_each_start_are_shown(tmp_path):
    """A start that an older version wrote says neither: both are unknown."""
    facts = about("version: 1\npipeline: uniform\n")
    (old,) = facts["starts"]
    facts["starts"] = [old, {**old, "host": "node-7", "command": "python -m train --x 'a b'"}]
    run = write_run(tmp_path / "run", [line(1), line(2)], about=facts)
    starts, *_ = settings(read_runs([run])[0])
    assert starts.head[:3] == ("time (UTC)", "host", "command of the first rank")
    assert [row[1:3] for row in starts.rows] == [
        ("unknown", "unknown"),
        ("node-7", "python -m train --x 'a b'"),
    ]


def test_a_run_with_next_to_nothing(tmp_path):
    """One line of two losses is a report, which says what there is not."""
    lines = [{"step": 1, "unweighted_loss": 2.0, "weighted_loss": math.nan}]
    folder = write_run(tmp_path / "run", lines)
    assert report(tmp_path / "r.html", folder).exit_code == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(page.figures) == 1
    for sentence in ("None of the runs was validated.", "No weights were logged."):
        assert sentence in page.words
    assert "No validation.jsonl" in page.words
    assert "nan" not in page.words.lower()


def test_a_spec_that_cannot_be_read_here_is_shown_as_text(tmp_path):
    """A plugin's stage may be missing: the report says so and shows what was written."""
    told = about("version: 1\npipeline: uniform\n")
    told["spec"]["text"] = "version: 1\npipeline: no_such_stage_here\n"
    folder = write_run(tmp_path / "run", [line(1), line(2)], about=told)
    assert report(tmp_path / "r.html", folder).exit_code == 0
    words = Page((tmp_path / "r.html").read_text(encoding="utf-8")).words
    assert "unknown stage 'no_such_stage_here'" in words
    assert "pipeline: no_such_stage_here" in words


def test_user_errors_are_one_message_and_leave_no_file(two, tmp_path):
    """What is no run, damaged or empty ends with status 2 and leaves an earlier report alone."""
    out = tmp_path / "r.html"
    out.write_text("before")
    none, damaged, empty, odd = (tmp_path / name for name in ("none", "damaged", "empty", "odd"))
    write_run(damaged, [line(1), line(2), line(3)])
    path = damaged / "weighting" / "metrics.jsonl"
    texts = path.read_text().splitlines()
    path.write_text("\n".join([texts[0], texts[1][:40], texts[2]]))
    write_run(empty, [])
    write_run(odd, [line(1)], about={"spec": "linupper"})
    for folder, message in {
        none: "none: no such folder; give the --dump_folder of a run",
        tmp_path: "not the folder of a run",
        damaged: "metrics.jsonl:2: not a line of metrics",
        empty: "nothing was logged",
        odd: "run.json: does not say what the run is",
        two[0]: "given twice",
    }.items():
        done = report(out, two[0], folder)
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert len(done.output.strip().splitlines()) == 1
    assert out.read_text() == "before"
    assert report(tmp_path / "no" / "r.html", two[0]).exit_code == 2
    assert not list(tmp_path.glob("*.part"))


def test_what_the_trainer_says_of_a_run_is_understood(tmp_path):
    """A first start sets another run's file aside; a resumed run keeps its facts and adds one."""
    folder = write_run(
        tmp_path / "run", [line(1), line(2)], about=about("version: 1\npipeline: abs")
    )
    path = folder / "weighting" / "run.json"
    facts = about("version: 1\nname: mine\npipeline: uniform", odd=object())
    first, *_ = facts.pop("starts")
    path.write_text(run_json.about(path, facts, first))
    again = {"name": "another", **facts["spec"], "hash": "0"}
    text = run_json.about(path, {**facts, "spec": again}, {**first, "step": 20, "ranks": 7})
    path.write_text(text)

    assert path.with_name("run.json.1").exists()
    (run,) = read_runs([folder])
    assert run.spec == wt.loads("version: 1\nname: mine\npipeline: uniform")
    assert run.about["spec"]["hash"] == run.spec.hash
    assert [(x["step"], x["ranks"]) for x in run.about["starts"]] == [(1, 2), (20, 7)]


def test_a_torn_last_line_is_left_out(tmp_path):
    """A run that is being written, or was killed, can be reported."""
    folder = write_run(tmp_path / "run", [line(1), line(2)])
    with (folder / "weighting" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "unwei')
    (run,) = read_runs([folder])
    assert [x["step"] for x in run.lines] == [1, 2]


@pytest.mark.slow
def test_long_runs_stay_small(tmp_path):
    """Four runs of 20,000 logged steps make less than 2 MB."""
    names = [f"domain-{i}" for i in range(10)]
    lines = [json.dumps(line(s, domains=names)) for s in range(1, 20_001)]
    folders = [write_run(tmp_path / f"run-{i}", []) for i in range(4)]
    for folder in folders:
        (folder / "weighting" / "metrics.jsonl").write_text("\n".join(lines))
    assert report(tmp_path / "r.html", *folders).exit_code == 0
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


def test_thinning_keeps_ends_and_extremes():
    """A peak of one step among thousands stays in the line."""
    points = [(float(i), float(i == 7777)) for i in range(20_000)]
    kept = [*thinned(Points.pairs(points))]
    assert len(kept) <= POINTS
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (7777.0, 1.0) in kept


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 8.1), (-0.5, 0.3), (1, 20_000), (0, 1e-5)])
def test_ticks_are_a_few_inside(low, high):
    """Ticks lie in the range, evenly, and are neither one nor many."""
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    room = (high - low) * 1e-6  # rounding
    assert all(low - room <= x <= high + room for x in found)


def test_lines_differ_without_their_colours():
    """Twelve lines of one chart look all different, and neighbours have other dashes."""
    chart = line_chart(
        "t", "y", [Line(str(i), Points.pairs([(0, i), (1, i)]), i) for i in range(12)]
    )
    looks = re.findall(r"class='line (c\d d\d)'", chart.svg)
    assert len(set(looks)) == 12
    assert all(a[-2:] != b[-2:] for a, b in itertools.pairwise(looks))


def chromium():
    """Return the browser; without one the test is skipped on a user's machine, and fails in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and "CI" not in os.environ:
        pytest.skip("there is no chromium here")
    assert found, "CI needs chromium"
    return found


def browse(page, folder):
    """Return a page as a browser leaves it, which must not complain about anything."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [chromium(), *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    return done.stdout


POINT = """
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const [chart, ...others] = page.querySelectorAll("svg.chart");
  const place = new DOMPoint(54 + 320 * (1.2 / 29), 100).matrixTransform(chart.getScreenCTM());
  const seen = () => [
    page.getElementById("values").hidden ? "" : page.getElementById("values").textContent,
    [...page.querySelectorAll(".cursor")].filter((x) => x.getAttribute("d")).length,
  ];
  const where = { clientX: place.x, clientY: place.y, bubbles: true };
  const key = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const views = [others.length + 1];
  chart.dispatchEvent(new PointerEvent("pointermove", where));
  views.push(seen());
  key("ArrowRight");
  views.push(seen());
  key("Escape");
  views.push(seen());
  document.querySelector("pre").textContent = JSON.stringify(views);
};
"""
"""Points at the first chart a little right of step 2, goes one step on by key, and leaves it."""


@pytest.mark.slow
def test_pointing_at_a_chart_shows_its_values_and_a_cursor_in_every_chart(two, tmp_path):
    """A line without a value at that step shows its nearest, and says of which step."""
    assert report(tmp_path / "r.html", *two).exit_code == 0
    text = html.escape((tmp_path / "r.html").read_text(encoding="utf-8"))
    around = tmp_path / "around.html"
    frame = f'<iframe width="1200" height="900" srcdoc="{text}"></iframe>'
    around.write_text(f"<!DOCTYPE html><pre></pre><script>{POINT}</script>{frame}")
    found = re.search(r"<pre>(.+?)</pre>", browse(around, tmp_path), re.DOTALL)[1]
    charts, pointed, stepped, left = json.loads(html.unescape(found))
    first, second = (
        {s: f"{line(s, shift)['unweighted_loss']:.5g}" for s in (2, 3)} for shift in (0, 0.5)
    )
    # The charts of validations begin at step 10: no cursor there.
    validations = len(DOMAINS) + 1
    assert pointed == [f"step 2\none: {first[2]}\ntwo: {second[2]}", charts - validations]
    assert stepped[0] == f"step 3\none: {first[3]}\ntwo: {second[2]} (step 2)"
    assert left == ["", 0]


@pytest.mark.slow
def test_a_browser_shows_the_report_without_overflow_or_errors(two, tmp_path):
    """At 1280 and 390 pixels nothing is wider than the page, and nothing is complained about."""
    assert report(tmp_path / "r.html", *two).exit_code == 0
    # A page of ours around the report measures it.
    text = html.escape((tmp_path / "r.html").read_text(encoding="utf-8"))
    frame = '<iframe width="{}" height="900" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, text) for width in (1280, 390))
    measure = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')].map((f) => {"
        " const d = f.contentDocument; const e = d.documentElement;"
        " return [e.scrollWidth, e.clientWidth, d.querySelectorAll('svg.chart').length].join(' ')"
        " }).join(';') }"
    )
    around = tmp_path / "around.html"
    around.write_text(f"<!DOCTYPE html><title></title><script>{measure}</script>{frames}")
    browse(tmp_path / "r.html", tmp_path)
    found = browse(around, tmp_path)
    measured = re.search(r"<title>([^<]+)</title>", found)[1].split(";")
    assert len(measured) == 2
    for found in measured:
        wide, there, charts = map(int, found.split())
        assert charts >= len(CHARTS)
        assert there > 300, "the frame was laid out"
        assert wide <= there, f"{wide} pixels on {there}"

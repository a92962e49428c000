"""Schedules given as shares of a run: steps where the run is known, refused elsewhere."""

import re
from pathlib import Path

import click.testing
import pytest
import torch

import weighting as wt
from weighting.build import plan_of
from weighting.cli import main
from weighting.schedules import Cosine, Exponential, Linear, Percent, Piecewise, Step

PIPELINE = "normalize -> temperature(step(100, 0.4, at=5%))"
SHARES = f"version: 1\nname: shares\npipeline: {PIPELINE}\n"
LISTS = """version: 1
name: shares
factors:
  pipeline:
  - normalize
  - temperature:
      tau:
        step: {before: 100, after: 0.4, at: 5%}
"""


def test_both_spellings_are_the_same_and_print_as_they_were_written():
    """Arrow text and lists, each read back to an equal spec."""
    spec = wt.loads(SHARES)
    assert wt.loads(LISTS) == spec
    assert "at=5%" in wt.dumps(spec)
    assert "at: 5%" in wt.dumps(spec, "yaml")
    assert wt.loads(wt.dumps(spec)) == wt.loads(wt.dumps(spec, "yaml")) == spec


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        (Step(before=1, after=2, at=Percent(value=5)), Step(before=1, after=2, at=50)),
        (
            Linear(start=1, end=2, over=Percent(value=20), begin=Percent(value=0.25)),
            Linear(start=1, end=2, over=200, begin=2),
        ),
        (
            Cosine(start=1, end=2, over=Percent(value=100), begin=7),
            Cosine(start=1, end=2, over=1000, begin=7),
        ),
        (
            Exponential(start=1, end=2, over=Percent(value=0)),
            Exponential(start=1, end=2, over=1),
        ),
        (
            Piecewise(values={0: 1, Percent(value=50): 3, Percent(value=0.25): 2}),
            Piecewise(values={0: 1, 2: 2, 500: 3}),
        ),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_share_is_so_many_steps_of_a_run(shares, steps):
    """Rounded to whole steps, and to one at least where none would divide by zero."""
    assert shares.over_steps(1000) == steps


def test_a_build_with_the_steps_of_a_run_follows_them():
    """The same weights as from the spec with steps, before, at and after the turn."""
    shares = wt.build(wt.loads(SHARES), steps=60)
    steps = wt.build(wt.loads(SHARES.replace("5%", "3")))
    assert shares.spec.hash == steps.spec.hash
    logits, labels = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    for step in (2, 3, 4):
        _, one = wt.weighted_cross_entropy(logits, labels, shares, step=step)
        _, other = wt.weighted_cross_entropy(logits, labels, steps, step=step)
        assert torch.equal(one.token, other.token)
    plan = plan_of(wt.loads(SHARES))
    assert wt.build(plan, steps=60).spec == shares.spec


def test_piecewise_takes_shares_in_both_spellings():
    """Printed as written; where two shares come to one step, the later one's value holds."""
    arrow = "version: 1\npipeline: 'temperature(piecewise({0: 9, 2%: 7, 50%: 3, 1%: 8}))'\n"
    lists = (
        "version: 1\npipeline:\n- temperature: {tau: {piecewise: {0: 9, 1%: 8, 2%: 7, 50%: 3}}}\n"
    )
    spec = wt.loads(arrow)
    assert spec == wt.loads(lists) == wt.loads(wt.dumps(spec)) == wt.loads(wt.dumps(spec, "yaml"))
    assert "{0: 9, 1%: 8, 2%: 7, 50%: 3}" in wt.dumps(spec)
    assert "piecewise: {0: 9, 1%: 8, 2%: 7, 50%: 3}" in wt.dumps(spec, "yaml")
    assert "{0: 7, 10: 3}" in wt.dumps(wt.build(spec, steps=20).spec)
    with pytest.raises(wt.SpecError, match="1% of piecewise is a share of the run"):
        wt.build(spec)


def test_a_domain_may_be_called_like_a_share():
    """The keys of a table are names, those of a schedule in it are steps."""
    arrow = "version: 1\npipeline: 'table({5%: 1, b: piecewise({0: 1, 5%: 2})}) -> mean_one'\n"
    lists = "version: 1\npipeline:\n- table: {5%: 1, b: {piecewise: {0: 1, 5%: 2}}}\n- mean_one\n"
    assert wt.loads(arrow) == wt.loads(lists)
    weights = wt.build(wt.loads(arrow), domains=["5%", "b"], steps=20).spec
    assert "b=piecewise({0: 1, 1: 2})" in wt.dumps(weights)


def test_shares_within_maps_are_found():
    """A number of a table may be a schedule too."""
    text = "table(a=step(1, 2, at=50%), b=1) -> mean_one"
    spec = wt.loads(f"version: 1\npipeline: {text}\n")
    assert "at=5)" in wt.dumps(wt.build(spec, domains=["a", "b"], steps=10).spec)
    with pytest.raises(wt.SpecError, match="at=50% of step"):
        wt.build(spec, domains=["a", "b"])


def test_the_spec_of_the_page_builds():
    """As it stands in the language's page."""
    page = (Path(wt.__file__).parents[1] / "docs" / "language.md").read_text(encoding="utf-8")
    [text] = re.findall(
        r"^```yaml\n(.*?%.*?)^```", page.partition("## Schedules")[2], re.MULTILINE | re.DOTALL
    )[:1]
    assert "cosine(100, 0.4, over=200, begin=50)" in wt.dumps(
        wt.build(wt.loads(text), steps=1000).spec
    )


def test_where_no_run_is_known_a_share_is_refused_with_its_place():
    """From Python, and by the commands that weigh without training."""
    with pytest.raises(wt.SpecError, match=r"at=5% of step is a share of the run.*steps=") as info:
        wt.build(wt.loads(SHARES, source="a.yaml"))
    assert "a.yaml:3:" in str(info.value)
    for command in (
        ["simulate", PIPELINE, "--losses", "1,2"],
        ["plot", PIPELINE, "--out", "a.svg"],
    ):
        done = click.testing.CliRunner().invoke(main, command)
        assert done.exit_code == 2
        assert "at=5% of step is a share of the run" in done.output


def test_explain_shows_the_schedule_over_the_steps_it_is_given():
    """And over a hundred steps without, so that a step is a percent; check has no objection."""
    run = click.testing.CliRunner().invoke
    assert run(main, ["check", PIPELINE]).exit_code == 0
    told = run(main, ["explain", PIPELINE, "--steps", "1000"]).output
    assert "at=5%" in told
    assert re.search(r"^ +49 100$", told, re.MULTILINE)
    assert re.search(r"^ +50 0.4$", told, re.MULTILINE)
    assert "schedules over 100 steps" in run(main, ["explain", PIPELINE]).output


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("temperature(step(1, 2, at=101%))", "at of step: must be from 0% to 100% of the run"),
        ("temperature(step(1, 2, at=-1%))", "at of step: must be from 0% to 100% of the run"),
        ("temperature(5%)", "5% is a share of a run's steps, and not one of these"),
        ("temperature(step(1, 2%, at=5))", "after of step: must be a number"),
        ("'temperature(piecewise({0: 1, 101%: 2}))'", "101% of piecewise: must be from 0% to 100%"),
        ("'temperature(piecewise({0: 1, 0%: 2}))'", "beside shares only step 0 can stand, once"),
        ("'temperature(piecewise({5: 1, 5%: 2}))'", "5 is a number of steps and 5% a share of the"),
        ("'temperature(piecewise({5%: 1, 5%: 2}))'", "5% is given twice; keep one"),
        ("temperature(step(1, 2, at=-1))", "at of step: must be at least 0, not -1"),
        ("temperature(step(1, 2, at=2.5))", "at of step: must be a whole number, not 2.5"),
        ("temperature(linear(1, 2, over=0))", "over of linear: must be at least 1, not 0"),
    ],
)
def test_shares_that_mean_nothing_are_refused(pipeline, message):
    """Beyond the run, or where a number is asked for; numbers of steps are checked as before."""
    with pytest.raises(wt.SpecError, match=re.escape(message)):
        wt.loads(f"version: 1\npipeline: {pipeline}\n")

"""The reference says of every stage and schedule what the class does."""

import re
import sys
from pathlib import Path

import pytest
from looping import for_each
from pydantic import ValidationError

import weighting as wt
from weighting.registry import stages
from weighting.schedules import SCHEDULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "stages.md"
SECTIONS = dict(
    re.findall(
        r"^### (\w+)\n(.*?)(?=^##)",
        PAGE.read_text(encoding="utf-8") + "\n## end\n",
        re.MULTILINE | re.DOTALL,
    )
)
SHIPPED = {n: c for n, c in stages().items() if c.__module__.startswith("weighting.stages")}
WORDS = {**SHIPPED, **SCHEDULES}
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = [(name, *row) for name in SECTIONS for row in ROW.findall(SECTIONS[name])]


def example(name):
    """Return the example of a section as a spec."""
    [text] = re.findall(r"^```yaml\n(.*?)^```", SECTIONS[name], re.MULTILINE | re.DOTALL)
    return wt.loads(text, source=name)


def arguments(name):
    """Return the arguments of a word as its example writes them."""
    if name in SCHEDULES:
        return example(name).factors["pipeline"][-1].tau.model_dump()
    [written] = [x for x in example(name).factors["pipeline"] if type(x).name == name]
    return {key: getattr(written, key) for key in type(written).model_fields}


def test_every_word_has_its_section():
    """No stage or schedule is missing, and none is made up."""
    assert sorted(SECTIONS) == sorted(WORDS)
    assert len(SECTIONS) >= 50


@for_each("name", sorted(WORDS))
def test_the_rows_are_the_arguments(name):
    """Each argument has a row, a stage's levels stand below, and the picture is there."""
    fields = {
        "name=value, ..." if f == WORDS[name].collects else f for f in WORDS[name].model_fields
    }
    assert {row[0] for row in ROW.findall(SECTIONS[name])} == fields
    if name in SHIPPED:
        assert f"Levels: {', '.join(SHIPPED[name].levels)}." in SECTIONS[name]
        assert f"Gives: {SHIPPED[name].gives}." in SECTIONS[name]
        assert (PAGE.parent / "curves" / f"{name}.svg").is_file()


def plain(text):
    """Return a value as the page writes it."""
    text = text.strip("`")
    if text in {"true", "false"}:
        return text == "true"
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


@for_each("name, argument, kind, span, default", ROWS)
def test_defaults_are_taken_and_ranges_end_where_the_page_says(name, argument, kind, span, default):
    """The default is what a stage has that is not given it; just outside the range is refused."""
    if argument == "name=value, ...":
        return
    cls, given = WORDS[name], arguments(name)
    without = {key: value for key, value in given.items() if key != argument}
    if default == "required":
        with pytest.raises(ValidationError, match=f"{argument}\n.*required"):
            cls(**without)
    elif default != "left out":
        assert getattr(cls(**without), argument) == getattr(
            cls(**without, **{argument: plain(default)}), argument
        )
    else:
        assert cls.model_fields[argument].default is None
    for bound, off in (("at least", -1), ("at most", 1), ("above", -1)):
        found = re.search(rf"\b{bound} ([\d.e+-]+)", span)
        if not found:
            continue
        edge = plain(found[1].rstrip("."))
        step = 1 if kind == "whole number" else 1e-3
        beyond = edge + off * step if bound != "above" else edge
        with pytest.raises(ValidationError, match=argument):
            cls(**without, **{argument: beyond})
        inside = edge if bound != "above" else 1e-6
        if given.get(argument) is not None and name != "clip":
            cls(**without, **{argument: inside})
    for word in re.findall(r"`(\w+)`", span) if kind == "word" else ():
        cls(**without, **{argument: word})
    if kind == "word":
        with pytest.raises(ValidationError, match=argument):
            cls(**without, **{argument: "no_such_word"})


def test_the_page_is_what_the_generator_writes(monkeypatch):
    """Nobody has edited it, and no class has changed since."""
    monkeypatch.syspath_prepend(str(PAGE.parent))
    import make_reference  # noqa: PLC0415 - a script beside the page

    monkeypatch.delitem(sys.modules, "make_reference")
    assert make_reference.page() == PAGE.read_text(encoding="utf-8")

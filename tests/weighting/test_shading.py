"""Shaded texts: what a terminal and a browser are given, for a small example and any text."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighting.report import shading
from weighting.report.shading import Shaded, Token, Weighed

TINY = Shaded(
    "tiny.txt",
    ("a model",),
    (Weighed("mile", ("A note.",)), Weighed("focal")),
    (
        Token("A"),
        Token(" b\n", 1, 2.5, 3.0, (2.0, 0.5), ""),
        Token("c", 2, 0.25, 1.0, (1.0, 1.0), ""),
        Token("", 2, 5.0, 4.0, (0.0, 1.5), "‹end›"),
    ),
)
PLAIN = """\
tiny.txt
a model

mile: weights from 0.0000 to 2.0000, mean 1.0000
  A note.

focal: weights from 0.5000 to 1.5000, mean 1.0000

     #  token                      loss  entropy       mile      focal
     1  ·b↵                      2.5000   3.0000     2.0000     0.5000
     2  c                        0.2500   1.0000     1.0000     1.0000
     3  ‹end›                    5.0000   4.0000     0.0000     1.5000"""
COLOURED = """\
tiny.txt
a model

weight [39] ≤0.06 [/][75] 0.11 [/][117] 0.19 [/][153] 0.33 [/][195] 0.57 [/][231] 1.00 [/]\
[230] 1.74 [/][223] 3.03 [/][222] 5.28 [/][215] 9.19 [/][208] ≥16.00 [/]

mile: weights from 0.0000 to 2.0000, mean 1.0000
  A note.

A[230] b↵[/]
[231]c[/][39]‹end›[/]

focal: weights from 0.5000 to 1.5000, mean 1.0000

A[195] b↵[/]
[231]c[/][230]‹end›[/]"""
"""A weight of 0 is one of six, more than a tenth: the scale is the widest there is."""


def test_a_table_where_there_are_no_colours():
    """A line for each token that is predicted, in 80 columns."""
    assert shading.table(TINY) == PLAIN
    assert "\x1b" not in PLAIN


def codes_named(text):
    """Return a text whose colour codes can be read: the background's number, or / for none."""
    text = text.replace("\x1b[0m", "[/]")
    return re.sub(r"\x1b\[38;5;16;48;5;(\d+)m", r"[\1]", text)


def test_a_terminal_shows_weights_as_colours_with_a_legend():
    """Each spec in turn on one scale: above one orange, below it blue; the legend has numbers."""
    assert codes_named(shading.terminal(TINY)) == COLOURED
    legend = re.sub(r"\[[^]]*\]", "", COLOURED.splitlines()[3])
    assert len(legend) <= 80


@pytest.mark.parametrize(
    ("weight", "r", "level"),
    [(0, 4, -5), (0.25, 4, -5), (0.5, 4, -2), (1, 4, 0), (2, 4, 2), (4, 4, 5), (99, 4, 5)],
)
def test_shades_are_even_steps_of_the_logarithm(weight, r, level):
    """From white both ways; the ends take what lies beyond."""
    assert shading.shade(weight, r) == level


@pytest.mark.parametrize(("weights", "r"), [([1.0], 1.25), ([0.6] * 9 + [50], 2), ([3, 3], 4)])
def test_the_scale_holds_nine_tenths_of_the_weights(weights, r):
    """The narrowest that does."""
    tokens = tuple(Token("a", weights=(weight,)) for weight in weights)
    assert shading.reach(Shaded("", (), (Weighed("x"),), tokens)) == r


class Read(HTMLParser):
    """Notes the elements of a page, and of each section the texts and attributes of its spans."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sections, self.spans = set(), [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Begin a text, or a token of one."""
        self.tags.add(tag)
        if dict(attrs).get("class") == "text":
            self.spans = []
            self.sections.append(self.spans)
        elif self.spans is not None:
            assert tag == "span", "nothing else is in a text"
            self.spans.append(["", dict(attrs)])

    def handle_endtag(self, tag):
        """End a text."""
        if tag == "div":
            self.spans = None

    def handle_data(self, data):
        """Collect the text of a token."""
        if self.spans is not None:
            self.spans[-1][0] += data


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "span"}
TAGS |= {"main", "section"}


def test_a_page_has_a_span_for_each_token_of_each_spec():
    """Its numbers are in the title; the shade is that spec's own."""
    page = shading.page(TINY)
    read = Read(page)
    assert read.tags == TAGS
    assert len(read.sections) == 2
    for spans in read.sections:
        assert [text for text, _ in spans] == ["A", " b\n", "c", ""]
        assert spans[1][1]["title"].splitlines() == [
            "token ·b↵",
            "loss 2.5000 nats",
            "entropy 3.0000 nats",
            "weight 2.0000 by mile",
            "weight 0.5000 by focal",
            "window 1",
        ]
        assert spans[0][1]["title"].endswith("nothing predicts it")
        assert spans[3][1]["data-mark"] == "‹end›"
    classes = [[span["class"] for _, span in spans] for spans in read.sections]
    assert classes == [["", "u1", "o w", "d5"], ["", "d1", "o w", "u1"]]
    assert "<script" not in page
    assert "://" not in page, "it needs nothing else"


HOSTILE = "</span><script>alert('x')</script>&amp;\"' onmouseover=x \x1b[31m\u202e"


def test_nothing_of_a_text_or_a_name_is_obeyed():
    """Neither by a browser nor by a terminal."""
    token = Token(HOSTILE, 1, 1.0, 1.0, (1.0,), HOSTILE)
    shaded = Shaded(HOSTILE, (HOSTILE,), (Weighed(HOSTILE, (HOSTILE,)),), (token,))
    read = Read(shading.page(shaded))
    assert read.tags == TAGS
    assert [text for text, _ in read.sections[0]] == [HOSTILE]
    assert set(read.sections[0][0][1]) == {"class", "title"}
    for text in (shading.table(shaded), shading.terminal(shaded)):
        left = re.sub(r"\x1b\[(0|38;5;16;48;5;\d+)m", "", text)
        assert "\x1b" not in left
        assert "\u202e" not in left


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.lists(UNICODE, min_size=1, max_size=6), st.lists(UNICODE, min_size=1, max_size=2))
def test_any_text_comes_out_as_it_went_in(texts, names):
    """Token by token on a page; tables keep to 80 columns, and every line of one is a token."""
    tokens = tuple(Token(text, 1, 1.0, 1.0, (1.0,) * len(names), "▪") for text in texts)
    shaded = Shaded(texts[0], (texts[-1],), tuple(Weighed(name) for name in names), tokens)
    for spans in Read(shading.page(shaded).encode().decode()).sections:
        assert [text for text, _ in spans] == texts
    lines = shading.table(shaded).split("\n")
    assert all(shading._columns(line) <= 80 for line in lines)
    assert [line[:6].strip() for line in lines[-len(texts) :]] == [
        str(n) for n in range(1, len(texts) + 1)
    ]


def test_long_texts_are_cut_in_a_terminal_and_whole_on_a_page():
    """And it is said."""
    tokens = tuple(Token("a", 1, 1.0, 1.0, (1.0,)) for _ in range(2_345))
    shaded = Shaded("long", (), (Weighed("x"),), tokens)
    assert shading.table(shaded).endswith(
        "2,145 more tokens are left out; --html writes all of them"
    )
    assert shading.terminal(shaded).endswith(
        "345 more tokens are left out; --html writes all of them"
    )
    assert len(Read(shading.page(shaded)).sections[0]) == 2_345

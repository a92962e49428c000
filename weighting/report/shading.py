"""A text whose tokens are shaded by their weights: as a page, for a terminal, or as a table.

    shade = 5 log w / log r, rounded, from -5 to 5;   r: the reach, the same for all specs

No weight is judged by colour alone: legends have numbers, and so has each token of a page.
"""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from weighting.language.html import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH = 80
_SHADES = 5
_REACHES = 1.25, 1.5, 2.0, 4.0, 8.0, 16.0
_MOST_SHADED = 2_000
_MOST_LISTED = 200
_WORD = 22
"""Columns that a token's text has in a table."""


class Token(NamedTuple):
    """A token of a text, and what is known of it.

    Attributes:
        text: Its part of the text; those of all tokens, joined, are the text.
        window: Number of the window it is predicted in, from 1.
        loss: In nats.
        entropy: Of its prediction, nats.
        weights: One for each spec; none if nothing predicts the token.
        mark: What is shown if it has no text.
    """

    text: str
    window: int = 1
    loss: float = 0.0
    entropy: float = 0.0
    weights: tuple[float, ...] = ()
    mark: str = ""


class Weighed(NamedTuple):
    """A spec's name, and what one must know to read its weights, a sentence a line."""

    name: str
    notes: tuple[str, ...] = ()


class Shaded(NamedTuple):
    """A text, its tokens and the specs that weigh them; `facts` say where it all is from."""

    title: str
    facts: tuple[str, ...]
    specs: tuple[Weighed, ...]
    tokens: tuple[Token, ...]


def reach(shaded: Shaded) -> float:
    """Return r: the first of a few numbers such that most weights are from 1/r to r.

    Nine tenths of them, of all specs together, or as many as the last of the numbers leaves.
    """
    weights = [weight for token in shaded.tokens for weight in token.weights]
    for r in _REACHES:
        inside = sum(1 / r <= weight <= r for weight in weights)
        if inside >= 0.9 * len(weights):
            return r
    return _REACHES[-1]


def shade(weight: float, r: float) -> int:
    """Return from -5, for 1/r and less, over 0, for one, to 5, for r and more."""
    if weight <= 0:
        return -_SHADES
    return max(-_SHADES, min(_SHADES, round(_SHADES * math.log(weight) / math.log(r))))


def terminal(shaded: Shaded) -> str:
    """Return the text in 256 colours, once for each spec."""
    r = reach(shaded)
    tokens = shaded.tokens[:_MOST_SHADED]
    parts = [*_heading(shaded), "", *_legend(r)]
    for index, spec in enumerate(shaded.specs):
        parts += ["", *_introduction(shaded, index, spec), ""]
        parts.append("".join(_painted(token, index, r) for token in tokens))
    parts += _left_out(len(shaded.tokens) - len(tokens))
    return "\n".join(parts)


def table(shaded: Shaded) -> str:
    """Return a line for each token: its text, loss and entropy in nats, and weights."""
    tokens = [token for token in shaded.tokens if token.weights]
    shown = tokens[:_MOST_LISTED]
    lines = _heading(shaded)
    for index, spec in enumerate(shaded.specs):
        lines += ["", *_introduction(shaded, index, spec)]
    names = "".join(f" {_fitted(spec.name, 10, right=True)}" for spec in shaded.specs)
    lines += ["", f"{'#':>6}  {'token':{_WORD}} {'loss':>8} {'entropy':>8}{names}"]
    for number, token in enumerate(shown, 1):
        word = _fitted(_visible(token.text) or token.mark, _WORD)
        weights = "".join(f" {_number(weight):>10}" for weight in token.weights)
        lines.append(f"{number:>6}  {word} {token.loss:8.4f} {token.entropy:8.4f}{weights}")
    return "\n".join([*lines, *_left_out(len(tokens) - len(shown))])


def page(shaded: Shaded) -> str:
    """Return an HTML page of its own, without scripts: numbers on hover, specs side by side.

    It holds nothing of the text but as text.
    """
    r = reach(shaded)
    swatches = "".join(
        f"<span class='{_class(level)}'>{_bound(level, r)}</span>"
        for level in range(-_SHADES, _SHADES + 1)
    )
    facts = "".join(f"<p>{escaped(fact)}</p>" for fact in shaded.facts)
    sections = "".join(_section(shaded, index, r) for index in range(len(shaded.specs)))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escaped(shaded.title)}</title><style>{_style()}</style></head>\n"
        f"<body><h1>{escaped(shaded.title)}</h1>\n{facts}\n"
        f"<div class='legend'><b>weight</b> {swatches}</div>\n"
        "<p>Hold the pointer over a token for its loss, entropy and weights. "
        "A bar marks where a window begins; in print, weights above one are underlined.</p>\n"
        f"<main>{sections}</main></body></html>\n"
    )


def _heading(shaded: Shaded) -> list[str]:
    return [line for fact in (shaded.title, *shaded.facts) for line in _wrapped(fact)]


def _introduction(shaded: Shaded, index: int, spec: Weighed) -> list[str]:
    """Return what a spec's weights are like, and its notes."""
    first, *more = _wrapped(f"{spec.name}: {_summary(shaded, index)}", hanging="  ")
    return [first, *more, *(line for note in spec.notes for line in _wrapped(note, "  "))]


def _summary(shaded: Shaded, index: int) -> str:
    weights = [token.weights[index] for token in shaded.tokens if token.weights]
    mean = sum(weights) / len(weights)
    low, high, mean = map(_number, (min(weights), max(weights), mean))
    return f"weights from {low} to {high}, mean {mean}"


def _number(value: float) -> str:
    """Return four decimals, or three digits and a power of ten."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e4  # noqa: PLR2004 - what four decimals show
    return f"{value:.4f}" if plain else f"{value:.2e}"


def _wrapped(text: str, indent: str = "", hanging: str = "") -> list[str]:
    """Return lines of a sentence, which may hold names of the user's."""
    safe = "".join(map(_plain_character, text))
    return textwrap.wrap(
        safe,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_on_hyphens=False,
    )


def _left_out(count: int) -> list[str]:
    return ["", f"{count:,} more tokens are left out; --html writes all of them"] if count else []


# The xterm palette, from light to strong; black is read on each of them.
_ABOVE = 230, 223, 222, 215, 208
_BELOW = 195, 153, 117, 75, 39
_RESET = "\x1b[0m"


def _paint(level: int) -> str:
    background = (231, *_ABOVE)[level] if level >= 0 else _BELOW[-level - 1]
    return f"\x1b[38;5;16;48;5;{background}m"


def _legend(r: float) -> list[str]:
    cells = (
        f"{_paint(level)} {_bound(level, r)} {_RESET}" for level in range(-_SHADES, _SHADES + 1)
    )
    return [f"weight {''.join(cells)}"]


def _bound(level: int, r: float) -> str:
    sign = {-_SHADES: "≤", _SHADES: "≥"}.get(level, "")
    return f"{sign}{r ** (level / _SHADES):.2f}"


def _painted(token: Token, index: int, r: float) -> str:
    """Return a token for a terminal; lines end without colour, which would run to the margin."""
    text = "".join(map(_plain_character, token.text)) or token.mark
    if not token.weights:
        return text
    paint = _paint(shade(token.weights[index], r))
    lines = text.replace("\n", "↵\n").split("\n")
    return "\n".join(f"{paint}{line}{_RESET}" if line else "" for line in lines)


def _plain_character(c: str) -> str:
    """Return a character that a terminal shows and does not obey; a line's end stays."""
    if c.isprintable() or c == "\n":
        return c
    if c == "\t":
        return "→   "
    if ord(c) < 0x20:  # noqa: PLR2004 - Unicode has a picture of each of these
        return chr(0x2400 + ord(c))
    return " " if unicodedata.category(c) == "Zs" else "\ufffd"


def _visible(text: str) -> str:
    """Return a text on one line whose spaces can be seen."""
    return "".join("↵" if c == "\n" else "·" if c == " " else _plain_character(c) for c in text)


def _fitted(text: str, width: int, *, right: bool = False) -> str:
    """Return a text that takes so many columns; wide characters take two."""
    text = "".join(map(_plain_character, text)).replace("\n", " ")
    if _columns(text) > width:
        while _columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    padding = " " * (width - _columns(text))
    return padding + text if right else text + padding


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _section(shaded: Shaded, index: int, r: float) -> str:
    """Return one spec's view of the text."""
    spec = shaded.specs[index]
    notes = "".join(f"<p>{escaped(note)}</p>" for note in (_summary(shaded, index), *spec.notes))
    names = [each.name for each in shaded.specs]
    return (
        f"<section><h2>{escaped(spec.name)}</h2>{notes}\n"
        f"<div class='text' dir='auto'>{''.join(_spans(shaded.tokens, names, index, r))}</div>"
        "</section>\n"
    )


def _spans(tokens: Sequence[Token], names: Sequence[str], index: int, r: float) -> Iterator[str]:
    """Yield a span for each token; what is not of the text is made by the style."""
    window = 1
    for token in tokens:
        classes: list[str] = []
        if token.weights:
            classes.append(_class(shade(token.weights[index], r)))
        if token.window != window:
            window = token.window
            classes.append("w")
        if token.text.startswith("\n"):
            classes.append("n")
        mark = f" data-mark='{_attribute(token.mark)}'" if token.mark and not token.text else ""
        title = _attribute("\n".join(_token_facts(token, names)))
        # A browser would read a carriage return as the end of a line.
        text = escape(token.text, quote=False).replace("\r", "&#13;")
        yield f"<span class='{' '.join(classes)}' title='{title}'{mark}>{text}</span>"


def _token_facts(token: Token, names: Sequence[str]) -> Iterator[str]:
    yield f"token {_visible(token.text) or token.mark}"
    if not token.weights:
        yield "nothing predicts it"
        return
    yield f"loss {token.loss:.4f} nats"
    yield f"entropy {token.entropy:.4f} nats"
    for name, weight in zip(names, token.weights, strict=True):
        yield f"weight {_number(weight)} by {name}"
    yield f"window {token.window}"


def _attribute(text: str) -> str:
    return escape(re.sub(r"[\0\r]", "\ufffd", text)).replace("\n", "&#10;")


def _class(level: int) -> str:
    return f"u{level}" if level > 0 else f"d{-level}" if level < 0 else "o"


def _style() -> str:
    """Return the style: two palettes, of which either is told apart by all eyes."""
    shades = "".join(
        f".{side}{level}{{background:rgb(var(--{side})/{level / _SHADES:g})}}"
        for side in "ud"
        for level in range(1, _SHADES + 1)
    )
    above = ",".join(f".u{level}" for level in range(1, _SHADES + 1))
    light = "color-scheme:light;--u:230 159 0;--d:86 180 233;--page:#fff;--ink:#111;--faint:#666"
    dark = "color-scheme:dark;--u:158 92 0;--d:0 98 158;--page:#111;--ink:#eee;--faint:#999"
    return (
        f":root{{{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "body{margin:2rem auto;max-width:90rem;padding:0 1rem;background:var(--page);"
        "color:var(--ink);font:1rem/1.5 system-ui,sans-serif}"
        "h1{font-size:1.4rem}h2{font-size:1.1rem;margin:1rem 0 .3rem}"
        "p{margin:.2rem 0;color:var(--faint);overflow-wrap:anywhere}"
        ".legend{margin:1rem 0}.legend span{display:inline-block;min-width:3.2rem;"
        "text-align:center;padding:.1rem 0}"
        "main{display:grid;gap:2rem;"
        "grid-template-columns:repeat(auto-fit,minmax(min(28rem,100%),1fr))}"
        ".text{margin-top:.7rem;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;"
        "font:.95rem/1.8 ui-monospace,monospace}"
        ".text span{padding:.15em 0}.text span:hover{outline:2px solid var(--ink)}"
        ".w{border-left:3px solid var(--ink)}"
        ".n::before{content:'\\21b5';opacity:.6}"
        "[data-mark]::before{content:attr(data-mark);opacity:.7}"
        f"{shades}"
        "@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}"
        f"body{{margin:0}}.text :is({above}){{text-decoration:underline}}}}"
    )

"""Arrow text to calls with positions, and calls back to text.

pipeline = stage ( ("->" | "→") stage )*
stage    = name [ "(" [ argument ("," argument)* ] ")" ]
argument = [ name "=" ] value
value    = number | number "/" "n" | number "%" | word | "text"
         | name "(" ... ")" | "{" key ":" value ... "}" | "[" value ... "]"
         | statistic, as in mean+3*std
         | pipeline, of a stage that takes another, as in over(ref_loss -> mean(sequence))
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, NoReturn

from weighting.contract.statistic import DEVIATIONS, STATISTIC
from weighting.errors import Problem, Source, Span, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_DEPTH = 16
MAX_STAGES = 100
"""Of a pipeline, however it is written."""
TOO_MANY = f"a pipeline has at most {MAX_STAGES} stages, and this one more; leave some out"


@dataclass(frozen=True)
class Literal:
    """A number, a word, a text, a truth value or nothing."""

    value: str | int | float | bool | None
    span: Span
    quoted: bool = False


@dataclass(frozen=True)
class Share:
    """A number over n, the number of units in scope: 2/n."""

    numerator: float
    span: Span


@dataclass(frozen=True)
class OfRun:
    """A number of percent, of the steps of a run: 5%."""

    percent: float
    span: Span


@dataclass(frozen=True)
class Pairs:
    """A map written in braces: {0: 100, 500: 0.4}, or {0: 100, 5%: 0.4}."""

    entries: tuple[tuple[Literal | OfRun, Value], ...]
    span: Span


@dataclass(frozen=True)
class Items:
    """A list written in brackets: [wiki, books]."""

    values: tuple[Value, ...]
    span: Span


@dataclass(frozen=True)
class Argument:
    """One argument of a call; `name` is None when it is positional."""

    name: str | None
    value: Value
    span: Span


@dataclass(frozen=True)
class Call:
    """A name with arguments: a stage, or a schedule inside one."""

    name: str
    arguments: tuple[Argument, ...]
    span: Span
    name_span: Span


@dataclass(frozen=True)
class Chain:
    """A pipeline as an argument; None stands for each stage that is noted as wrong."""

    calls: tuple[Call | None, ...]
    span: Span


Value = Literal | Share | OfRun | Pairs | Items | Call | Chain

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<arrow>->|→)
      | (?P<statistic>"""
    + DEVIATIONS
    + r""")
      | (?P<number>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?(?![\w.]))
      | (?P<name>[^\W\d]\w*(?:[-.](?=\w)\w+)*)
      | (?P<text>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
      | (?P<joint>=>|\|+|>)
      | (?P<mark>[(){}\[\],=:/%])
      | (?P<other>[-+.\w]+|.)""",
    re.VERBOSE,
)
_NAME = re.compile(r"[^\W\d]\w*(?:[-.](?=\w)\w+)*")
_CLOSING = {")", "}", "]"}
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


def parse(
    source: Source, text: str, offsets: Sequence[int], problems: list[Problem]
) -> tuple[Call | None, ...]:
    """Return the stages written in a text, None for each that is noted as wrong.

    Every stage is read on its own, so several broken stages give several problems.

    Args:
        source: Where the text comes from.
        text: The arrow text.
        offsets: Where in the source each of its characters stands.
        problems: Gets what is wrong.
    """
    calls: list[Call | None] = []
    pieces = list(islice(_split(text, offsets), MAX_STAGES + 1))
    if len(pieces) > MAX_STAGES:
        _, place = pieces[-1]
        problems.append(source.problem(TOO_MANY, place))
        return (None,)
    for number, (tokens, piece) in enumerate(pieces):
        if not tokens:
            where = "after" if number else "before"
            message = f"a stage is missing {where} '->'" if len(pieces) > 1 else "no stage here"
            problems.append(source.problem(message, piece))
            calls.append(None)
            continue
        try:
            calls.append(_Parser(source, tokens).stage())
        except SpecError as error:
            problems.extend(error.problems)
            calls.append(None)
    return tuple(calls)


def to_text(calls: tuple[Call, ...]) -> str:
    """Return calls as arrow text; parsing it gives equal calls."""
    return " -> ".join(_call_text(call) for call in calls)


def number_text(value: float) -> str:
    """Return the shortest text that reads back as this number."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)  # noqa: PLR2004


def _call_text(call: Call) -> str:
    if not call.arguments:
        return call.name
    arguments = ", ".join(
        _value_text(a.value) if a.name is None else f"{_word_text(a.name)}={_value_text(a.value)}"
        for a in call.arguments
    )
    return f"{call.name}({arguments})"


def _value_text(value: Value) -> str:
    if isinstance(value, Call):
        return _call_text(value)
    if isinstance(value, Chain):
        return to_text(tuple(call for call in value.calls if call))
    if isinstance(value, Share):
        return f"{number_text(value.numerator)}/n"
    if isinstance(value, OfRun):
        return f"{number_text(value.percent)}%"
    if isinstance(value, Pairs):
        return (
            "{" + ", ".join(f"{_value_text(k)}: {_value_text(v)}" for k, v in value.entries) + "}"
        )
    if isinstance(value, Items):
        return f"[{', '.join(map(_value_text, value.values))}]"
    return _word_text(value.value)


def _word_text(value: str | float | bool | None) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return number_text(value)
    plain = STATISTIC.fullmatch(value) or (_NAME.fullmatch(value) and value not in _WORDS)
    return value if plain else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    span: Span


def _split(text: str, offsets: Sequence[int]) -> Iterator[tuple[list[_Token], Span]]:
    """Yield the tokens between arrows, with the span a message about a gap should point at.

    Arrows between brackets belong to a pipeline that is an argument.
    """
    tokens: list[_Token] = []
    first = offsets[0] if text else 0
    place = (first, first + 1)
    inner = _in_brackets(text)
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind == "space":
            continue
        span = (offsets[match.start()], offsets[match.end() - 1] + 1)
        if kind == "arrow" and not inner[match.start()]:
            yield tokens, (span if not tokens else place)
            tokens = []
            place = span
        else:
            tokens.append(_Token(kind, match.group(), span))
    yield tokens, place


def _in_brackets(text: str) -> list[bool]:
    """Return which characters of a text stand between brackets that are both there."""
    depth, opened = [0] * (len(text) + 1), list[int]()
    for match in _TOKEN.finditer(text):
        if match.group() == "(":
            opened.append(match.start())
        elif match.group() == ")" and opened:
            depth[opened.pop()] += 1
            depth[match.end()] -= 1
    return [x > 0 for x in accumulate(depth)]


class _Parser:
    """Recursive descent over the tokens of one stage."""

    def __init__(self, source: Source, tokens: list[_Token]) -> None:
        self.source = source
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def stage(self) -> Call:
        call = self._call(self._take_name("a stage name"))
        if token := self._peek():
            hint = "stages are joined by '->'"
            if token.text in _CLOSING:
                hint = f"this {token.text!r} closes nothing"
            elif token.kind == "joint" or token.text in {"-", ",", "="}:
                hint += f", not by {token.text!r}"
            self._fail(f"unexpected {token.text!r}; {hint}", token.span)
        return call

    def _call(self, name: _Token) -> Call:
        opening = self._peek()
        if opening is None or opening.text != "(":
            return Call(name.text, (), name.span, name.span)
        self._deeper(opening)
        self.position += 1
        arguments: list[Argument] = []
        named = False
        while not self._accept(")"):
            argument = self._argument()
            named = named or argument.name is not None
            if argument.name is None and named:
                message = "an argument without a name cannot follow one with a name; name it"
                self._fail(message, argument.span)
            arguments.append(argument)
            self._separator(opening, ")")
        self.depth -= 1
        return Call(name.text, tuple(arguments), (name.span[0], self._end()), name.span)

    def _argument(self) -> Argument:
        token, following = self._peek(), self._peek(1)
        if token and following and token.kind in {"name", "text"} and following.text in {"=", ":"}:
            if following.text == ":":
                message = f"write {token.text}=..., with '=' instead of ':'"
                self._fail(message, (token.span[0], following.span[1]))
            self.position += 2
            value = self._value()
            return Argument(self._unquote(token), value, (token.span[0], self._end()))
        value = self._value()
        return Argument(None, value, value.span)

    def _value(self) -> Value:  # noqa: RET503 - _fail does not return
        token = self._peek()
        if token is None:
            self._fail("a value is missing here", self._last_span())
        if token.text == "{":
            return self._pairs(token)
        if token.text == "[":
            return self._items(token)
        self.position += 1
        if token.kind == "number":
            return self._number(token)
        if token.kind == "text":
            return Literal(self._unquote(token), token.span, quoted=True)
        if token.kind == "statistic":
            return Literal("".join(token.text.split()), token.span)
        if token.kind == "name":
            following = self._peek()
            value = self._call(token) if following and following.text == "(" else None
            if (arrow := self._peek()) and arrow.kind == "arrow":
                return self._chain(value or Call(token.text, (), token.span, token.span))
            return value or Literal(_WORDS.get(token.text, token.text), token.span)
        if token.text in _CLOSING | {",", "="}:
            self._fail(f"a value is missing before {token.text!r}", token.span)
        self._fail(f"{token.text!r} is not a value", token.span)

    def _chain(self, first: Call) -> Chain:
        calls = [first]
        while (token := self._peek()) and token.kind == "arrow":
            self.position += 1
            if self._peek() is None:
                self._fail("a stage is missing after '->'", token.span)
            calls.append(self._call(self._take_name("a stage name")))
        return Chain(tuple(calls), (first.span[0], self._end()))

    def _number(self, token: _Token) -> Value:
        integral = re.fullmatch(r"[-+]?[0-9]{1,18}", token.text)
        value = int(token.text) if integral else float(token.text)
        if self._accept("%"):
            return OfRun(float(value), (token.span[0], self._end()))
        if not self._accept("/"):
            return Literal(value, token.span)
        unit = self._peek()
        span = (token.span[0], unit.span[1] if unit else self._end())
        if unit is None or unit.text != "n":
            self._fail("only k/n can be written, n the number of units in scope", span)
        self.position += 1
        return Share(float(value), span)

    def _pairs(self, opening: _Token) -> Pairs:
        self._deeper(opening)
        self.position += 1
        entries: list[tuple[Literal | OfRun, Value]] = []
        known: set[object] = set()
        while not self._accept("}"):
            key = self._value()
            if not isinstance(key, Literal | OfRun):
                self._fail("a key is a number or a name", key.span)
            if not self._accept(":"):
                self._fail("a key is followed by ':' and its value", key.span)
            share = isinstance(key, OfRun)
            what = (key.percent, "%") if share else key.value
            if what in known:
                shown = _value_text(key) if share else repr(key.value)
                self._fail(f"{shown} is given twice; keep one", key.span)
            known.add(what)
            entries.append((key, self._value()))
            self._separator(opening, "}")
        self.depth -= 1
        return Pairs(tuple(entries), (opening.span[0], self._end()))

    def _items(self, opening: _Token) -> Items:
        self._deeper(opening)
        self.position += 1
        values: list[Value] = []
        while not self._accept("]"):
            values.append(self._value())
            self._separator(opening, "]")
        self.depth -= 1
        return Items(tuple(values), (opening.span[0], self._end()))

    def _separator(self, opening: _Token, closing: str) -> None:
        """Expect a comma, or leave the closing bracket for the caller's loop."""
        token = self._peek()
        if token is None:
            self._fail(f"this {opening.text!r} is never closed", opening.span)
        if token.text == closing:
            return
        if not self._accept(","):
            self._fail(f"expected ',' or {closing!r} before {token.text!r}", token.span)
        if (following := self._peek()) is None:
            self._fail(f"this {opening.text!r} is never closed", opening.span)
        if following.text == closing:
            self._fail("an argument is missing after ','", token.span)

    def _take_name(self, what: str) -> _Token:
        token = self._peek()
        assert token is not None
        if token.kind != "name":
            self._fail(f"expected {what}, not {token.text!r}", token.span)
        self.position += 1
        return token

    def _deeper(self, token: _Token) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} deep", token.span)

    def _peek(self, ahead: int = 0) -> _Token | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def _accept(self, text: str) -> bool:
        token = self._peek()
        if token is None or token.kind == "text" or token.text != text:
            return False
        self.position += 1
        return True

    def _end(self) -> int:
        return self.tokens[self.position - 1].span[1]

    def _last_span(self) -> Span:
        return self.tokens[-1].span

    def _unquote(self, token: _Token) -> str:
        """Return what a name or text says; double quotes know JSON's escapes, single ones none."""
        if token.kind != "text":
            return token.text
        if token.text[0] == "'":
            return token.text[1:-1]
        try:
            return json.loads(token.text)
        except ValueError:
            self._fail("an escape here is not one JSON knows; use single quotes", token.span)

    def _fail(self, message: str, span: Span) -> NoReturn:
        raise SpecError([self.source.problem(message, span)])

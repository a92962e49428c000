"""Calls to stages and schedules, and back: names, arguments and their ranges are checked here."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from weighting.contract import Stage
from weighting.errors import Problem, Source, Span, nearest
from weighting.language import arrow
from weighting.language.arrow import (
    Argument,
    Call,
    Chain,
    Items,
    Literal,
    OfRun,
    Pairs,
    Share,
    Value,
)
from weighting.language.yaml_nodes import Map, Node, Scalar, Seq
from weighting.registry import stages
from weighting.schedules import SCHEDULES, Constant, Percent, Schedule, ShareOfN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

_NO_STAGE = "a pipeline needs a stage; write uniform for plain training"
_SHARE = re.compile(r"([-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)\s*(/\s*n|%)")


def make_stage(source: Source, call: Call, problems: list[Problem]) -> Stage | None:
    """Return the stage a call names, or None after noting what is wrong."""
    made = _make(source, call, stages(), "stage", problems)
    assert made is None or isinstance(made, Stage)
    return made


def stage_call(stage: Stage, *, defaults: bool = False) -> Call:
    """Return the call that writes a stage, with or without its defaults; `make_stage` reads it."""
    return _call(stage, positional=1, defaults=defaults)


def from_yaml(source: Source, node: Node, problems: list[Problem]) -> tuple[Call | None, ...]:
    """Return the calls of a pipeline, arrow text or YAML list; None for each noted as wrong."""
    if isinstance(node, Scalar) and not node.text.strip():
        problems.append(source.problem(_NO_STAGE, node.span))
        return (None,)
    if isinstance(node, Scalar) and isinstance(node.value, str):
        return arrow.parse(source, node.text, node.offsets, problems)
    if not isinstance(node, Seq):
        message = "a pipeline is arrow text (normalize -> temperature(1)) or a list of stages"
        message += "; put '- ' before each stage" if isinstance(node, Map) else ""
        problems.append(source.problem(message, node.span))
        return (None,)
    if not node.items:
        problems.append(source.problem(_NO_STAGE, node.span))
        return (None,)
    calls: list[Call | None] = []
    if len(node.items) > arrow.MAX_STAGES:
        place = node.items[arrow.MAX_STAGES].span
        problems.append(source.problem(arrow.TOO_MANY, place))
        return (None,)
    items = iter(node.items)
    for item in items:
        if isinstance(item, Scalar) and isinstance(item.value, str):
            if not item.quoted and _open_brackets(item.value) > 0:
                problems.append(_split_problem(source, item))
                calls.append(None)
                depth = _open_brackets(item.value)
                while depth > 0 and (rest := next(items, None)):  # what YAML took apart
                    depth += _open_brackets(_text_of(source, rest))
                continue
            calls.extend(arrow.parse(source, item.text, item.offsets, problems))
        elif isinstance(item, Map) and len(item.entries) == 1:
            (key, value) = item.entries[0]
            calls.append(_yaml_call(source, key, value, problems))
        else:
            message = "a stage is a name, name(arguments) or one `name: {arguments}`"
            if isinstance(item, Map):
                message += "; these are several, give each its own '-'"
            problems.append(source.problem(message, item.span))
            calls.append(None)
        if len(calls) > arrow.MAX_STAGES:  # an item may be arrow text of several
            problems.append(source.problem(arrow.TOO_MANY, item.span))
            return (None,)
    return tuple(calls)


def to_yaml(call: Call) -> object:
    """Return a call as the plain data its YAML list item holds."""
    if not call.arguments:
        return call.name
    if len(call.arguments) == 1 and isinstance(call.arguments[0].value, Pairs | Chain):
        return {call.name: _yaml_value(call.arguments[0].value)}
    return {call.name: {a.name: _yaml_value(a.value) for a in _named(call).arguments}}


def _make(
    source: Source,
    call: Call,
    known: Mapping[str, type[BaseModel]],
    what: str,
    problems: list[Problem],
) -> BaseModel | None:
    cls = known.get(call.name)
    if cls is None:
        hint = nearest(call.name, known) or "; `weighting list` shows what there is"
        if call.name in SCHEDULES:
            hint = f"; {call.name} is a schedule: write temperature({call.name}(...))"
        message = f"unknown {what} {call.name!r}{hint}"
        problems.append(source.problem(message, call.name_span))
        return None
    before = len(problems)
    values, spans = _bind(source, call, cls, problems)
    if len(problems) > before:
        return None
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems += [_argument_problem(source, call, cls, e, spans) for e in error.errors()]
        return None


def _bind(
    source: Source, call: Call, cls: type[BaseModel], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Span]]:
    """Match arguments to fields; return values and where each stands, noting mismatches."""
    collects: str | None = getattr(cls, "collects", None)
    fields = list(cls.model_fields)
    # `within` is an afterthought: it has its name, unless it is all there is.
    by_position = [f for i, f in enumerate(fields) if i == 0 or f != "within"]
    values: dict[str, Any] = {}
    spans: dict[str, Span] = {}
    for index, argument in enumerate(call.arguments):
        name = argument.name
        read = _nested if _is_pipeline(cls, name, index) else _plain
        value = read(source, argument.value, problems)
        if collects:
            if name is not None:
                value = {name: value}
            elif isinstance(argument.value, Pairs) and _keys_are_text(cls):
                entries = argument.value.entries
                value = {_key_text(source, k): _plain(source, v, problems) for k, v in entries}
            elif not isinstance(value, dict):
                message = f"{call.name} takes name=value pairs or a map in braces"
                problems.append(source.problem(message, argument.span))
                continue
            name = collects
            collected = values.setdefault(collects, {})
            for key in value:
                spans[str(key)] = argument.span
                if key in collected:
                    message = f"{key!r} is given twice; keep one"
                    problems.append(source.problem(message, argument.span))
            collected.update(value)
            value = collected
        elif name is None:
            if index >= len(by_position):
                takes = f"takes {', '.join(by_position)}" if fields else "takes no arguments"
                message = f"{call.name} {takes}; this one is too many"
                message += "; within needs its name" if len(by_position) < len(fields) else ""
                problems.append(source.problem(message, argument.span))
                continue
            name = by_position[index]
        elif name not in fields:
            takes = nearest(name, fields) if fields else "; it takes no arguments"
            if name in SCHEDULES and fields:
                takes = f"; {name} is a schedule: write {fields[0]}: {{{name}: ...}}"
            message = f"unknown argument {name!r} of {call.name}{takes}"
            problems.append(source.problem(message, argument.span))
            continue
        elif name in values:
            message = f"argument {name!r} of {call.name} is given twice; keep one"
            problems.append(source.problem(message, argument.span))
            continue
        values[name] = value
        spans.setdefault(name, argument.value.span)
    return values, spans


def _keys_are_text(cls: type[BaseModel]) -> bool:
    """Tell whether the free names a class collects are texts, not steps."""
    return issubclass(cls, Stage)


def _key_text(source: Source, key: Literal | OfRun) -> str:
    """Return a key as it was written: a domain may be called 2014, 1e-3 or 5%."""
    if isinstance(key, Literal) and key.quoted:
        return str(key.value)
    return source.text[slice(*key.span)]


def _argument_problem(
    source: Source, call: Call, cls: type[BaseModel], item: ErrorDetails, spans: dict[str, Span]
) -> Problem:
    loc = [str(part) for part in item["loc"] if part != "[key]"]
    span = next((spans[part] for part in reversed(loc) if part in spans), call.span)
    collects: str | None = getattr(cls, "collects", None)
    if item["type"] == "missing":
        needs = f"an entry: {call.name}(name=value, ...)"
        needs = needs if loc[0] == collects else f"{loc[0]}: {call.name}({loc[0]}=...)"
        return source.problem(f"{call.name} needs {needs}", span)
    reason = _reason(item)
    if loc and loc[0] == collects:
        loc = loc[1:]
    where = f"{loc[0]} of {call.name}" if loc else call.name
    return source.problem(f"{where}: {reason}", span)


def _reason(item: ErrorDetails) -> str:
    """Say in this language's words what pydantic found."""
    given, limits = item["input"], item.get("ctx", {})
    if "error" in limits:
        return str(limits["error"])
    if isinstance(given, tuple):
        return "a list is not a value here"
    must = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "a name",
        "bool_type": "true or false",
        "finite_number": "finite",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "greater_than": f"greater than {limits.get('gt')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "less_than": f"less than {limits.get('lt')}",
        "literal_error": str(limits.get("expected", "")).replace("'", ""),
        "too_short": "given at least one entry",
        "string_too_short": "a name",
    }.get(item["type"])
    if must is None:
        return item["msg"][:1].lower() + item["msg"][1:]
    shown = f"{given:g}" if isinstance(given, float) else repr(given)
    return f"must be {must}, not {shown}"


def _is_pipeline(cls: type[BaseModel], name: str | None, index: int) -> bool:
    """Tell whether an argument holds another pipeline, by its name or as the first."""
    nests: str | None = getattr(cls, "nests", None)
    return nests is not None and (name == nests if name else index == 0)


def _nested(source: Source, value: Value, problems: list[Problem]) -> tuple[Stage, ...] | None:
    """Return the stages of a pipeline that is an argument, or None after noting what is wrong."""
    if isinstance(value, Literal) and isinstance(value.value, str) and not value.quoted:
        value = Call(value.value, (), value.span, value.span)
    if not isinstance(value, Call | Chain):
        message = "here stands a pipeline, as in minus(ref_loss) or over(entropy -> mean(domain))"
        problems.append(source.problem(message, value.span))
        return None
    written = value.calls if isinstance(value, Chain) else (value,)
    made = [make_stage(source, part, problems) if part else None for part in written]
    sound = tuple(stage for stage in made if stage is not None)
    return sound if len(sound) == len(made) else None


def _plain(source: Source, value: Value, problems: list[Problem]) -> Any:  # noqa: ANN401
    """Return what a stage's field is given for a written value."""
    if isinstance(value, Share):
        if math.isfinite(value.numerator):
            return ShareOfN(numerator=value.numerator)
        problems.append(source.problem("the number over n is not finite", value.span))
        return None
    if isinstance(value, OfRun):
        if math.isfinite(value.percent):
            return Percent(value=value.percent)
        problems.append(source.problem("the number of percent is not finite", value.span))
        return None
    if isinstance(value, Call):
        return _make(source, value, SCHEDULES, "schedule", problems)
    if isinstance(value, Chain):
        message = "an argument is one value, not a pipeline"
        problems.append(source.problem(message, value.span))
        return None
    if isinstance(value, Pairs):
        return {
            key.value if isinstance(key, Literal) else _plain(source, key, problems): (
                _plain(source, item, problems)
            )
            for key, item in value.entries
        }
    if isinstance(value, Items):
        return tuple(_plain(source, item, problems) for item in value.values)
    return value.value


def _call(model: Stage | Schedule, positional: int, *, defaults: bool = False) -> Call:
    """Return the call that writes a stage or schedule: what was given, in field order."""
    span: Span = (0, 0)
    collects = model.collects
    arguments: list[Argument] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        if value is None or not (defaults or name in model.model_fields_set):
            continue
        if name == collects and all(isinstance(key, str) for key in value):
            arguments += [Argument(key, _written(item), span) for key, item in value.items()]
        else:
            is_positional = len(arguments) < positional and (
                type(model).model_fields[name].is_required()
            )
            arguments.append(Argument(None if is_positional else name, _written(value), span))
    return Call(model.name, tuple(arguments), span, span)


def _written(value: object) -> Value:
    """Return the written form of a field's value."""
    span: Span = (0, 0)
    if isinstance(value, Constant):
        return Literal(value.value, span)
    if isinstance(value, ShareOfN):
        return Share(value.numerator, span)
    if isinstance(value, Percent):
        return OfRun(value.value, span)
    if isinstance(value, Schedule):
        return _call(value, positional=value.positional)
    if isinstance(value, tuple) and all(isinstance(stage, Stage) for stage in value):
        return Chain(tuple(stage_call(stage) for stage in value), span)
    if isinstance(value, dict):
        entries = (
            (OfRun(key.value, span) if isinstance(key, Percent) else Literal(key, span), item)
            for key, item in ((key, _written(item)) for key, item in value.items())
        )
        return Pairs(tuple(entries), span)
    if isinstance(value, tuple):
        items = tuple(map(_written, value))
        return items[0] if len(items) == 1 else Items(items, span)
    assert value is None or isinstance(value, str | int | float | bool)
    return Literal(value, span)


def _named(call: Call) -> Call:
    """Return the call with every positional argument named."""
    cls = stages().get(call.name) or SCHEDULES[call.name]
    names = list(cls.model_fields)
    arguments = tuple(
        Argument(names[i] if a.name is None else a.name, a.value, a.span)
        for i, a in enumerate(call.arguments)
    )
    return Call(call.name, arguments, call.span, call.name_span)


def _yaml_value(value: Value) -> object:
    if isinstance(value, Share):
        return f"{arrow.number_text(value.numerator)}/n"
    if isinstance(value, OfRun):
        return f"{arrow.number_text(value.percent)}%"
    if isinstance(value, Pairs):
        return {
            key.value if isinstance(key, Literal) else _yaml_value(key): _yaml_value(item)
            for key, item in value.entries
        }
    if isinstance(value, Call):
        return to_yaml(value)
    if isinstance(value, Chain):
        return [to_yaml(call) for call in value.calls if call]
    if isinstance(value, Items):
        return [_yaml_value(item) for item in value.values]
    number = value.value
    if isinstance(number, float) and number == int(number):
        return int(number)
    return number


def _yaml_call(source: Source, key: Scalar, node: Node, problems: list[Problem]) -> Call | None:
    """Return the call written as `name: arguments`."""
    name = str(key.value)
    if "(" in name:
        written = f"{name}={_text_of(source, node)}"
        message = f"inside brackets an argument takes '=': {written}"
        problems.append(source.problem(message, (key.span[0], node.span[1])))
        return None
    before = len(problems)
    span = (key.span[0], node.span[1])
    cls = stages().get(name) or SCHEDULES.get(name)
    nests: str | None = getattr(cls, "nests", None)
    arguments: list[Argument] = []
    if isinstance(node, Map) and getattr(cls, "collects", None):
        made = _yaml_pairs(source, node, problems, of_steps=name in SCHEDULES)
        arguments = [Argument(None, made, node.span)]
    elif isinstance(node, Map):
        for item_key, item in node.entries:
            if _is_broken(item):
                problems.append(_split_problem(source, item))
                return None
            if nests and str(item_key.value) == nests:
                value: Value = Chain(from_yaml(source, item, problems), item.span)
            else:
                value = _yaml_argument(source, item, problems)
            arguments.append(Argument(str(item_key.value), value, item_key.span))
    elif isinstance(node, Seq) and nests:
        chain = Chain(from_yaml(source, node, problems), node.span)
        arguments = [Argument(None, chain, node.span)]
    elif isinstance(node, Seq):
        message = f"the arguments of {name} are a map, {name}: {{argument: value}}, or one value"
        problems.append(source.problem(message, node.span))
        return None
    elif node.value is not None:
        if _is_broken(node):
            problems.append(_split_problem(source, node))
            return None
        one = Chain(from_yaml(source, node, problems), node.span) if nests else None
        value = one or _yaml_argument(source, node, problems)
        arguments = [Argument(None, value, node.span)]
    return Call(name, tuple(arguments), span, key.span) if len(problems) == before else None


def _yaml_pairs(source: Source, node: Map, problems: list[Problem], *, of_steps: bool) -> Pairs:
    """Return a map written in YAML; its keys may be shares of the run where they are steps."""
    entries = []
    for key, item in node.entries:
        share = _SHARE.fullmatch(key.value.strip()) if isinstance(key.value, str) else None
        if of_steps and share and share[2] == "%":
            name: Literal | OfRun = OfRun(float(share[1]), key.span)
        else:
            name = Literal(key.value, key.span, key.quoted)
        entries.append((name, _yaml_argument(source, item, problems)))
    return Pairs(tuple(entries), node.span)


def _yaml_argument(source: Source, node: Node, problems: list[Problem]) -> Value:
    """Return an argument's value written in YAML."""
    if isinstance(node, Map):
        first = node.entries[0] if len(node.entries) == 1 else None
        if first and first[0].value in SCHEDULES:
            call = _yaml_call(source, *first, problems)
            return call or Literal(None, node.span)
        return _yaml_pairs(source, node, problems, of_steps=False)
    if isinstance(node, Seq):
        items = (_yaml_argument(source, item, problems) for item in node.items)
        return Items(tuple(items), node.span)
    if isinstance(node.value, str):
        if share := _SHARE.fullmatch(node.value.strip()):
            kind = OfRun if share[2] == "%" else Share
            return kind(float(share[1]), node.span)
        if re.match(r"\s*\w+\s*\(", node.value):
            calls = arrow.parse(source, node.text, node.offsets, problems)
            if len(calls) > 1:
                message = "an argument is one value, not a pipeline"
                problems.append(source.problem(message, node.span))
            return calls[0] or Literal(None, node.span)
    return Literal(node.value, node.span, node.quoted)


def _is_broken(node: Node) -> bool:
    return isinstance(node, Scalar) and not node.quoted and _open_brackets(node.value) > 0


def _open_brackets(value: object) -> int:
    text = str(value)
    return text.count("(") - text.count(")")


def _text_of(source: Source, node: Node) -> str:
    return source.text[node.span[0] : node.span[1]]


def _split_problem(source: Source, node: Node) -> Problem:
    message = "YAML splits this at the comma inside the brackets; put quotes around the whole call"
    return source.problem(message, node.span)

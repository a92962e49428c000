"""The JSON Schema of a spec file, for editors: made from the stages there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from weighting.contract import Stage, Sugar
from weighting.contract.stage import PIPELINE_HERE
from weighting.pipeline import expand
from weighting.registry import stages
from weighting.schedules import SCHEDULE_HERE, SCHEDULES
from weighting.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Schema = dict[str, Any]


def schema() -> Schema:
    """Return the JSON Schema (2020-12) of a spec, its stages and schedules included.

    It knows names, arguments and ranges, in lists and in arrow text; whether stages fit together
    is for `weighting check`.
    """
    known = sorted(stages().items())
    call, schedule_call = _calls(known), _calls(SCHEDULES.items())
    pipeline = {
        "anyOf": [
            {"type": "string", "pattern": f"^\\s*{call}(\\s*(->|→)\\s*{call})*\\s*$"},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/stage"}},
        ]
    }
    options = Spec.model_json_schema()["properties"]
    properties = {
        "version": {"const": 1, "description": "Version of the language."},
        "name": options["name"],
        "pipeline": {"$ref": "#/$defs/pipeline"},
        "factors": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": r"^[^\W\d][\w-]*$"},
            "additionalProperties": {"$ref": "#/$defs/pipeline"},
        },
        "plugins": {"anyOf": [_MODULE, {"type": "array", "items": _MODULE}]},
        **{name: options[name] for name in _OPTIONS},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weighting spec",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": ["version"],
        "oneOf": [{"required": ["pipeline"]}, {"required": ["factors"]}],
        "$defs": {
            "pipeline": pipeline,
            "stage": {
                "anyOf": [
                    {"type": "string", "pattern": f"^\\s*{call}\\s*$"},
                    *(_item(name, cls) for name, cls in known),
                ]
            },
            "schedule": {
                "anyOf": [
                    {"type": "string", "pattern": f"^\\s*{schedule_call}\\s*$"},
                    *(_item(name, cls) for name, cls in SCHEDULES.items()),
                ]
            },
        },
    }


_OPTIONS = ("normalize", "reduction", "scope", "on_nonfinite", "apply", "start")
_MODULE = {"type": "string", "pattern": r"^[^\W\d]\w*(\.[^\W\d]\w*)*$"}
_VALUE = (
    r"""(\{[^{}]*\}|\[[^\[\]]*\]|"[^"]*"|'[^']*'|[^\s(),={}"']+"""
    r"""(\s*\(([^()]|\(([^()]|\([^()]*\))*\))*\))?)"""
)
"""A pattern for an argument's value: a map, a list, a text, or a word or number that may have
brackets after it."""


_DEPTH = 10
"""Brackets inside brackets that a pattern allows in a pipeline that is an argument."""


def _balanced(depth: int) -> str:
    """Return a pattern for text whose brackets are closed, with some between, up to a depth."""
    return "[^()]*" if not depth else f"([^()]|\\({_balanced(depth - 1)}\\))+"


def _calls(known: Iterable[tuple[str, type[BaseModel]]]) -> str:
    """Return a pattern for a call of one of these: its name and arguments of its own."""
    return f"({'|'.join(_call(name, cls) for name, cls in known)})"


def _call(name: str, cls: type[BaseModel]) -> str:
    fields = cls.model_fields
    if getattr(cls, "collects", None):
        argument, most = f"([^\\s(),={{}}]+\\s*=\\s*)?{_VALUE}", ""
    else:
        argument, most = f"(({'|'.join(fields)})\\s*=\\s*)?{_VALUE}", str(len(fields) - 1)
    if getattr(cls, "nests", None):  # what stands in its brackets is for `weighting check`
        return f"{name}\\s*\\({_balanced(_DEPTH)}\\)"
    arguments = f"\\s*\\(\\s*{argument}(\\s*,\\s*{argument}){{0,{most}}}\\s*\\)"
    if not fields:
        return f"{name}(\\s*\\(\\s*\\))?"
    needs_some = any(field.is_required() for field in fields.values())
    return name + (arguments if needs_some else f"(\\s*\\(\\s*\\)|{arguments})?")


def _item(name: str, cls: type[BaseModel]) -> Schema:
    """Return the schema of `name: {arguments}`, or `name: value` for the first argument."""
    whole = cls.model_json_schema()
    fields: dict[str, Schema] = {
        field: _without_null(_with_schedules(value))
        for field, value in whole.get("properties", {}).items()
    }
    collects: str | None = getattr(cls, "collects", None)
    if collects:
        ways = [{**fields[collects], "minProperties": 1}]
    else:
        arguments = {"type": "object", "properties": fields, "additionalProperties": False}
        ways = [arguments | ({"required": whole["required"]} if "required" in whole else {})]
        # One argument may be given without its name, if the others need none.
        if fields and whole.get("required", [])[1:] == []:
            ways.append(next(iter(fields.values())))
        if "required" not in whole:
            ways.append({"type": "null"})
    described = {"description": " ".join((cls.__doc__ or "").split("\n\n")[0].split())}
    return {
        "type": "object",
        "properties": {name: {"anyOf": ways, **described}},
        "required": [name],
        "additionalProperties": False,
        # No keyword of JSON Schema: what `weighting list` says of a word without importing it.
        "x-word": {
            "kind": cls.kind if issubclass(cls, Stage) else "schedule",
            "call": name + signature(cls),
            "levels": " ".join(stands_at(cls)) if issubclass(cls, Stage) else "",
        },
    }


def stands_at(cls: type[Stage]) -> tuple[str, ...]:
    """Return the levels at which a stage can stand; of sources and pools those they give."""
    if cls.kind == "pool":
        return get_args(cls.model_fields["level"].annotation)
    if cls.kind == "source":
        return (expand((cls(),))[-1].level,) if issubclass(cls, Sugar) else ("token",)
    return cls.levels


def signature(cls: type[BaseModel]) -> str:
    """Return the arguments of a stage or schedule as one writes them, with their defaults."""
    if getattr(cls, "collects", None):
        return "({step: value, ...})" if cls is SCHEDULES["piecewise"] else "(name=value, ...)"
    arguments = ", ".join(_arguments(cls))
    return f"({arguments})" if arguments else ""


def _arguments(cls: type[BaseModel]) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        default = default_of(field)
        yield name if default is None else f"{name}={default}"


def default_of(field: FieldInfo) -> str | None:
    """Return the default of an argument as one writes it; None where there is none."""
    if field.is_required() or field.default is None:
        return None
    value = getattr(field.default, "value", field.default)
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _with_schedules(value: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Put the definition of a schedule, or a pipeline, where one may stand."""
    if value == SCHEDULE_HERE:
        return {"$ref": "#/$defs/schedule"}
    if value == PIPELINE_HERE:
        return {"$ref": "#/$defs/pipeline"}
    if isinstance(value, dict):
        return {key: _with_schedules(item) for key, item in value.items()}
    return [_with_schedules(item) for item in value] if isinstance(value, list) else value


def _without_null(value: Schema) -> Schema:
    """Leave out that an argument may be null, which is how leaving it out is kept in Python."""
    ways = [way for way in value.get("anyOf", []) if way != {"type": "null"}]
    kept = {key: item for key, item in value.items() if key not in {"anyOf", "default", "title"}}
    return {**kept, **({"anyOf": ways} if ways else {})}

"""Text -> Spec: YAML or arrow text, with every error of it at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

from weighting.build.checks import order_problems
from weighting.errors import Problem, Source, Span, SpecError, nearest
from weighting.language import calls
from weighting.language.open import Document, open_argument, open_file, open_text
from weighting.language.plugins import import_plugins
from weighting.language.yaml_nodes import Map, Node, Scalar
from weighting.registry import stages
from weighting.spec import (
    CHOICES,
    MAX_FACTORS,
    MAX_STEP,
    SINGLE,
    TOO_MANY_FACTORS,
    Apply,
    Marks,
    Spec,
)

if TYPE_CHECKING:
    from pathlib import Path

    from weighting.contract import Stage


def load(path: str | Path, *, allow_plugins: bool = False) -> Spec:
    """Read a spec file.

    Args:
        path: The file; a shipped spec may be given by its name alone, as in "linupper".
        allow_plugins: Import the modules the spec names under `plugins:`, which runs their code.

    Raises:
        SpecError: The file is missing, unreadable or wrong; every error in it at once.
    """
    return spec_of(open_file(path), allow_plugins=allow_plugins)


def loads(text: str, source: str = "<spec>", *, allow_plugins: bool = False) -> Spec:
    """Read a spec from YAML text, or a single pipeline from arrow text.

    Args:
        text: The spec.
        source: What to call it in messages.
        allow_plugins: Import the modules the spec names under `plugins:`, which runs their code.

    Raises:
        SpecError: Anything is wrong with it; every error at once.
    """
    return spec_of(open_text(text, source), allow_plugins=allow_plugins)


def resolve(text: str, *, allow_plugins: bool = False) -> Spec:
    """Return the spec a text means: a file, a shipped name, arrow text, or (several lines) YAML.

    Raises:
        SpecError: It is none of them, or wrong.
    """
    document = open_argument(text, lambda word: word in stages())
    return spec_of(document, allow_plugins=allow_plugins)


def spec_of(document: Document, *, allow_plugins: bool = False) -> Spec:
    """Return the spec of a document.

    Raises:
        SpecError: Anything is wrong with it; every error at once.
    """
    problems: list[Problem] = []
    spec = _read(document.source, document.root, problems, allow_plugins=allow_plugins)
    if problems:
        # A user mends a file once: say what `build` would object to in the sound factors too.
        raise SpecError([*problems, *(order_problems(spec) if spec else ())])
    assert spec is not None
    return spec


_KEYS = ("version", "name", SINGLE, "factors", "plugins", "apply", "start", *CHOICES)


def _read(
    source: Source, root: Node, problems: list[Problem], *, allow_plugins: bool
) -> Spec | None:
    """Return the spec of a document; with problems noted, a spec of its sound factors or None."""
    if isinstance(root, Scalar) and isinstance(root.value, str):
        entries: dict[str, tuple[Scalar, Node]] = {SINGLE: (root, root)}
    elif isinstance(root, Map):
        entries = {key.text: (key, value) for key, value in root.entries}
        _check_keys(source, root, entries, problems)
    else:
        message = "a spec is a map that starts with version: 1 and holds pipeline: or factors:"
        problems.append(source.problem(message, root.span))
        return None
    options: dict[str, Any] = {
        name: _option(source, *entries[name], problems) for name in _OPTIONS if name in entries
    }
    if "plugins" in entries:
        options["plugins"] = import_plugins(
            source, entries["plugins"][1], problems, allow=allow_plugins
        )
    if "start" in entries:
        options["start"] = _start(source, entries["start"][1], problems)
    spans: dict[tuple[str, int], Span] = {}
    factors: dict[str, tuple[Stage, ...]] = {}
    for name, node in _pipelines(source, entries, problems):
        pipeline = _pipeline(source, name, node, spans, problems)
        if pipeline:
            factors[name] = pipeline
    if "apply" in entries:
        names = [name for name, _ in _pipelines(source, entries, [])]
        options["apply"] = _apply(source, entries["apply"][1], names, problems)
    if not factors:
        return None
    given = {name: value for name, value in options.items() if value is not None}
    if len(factors) < len(_pipelines(source, entries, [])):
        given.pop("apply", None)  # a factor that is wrong is not there to be judged
    spec = Spec.model_validate({"factors": factors, **given})
    return spec.with_marks(Marks(source, spans))


_OPTIONS: dict[str, str | tuple[str, ...]] = {
    "name": "^[A-Za-z0-9][A-Za-z0-9._-]*$",
    **{name: get_args(Spec.model_fields[name].annotation) for name in CHOICES},
}


def _check_keys(
    source: Source, root: Map, entries: dict[str, tuple[Scalar, Node]], problems: list[Problem]
) -> None:
    for name, (key, _) in entries.items():
        if name in _KEYS:
            continue
        message = f"unknown key {name!r}"
        owners = sorted(n for n, c in stages().items() if name in c.model_fields)
        close = nearest(name, _KEYS)
        if name in stages():
            message += f"; {name} is a stage and belongs in pipeline:"
        elif owners and "did you mean" not in close:
            message += f"; {name} is an argument of {', '.join(owners)} and belongs inside a stage"
        problems.append(source.problem(message if ";" in message else message + close, key.span))
    if "version" not in entries:
        message = "version is missing; write version: 1 on the first line"
        problems.append(source.problem(message, (root.span[0], root.span[0] + 1)))
    else:
        value = entries["version"][1]
        if not isinstance(value, Scalar) or value.value != 1 or isinstance(value.value, bool):
            message = "this release reads version 1 of the language; write version: 1"
            problems.append(source.problem(message, value.span))


def _option(source: Source, key: Scalar, node: Node, problems: list[Problem]) -> str | None:
    allowed = _OPTIONS[str(key.value)]
    value = node.text if isinstance(node, Scalar) else None
    if isinstance(allowed, str):
        if value is not None and re.fullmatch(allowed, value):
            return value
        message = f"{key.value} is a word of letters, digits, '.', '_' and '-'"
    elif value in allowed:
        return value
    else:
        message = f"{key.value} is {' or '.join(allowed)}"
        message += nearest(value, allowed) if isinstance(value, str) else ""
    problems.append(source.problem(message, node.span))
    return None


def _start(source: Source, node: Node, problems: list[Problem]) -> int | None:
    """Return the first step that is weighed."""
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_STEP:
        return value
    message = (
        "start is the first optimizer step that is weighed, a whole number from 1 on: "
        "start: 1001 after a thousand steps of plain training"
    )
    problems.append(source.problem(message, node.span))
    return None


def _apply(
    source: Source, node: Node, factors: list[str], problems: list[Problem]
) -> str | dict[str, str] | None:
    """Return where domain weights act: a word for all, or one for each factor named."""
    words = get_args(Apply)
    if isinstance(node, Scalar) and node.text in words:
        return node.text
    if not isinstance(node, Map) or not node.entries:
        text = node.text if isinstance(node, Scalar) else ""
        message = f"apply is {_WORDS}, or a map from factors to these"
        problems.append(source.problem(message + _meant(text), node.span))
        return None
    found: dict[str, str] = {}
    for key, value in node.entries:
        if key.text not in factors:
            message = f"apply names no factor {key.text!r}{nearest(key.text, factors)}"
            problems.append(source.problem(message, key.span))
        elif isinstance(value, Scalar) and value.text in words:
            found[key.text] = value.text
        else:
            text = value.text if isinstance(value, Scalar) else ""
            problems.append(source.problem(f"apply is {_WORDS}{_meant(text)}", value.span))
    return found


_WORDS = "loss, sampling or both"


def _meant(text: str) -> str:
    """Return which word of `apply` was meant, if one is near."""
    close = nearest(text, get_args(Apply))
    return close if "did you mean" in close else ""


def _pipelines(
    source: Source, entries: dict[str, tuple[Scalar, Node]], problems: list[Problem]
) -> list[tuple[str, Node]]:
    """Return the named pipelines of a document, noting when there is not exactly one home."""
    single, several = entries.get(SINGLE), entries.get("factors")
    if single and several:
        message = "give pipeline: or factors:, not both; move it under factors: with a name"
        problems.append(source.problem(message, single[0].span))
    if not single and not several:
        message = "nothing to weigh by; add pipeline: or factors: (uniform is plain training)"
        problems.append(source.problem(message, (len(source.text.rstrip()) - 1,) * 2))
    found = [(SINGLE, single[1])] if single else []
    if several:
        node = several[1]
        if not isinstance(node, Map) or not node.entries:
            message = "factors: is a map from a name to its pipeline"
            problems.append(source.problem(message, node.span))
            return found
        if len(node.entries) > MAX_FACTORS:
            place = node.entries[MAX_FACTORS][0].span
            problems.append(source.problem(TOO_MANY_FACTORS, place))
            return found
        for key, value in node.entries:
            if re.fullmatch(r"[^\W\d][\w-]*", key.text):
                found.append((key.text, value))
            else:
                message = "a factor's name is a word of letters, digits, '_' and '-'"
                problems.append(source.problem(message, key.span))
    return found


def _pipeline(
    source: Source,
    factor: str,
    node: Node,
    spans: dict[tuple[str, int], Span],
    problems: list[Problem],
) -> tuple[Stage, ...] | None:
    written = calls.from_yaml(source, node, problems)
    made = [calls.make_stage(source, call, problems) if call else None for call in written]
    spans.update({(factor, index): call.span for index, call in enumerate(written) if call})
    sound = [stage for stage in made if stage is not None]
    return tuple(sound) if len(sound) == len(made) else None

"""The validated whole: reading a spec from text, and writing it back."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny, model_validator
from typing_extensions import override

import weighting.stages  # noqa: F401 - registers the words of the language
from weighting import arrow, calls, document
from weighting.contract import Stage
from weighting.document import Map, Node, Scalar, Seq
from weighting.errors import Place, Problem, Source, Span, SpecError, nearest
from weighting.html import spec_html
from weighting.registry import stages

Pipeline = tuple[SerializeAsAny[Stage], ...]
Spelling = Literal["arrow", "yaml"]
Apply = Literal["loss", "sampling", "both"]

SINGLE = "pipeline"
"""The name of the only factor of a spec written with `pipeline:`."""
MAX_FACTORS = 100
"""Of a spec."""
_TOO_MANY = f"a spec has at most {MAX_FACTORS} factors, and this one more; leave some out"


class _Marks:
    """Where each stage stands in the text a spec was read from; no part of its value."""

    def __init__(self, source: Source, spans: dict[tuple[str, int], Span]) -> None:
        self.source = source
        self.spans = spans

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Marks)

    def __hash__(self) -> int:
        return 0


class Spec(BaseModel):
    """A weighting: one pipeline, or several named factors whose weights multiply.

    Attributes:
        version: Version of the language.
        name: What to call it in logs and files.
        factors: Pipelines by name; a single `pipeline:` is a factor of that name.
        normalize: `mean_one` scales the product of the factors to mean one over valid tokens;
            `none` leaves it, for published methods that do not normalise.
        reduction: `token_mean` lets every token of a sequence count alike; `sequence_mean` (or
            `domain_mean`) lets every sequence (domain) count alike whatever its length.
        scope: Which units statistics run over: `microbatch`, those of all data-parallel ranks;
            `rank`, those of each rank alone; `step`, those of all accumulated microbatches too;
            `running`, those of the last 1,024 units before the microbatch as well.
        on_nonfinite: `error` reports a NaN or infinite signal at the next log step; `drop`
            weighs the unit 0 and counts it.
        apply: Where the weights of domains act, for every factor that has such, or by factor:
            `loss` multiplies the loss; `sampling` draws training data in proportion to them and
            leaves the loss alone; `both` multiplies the loss by weight / proportion drawn, so that
            their product is the weight, and draws by it unless another factor says `sampling`.
        plugins: Modules that register further stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    name: str = Field(default="unnamed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    factors: dict[str, Pipeline] = Field(min_length=1)
    normalize: Literal["mean_one", "none"] = "mean_one"
    reduction: Literal["token_mean", "sequence_mean", "domain_mean"] = "token_mean"
    scope: Literal["rank", "microbatch", "step", "running"] = "microbatch"
    on_nonfinite: Literal["error", "drop"] = "error"
    apply: Apply | dict[str, Apply] = "loss"
    plugins: tuple[str, ...] = ()
    _marks: _Marks = PrivateAttr(default_factory=lambda: _Marks(Source("", ""), {}))

    @model_validator(mode="after")
    def _some_stages(self) -> Spec:
        empty = [name for name, pipeline in self.factors.items() if not pipeline]
        if empty:
            msg = f"factor {empty[0]!r} has no stage; write uniform for plain training"
            raise ValueError(msg)
        if len(self.factors) > MAX_FACTORS:
            raise ValueError(_TOO_MANY)
        for name, pipeline in self.factors.items():
            if len(pipeline) > arrow.MAX_STAGES:
                msg = f"factor {name!r}: {arrow.TOO_MANY}"
                raise ValueError(msg)
        if isinstance(self.apply, dict) and (unknown := sorted({*self.apply} - {*self.factors})):
            msg = f"apply names no factor {unknown[0]!r}{nearest(unknown[0], self.factors)}"
            raise ValueError(msg)
        return self

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change whenever the meaning of the spec may have changed."""
        text = dumps(self.model_copy(update={"name": "unnamed"}))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def place(self, factor: str, index: int) -> Place | None:
        """Return where a stage was written; None for a spec that was not read from text."""
        span = self._marks.spans.get((factor, index))
        return self._marks.source.place(*span) if span else None

    @override
    def __str__(self) -> str:
        return dumps(self)

    def _repr_html_(self) -> str:
        """Return how a notebook shows it."""
        from weighting.build import plan  # noqa: PLC0415 - build knows specs, not the reverse

        rows = [
            (name, plan(pipeline)[-1].level, arrow_text(pipeline))
            for name, pipeline in self.factors.items()
        ]
        return spec_html(self.name, str(self), rows)


def load(path: str | Path, *, allow_plugins: bool = False) -> Spec:
    """Read a spec file.

    Args:
        path: The file; a shipped spec may be given by its name alone, as in "linupper".
        allow_plugins: Import the modules the spec names under `plugins:`, which runs their code.

    Raises:
        SpecError: The file is missing, unreadable or wrong; every error in it at once.
    """
    found = find(path)
    try:
        with found.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            size = f"{found.stat().st_size:,} bytes"
            raise SpecError([Problem(f"{path}: {document.too_long(size)}")])
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start}); save the spec as UTF-8"
        raise SpecError([Problem(msg)]) from None
    except OSError as error:
        raise SpecError([Problem(f"{path}: {error.strerror or error}")]) from None
    return loads(text, source=str(path), allow_plugins=allow_plugins)


def loads(text: str, source: str = "<spec>", *, allow_plugins: bool = False) -> Spec:
    """Read a spec from YAML text, or a single pipeline from arrow text.

    Args:
        text: The spec.
        source: What to call it in messages.
        allow_plugins: Import the modules the spec names under `plugins:`, which runs their code.

    Raises:
        SpecError: Anything is wrong with it; every error at once.
    """
    from weighting.build import order_problems  # noqa: PLC0415 - build knows specs, not the reverse

    if len(text) > document.MAX_CHARACTERS:
        raise SpecError([Problem(f"{source}: {document.too_long(f'{len(text):,}')}")])
    origin = Source(source, text.replace("\r\n", "\n"))
    problems: list[Problem] = []
    if re.match(r"\s*[^\W\d]\w*\s*(\(|->|→|$)", text):  # no YAML map begins like this
        written = range(len(origin.text))
        node = Scalar(origin.text, (0, len(origin.text)), origin.text, written, quoted=True)
    else:
        node = document.parse(origin)
    spec = _read(origin, node, problems, allow_plugins=allow_plugins)
    if problems:
        # A user mends a file once: say what `build` would object to in the sound factors too.
        raise SpecError([*problems, *(order_problems(spec) if spec else ())])
    assert spec is not None
    return spec


def resolve(text: str, *, allow_plugins: bool = False) -> Spec:
    """Return the spec a text means: a file, a shipped name, arrow text, or (several lines) YAML.

    Raises:
        SpecError: It is none of them, or wrong.
    """
    if "\n" in text:
        return loads(text, allow_plugins=allow_plugins)
    looks_like_file = text.endswith((".yaml", ".yml")) or _is_file(text)
    is_arrow = re.search(r"->|→|\(", text) or text.strip() in stages().keys() - shipped().keys()
    if is_arrow and not looks_like_file:
        return loads(text, source="<arrow>", allow_plugins=allow_plugins)
    return load(text, allow_plugins=allow_plugins)


def dumps(spec: Spec, spelling: Spelling = "arrow") -> str:
    """Write a spec as YAML, its pipelines as arrow text or as YAML lists; `loads` gives it back."""
    data: dict[str, Any] = {"version": spec.version}
    for name in ("name", "plugins", *_CHOICES, "apply"):
        value = getattr(spec, name)
        if value != Spec.model_fields[name].default:
            data[name] = list(value) if isinstance(value, tuple) else value
    written = {name: _pipeline_data(p, spelling) for name, p in spec.factors.items()}
    single = list(written) == [SINGLE]
    data |= {SINGLE: written[SINGLE]} if single else {"factors": written}
    return document.dump(data, flow_leaves=spelling == "yaml")


def arrow_text(pipeline: tuple[Stage, ...]) -> str:
    """Return a pipeline as arrow text."""
    return arrow.to_text(tuple(calls.stage_call(stage) for stage in pipeline))


def imported(spec: Spec) -> str:
    """Return the modules under `plugins:`, each with the file whose code ran; '' for none."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in spec.plugins}
    return ", ".join(f"{name} ({file or 'no file'})" for name, file in files.items())


def shipped() -> dict[str, Path]:
    """Return the spec files that come with the package, by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "specs", here.parent / "specs"):  # installed; a source checkout
        if files := sorted(folder.glob("*.yaml")):
            return {file.stem: file for file in files}
    return {}


def find(path: str | Path) -> Path:
    """Return the file a path means, looking among the shipped specs when it does not exist.

    Raises:
        SpecError: There is no such file.
    """
    file = Path(path)
    if _is_file(str(path)):
        return file
    name = file.name.removesuffix(".yaml")
    known = shipped()
    is_bare = str(path) in {name, f"specs/{name}.yaml"}
    if is_bare and name in known:
        return known[name]
    what = "is a directory" if os.path.isdir(path) else "no such file"  # noqa: PTH112 - see _is_file
    fix = nearest(name, known) or "; `weighting list` shows the specs there are"
    raise SpecError([Problem(f"{path}: {what}{fix}")])


_MOST_BYTES = 4 * document.MAX_CHARACTERS
"""A character of UTF-8 takes no more than four."""


def _is_file(text: str) -> bool:
    """Tell whether a file has this name; a text too long or odd for one is no error here."""
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises on such texts


def _pipeline_data(pipeline: tuple[Stage, ...], spelling: Spelling) -> object:
    if spelling == "arrow":
        return arrow_text(pipeline)
    return [calls.to_yaml(calls.stage_call(stage)) for stage in pipeline]


_CHOICES = ("normalize", "reduction", "scope", "on_nonfinite")
_KEYS = ("version", "name", SINGLE, "factors", "plugins", "apply", *_CHOICES)


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
        options["plugins"] = _plugins(source, entries["plugins"][1], problems, allow=allow_plugins)
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
    spec._marks = _Marks(source, spans)  # noqa: SLF001 - its own private attribute
    return spec


_OPTIONS: dict[str, str | tuple[str, ...]] = {
    "name": "^[A-Za-z0-9][A-Za-z0-9._-]*$",
    **{name: get_args(Spec.model_fields[name].annotation) for name in _CHOICES},
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


def _plugins(
    source: Source, node: Node, problems: list[Problem], *, allow: bool
) -> tuple[str, ...]:
    """Import the plugin modules if that was allowed; return their names."""
    items = node.items if isinstance(node, Seq) else (node,)
    names: list[str] = []
    for item in items:
        name = item.value if isinstance(item, Scalar) else None
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            message = "a plugin is the dotted name of a Python module, such as my_stages"
            problems.append(source.problem(message, item.span))
            continue
        names.append(name)
        if name in sys.modules:
            continue
        if not allow:
            message = (
                f"importing {name} runs its code; allow it with --allow-plugins, or "
                f"allow_plugins=True, or import {name} yourself first"
            )
            problems.append(source.problem(message, item.span))
            continue
        try:
            _import_plugin(name)
        except Exception as error:  # noqa: BLE001 - a plugin may fail in any way
            message = f"plugin {name} cannot be imported: {type(error).__name__}: {error}"
            problems.append(source.problem(message, item.span))
    return tuple(names)


def _import_plugin(name: str) -> None:
    """Import a module, from the working directory too.

    That is searched last: a file there may be called like a module of an installed package.
    """
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)


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
            problems.append(source.problem(_TOO_MANY, place))
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

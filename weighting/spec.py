"""A weighting, validated: one frozen value, and the text it prints as."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny, model_validator
from typing_extensions import override

from weighting.contract import Stage
from weighting.errors import Place, Source, Span, nearest
from weighting.language import arrow, calls, yaml_nodes
from weighting.language.html import spec_html
from weighting.pipeline import expand

Pipeline = tuple[SerializeAsAny[Stage], ...]
Spelling = Literal["arrow", "yaml"]
Apply = Literal["loss", "sampling", "both"]

SINGLE = "pipeline"
"""The name of the only factor of a spec written with `pipeline:`."""
MAX_FACTORS = 100
"""Of a spec."""
MAX_STEP = 2**53
"""Of a spec's start: every reader of YAML and JSON takes such a number as it is."""
TOO_MANY_FACTORS = f"a spec has at most {MAX_FACTORS} factors, and this one more; leave some out"


class Marks:
    """Where each stage stands in the text a spec was read from; no part of its value."""

    def __init__(self, source: Source, spans: dict[tuple[str, int], Span]) -> None:
        self.source = source
        self.spans = spans

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Marks)

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
            `document_mean`, `domain_mean`) lets every sequence (document, domain) count alike
            whatever its length.
        scope: Which units statistics run over: `microbatch`, those of all data-parallel ranks;
            `rank`, those of each rank alone; `step`, those of all accumulated microbatches too;
            `running`, those of the last 1,024 units before the microbatch as well.
        on_nonfinite: `error` reports a NaN or infinite signal at the next log step; `drop`
            weighs the unit 0 and counts it.
        apply: Where the weights of domains act, for every factor that has such, or by factor:
            `loss` multiplies the loss; `sampling` draws training data in proportion to them and
            leaves the loss alone; `both` multiplies the loss by weight / proportion drawn, so that
            their product is the weight, and draws by it unless another factor says `sampling`.
        start: The optimizer step from which tokens are weighed.  Before it every token weighs one,
            as in plain training; what stages remember moves, and data is drawn, as ever.
        plugins: Modules that register further stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    name: str = Field(default="unnamed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    factors: dict[str, Pipeline] = Field(min_length=1)
    normalize: Literal["mean_one", "none"] = "mean_one"
    reduction: Literal["token_mean", "sequence_mean", "document_mean", "domain_mean"] = "token_mean"
    scope: Literal["rank", "microbatch", "step", "running"] = "microbatch"
    on_nonfinite: Literal["error", "drop"] = "error"
    apply: Apply | dict[str, Apply] = "loss"
    start: int = Field(default=1, ge=1, le=MAX_STEP, strict=True)
    plugins: tuple[str, ...] = ()
    _marks: Marks = PrivateAttr(default_factory=lambda: Marks(Source("", ""), {}))

    @model_validator(mode="after")
    def _some_stages(self) -> Spec:
        empty = [name for name, pipeline in self.factors.items() if not pipeline]
        if empty:
            msg = f"factor {empty[0]!r} has no stage; write uniform for plain training"
            raise ValueError(msg)
        if len(self.factors) > MAX_FACTORS:
            raise ValueError(TOO_MANY_FACTORS)
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

    def with_marks(self, marks: Marks) -> Spec:
        """Return the same spec, which knows where its stages stand in a text."""
        marked = self.model_copy()
        marked._marks = marks  # noqa: SLF001 - its own private attribute
        return marked

    def place(self, factor: str, index: int) -> Place | None:
        """Return where a stage was written; None for a spec that was not read from text."""
        span = self._marks.spans.get((factor, index))
        return self._marks.source.place(*span) if span else None

    @override
    def __str__(self) -> str:
        return dumps(self)

    def _repr_html_(self) -> str:
        """Return how a notebook shows it."""
        rows = [
            (name, expand(pipeline)[-1].level, arrow_text(pipeline))
            for name, pipeline in self.factors.items()
        ]
        return spec_html(self.name, str(self), rows)


def dumps(spec: Spec, spelling: Spelling = "arrow") -> str:
    """Write a spec as YAML, its pipelines as arrow text or as YAML lists; `loads` gives it back."""
    data: dict[str, Any] = {"version": spec.version}
    for name in ("name", "plugins", *CHOICES, "apply", "start"):
        value = getattr(spec, name)
        if value != Spec.model_fields[name].default:
            data[name] = list(value) if isinstance(value, tuple) else value
    written = {name: _pipeline_data(p, spelling) for name, p in spec.factors.items()}
    single = list(written) == [SINGLE]
    data |= {SINGLE: written[SINGLE]} if single else {"factors": written}
    return yaml_nodes.dump(data, flow_leaves=spelling == "yaml")


def arrow_text(pipeline: tuple[Stage, ...]) -> str:
    """Return a pipeline as arrow text."""
    return arrow.to_text(tuple(calls.stage_call(stage) for stage in pipeline))


def _pipeline_data(pipeline: tuple[Stage, ...], spelling: Spelling) -> object:
    if spelling == "arrow":
        return arrow_text(pipeline)
    return [calls.to_yaml(calls.stage_call(stage)) for stage in pipeline]


CHOICES = ("normalize", "reduction", "scope", "on_nonfinite")
"""Keys of a spec whose value is one of a few words."""

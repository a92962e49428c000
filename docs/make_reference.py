"""Write docs/stages.md, the reference of stages and schedules, a curve of each, and the schema.

    python docs/make_reference.py

Words, arguments, ranges and defaults come from the classes; the examples stand here.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weighting as wt
from weighting.contract.stage import PIPELINE_HERE
from weighting.language.schema import schema
from weighting.registry import stages
from weighting.schedules import SCHEDULES

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel

HERE = Path(__file__).resolve().parent
KINDS = {
    "source": ("Sources", "Read a signal and give a score, or a weight, for each token."),
    "pool": ("Pools", "Turn scores of tokens into scores of documents, sequences or domains."),
    "shape": ("Shapes", "Turn a score into another score."),
    "weigh": ("Weighers", "Turn scores into weights."),
    "constrain": ("Constraints", "Bound weights and keep their mean."),
}
EXAMPLES = {
    "abs": "normalize -> abs -> temperature(0.4)",
    "ado": "mean(domain) -> ado(every=1000, warmup=1000)",
    "affine": "normalize -> affine(scale=2, shift=1) -> temperature(1)",
    "as_is": "target_prob -> as_is",
    "bandit": "mean(domain) -> bandit(reward=0.1)",
    "bernoulli": "rank -> bernoulli(correct=true, seed=1)",
    "center": "mean(sequence) -> center -> sigmoid -> mean_one",
    "clamp": "normalize -> temperature(0.4) -> clamp(2/n)",
    "clip": "normalize -> clip(min=-0.5, max=0.5) -> temperature(0.4)",
    "column": "column(quality) -> mean(sequence) -> temperature(1)",
    "context_gain": "context_gain(window=1024) -> exp -> clip(max=5) -> as_is",
    "correct": "correct -> affine(-1, 1) -> as_is",
    "doge": "doge(step_size=0.05)",
    "doremi": "doremi(step_size=1, smoothing=1e-3)",
    "dynamic_loading": "dynamic_loading(a=1.9, b=0.7)",
    "effective_number": (
        "column(label_count) -> clip(min=1) -> effective_number(10000) -> pow(-1) -> mean_one"
    ),
    "ema": "mean(domain) -> ema(0.9) -> temperature(1)",
    "entropy": "entropy(gamma=1) -> token_scale",
    "error_norm": "error_norm -> threshold(quantile=0.9, side=below)",
    "excess_loss": "excess_loss -> select(0.6)",
    "exp": "mean(sequence) -> clip(max=4) -> exp -> mean_one",
    "exponentiated": "mean(domain) -> exponentiated(step_size=0.01)",
    "extremes": "normalize -> extremes -> temperature(0.4)",
    "floor": "normalize -> temperature(0.4) -> floor(0.2)",
    "focal": "focal(gamma=2) -> as_is",
    "forgotten": "forgotten(examples=100000) -> mean(sequence) -> select(0.7)",
    "gate": "target_prob -> gate(0.1, 0.9) -> as_is",
    "indicator": "mean(sequence) -> indicator(mean) -> affine(0.5, 0.5) -> bernoulli(correct=true)",
    "interpolate": "normalize -> temperature(0.4) -> interpolate(0.5)",
    "kl": "kl -> affine(-1) -> temperature(1)",
    "last": "mean(domain) -> last(1) -> over(mean(domain) -> last(2)) -> temperature(2)",
    "length": "length(sequence) -> pow(-0.5) -> mean_one",
    "linupper": "normalize -> linupper(alpha=0.5) -> temperature(0.4)",
    "log": "mean(sequence) -> log -> temperature(1)",
    "loss": "loss -> mean_one",
    "max": "max(sequence) -> normalize -> temperature(0.4)",
    "mean": "mean(sequence) -> normalize -> temperature(0.4)",
    "minus": "loss -> minus(ref_loss) -> mean_one",
    "mean_one": "loss -> mean_one",
    "multinomial": "mean(sequence) -> multinomial(draws=0.5, seed=1)",
    "normalize": "normalize -> temperature(0.4)",
    "over": "mean(sequence) -> over(ref_loss -> mean(sequence)) -> temperature(1)",
    "plus": "loss -> plus(entropy) -> mean_one",
    "position": "entropy -> token_scale -> where(position, below=64)",
    "pow": "target_prob -> pow(0.5) -> as_is",
    "quadratic": "normalize -> quadratic -> temperature(0.4)",
    "rank": "rank -> pow(2) -> mean_one",
    "remembered": "remembered(examples=100000) -> mean(sequence) -> rank -> temperature(0.217)",
    "ref_entropy": "ref_entropy -> token_scale",
    "ref_loss": "ref_loss -> over(loss) -> mean_one",
    "running": "running(1, decay=0.9)",
    "select": "loss -> select(0.6)",
    "short_loss": "short_loss(1024) -> over(loss) -> mean_one",
    "signed": "column(keep) -> signed",
    "sigmoid": "mean(sequence) -> center -> sigmoid -> mean_one",
    "slope": "mean(domain) -> slope(100) -> affine(-1000) -> temperature(1)",
    "standardize": "mean(sequence) -> standardize -> clip(min=-1, max=1) -> temperature(1)",
    "sum": "sum(sequence) -> temperature(1)",
    "table": "table(a=2, b=1) -> mean_one",
    "tanh": "mean(sequence) -> standardize -> tanh -> temperature(1)",
    "target_prob": "target_prob -> as_is",
    "temperature": "normalize -> temperature(0.4)",
    "threshold": "loss -> threshold(at=3)",
    "times": "entropy -> times(loss) -> mean_one",
    "tilted": "tilted(sequence, tilt=1) -> temperature(1)",
    "token_id": "entropy -> token_scale -> where(token_id, at_least=256)",
    "token_scale": "entropy -> token_scale",
    "topical": "mean(domain) -> topical(every=10)",
    "topics": "topics(key=topics, number=8, every=10)",
    "topk_entropy": "topk_entropy(20) -> token_scale",
    "uniform": "uniform",
    "validation_bandit": "validation_bandit(reward=0.1)",
    "variability": "variability(examples=100000) -> mean(sequence) -> affine(1, 0.2) -> mean_one",
    "where": "entropy -> token_scale -> where(position, below=64)",
}
SMALLEST = 1e-30
"""The smallest positive number of the language."""
SCHEDULE_EXAMPLES = {
    "constant": "normalize -> temperature(constant(0.4))",
    "step": "normalize -> temperature(step(100, 0.4, at=500))",
    "linear": "normalize -> temperature(linear(1, 0.4, over=1000, begin=500))",
    "cosine": "normalize -> temperature(cosine(1, 0.4, over=1000))",
    "exponential": "normalize -> temperature(exponential(100, 0.4, over=1000))",
    "piecewise": "'normalize -> temperature(piecewise({0: 100, 500: 1, 1000: 0.4}))'",
}


def main() -> None:
    """Write the page and the pictures."""
    gallery = script("gallery")
    for name, text in EXAMPLES.items():
        picture = gallery.picture(wt.loads(text, source=name))
        (HERE / "curves" / f"{name}.svg").write_text(picture, encoding="utf-8")
    (HERE / "stages.md").write_text(page(), encoding="utf-8")
    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    (HERE.parent / "specs" / "weighting.schema.json").write_text(text, encoding="utf-8")


def script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module."""
    path = HERE.parent / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def page() -> str:
    """Return the whole reference."""
    parts = [
        "# Stages and schedules",
        "Written by `python docs/make_reference.py` from the classes; do not edit this page.",
        (
            "Each picture shows the weights of the example over a batch whose loss runs from 1 to "
            "5 nats, as in the [gallery of specs](../specs/README.md).\n"
            "The grey line is a weight of 1, the dashed line 2.\n"
            "A *number or schedule* takes a number, or one of the [schedules](#schedules).\n"
            "A *statistic* is `median`, `mean`, `std`, or deviations from the mean, "
            "`mean+3*std`, of the scores that the stage is given."
        ),
    ]
    for kind, (title, text) in KINDS.items():
        parts += [f"## {title}", text]
        parts += [entry(name) for name, cls in sorted(shipped().items()) if cls.kind == kind]
    parts += ["## Schedules", "A schedule stands wherever a number may change over the run."]
    parts += [schedule(name) for name in SCHEDULES]
    return "\n\n".join(parts) + "\n"


def shipped() -> dict[str, type[wt.Stage]]:
    """Return the stages of the language, without those that plugins have brought."""
    return {n: x for n, x in stages().items() if x.__module__.startswith("weighting.stages.")}


def entry(name: str) -> str:
    """Return the section of one stage."""
    cls = stages()[name]
    title, formula, rest = told(cls)
    takes = cls.takes or "nothing"
    levels = ", ".join(cls.levels)
    parts = [f"### {name}", title, formula, arguments(cls)]
    parts += [f"- Takes: {takes}. Gives: {cls.gives}.\n- Levels: {levels}."]
    parts += [rest, f"![Weights of the example](curves/{name}.svg)"]
    parts += [f"```yaml\nversion: 1\nname: {name.replace('_', '-')}-example\n{written(name)}\n```"]
    return "\n\n".join(part for part in parts if part)


def schedule(name: str) -> str:
    """Return the section of one schedule."""
    cls = SCHEDULES[name]
    title, formula, rest = told(cls)
    example = f"```yaml\nversion: 1\nname: {name}-example\npipeline: {SCHEDULE_EXAMPLES[name]}\n```"
    parts = [f"### {name}", title, formula, arguments(cls), rest, example]
    return "\n\n".join(part for part in parts if part)


def written(name: str) -> str:
    """Return the example's keys, with the map of actions where a stage needs it."""
    return f"pipeline: {EXAMPLES[name]}"


def told(cls: type) -> tuple[str, str, str]:
    """Return a docstring's first line, its formula as a block, and the rest."""
    title, _, body = (inspect.getdoc(cls) or "").partition("\n\n")
    paragraphs = [f"{part.rstrip()}" for part in body.split("\n\n") if part.strip()]
    is_formula = bool(paragraphs) and re.search(r" = |<-|^\w.*=", paragraphs[0]) is not None
    formula = f"```text\n{paragraphs.pop(0)}\n```" if is_formula else ""
    rest = "\n\n".join(escaped(text) for text in paragraphs)
    return escaped(title), formula, rest


def escaped(text: str) -> str:
    """Return prose of a docstring as Markdown; stars and low lines are themselves."""
    if re.search(r"^\s{2,}\S|<-| <= ", text, re.MULTILINE) and "Source:" not in text:
        return f"```text\n{text}\n```"
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*_<|\[\]])", r"\\\1", piece)
        for piece in pieces
    )


def arguments(cls: type[BaseModel]) -> str:
    """Return a table of arguments."""
    fields = cls.model_fields
    if not fields:
        return "No arguments."
    rows = ["| argument | type | range | default |", "|---|---|---|---|"]
    properties = cls.model_json_schema()["properties"]
    for name, field in fields.items():
        kind, span = typed(name, properties[name])
        default = "required" if field.is_required() else value(field.default)
        shown = "name=value, ..." if getattr(cls, "collects", None) == name else name
        rows.append(f"| `{shown}` | {kind} | {span} | {default} |")
    return "\n".join(rows)


def typed(name: str, schema: dict[str, Any]) -> tuple[str, str]:
    """Return type and range of an argument, from its JSON Schema."""
    ways = flat(schema)
    if "additionalProperties" in ways[0]:
        kind, span = typed(name, ways[0]["additionalProperties"])
        return f"map to {kind}", span
    enum = next((way["enum"] for way in ways if "enum" in way), None)
    if enum:
        return "word", ", ".join(f"`{word}`" for word in enum)
    if ways[0].get("$comment") == PIPELINE_HERE["$comment"]:
        return "pipeline", "ends in a score"
    first = next(way for way in ways if way.get("type") not in {None, "null"})
    low = first.get("minimum", first.get("exclusiveMinimum"))
    high = first.get("maximum", first.get("exclusiveMaximum"))
    if "exclusiveMaximum" in first and first["type"] == "integer":
        high -= 1
    kinds = {"number": "number", "integer": "whole number", "boolean": "truth value"}
    kind = kinds.get(first["type"], "text")
    if any(way.get("$comment") for way in ways):
        patterns = [way["pattern"] for way in ways if "pattern" in way]
        if any("median" in pattern for pattern in patterns):
            return "number, schedule or statistic", span_of(low, high)
        shared = bool(patterns)
        return "number or schedule", span_of(low, high) + (", or `k/n`" if shared else "")
    if any("%" in way.get("pattern", "") for way in ways):
        return "whole number, or share of the run", f"{span_of(low, high)}, or `5%`"
    if first.get("exclusiveMinimum") == 0:
        return kind, "above 0"
    return kind, span_of(low, high) if kind in {"number", "whole number"} else "any"


def flat(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ways a value may be written, nested choices opened."""
    if "anyOf" not in schema:
        return [schema]
    return [way for one in schema["anyOf"] for way in flat(one)]


def span_of(low: float | None, high: float | None) -> str:
    """Return a range in words; 1e30 and 1e-30 are the ends of what float32 sums can bear."""
    least = "" if low in {None, -1e30} else "above 0" if low == SMALLEST else f"at least {low:g}"
    most = "" if high in {None, 1e30} else f"at most {high:.10g}"
    return ", ".join(part for part in (least, most) if part) or "any"


def value(default: object) -> str:
    """Return a default as the language writes it."""
    if default is None:
        return "left out"
    plain = getattr(default, "value", default)
    if isinstance(plain, bool):
        return f"`{str(plain).lower()}`"
    return f"`{plain:g}`" if isinstance(plain, int | float) else f"`{plain}`"


if __name__ == "__main__":
    main()

"""docs/results.md's section "Does it help?", made of the numbers that the benchmarks have stored.

python benchmarks/results.py
"""

from __future__ import annotations

import json
from pathlib import Path

import evidence_long_page
import evidence_page
import regression
import theory

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
HEADING = "## Does it help?"


def main() -> None:
    """Write the section where it stands."""
    text = PAGE.read_text(encoding="utf-8")
    before, found, rest = text.partition(f"{HEADING}\n")
    assert found, f"{PAGE.name} has no heading {HEADING!r}"
    PAGE.write_text(before + section() + rest[rest.index("\n## ") + 1 :], encoding="utf-8")


def section() -> str:
    """Return the section, from its heading to the next one."""
    found = evidence_page.Found(HERE / "evidence.parquet")
    parts = [
        HEADING,
        (
            "Measure it on your own data, with `weighting compare`.\n"
            "Papers report small gains; at the size a laptop trains we found none in the mean "
            "over domains.\n"
            "What follows are our own experiments.  `make evidence` runs them; the language model "
            "takes ten minutes of it."
        ),
        (
            "### Linear regression\n\n"
            "With outliers, as in appendix B of the LinUpper paper "
            "([report](../benchmarks/regression.md)):"
        ),
        "\n".join(regression.in_short(load("regression"))),
        cap(),
        (
            "### A small language model\n\n"
            f"[Report](../benchmarks/evidence.md): {evidence_page.made(found)}\n"
            "The table shows each method's loss minus that of uniform weights, so below zero is "
            "better.\n"
            f"In brackets stands the {evidence_page.LEVEL} % interval of a bootstrap over seeds "
            "and documents."
        ),
        "![Log-perplexity by method and domain, less that of uniform](../benchmarks/evidence.svg)",
        evidence_page.summary(found).rstrip(),
        (
            "So small a model and so few tokens do not say what happens at scale.\n"
            "The LinUpper paper reports a gain of 0.02 to 0.03 nats.\n"
            "It trained models of 124 to 300 million parameters on 0.3 to 0.5 billion tokens, and "
            "weighed only after the first thousand steps."
        ),
        *long_runs(),
        (
            "### On a GPU\n\n"
            "These commands train the paper's smallest model in a plain PyTorch loop.\n"
            "They have been run on a CPU only, with a tiny model.\n\n"
            "| command | what it does |\n|---|---|\n"
            "| `python benchmarks/pack.py` | Packs text of several domains into one file. |\n"
            "| `python benchmarks/gpu.py linupper --tokens tokens.npz` | Trains one method on it; "
            "cut off, it goes on. |\n"
            "| `python benchmarks/gpu.py table outputs/gpu` | Compares the runs. |"
        ),
        (
            "### At scale\n\n"
            "Here there is arithmetic only ([page](../benchmarks/scale.md)): bytes, FLOPs and "
            "memory for Llama 3 1B to 405B on 8 to 16,384 GPUs.\n"
            "It was checked against what was measured on a CPU.\n"
            "LinUpper sends 8 n + 8 bytes from each rank, n being the rank's sequences; the size "
            "of the model does not matter."
        ),
    ]
    return "\n\n".join(parts) + "\n\n"


def long_runs() -> list[str]:
    """Return what the runs in the papers' proportions say, as far as they are there."""
    if not (HERE / "evidence-long.parquet").exists():
        return [
            (
                "### In the papers' proportions\n\n"
                "[A study](reproduce.md#in-the-papers-proportions) of 20,000 steps, the first "
                "1,000 of them plain, with 32 rows a step, can be run.\n"
                "No run of it is finished yet."
            )
        ]
    found = evidence_long_page.Study(HERE / "evidence-long.parquet")
    return [
        (
            "### In the papers' proportions\n\n[Report](../benchmarks/evidence-long.md): "
            f"{evidence_long_page.made(found)}"
        ),
        *evidence_long_page.answers(found),
    ]


def cap() -> str:
    """Return what the clamp does to the largest weight, in a sentence."""
    found = load("theory")
    r = 0.4
    case = next(x for x in found["caps"] if x["r"] == r and "linupper" in x["text"])
    free, clamped = (
        theory.share(x["over"], x["followed"]) for x in (case["free"], case["clamped"])
    )
    steps = sum(x["followed"] for x in found["bounds"])
    broken = sum(x["broken"] for x in found["bounds"])
    return (
        "A bound like the paper's, derived for this setting, was checked at every step without "
        f"noise ([report](../benchmarks/theory.md)): it fails at {broken} of {steps:,} steps.\n"
        "The paper asks that no weight exceeds 2/n.\n"
        f"At r = {r} the largest weight does so at {free} of steps without the clamp, and at "
        f"{clamped} with it."
    )


def load(name: str) -> dict:
    """Return the numbers that a benchmark has stored."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

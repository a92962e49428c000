"""docs/results.md's section "Does it help?", made of the numbers that the benchmarks have stored.

python benchmarks/results.py
"""

from __future__ import annotations

import json
from pathlib import Path

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
            "Measure it on your own data, with `weighting compare`: the gains that papers report "
            "are small, and at the size a laptop trains we found none in the mean over domains.\n"
            "What follows are our experiments; `make evidence` runs them, the language model for "
            "ten minutes."
        ),
        (
            "**Linear regression** with outliers, as in appendix B of the LinUpper paper "
            "([report](../benchmarks/regression.md)):"
        ),
        "\n".join(regression.in_short(load("regression"))),
        cap(),
        (
            f"**A small language model** ([report](../benchmarks/evidence.md)): "
            f"{evidence_page.made(found)}\n"
            "Below zero is better; in brackets the "
            f"{evidence_page.LEVEL} % interval of a bootstrap over seeds and documents."
        ),
        "![Log-perplexity by method and domain, less that of uniform](../benchmarks/evidence.svg)",
        evidence_page.summary(found).rstrip(),
        (
            "So small a model and so few tokens do not say what happens at scale.\n"
            "The paper reports 0.02 to 0.03 nats from LinUpper at 124 to 300 million parameters "
            "after 0.3 to 0.5 billion tokens, where its weights begin after the first thousand "
            "steps."
        ),
        (
            "**On a GPU**, `python benchmarks/pack.py` packs text of several domains into one file "
            "and `python benchmarks/gpu.py linupper --tokens tokens.npz` trains the paper's "
            "smallest shape on it in a plain PyTorch loop, one command for each method, resumable; "
            "`python benchmarks/gpu.py table outputs/gpu` compares the runs.\n"
            "It has been run on a CPU only, with a tiny model."
        ),
        (
            "**At scale** there is arithmetic ([page](../benchmarks/scale.md)): bytes, FLOPs and "
            "memory for Llama 3 1B to 405B on 8 to 16,384 GPUs, checked against what was measured "
            "on a CPU.\n"
            "LinUpper hands over 8 n + 8 bytes a rank whatever the model, n being its sequences."
        ),
    ]
    return "\n\n".join(parts) + "\n\n"


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
        "The bound behind it was checked at every step without noise "
        f"([report](../benchmarks/theory.md)): it fails at {broken} of {steps:,}.\n"
        f"At r = {r} the largest weight exceeds 2/n at {free} of steps without the clamp, and at "
        f"{clamped} with it."
    )


def load(name: str) -> dict:
    """Return the numbers that a benchmark has stored."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

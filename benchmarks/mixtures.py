"""DoReMi's mixture times LinUpper on text of several domains: the chain, four runs, a report.

    python benchmarks/mixtures.py --data FOLDER [--tokenizer FOLDER] --folder outputs/mixtures

FOLDER holds `train/` and `valid/` with .parquet or .jsonl files of the columns `text` and `domain`.
A reference and DoReMi's proxy find a mixture (`weighting mix doremi`); then four models train from
one seed, on all domains alike or on the mixture, weighted alike or by LinUpper.  A run that is done
is not made again, so that the report can be written anew.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl

from weighting.runs.files import read_lines

mpl.use("svg")
import matplotlib.pyplot as plt

RUNS = {
    "uniform": ("uniform", "uniform-domains"),
    "linupper": ("linupper", "uniform-domains"),
    "doremi": ("uniform", "mixture"),
    "doremi x linupper": ("linupper", "mixture"),
}
"""The runs by name: what weighs, and what is drawn by."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")


def main() -> None:
    """Make the runs that are not there yet, and write the report and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--folder", type=Path, default=Path("outputs/mixtures"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--config", default="llama3_proxy")
    parser.add_argument("--method", default="doremi")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/mixtures.md"))
    parser.add_argument("flags", nargs="*", help="further torchtitan flags, after --")
    args = parser.parse_args()
    flags = ["--training.seq_len=128", "--training.local_batch_size=32", "--metrics.log_freq=5"]
    flags += ["--debug.seed=1", "--dataloader.split=train"]
    flags += [f"--hf_assets_path={args.tokenizer}"] if args.tokenizer else []
    flags += args.flags
    args.said = flags
    given = [f"--data={args.data}", f"--config={args.config}"]
    mixture = args.folder / "mixture.yaml"
    if not mixture.exists():
        search = [f"--out={mixture}", f"--folder={args.folder}", f"--steps={args.steps}"]
        run(args.folder / "mix", "mix", args.method, *given, *search, *flags)
    validation = ["--validator.enable", "--validator.steps=-1", f"--validator.freq={args.steps}"]
    validation += ["--validator.dataloader.split=valid"]
    validation += [f"--validator.dataloader.dataset_path={args.data}"]
    for name, (spec, drawn) in RUNS.items():
        folder = args.folder / name.replace(" ", "-")
        if (folder / "weighting" / "validation.jsonl").exists():
            continue
        by = f"--mixture={mixture if drawn == 'mixture' else drawn}"
        more = [f"--dump_folder={folder}", f"--training.steps={args.steps}", *flags, *validation]
        run(folder, "train", spec, by, *given, *more)
    picture(args.folder, args.out.with_suffix(".svg"))
    args.out.write_text(report(args), encoding="utf-8")
    print(args.out)


def run(folder: Path, *command: str) -> None:
    """Run `weighting`, keep what it prints and how long it took, and stop if it fails."""
    print(" ".join(("weighting", *command)), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        started = [sys.executable, "-m", "weighting", *command]
        subprocess.run(started, stdout=log, stderr=log, check=True)  # noqa: S603 - our own module
    folder.with_suffix(".seconds").write_text(f"{time.monotonic() - began:.0f}")


def picture(folder: Path, out: Path) -> None:
    """Draw the proxy's mixture over its steps."""
    lines = read_lines(folder / "proxy" / "weighting" / "metrics.jsonl")
    names = domains(lines[-1], "mixture")
    mpl.rcParams["svg.hashsalt"] = "weighting"
    mpl.rcParams["svg.fonttype"] = "none"
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axis, kind, title in zip(
        axes, ("mixture", "average"), ("as it stands", "averaged so far"), strict=True
    ):
        for index, name in enumerate(names):
            shares = [line[f"domain/{name}/{kind}"] for line in lines]
            style = "-" if index < len(COLOURS) else "--"
            colour = COLOURS[index % len(COLOURS)]
            axis.plot([x["step"] for x in lines], shares, style, color=colour, label=name)
        axis.axhline(1 / len(names), color="#888888", linewidth=0.8, linestyle=":")
        axis.set(xlabel="proxy step", title=f"weights of domains, {title}")
    axes[0].set(ylabel="share (sum one; dotted: equal)", ylim=(0, None))
    axes[1].legend(frameon=False, ncols=2)
    fig.savefig(out, metadata={"Date": None})


def domains(line: dict[str, float], kind: str) -> list[str]:
    """Return the domains a line of metrics tells a number of."""
    prefix, suffix = "domain/", f"/{kind}"
    found = (key for key in line if key.startswith(prefix) and key.endswith(suffix))
    return [key.removeprefix(prefix).removesuffix(suffix) for key in found]


def report(args: argparse.Namespace) -> str:
    """Return the report in Markdown."""
    folder = args.folder
    proxy = read_lines(folder / "proxy" / "weighting" / "metrics.jsonl")[-1]
    found = {
        name: read_lines(folder / name.replace(" ", "-") / "weighting" / "validation.jsonl")[-1]
        for name in RUNS
    }
    names = domains(proxy, "mixture")
    lines = [
        "# A mixture found by DoReMi, times LinUpper",
        "",
        f"Written by `python benchmarks/mixtures.py`, {args.steps} steps of `{args.config}` a run.",
        "",
        f"Flags of every run: `{' '.join(x for x in args.said if not x.startswith('--hf_'))}`.",
        "",
        f"![mixture over the proxy's steps]({args.out.with_suffix('.svg').name})",
        "",
        "| domain | mixture (average) | at the end | last weight of its tokens |",
        "|---|---|---|---|",
    ]
    for x in names:
        cells = (proxy[f"domain/{x}/{kind}"] for kind in ("average", "mixture", "weight"))
        lines.append(f"| {x} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")
    lines += ["", "Validation perplexity, and how far it is from that of `uniform`:", ""]
    lines += [f"| domain | tokens | {' | '.join(RUNS)} |", f"|---|---|{'---|' * len(RUNS)}"]
    base = found["uniform"]
    for x in names:
        cells = [compared(found[run][f"{x}/loss"], base[f"{x}/loss"]) for run in RUNS]
        lines.append(f"| {x} | {base[f'{x}/tokens']:,} | {' | '.join(cells)} |")
    mean = "domain_mean_loss"
    cells = [compared(found[run][mean], base[mean]) for run in RUNS]
    lines.append(f"| **mean of log-perplexities** | | {' | '.join(cells)} |")
    spent = [f"{p.stem} {p.read_text()} s" for p in sorted(folder.glob("*.seconds"))]
    return "\n".join([*lines, "", f"Seconds by the clock: {', '.join(spent)}.", ""])


def compared(loss: float, base: float) -> str:
    """Return a perplexity, and how far its logarithm is from another's."""
    return f"{math.exp(loss):.2f} ({loss - base:+.3f})"


if __name__ == "__main__":
    main()

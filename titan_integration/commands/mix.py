"""A search for a mixture: what a run with moving domain weights found, as a spec; and the chain.

`weighting mix` ends up here: train a reference if the method reads one, train the proxy, and keep
the proportions it found.  Each run is that of `commands.train`, goes on where it was cut off, and
is not made twice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from titan_integration.commands import run_queue as series
from titan_integration.observe.metrics import FOLDER
from titan_integration.observe.mixture import FILE
from weighting.build import plan_of
from weighting.errors import printable
from weighting.language.read import resolve
from weighting.runs.files import write_whole

if TYPE_CHECKING:
    import weighting as wt

METHODS = {"doremi": "doremi-proxy", "doge": "doge-proxy"}
"""Specs that search for a mixture, by the name of the method."""
REFERENCE, PROXY, ORDERS = "reference", "proxy", "mix.json"
"""Folders of the two runs, and the file that says what they were asked for."""


def main(arguments: list[str] | None = None) -> int:
    """Search for a mixture; return the exit status: 0, 2 for an error of the user's, or a run's."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return _mix(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(printable(f"error: {error}\n", keep="\n"))
        return 2


def _mix(args: argparse.Namespace) -> int:
    spec = resolve(args.spec, allow_plugins=args.allow_plugins)
    plan = plan_of(spec)
    if not plan.moves_domains:
        msg = (
            f"{spec.name} has no domain weights that move, so it finds no mixture; "
            f"methods are {', '.join(METHODS)}, or a spec with such weights"
        )
        raise ValueError(msg)
    folder, out = Path(args.folder or f"outputs/mix-{spec.name}"), Path(args.out)
    if out.exists() and not args.overwrite:
        msg = f"{out} exists; take another --out, or --overwrite"
        raise ValueError(msg)
    out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said first
    if not os.access(out.parent, os.W_OK):
        msg = f"{out.parent} cannot be written to; take another --out"
        raise ValueError(msg)
    _keep_orders(folder, args, spec)
    reference = args.reference
    if "ref_loss" in plan.needs and not reference:
        reference = str(folder / REFERENCE / "checkpoint")
        last = folder / REFERENCE / "checkpoint" / f"step-{args.reference_steps}" / ".metadata"
        steps = args.reference_steps
        if code := _train(args, "uniform-domains", folder / REFERENCE, steps, [], done=last):
            return code
    more = ["--weighting.reference", reference] if reference and reference != "column" else []
    found = folder / PROXY / FOLDER / FILE
    if code := _train(args, args.spec, folder / PROXY, args.steps, more, done=found):
        return code
    text = found.read_text(encoding="utf-8")
    write_whole(out, text.replace("--mixture FILE", f"--mixture {out}", 1))
    print(printable(text, keep="\n"))  # noqa: T201 - the result
    print(printable(f"mixture: {out}"))  # noqa: T201
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titan_integration.commands.mix")
    parser.add_argument("--method", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--config", default="llama3_proxy")
    parser.add_argument("--module", default="titan_integration")
    parser.add_argument("--data")
    parser.add_argument("--ranks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--reference-steps", type=int)
    parser.add_argument("--reference", default="")
    parser.add_argument("--folder")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--allow-plugins", action="store_true")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args(arguments)
    args.reference_steps = args.reference_steps or args.steps
    args.spec = METHODS.get(args.method, args.method)
    return args


def _keep_orders(folder: Path, args: argparse.Namespace, spec: wt.Spec) -> None:
    """Note what the runs in a folder are asked for.

    Raises:
        ValueError: They were asked for something else before.
    """
    names = ("config", "module", "data", "ranks", "steps", "reference_steps", "reference", "flags")
    orders = {"spec": spec.hash, **{name: getattr(args, name) for name in names}}
    if any(series.begun(folder / run) for run in (REFERENCE, PROXY)):
        series.refuse_changed(folder / ORDERS, orders, "a search")
    series.note(folder / ORDERS, orders)


def _train(
    args: argparse.Namespace, spec: str, folder: Path, steps: int, more: list[str], *, done: Path
) -> int:
    """Train with a spec unless what it leaves is there; a run that was cut off goes on."""
    if done.exists():
        print(printable(f"{folder}: trained already"))  # noqa: T201 - progress
        return 0
    print(printable(f"{folder}: training {steps} steps with {spec}"), flush=True)  # noqa: T201
    more = ["--checkpoint.interval", str(max(steps // 4, 1)), "--debug.seed", "0", *more]
    return subprocess.call(series.command(args, spec, folder, steps, more))  # noqa: S603 - our own


if __name__ == "__main__":
    sys.exit(main())

"""A search for a mixture: what a run with moving domain weights found, as a spec; and the chain.

What `weighting mix` calls: train a reference if the method reads one, train the proxy, and keep
the proportions it found.  Each run is that of `commands.train`, goes on where it was cut off, and
is not made twice.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_integration.commands import run_queue as series
from titan_integration.commands import train as launch
from titan_integration.host.run_dir import refuse_unwritable
from weighting.build import plan_of
from weighting.errors import printable
from weighting.runs.files import write_whole
from weighting.runs.layout import CHECKPOINTS, FOLDER, MIXTURE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.spec import Spec

REFERENCE, PROXY, ORDERS = "reference", "proxy", "mix.json"
"""Folders of the two runs, and the file that says what they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Options(launch.HostOptions):
    """What a search is given.

    Attributes:
        text: The method, as a spec that a run can be given.
        spec: The same, read.
        methods: Names of methods, for a message.
        out: File for the mixture.
        steps: Of the proxy.
        seed: Of the first weights.
        reference_steps: Of the reference; None for as many.
        reference: A checkpoint to use instead, or `column`.
        folder: Where the runs go; None for one of the spec's name.
        overwrite: Whether `out` may exist.
        allow_plugins: Whether the modules that specs name are imported.
    """

    text: str
    spec: Spec
    methods: Sequence[str]
    out: str
    steps: int
    seed: int
    reference_steps: int | None
    reference: str | None
    folder: str | None
    overwrite: bool
    allow_plugins: bool


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Search for a mixture; return the exit status: 0, or a run's.

    Raises:
        ValueError: The search cannot be.
        OSError: A file cannot be written.
    """
    args = Options(**options)
    spec, plan = args.spec, plan_of(args.spec)
    if not plan.moves_domains:
        msg = (
            f"{spec.name} has no domain weights that move, so it finds no mixture; "
            f"methods are {', '.join(args.methods)}, or a spec with such weights"
        )
        raise ValueError(msg)
    folder, out = Path(args.folder or f"outputs/mix-{spec.name}"), Path(args.out)
    if out.exists() and not args.overwrite:
        msg = f"{out} exists; take another --out, or --overwrite"
        raise ValueError(msg)
    refuse_unwritable(out.parent)
    refuse_unwritable(folder)
    _keep_orders(folder, args)
    reference = args.reference
    if "ref_loss" in plan.needs and not reference:
        reference = str(folder / REFERENCE / CHECKPOINTS)
        steps = args.reference_steps or args.steps
        done = series.last_saved(folder / REFERENCE) == steps
        if code := _train(args, "uniform-domains", folder / REFERENCE, steps, [], done=done):
            return code
    more = ["--weighting.reference", reference] if reference and reference != "column" else []
    found = folder / PROXY / FOLDER / MIXTURE
    if code := _train(args, args.text, folder / PROXY, args.steps, more, done=found.exists()):
        return code
    text = found.read_text(encoding="utf-8")
    write_whole(out, text.replace("--mixture FILE", f"--mixture {out}", 1))
    print(printable(text, keep="\n"))  # noqa: T201 - the result
    print(printable(f"mixture: {out}"))  # noqa: T201
    return 0


def _keep_orders(folder: Path, args: Options) -> None:
    """Note what the runs in a folder are asked for.

    Raises:
        ValueError: They were asked for something else before.
    """
    names = ("config", "module", "data", "ranks", "steps", "seed")
    orders = {"spec": args.spec.hash, **{name: getattr(args, name) for name in names}}
    orders |= {"reference_steps": args.reference_steps or args.steps, "flags": [*args.flags]}
    orders |= {"reference": args.reference or ""}
    if any(series.begun(folder / run) for run in (REFERENCE, PROXY)):
        series.refuse_changed(folder / ORDERS, orders, "a search")
    series.note(folder / ORDERS, orders)


def _train(
    args: Options, spec: str, folder: Path, steps: int, more: list[str], *, done: bool
) -> int:
    """Train with a spec unless what it leaves is there; a run that was cut off goes on."""
    if done:
        print(printable(f"{folder}: trained already"))  # noqa: T201 - progress
        return 0
    print(printable(f"{folder}: training {steps} steps with {spec}"), flush=True)  # noqa: T201
    more = ["--checkpoint.interval", str(max(steps // 4, 1)), "--debug.seed", str(args.seed), *more]
    words = series.command(args, spec, folder, steps, more, plugins=args.allow_plugins)
    return subprocess.call(words)  # noqa: S603 - our own

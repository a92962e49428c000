"""A search for a mixture: what a run with moving domain weights found, as a spec; and the chain.

`weighting mix` ends up here: train a reference if the method reads one, train the proxy, and keep
the proportions it found.  Each run is `titan_integration.launch`'s, goes on where it was cut off,
and is not made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_integration import series
from titan_integration.folder import writing
from titan_integration.metrics import FOLDER
from weighting.build import sketch
from weighting.errors import printable
from weighting.files import write_whole
from weighting.mixture import mixture_text
from weighting.spec import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    import weighting as wt
    from titan_integration.trainer import WeightedTrainer

FILE = "mixture.yaml"
"""The proportions a run found, below its dump folder, beside its metrics."""
METHODS = {"doremi": "doremi-proxy", "doge": "doge-proxy"}
"""Specs that search for a mixture, by the name of the method."""
REFERENCE, PROXY, ORDERS = "reference", "proxy", "mix.json"
"""Folders of the two runs, and the file that says what they were asked for."""


def write_mixture(trainer: WeightedTrainer) -> None:
    """Write the proportions a run found, if its domain weights move; every rank must call it.

    They are the average over the run where the weighting keeps one, else the last.
    """
    found = trainer.state.mixtures()
    if "mixture" not in found or int(os.environ.get("RANK", "0")):
        return
    config: Any = trainer.config
    spec = trainer.state.fn.spec
    kind = "average" if "average" in found else "mixture"
    loader = config.dataloader
    made = json.loads(trainer.dataloader.state_dict().get("made_from", "{}"))
    provenance = {
        "spec": f"{spec.name} {spec.hash}",
        "proportions": f"{kind} of {trainer.step} steps" if kind == "average" else "the last",
        "at the end": shown(found["mixture"]),
        "reference": config.weighting.reference or "none",
        "data": f"{loader.dataset_path or loader.dataset}, split {loader.split}, text "
        f"{made.get('text', 'streamed')}",
        "tokens": f"{trainer.ntokens_seen:,} on each rank, {config.training.seq_len} a sequence",
        "seeds": f"data {loader.seed}, model {config.debug.seed}",
        "model": f"{config.model_spec.name} {config.model_spec.flavor}",
        "versions": ", ".join(f"{x} {version(x)}" for x in ("torch", "torchtitan")),
    }
    title = f"Proportions of domains found by {spec.name}."
    text = mixture_text(f"{spec.name}-mixture", found[kind], title, provenance)
    path = Path(config.dump_folder) / FOLDER / FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def shown(shares: Mapping[str, float]) -> str:
    """Return proportions in one line."""
    return ", ".join(f"{name} {share:.4f}" for name, share in shares.items())


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
    fn = sketch(spec)
    if not fn.moves_domains:
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
    if "ref_loss" in fn.needs and not reference:
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
    parser = argparse.ArgumentParser(prog="python -m titan_integration.mixing")
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

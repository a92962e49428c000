"""A sweep of short runs over a number of a spec, from the same first weights on the same data.

What `weighting tune --train` calls.  Values of a list are trained one after the other.  Of a range
Optuna chooses each by the validation losses before it; what was chosen is noted before it is
trained, so that the same command goes on with it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from titan_integration.commands import compare
from weighting.build import plan_of
from weighting.errors import printable
from weighting.report.read import read_runs
from weighting.runs.files import json_text, write_whole
from weighting.runs.vary import rounded, varied

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weighting.runs.vary import Number, Values
    from weighting.spec import Spec

CHOSEN, BEST = "tune.json", "best.yaml"
"""What was asked for and chosen so far, and the best spec, in the folder of the runs."""
_FIRST, _TRIES, _APART = 4, 50, 1000
"""Values chosen by chance, how often one that was tried is chosen anew, and how far seeds move."""


@dataclass(frozen=True, kw_only=True)
class Options(compare.Options):
    """What a sweep is given beside what a comparison is.

    Attributes:
        number: What is changed in the only spec.
        values: To what.
        trials: How many values of a range.
        plot: A picture's file.
    """

    number: Number
    values: Values
    trials: int
    plot: str | None


def main(*, spec: Spec, text: str, folder: str | None, **options: Any) -> int:  # noqa: ANN401, D417
    """Train with each value; return 0, a run's status, or 130 if interrupted.

    Args:
        spec: The spec.
        text: The same, as the user gave it.
        folder: Where runs go; None for one of the spec's name.

    Raises:
        ValueError: The sweep cannot be.
        OSError: Its folder or its report cannot be written.
    """
    folder = folder or f"outputs/tune-{spec.name}"
    options |= {"specs": [(text, spec)], "folder": folder, "out": None, "validates": True}
    return compare.status_of(partial(_tune, Options(**options)))


def _tune(args: Options) -> None:
    for value in args.values.listed or (args.values.low, args.values.high):
        plan_of(varied(args.specs[0][1], args.number, value))
    path = Path(args.folder) / CHOSEN
    chosen = _chosen_before(path, args)
    count = len(args.values.listed) or args.trials
    # The spec as it is written is what others are compared with.
    runs = compare.trained(args)
    losses: dict[float, float] = {}
    if args.number.value is not None:
        losses[args.number.value] = _loss(args, runs)
    for trial in range(count):
        known = trial < len(chosen)
        value = chosen[trial] if known else _next(args, losses, trial)
        if value is None:
            print(f"no further value of {args.number.label} to three digits")  # noqa: T201
            break
        if not known:
            chosen.append(value)
            write_whole(path, json_text({**_asked(args), "chosen": chosen}, indent=1) + "\n")
        if value not in losses:
            spec = varied(args.specs[0][1], args.number, value)
            own = compare.trained(replace(args, specs=[(str(spec), spec)]))
            losses[value] = _loss(args, own)
            runs += own
    runs.sort(key=lambda run: run.again)
    compare.report(args, runs)
    _tell(args, losses)


def _asked(args: Options) -> dict[str, Any]:
    """Return what a sweep's values depend on, as JSON has it."""
    low, high, listed = args.values
    values = [*listed] if listed else [low, high]
    return {"spec": args.specs[0][1].hash, "number": args.number.label, "values": values}


def _chosen_before(path: Path, args: Options) -> list[float]:
    """Return the values that were chosen before.

    Raises:
        ValueError: They were chosen for another sweep.
    """
    if not path.exists():
        return []
    noted = json.loads(path.read_text(encoding="utf-8"))
    for name, value in _asked(args).items():
        if noted.get(name) != value:
            msg = (
                f"{path.parent} holds a sweep with {name} = {noted.get(name)!r}, and now it is "
                f"{value!r}; take another --folder, or remove that one"
            )
            raise ValueError(msg)
    return noted["chosen"]


def _next(args: Options, losses: Mapping[float, float], trial: int) -> float | None:
    """Return the value to train with next; None if there is no other."""
    if args.values.listed:
        return args.values.listed[trial]
    import optuna  # noqa: PLC0415 - lists do without; the command has looked for it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    low, high, _ = args.values
    log = args.values.by_ratio
    kind: Any = optuna.distributions.FloatDistribution(low, high, log=log)
    if args.number.whole:
        kind = optuna.distributions.IntDistribution(int(low), int(high), log=log)
    for again in range(_TRIES):
        # A sampler of its own for each choice: what it chooses depends on the losses alone, and
        # not on whether the command was cut off in between.
        sampler = optuna.samplers.TPESampler(
            seed=args.seed + trial + _APART * again, n_startup_trials=_FIRST
        )
        study = optuna.create_study(sampler=sampler)
        for value, loss in losses.items():
            if low <= value <= high and math.isfinite(loss):
                own = int(value) if args.number.whole else value
                trained = optuna.trial.create_trial(
                    params={"x": own}, distributions={"x": kind}, value=loss
                )
                study.add_trial(trained)
        drawn = study.ask({"x": kind}).params["x"]
        found = drawn if args.number.whole else min(max(rounded(drawn), low), high)
        if found not in losses:
            return found
    return None


def _loss(args: Options, runs: Sequence[compare.Run]) -> float:
    """Return the validation loss of a value, the mean over its seeds, nats; NaN without one."""
    folder = Path(args.folder)
    ends = [run.validations[-1] for run in read_runs([folder / run.name for run in runs])]
    return fmean(end.get("domain_mean_loss", end.get("loss", math.nan)) for end in ends)


def _tell(args: Options, losses: Mapping[float, float]) -> None:
    """Print which value ended best, keep that spec, and draw them all."""
    label, folder = args.number.label, Path(args.folder)
    finite = {value: loss for value, loss in losses.items() if math.isfinite(loss)}
    print()  # noqa: T201 - the result
    if finite:
        best = min(finite, key=lambda value: finite[value])
        spec = varied(args.specs[0][1], args.number, best)
        write_whole(folder / BEST, str(spec))
        told = f"lowest validation loss: {finite[best]:.4f}, with {label} = {best:g}"
        print(printable(f"{told}: {folder / BEST}"))  # noqa: T201
    if args.seeds == 1:
        print("one seed of each; --seeds 3 says how far seeds are apart")  # noqa: T201
    if args.plot is not None:
        _draw(args, finite)


def _draw(args: Options, losses: Mapping[float, float]) -> None:
    from weighting.cli.figures import picture  # noqa: PLC0415 - needs matplotlib
    from weighting.cli.panels import Line, Panel  # noqa: PLC0415

    path = Path(args.plot or "")
    name, at = args.specs[0][1].name, sorted(losses)
    lines = [Line(name, at, [losses[value] for value in at], 1, 0)]
    label = "validation loss (nats)"
    panel = Panel("", args.number.label, label, lines, "points", log=args.values.by_ratio)
    title = f"{name} over {args.number.label}"
    write_whole(path, picture(title, [panel], path.suffix.lower()))
    print(printable(f"wrote {path}"))  # noqa: T201

"""A comparison of specs: one run of each from the same first weights, and the report of them.

What `weighting compare` calls, and `tune` for its short runs.  What can be found wrong without
training is said before anything is made; then one checkpoint of step 0 is, and the runs follow one
by one.
"""

from __future__ import annotations

import math
import re
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

from titan_integration.commands import run_queue as series
from titan_integration.commands import train as launch
from titan_integration.commands.progress import SEED, View, cut
from titan_integration.data.data_files import data_at, local_files, saved_dataset
from titan_integration.data.formats import read_records
from titan_integration.data.records import domain_of, numbers_of
from titan_integration.data.records import text_of as check_text
from titan_integration.data.signals import references_of, references_read, told_by
from titan_integration.host.quiet import quiet
from titan_integration.host.run_dir import refuse_unwritable
from weighting.build import plan_of
from weighting.cli.explanation import explanation
from weighting.columns import plain_name
from weighting.errors import printable
from weighting.language.read import resolve
from weighting.mixture import with_mixture
from weighting.report.page import write_report
from weighting.report.read import read_runs
from weighting.report.tables import as_text, by_seed
from weighting.runs.files import read_lines
from weighting.runs.layout import CHECKPOINTS, FOLDER, METRICS, VALIDATION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from titan_integration.data.loader import DomainTextDataLoader
    from titan_integration.trainer.trainer import WeightedTrainer
    from weighting.report.tables import Table
    from weighting.spec import Spec

ORDERS, REPORT = "compare.json", "report.html"
"""What all runs were asked for, and where the report of them goes."""
OWN = {
    "--dump_folder": "--folder",
    "--training.steps": "--steps",
    "--debug.seed": "--seed",
    "--checkpoint.folder": "--folder",
    "--checkpoint.initial_load_path": "--seed",
    "--weighting.spec": "SPEC",
    "--weighting.mixture": "--mixture",
    "--weighting.reference": "--reference",
}
"""Flags of torchtitan that a comparison sets, and what sets them."""
_COMMON = ("config", "module", "data", "ranks", "seed", "mixture", "reference")
"""Orders that all runs follow, beside flags and steps."""
_DEGREES = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel")
_DEGREES += ("pipeline_parallel", "context_parallel", "expert_parallel")
_LINES = 12
"""So many lines of the log of a run that failed are shown."""


class Run(NamedTuple):
    """A run of a comparison.

    Attributes:
        name: Its folder, below that of the comparison.
        text: The spec as the user gave it.
        spec: What weighs and draws.
        flags: What it is given and others may not be.
        again: 0 for the first seed, 1 for the next one, and so on.
    """

    name: str
    text: str
    spec: Spec
    flags: list[str]
    again: int = 0


class RunFailedError(Exception):
    """A run ended with another status than 0; holds what to say, and that status."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Options(launch.HostOptions):
    """What a comparison is given.

    Attributes:
        specs: As the user gave them, and as they were read.
        folder: Where the runs go.
        out: File of the report; None for one in the folder.
        steps: Of each run; None for those of the config.
        seed: Of the first weights.
        seeds: How many seeds each spec is trained with, from that one on.
        mixture: A spec by which data is drawn.
        reference: Whose loss is `ref_loss`, for specs that read it.
        allow_plugins: Whether the modules that specs name are imported.
        validates: Whether every run ends in a validation; runs of several seeds always do.
    """

    specs: Sequence[tuple[str, Spec]]
    folder: str
    out: str | None
    steps: int | None
    seed: int
    seeds: int = 1
    mixture: str | None
    reference: str | None
    allow_plugins: bool
    validates: bool = False


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Compare; return 0, a run's status, or 130 if interrupted.

    Raises:
        ValueError: The comparison cannot be.
        OSError: Its folder or its report cannot be written.
    """
    return status_of(partial(_compare, Options(**options)))


def status_of(work: Callable[[], None]) -> int:
    """Have runs trained; return 0, the status of one that failed, or 130 if interrupted."""
    try:
        work()
    except RunFailedError as error:
        sys.stderr.write(printable(f"error: {error}\n", keep="\n"))
        return error.status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on\n")
        return 130
    return 0


def table(folders: Sequence[Path]) -> str:
    """Return what runs came to and how far that is from the first one: losses at the end, nats."""
    runs = read_runs(folders)
    told = {"unweighted": [run.lines[-1].get("unweighted_loss", math.nan) for run in runs]}
    if any(run.validations for run in runs):
        ends = [run.validations[-1] if run.validations else {} for run in runs]
        told["validation"] = [line.get("domain_mean_loss", math.nan) for line in ends]
    names = [cut(run.name) for run in runs]
    width = max(map(len, names))
    rows = [f"{'':{width}}" + "".join(f"  {kind:>10}  difference" for kind in told)]
    for i, name in enumerate(names):
        cells = [
            f"  {losses[i]:10.4f}" + (f"  {losses[i] - losses[0]:+10.4f}" if i else " " * 12)
            for losses in told.values()
        ]
        rows.append(f"{name:{width}}{''.join(cells)}".rstrip())
    means = "; validation: mean over domains" if len(told) > 1 else ""
    return "\n".join([*rows, "", f"last losses in nats, differences to {names[0]}{means}"])


def _compare(args: Options) -> None:
    if len(args.specs) < 2:  # noqa: PLR2004 - it takes two
        given = ", ".join(text for text, _ in args.specs) or "none"
        msg = f"a comparison takes two specs or more; given: {given}"
        raise ValueError(msg)
    report(args, trained(args))


def trained(args: Options) -> list[Run]:
    """Train what is not trained yet, and return all runs.

    Raises:
        ValueError: One of them cannot be, or the folder holds others.
        OSError: The folder or that of the report cannot be written.
        RunFailedError: A run has failed; those after it were not begun.
    """
    runs = _runs(args)
    if _validates(args):
        args = replace(args, flags=_validating(args))
        runs = _repeated(runs, args)
    folder = Path(args.folder)
    refuse_unwritable(folder)
    refuse_unwritable(_page(args).parent)
    launch.check_config(args.module, args.config)
    steps = _preflight(args, [run for run in runs if not run.again])
    begun = [name for name in (SEED, *_names(runs)) if series.begun(folder / name)]
    orders: dict[str, Any] = {name: getattr(args, name) for name in _COMMON}
    orders |= {"flags": [*args.flags], "steps": steps}
    binding = [*orders] if begun else []
    orders |= {_order(run.name): run.spec.hash for run in runs}
    binding += [_order(run.name) for run in runs if run.name in begun]
    series.refuse_changed(folder / ORDERS, orders, "a comparison", binding)
    folder.mkdir(parents=True, exist_ok=True)
    _catch_signals()
    with series.alone(folder) as lock:
        series.note(folder / ORDERS, orders)
        _train(args, runs, steps, lock)
    return runs


def report(args: Options, runs: Sequence[Run]) -> None:
    """Write the report of runs that are trained, and print what they came to."""
    folder = Path(args.folder)
    folders = [folder / run.name for run in runs]
    write_report(folders, _page(args), explanation)
    told = as_text(_by_seed(folder, runs)) if args.seeds > 1 else table(folders)
    print(printable(f"\n{told}\n\nreport: {_page(args)}", keep="\n"))  # noqa: T201 - the result


def _page(args: Options) -> Path:
    return Path(args.out or Path(args.folder) / REPORT)


def _validates(args: Options) -> bool:
    return args.validates or args.seeds > 1


def _by_seed(folder: Path, runs: Sequence[Run]) -> Table:
    """Return the losses of all specs over their seeds, and differences to the first spec."""
    read = read_runs([folder / run.name for run in runs])
    specs = dict.fromkeys(run.text for run in runs)
    groups = {
        next(run.name for run in runs if run.text == text): [
            found for run, found in zip(runs, read, strict=True) if run.text == text
        ]
        for text in specs
    }
    return by_seed(groups)


def _order(name: str) -> str:
    return f"the spec of {name}"


# Before anything is made --------------------------------------------------------------------------


def _runs(args: Options) -> list[Run]:
    """Return the runs, each with a folder of its own.

    Raises:
        ValueError: A spec is wrong or given twice, or a flag is not the user's.
    """
    for flag, option in OWN.items():
        if launch.value_of(args.flags, flag) is not None:
            msg = f"{flag} is set for every run; leave it out, and use {option}"
            raise ValueError(msg)
    mixture = resolve(args.mixture, allow_plugins=args.allow_plugins) if args.mixture else None
    runs: list[Run] = []
    for text, spec in args.specs:
        name = _free(spec.name, [SEED, *_names(runs)])
        both = with_mixture(spec, mixture) if mixture else spec
        read = references_read(args.reference or "", plan_of(both).needs)
        twin = next((run for run in runs if run.spec.hash == both.hash), None)
        if twin is not None:
            msg = f"{text} and {twin.text} are the same weighting; give it once"
            raise ValueError(msg)
        flags = ["--weighting.mixture", args.mixture] if args.mixture else []
        flags += ["--weighting.reference", read] if read else []
        runs.append(Run(name, text, both, flags))
    needs = frozenset[str]().union(*(plan_of(run.spec).needs for run in runs))
    for name, path in references_of(args.reference or "").items():
        if not needs.intersection((told := told_by(name)).values()):
            given = f"{name}={path}" if name else path
            msg = (
                f"none of the specs reads {plain_name(told['ref_loss'])}; leave out --reference "
                f"{given}"
            )
            raise ValueError(msg)
    return runs


def _repeated(runs: Sequence[Run], args: Options) -> list[Run]:
    """Return the runs of all seeds, those of a seed one after the other."""
    return [
        run if not again else run._replace(name=f"{run.name}@{args.seed + again}", again=again)
        for again in range(args.seeds)
        for run in runs
    ]


def _validating(args: Options) -> list[str]:
    """Return the user's flags, with the one that has every run validated.

    Raises:
        ValueError: The user's data is given, and no text to validate on.
    """
    texts = ("--validator.dataloader.dataset_path", "--validator.dataloader.dataset")
    if args.data and all(launch.value_of(args.flags, flag) is None for flag in texts):
        msg = f"{_asks(args)} compares validation losses; say on which text, with {texts[0]} FILE"
        raise ValueError(msg)
    if "--validator.no-enable" in args.flags or "--validator.no_enable" in args.flags:
        msg = f"{_asks(args)} compares validation losses; leave out --validator.no-enable"
        raise ValueError(msg)
    # As they were, if it is among them: what was compared with one seed then goes on with more.
    return [*([] if "--validator.enable" in args.flags else ["--validator.enable"]), *args.flags]


def _asks(args: Options) -> str:
    return "tune" if args.validates else "--seeds"


def _free(name: str, taken: Sequence[str]) -> str:
    """Return the name, or the first of name-2, name-3, ... that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _preflight(args: Options, runs: Sequence[Run]) -> int:
    """Have the host read the flags of all runs, and refuse what one of them would; return steps.

    Raises:
        ValueError: A run cannot be.
        SystemExit: There is no such flag; the host has said so.
    """
    with quiet():  # each run says it in its log
        configs = [_checked(args, run) for run in runs]
    return configs[0].training.steps


def _checked(args: Options, run: Run) -> WeightedTrainer.Config:
    # Importing the host takes seconds; what is plainly wrong has been said by now.
    from titan_integration.data.loader import DomainTextDataLoader  # noqa: PLC0415
    from titan_integration.host import cpu  # noqa: PLC0415
    from titan_integration.host.flags import parse  # noqa: PLC0415
    from titan_integration.observe.recorder import asked  # noqa: PLC0415
    from titan_integration.trainer import preflight  # noqa: PLC0415
    from titan_integration.trainer.trainer import WeightedTrainer  # noqa: PLC0415

    cpu.use_cpu()
    steps = ["--training.steps", str(args.steps)] if args.steps else []
    given = replace(args, flags=[*steps, *run.flags, *args.flags])
    flags = launch.host_flags(given, run.text, str(Path(args.folder) / run.name))
    flags += ["--weighting.allow_plugins"] if args.allow_plugins else []
    config = parse([*flags, *given.flags])
    if not isinstance(config, WeightedTrainer.Config):
        msg = f"{args.module}.{args.config} has no weighting; give it one with with_weighting"
        raise ValueError(msg)  # noqa: TRY004 - the user named it
    last, every = config.training.steps, config.validator.freq
    if config.validator.enable and _own_frequency(args) and last % every:
        msg = (
            f"--validator.freq {every} does not validate the last of {last} steps, which is what "
            "is compared; take a divisor of it"
        )
        raise ValueError(msg)
    plan = plan_of(run.spec, steps=config.training.steps)
    if config.weighting.record:
        asked(config.weighting.record)
    preflight.refuse_unsupported(config, plan)
    preflight.ask_for_columns(config, plan.needs)
    preflight.ask_for_rows(config, plan)
    if isinstance(config.dataloader, DomainTextDataLoader.Config):
        _check_data(config.dataloader, run.name)
    return config


def _check_data(loader: DomainTextDataLoader.Config, name: str) -> None:
    """Check that local data is there, and that its first record has what a run reads."""
    from titan_integration.data.documents import embedded_documents  # noqa: PLC0415
    from titan_integration.data.loader import columns_read  # noqa: PLC0415

    columns = columns_read(loader)
    data = loader.dataset_path or loader.dataset
    try:
        if loader.dataset_path or data.startswith((".", "/", "~")):
            path = data_at(data)
            if saved_dataset(path, loader.split):
                return
            for place, record in read_records(local_files(path, loader.split)[0], columns):
                check_text(record, columns, place)
                domain_of(record, columns, place)
                numbers_of(record, columns, place)
                break
        elif data == "stdlib" and columns.numbers:
            embedded_documents(loader.split, loader.domains, columns.numbers)
    except ValueError as error:
        msg = f"{name}: {error}"
        raise ValueError(msg) from error


# The runs -----------------------------------------------------------------------------------------


def _train(args: Options, runs: Sequence[Run], steps: int, lock: IO[str]) -> None:
    """Train what is not trained yet.

    Raises:
        RunFailedError: A run has failed; those after it were not begun.
    """
    folder = Path(args.folder)
    done = [min(max(series.last_saved(folder / run.name), 0), steps) for run in runs]
    saves = ["--checkpoint.interval", str(max(steps // 10, 1))]
    ends = [] if _own_frequency(args) else ["--validator.freq", str(steps)]
    with View(steps, done) as view:
        for run, at in zip(runs, done, strict=True):
            first = f"{SEED}@{args.seed + run.again}" if run.again else SEED
            common = ["--debug.seed", str(args.seed + run.again)]
            if series.last_saved(folder / first) < 0:
                view.seed(first)
                whole = [f"--parallelism.{degree}_degree=1" for degree in _DEGREES]
                flags = [*args.flags, *whole, "--checkpoint.create_seed_checkpoint"]
                one = replace(args, ranks=1, flags=flags)
                _run(args, first, _words(one, "uniform", folder / first, steps, common), lock, view)
            weights = (folder / first / CHECKPOINTS / "step-0").resolve()
            if at == steps:
                if _validates(args):
                    _refuse_unvalidated(folder / run.name, steps)
                view.say(f"{cut(run.name)}: trained already")
                continue
            common += ["--checkpoint.initial_load_path", str(weights), *saves, *ends]
            words = _words(args, run.text, folder / run.name, steps, [*run.flags, *common])
            view.begin(run.name, at)
            _run(args, run.name, words, lock, view)
            view.end(read_lines(folder / run.name / FOLDER / METRICS)[-1]["unweighted_loss"])


def _own_frequency(args: Options) -> bool:
    """Tell whether the user says when to validate, or nobody asks for it."""
    asked = _validates(args) or "--validator.enable" in args.flags
    return not asked or launch.value_of(args.flags, "--validator.freq") is not None


def _refuse_unvalidated(run: Path, steps: int) -> None:
    """Refuse a run that was stopped after its last save and before its last validation.

    Raises:
        ValueError: It was; says how to go on.
    """
    path = run / FOLDER / VALIDATION
    if path.exists() and read_lines(path)[-1]["step"] == steps:
        return
    saved = run / CHECKPOINTS / f"step-{steps}"
    msg = (
        f"{run}: was stopped before the validation of its last step; remove {saved}, and the same "
        "command goes on from the save before"
    )
    raise ValueError(msg)


def _words(args: Options, spec: str, folder: Path, steps: int, more: list[str]) -> list[str]:
    return series.command(args, spec, folder, steps, more, plugins=args.allow_plugins)


def _run(args: Options, name: str, words: list[str], lock: IO[str], view: View) -> None:
    """Have a run write its log to its end, and show what it does.

    Raises:
        RunFailedError: It has failed.
    """
    folder = Path(args.folder)
    log = folder / f"{name}.log"
    before = log.stat().st_size if log.exists() else 0
    lines = series.new_lines(folder / name / FOLDER / METRICS)
    if status := series.logged(words, log, lock, lambda: view.look(next(lines))):
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(before)
            told = "\n".join(f"    {line}" for line in telling(file.read()))
        msg = (
            f"{name} ended with status {status}; its log, {log}, ends with\n{told}\n"
            "when that is mended, the same command goes on"
        )
        raise RunFailedError(msg, status)


def telling(log: str) -> list[str]:
    """Return the lines of a log that say why a run ended: its last error, or its last lines."""
    plain = (re.sub(r"^\[rank\d+\]:", "", line).rstrip() for line in log.splitlines())
    lines = [line for line in plain if line]
    said = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return lines[said[-1] :][:_LINES] if said else lines[-_LINES:]


def _catch_signals() -> None:
    """Have what would end this process end the run too; signals that are ignored stay so."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt

"""Models on benchmarks, by lm-evaluation-harness: what `weighting evaluate` calls."""

from __future__ import annotations

import contextlib
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from titan_integration.commands import export
from titan_integration.commands import train as launch
from titan_integration.data.data_files import near
from titan_integration.host import cpu
from titan_integration.host.flags import parse
from titan_integration.host.quiet import quiet
from titan_integration.host.run_dir import refuse_unwritable
from titan_integration.loss.reference_model import find_checkpoint
from weighting.errors import printable
from weighting.report.tables import Table, as_text
from weighting.runs import evaluated
from weighting.runs.layout import CHECKPOINTS, EVALUATION, FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lm_eval.tasks import TaskManager
    from torchtitan.trainer import Trainer

    from weighting.runs.evaluated import Score


def main(
    *,
    models: Sequence[str],
    tasks: Sequence[str],
    shots: int | None = None,
    task_folder: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    **options: Any,  # noqa: ANN401 - those of `HostOptions`
) -> int:
    """Evaluate models, keep what is found beside their runs task by task, and print it; return 0.

    Args:
        models: Folders of runs, of checkpoints, or for Hugging Face.
        tasks: Names of the harness, or of `evaluated.TASKS`.
        shots: Examples before a question; those of a paper's list, or of the task, for None.
        task_folder: Where task files of the user's are.
        limit: Questions of a task; all for None.
        batch: Questions at once.
        options: Those of `HostOptions`.

    Raises:
        ValueError: A model, its config or a task is not as it must be; what was found is kept.
    """
    given = launch.HostOptions(**options)
    launch.check_config(given.module, given.config)
    found = [_checkpoint(model) for model in models]
    names = _names(models)
    places = [_place(folder) for folder in found]
    for place in places:
        refuse_unwritable(place.parent)
        evaluated.read(place)
    with quiet():
        manager = _tasks(task_folder)
        asked = _asked(tasks, shots, manager)
        config = None
        if given.flags or not all(map(_for_hf, found)):
            cpu.use_cpu()
            flags = [*launch.host_flags(given, "uniform", "outputs/evaluate"), *given.flags]
            config = cast("Trainer.Config", parse(flags))
        scores: list[dict[str, Score]] = []
        for folder, place in zip(found, places, strict=True):
            own: dict[str, Score] = {}
            for some in _scores(config, folder, asked, manager, limit, batch):
                own |= some
                evaluated.add(place, folder.name, some, {"lm_eval": version("lm-eval")})
            scores.append(own)
    rows = evaluated.rows([*zip(names, scores, strict=True)])
    paired = f"; difference to {names[0]}, 95 % interval over questions" if len(names) > 1 else ""
    caption = f"Scores in per cent{paired}. Kept in {', '.join(map(str, places))}"
    table = Table(caption, evaluated.head(names), rows)
    print(printable(as_text(table), keep="\n"))  # noqa: T201 - the result
    return 0


def _checkpoint(model: str) -> Path:
    """Return the folder of a model's checkpoint.

    Raises:
        ValueError: There is none.
    """
    inside = Path(model).expanduser() / CHECKPOINTS
    return find_checkpoint(str(inside) if inside.is_dir() else model, "MODEL")


def _names(models: Sequence[str]) -> list[str]:
    """Return what to call the models: their folders, or whole paths where two are called alike."""
    short = [Path(model).resolve().name for model in models]
    return short if len(set(short)) == len(short) else [*models]


def _place(checkpoint: Path) -> Path:
    """Return the file for what is found of a checkpoint: that of its run, or one beside it."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / FOLDER).is_dir():
            return folder / FOLDER / EVALUATION
    return (checkpoint if _for_hf(checkpoint) else checkpoint.parent) / EVALUATION


def _for_hf(checkpoint: Path) -> bool:
    """Tell whether transformers loads a folder as it is."""
    return (checkpoint / "config.json").is_file()


def _tasks(folder: str | None) -> TaskManager:
    """Return the harness's tasks and those of a folder; it reads the files of all of them."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra, and slow

    return TaskManager(include_path=folder)


def _asked(tasks: Sequence[str], shots: int | None, manager: TaskManager) -> dict[str, int | None]:
    """Return tasks by their names in the harness, each with its number of examples.

    Raises:
        ValueError: The harness has no such task; says which are like it.
    """
    known = manager.all_tasks
    asked: dict[str, int | None] = {}
    for name in tasks:
        members, usual = evaluated.TASKS.get(name, ((name,), None))
        for task in members:
            if task not in known:
                like = near(task, [*known, *evaluated.TASKS])
                msg = f"--tasks: lm-evaluation-harness has no task {task!r}{like}"
                raise ValueError(msg)
            asked[task] = usual if shots is None else shots
    if not asked:
        msg = "--tasks names none; give names of tasks with commas between them"
        raise ValueError(msg)
    return asked


def _scores(
    config: Trainer.Config | None,
    checkpoint: Path,
    asked: dict[str, int | None],
    manager: TaskManager,
    limit: int | None,
    batch: int,
) -> Iterator[dict[str, Score]]:
    """Yield what a model has of each task, or of the tasks of a group.

    Raises:
        ValueError: As `export.write`, or a task takes what is not installed.
    """
    from lm_eval import simple_evaluate  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        folder = checkpoint
        if not _for_hf(checkpoint):
            assert config is not None, "parsed where a model is not for Hugging Face"
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "hf")
            export.write(config, checkpoint, folder, torch.float32)
        accelerator = torch.accelerator.is_available()
        device = str(torch.accelerator.current_accelerator()) if accelerator else "cpu"
        model = HFLM(pretrained=str(folder), device=device, batch_size=batch)
        for task, shots in asked.items():
            try:
                told = simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=shots,
                    limit=limit,
                    task_manager=manager,
                    bootstrap_iters=0,
                )
            except ModuleNotFoundError as error:
                msg = f"--tasks {task}: needs the package {error.name}, which is not installed"
                raise ValueError(msg) from error
            assert told is not None, "one process has all of it"
            yield _read(cast("dict[str, Any]", told))


def _read(told: dict[str, Any]) -> dict[str, Score]:
    """Return the scores in what the harness found; a group of tasks has those of its members.

    Raises:
        ValueError: A task has no number for each question.
    """
    found: dict[str, Score] = {}
    for task, samples in told["samples"].items():
        metric = samples[0]["metrics"][0]
        if not isinstance(samples[0].get(metric), int | float):
            msg = f"--tasks {task}: has no number for each question, but {metric} of all of them"
            raise ValueError(msg)  # noqa: TRY004 - a user's error
        first = samples[0]["filter"]
        items = {
            f"{x['doc_id']}-{x['doc_hash'][:12]}": float(x[metric])
            for x in samples
            if x["filter"] == first
        }
        found[task] = evaluated.Score(metric, int(told["n-shot"].get(task, 0) or 0), items)
    return found

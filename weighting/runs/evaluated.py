"""What benchmarks say of models: the file beside a run, and differences paired by question."""

from __future__ import annotations

import json
import math
from statistics import NormalDist, fmean, variance
from typing import TYPE_CHECKING, Any, NamedTuple

from weighting.runs.files import json_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

TASKS: dict[str, tuple[tuple[str, ...], int]] = {
    "linupper-gpt2": (("logiqa", "logiqa2", "sciq", "piqa"), 5),
    "mile-triviaqa": (("triviaqa",), 0),
}
"""Task lists of papers: the harness's names, and how many examples precede a question.

Sow et al., ICLR 2025, evaluate their GPT-2 sizes on the first; Su et al., NAACL Findings 2024,
report the second beside others.
"""
_HALF = NormalDist().inv_cdf(0.975)


class Score(NamedTuple):
    """What a model has of a task.

    Attributes:
        metric: What is measured, such as `acc`.
        shots: Examples before each question.
        items: The metric of each question, by the question's digest.
    """

    metric: str
    shots: int
    items: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over questions."""
        return fmean(self.items.values())


class Difference(NamedTuple):
    """A mean difference, and the 95 % interval of it."""

    mean: float
    low: float
    high: float


def difference(scores: Mapping[str, Score], base: Mapping[str, Score]) -> Difference | None:
    """Return the mean over tasks of how far scores are from others, paired by question.

        sum_k m_k / K  +- 1.96 sqrt(sum_k s_k^2 / n_k) / K

    m_k, s_k: mean and standard deviation of the n_k differences of task k.  The interval is over
    questions, the models being as they are: another seed of training is not in it.  None where a
    task is not there, was asked otherwise, or has less than two questions.
    """
    means, errors = list[float](), list[float]()
    for task, score in scores.items():
        other = base.get(task)
        if other is None or score[:2] != other[:2] or {*score.items} != {*other.items}:
            return None
        gaps = [value - other.items[key] for key, value in score.items.items()]
        if len(gaps) < 2:  # noqa: PLR2004 - one has no spread
            return None
        means.append(fmean(gaps))
        errors.append(variance(gaps) / len(gaps))
    if not means:
        return None
    half = _HALF * math.sqrt(sum(errors)) / len(errors)
    return Difference(fmean(means), fmean(means) - half, fmean(means) + half)


def rows(models: Sequence[tuple[str, Mapping[str, Score]]]) -> list[tuple[str, ...]]:
    """Return a line for each task that all models have, and one for the mean over them.

    Columns: the task; of each model its score in per cent, and but for the first the difference.
    """
    (_, base), *_ = models
    common = [task for task in base if all(task in scores for _, scores in models)]
    lines = [*((x, [x]) for x in common), *([("mean", common)] if len(common) > 1 else [])]
    found = list[tuple[str, ...]]()
    for label, tasks in lines:
        shots = f", {base[label].shots}-shot {base[label].metric}" if label in base else ""
        cells = [f"{label}{shots}"]
        for i, (_, scores) in enumerate(models):
            some = {task: scores[task] for task in tasks}
            cells.append(f"{100 * fmean(x.mean for x in some.values()):.2f}")
            if i:
                gap = difference(some, {task: base[task] for task in tasks})
                percent = [100 * x for x in gap] if gap else []
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*percent) if gap else "–")
        found.append(tuple(cells))
    return found


def head(names: Sequence[str]) -> tuple[str, ...]:
    """Return the heads of the columns of `rows`."""
    words = ["task"]
    for i, name in enumerate(names):
        words += [name, *(["difference"] if i else [])]
    return tuple(words)


def read(path: Path) -> dict[str, dict[str, Score]]:
    """Return scores by checkpoint and task, the latest evaluated checkpoint last.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            step: {
                task: Score(str(x["metric"]), int(x["shots"]), dict(x["items"]))
                for task, x in tasks.items()
            }
            for step, tasks in found["checkpoints"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: not what weighting evaluate writes; remove it and evaluate again"
        raise ValueError(msg) from error


def add(path: Path, checkpoint: str, scores: Mapping[str, Score], about: Mapping[str, str]) -> None:
    """Write scores of a checkpoint beside what is there; those of the same tasks are replaced.

    Those of more questions, asked alike, stay: a quick look does not replace a whole evaluation.

    Raises:
        ValueError: As `read`.
    """
    found = read(path)
    latest = found.pop(checkpoint, {})
    for task, new in scores.items():
        old = latest.get(task)
        if old is None or old[:2] != new[:2] or len(old.items) <= len(new.items):
            latest[task] = new
    told = {
        step: {task: {"value": x.mean, **x._asdict()} for task, x in tasks.items()}
        for step, tasks in (found | {checkpoint: latest}).items()
    }
    write_whole(path, json_text({**about, "checkpoints": told}, indent=1) + "\n")

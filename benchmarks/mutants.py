"""Break one line of the code at a time and see whether the tests notice.

    python benchmarks/mutants.py            all of them; exit status 1 if one survives
    python benchmarks/mutants.py 3 17       these, counted from 1

Every mutant is a copy of the project with one expression replaced. The tests that should notice are
run on it until the first one fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("weighting", "titan_integration", "specs", "tests", "benchmarks", "docs")
LIMIT_S = 300


class Mutant(NamedTuple):
    """A file, an expression that stands in it once, what replaces it, and who should notice."""

    breaks: str
    file: str
    old: str
    new: str
    tests: str


REFERENCES, KIT = "test_specs.py", "weighting/test_testing.py"
GOLDEN, LAWS, PROJECT = "weighting/test_golden.py", "test_laws.py", "weighting/test_project.py"
LINEAR, DATA = "weighting/test_linear.py", "titan_integration/test_data.py"
STAGES, BUILD = "weighting/stages", "weighting/build"
MUTANTS = (
    Mutant(
        "the focal formula",
        f"{STAGES}/focal.py",
        "(-(-signals.loss).expm1())",
        "((-signals.loss).exp())",
        GOLDEN,
    ),
    Mutant(
        "where LinUpper starts", f"{STAGES}/linupper.py", "shift=Constant", "scale=Constant", GOLDEN
    ),
    Mutant("the range of normalize", f"{STAGES}/normalize.py", "width)) - 1)", "width)))", GOLDEN),
    Mutant(
        "the temperature",
        f"{STAGES}/temperature.py",
        "scope.max(x)) / tau",
        "scope.max(x)) * tau",
        GOLDEN,
    ),
    Mutant(
        "mean one",
        f"{STAGES}/mean_one.py",
        "total) * count)",
        "total))",
        f"{LAWS}::test_the_laws_of_the_kit_hold",
    ),
    Mutant(
        "the shift of MiLe's entropy",
        f"{STAGES}/entropy.py",
        "(Entropy(), Affine(shift=self.sigma or one), Pow(",
        "(Entropy(), Pow(",
        GOLDEN,
    ),
    Mutant(
        "the share that interpolate mixes in",
        f"{STAGES}/interpolate.py",
        "lam + (1 - lam) * x",
        "lam + x",
        REFERENCES,
    ),
    Mutant(
        "DoReMi's smoothing",
        f"{STAGES}/exponentiated.py",
        "+ smoothing / weights.numel()",
        "+ smoothing",
        REFERENCES,
    ),
    Mutant(
        "the sum under a cap",
        "weighting/capped_simplex.py",
        "scale = torch.where(free > 0, (total - rest) / free.clamp(min=TINY), scale)",
        "scale = scale * 0.9",
        PROJECT,
    ),
    Mutant(
        "the cap itself",
        "weighting/capped_simplex.py",
        "out = torch.minimum(largest, scale * w)",
        "out = scale * w",
        PROJECT,
    ),
    Mutant(
        "the sum over a floor",
        "weighting/capped_simplex.py",
        "out = torch.maximum(smallest, scale * weight)",
        "out = torch.maximum(smallest, weight)",
        PROJECT,
    ),
    Mutant(
        "draws differ from batch to batch",
        "weighting/counter_rng.py",
        "_mix(counter + _mix(",
        "_mix(0 * counter + _mix(",
        "test_scopes.py",
    ),
    Mutant(
        "draws do not hang on padding",
        f"{STAGES}/bernoulli.py",
        "draws[(scope.valid.cumsum(0) - 1).clamp(min=0)] < p",
        "draws < p",
        "test_scopes.py",
    ),
    Mutant(
        "normalisation over ranks",
        f"{BUILD}/weighting.py",
        "sums = self.collectives.sum(torch.stack(sums)).unbind()",
        "sums = torch.stack(sums).unbind()",
        f"{LAWS}::test_many_ranks_weigh_like_one",
    ),
    Mutant(
        "a rank's own part of the gathered units",
        f"{BUILD}/weighting.py",
        "[self.collectives.rank, :size]",
        "[0, :size]",
        f"{LAWS}::test_many_ranks_weigh_like_one",
    ),
    Mutant(
        "evaluation leaves the state alone",
        f"{BUILD}/weighting.py",
        "        if not self.training:\n            return _with_state(scope, after)\n",
        "",
        f"{LAWS}::test_looking_changes_nothing",
    ),
    Mutant(
        "the state is remembered",
        f"{BUILD}/weighting.py",
        "            before[key].copy_(value)\n",
        "",
        REFERENCES,
    ),
    Mutant(
        "a damaged state is refused",
        f"{BUILD}/weighting.py",
        "        if problems:\n            wrong",
        "        if False:\n            wrong",
        "weighting/test_saved.py",
    ),
    Mutant(
        "the effective sample size",
        f"{BUILD}/statistics.py",
        "ess = total * total",
        "ess = total",
        "weighting/test_build.py",
    ),
    Mutant(
        "the late part of a weight",
        "weighting/loss/late_bound.py",
        "sums.scaled(per_token, late)",
        "sums.scaled(per_token, late * 0 + 1)",
        LINEAR,
    ),
    Mutant(
        "the gradient that arrives from above",
        "weighting/loss/late_bound.py",
        "fold_([gradient], grads[0].view(1))",
        "pass",
        LINEAR,
    ),
    Mutant(
        "the end of a ramp",
        "weighting/schedules.py",
        "/ known_steps(self.over)).clamp(0, 1)",
        "/ known_steps(self.over))",
        "weighting/test_schedules.py",
    ),
    Mutant(
        "which rows of a batch are a rank's",
        "titan_integration/data/packing.py",
        "if 0 <= i - self._first_row < self._local_batch:",
        "if 0 <= i < self._local_batch:",
        DATA,
    ),
    Mutant(
        "a document goes on where its row ended",
        "titan_integration/data/packing.py",
        "(document, offset + take) if take < left",
        "(document, offset + take + 1) if take < left",
        DATA,
    ),
    Mutant(
        "every epoch has an order of its own",
        "titan_integration/data/packing.py",
        "key = (epoch,) if",
        "key = (0,) if",
        DATA,
    ),
    Mutant(
        "damaged checkpoints are refused",
        "titan_integration/state/checksums.py",
        "if zipfile.is_zipfile(found) and not _is_intact(found):",
        "if False:",
        "titan_integration/test_intact.py",
    ),
)


def main(chosen: list[str]) -> int:
    """Try the mutants, print a table, and return how many survived."""
    mutants = [MUTANTS[int(number) - 1] for number in chosen] or MUTANTS
    survivors = 0
    print(f"{'mutant':42} | {'noticed by':72} | seconds")
    for mutant in mutants:
        began = time.monotonic()
        test = noticed_by(mutant)
        survivors += test is None
        seconds = time.monotonic() - began
        print(f"{mutant.breaks:42} | {test or 'NO TEST':72} | {seconds:7.1f}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} noticed")
    return min(survivors, 1)


def noticed_by(mutant: Mutant) -> str | None:
    """Return the first test that fails on a mutant, None if none does.

    Raises:
        RuntimeError: The tests could not be run at all, which is no sign that they notice.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile"):
            shutil.copy(ROOT / name, copy)
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            msg = f"{mutant.file} must hold {mutant.old!r} once, not {text.count(mutant.old)} times"
            raise RuntimeError(msg)
        path.write_text(text.replace(mutant.old, mutant.new))
        quick = ["-m", "not processes and not slow"]
        command = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *quick]
        done = subprocess.run(  # noqa: S603 - our own tests
            [sys.executable, *command, f"tests/{mutant.tests}"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 1 and failed:
        return failed[0].split()[1].removeprefix("tests/")
    if done.returncode == 0:
        return None
    msg = f"{mutant.breaks}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    raise RuntimeError(msg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

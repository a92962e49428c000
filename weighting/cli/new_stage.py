"""`weighting new-stage`: a stage of one's own to start from, and its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
import tempfile
from pathlib import Path
from string import Template
from typing import NamedTuple

import click

from weighting.cli.common import give_up
from weighting.language.words import words

_LONGEST = 64


@click.command("new-stage")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["shape", "weigh", "source", "constrain", "pool"]),
    default="shape",
    show_default=True,
    help="What goes in and out.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Where to write it.",
)
def new_stage(name: str, *, kind: str, folder: Path) -> None:
    """Write NAME.py, a stage to change into one's own, and test_NAME.py.

    Nothing is overwritten: exit 2 if a file exists or the name cannot be used.

    \b
    Examples:
      weighting new-stage soft_cap
      weighting new-stage surprise --kind source --dir plugins
    """  # noqa: D301 - \b is click's, for text it must not rewrap
    module, test = folder / f"{name}.py", folder / f"test_{name}.py"
    if problem := _problem_with(name, module, test):
        give_up(problem)
    words = {"name": name, "title": name.replace("_", " "), "cls": _class_name(name)}
    body = _BODIES[kind]
    texts = {
        module: Template(_MODULE).substitute(words, **_filled(body, words)),
        test: Template(_TEST).substitute(words, **_filled(body, words)),
    }
    try:
        _write(texts)
    except OSError as error:
        give_up(f"--dir {folder}: nothing was written: {error.strerror or error}; choose another")
    use = Template(body.use).substitute(words)
    click.echo(f"wrote {module} and {test}; next, {_from(folder)}")
    click.echo(f"  test it        python -m pytest {test.name}")
    click.echo(f"  use it         plugins: [{name}]")
    click.echo(f"                 pipeline: {use}")
    click.echo("  allow its code  weighting check SPEC --allow-plugins")


class _Body(NamedTuple):
    """What differs between kinds: the class and an example of its use."""

    imports: str
    code: str
    instances: str
    use: str
    example: str


def _problem_with(name: str, module: Path, test: Path) -> str | None:
    """Return why a stage cannot get this name here, or None."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        near = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|\W+", "_", name).strip("_").lower()
        hint = f"; write {near}" if re.fullmatch(r"[a-z_][a-z0-9_]*", near) else ""
        hint = hint or "; write one such as soft_cap"
        return f"a stage name is a lower-case identifier, not {name!r}{hint}"
    if taken := next((word for word in words() if word.name == name), None):
        if taken.kind == "schedule":
            return f"{name!r} is a schedule of the language; choose another name"
        return f"there is a stage {name!r} already; see weighting list"
    if keyword.iskeyword(name) or not name.strip("_0123456789"):
        return f"{name!r} cannot name a Python module; choose another name"
    if len(name) > _LONGEST:
        return f"a stage name has at most {_LONGEST} characters, not {len(name)}; shorten it"
    for path in (module, test):
        if path.exists():
            return f"{path} exists already, and nothing was written; choose another name"
    if name in sys.modules or importlib.util.find_spec(name):
        return f"{name!r} is a Python module already, which {module} would hide; choose another"
    return None


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _from(folder: Path) -> str:
    return "here" if folder.resolve() == Path.cwd() else f"in {folder}"


def _filled(body: _Body, words: dict[str, str]) -> dict[str, str]:
    return {field: Template(text).substitute(words) for field, text in body._asdict().items()}


def _write(texts: dict[Path, str]) -> None:
    """Write all files or none, each complete from the moment it is there."""
    placed: list[Path] = []
    with tempfile.TemporaryDirectory(dir=next(iter(texts)).parent) as folder:
        drafts = {path: Path(folder) / path.name for path in texts}
        for path, text in texts.items():
            drafts[path].write_text(text, encoding="utf-8")
        try:
            for path, draft in drafts.items():
                path.open("x").close()  # ours now, or an error
                placed.append(path)
                draft.replace(path)
        except OSError:
            for path in placed:
                path.unlink()
            raise


_MODULE = '''\
"""The stage `$name`: say what it is for, and which paper it comes from."""

$imports

@wt.stage("$name")
$code'''

_TEST = '''\
"""Tests of the stage `$name`: every law, and an example."""

from weighting.testing import assert_weights, parametrize_with_checks

from $name import $cls


@parametrize_with_checks([$instances])
def test_laws(stage, check):
    """It obeys every law of its kind."""
    check(stage)


def test_example():
    """It gives these losses the weights of the formula."""
    assert_weights(
        "$use",
        loss=[1.0, 2.0, 3.0],
        expect=[$example],
        atol=1e-5,
    )
'''

_IMPORTS = "import weighting as wt\nfrom torch import Tensor\n"
_TORCH = f"import torch\n{_IMPORTS}"

_BODIES = {
    "shape": _Body(
        _IMPORTS,
        '''\
class $cls(wt.Shape):
    """Level off smoothly: what the best scores add fades.

    y = at * tanh(x / at)
    """

    pointwise = True  # looks at no other unit, so that a token's weight need not wait
    at: wt.PositiveNumber = 1.0

    def apply(self, x: Tensor, scope: wt.Scope) -> Tensor:
        """Return the new score of each unit, [U] -> [U]."""
        at = self.at(scope.step)  # a number or a schedule, at this step
        return at * (x / at).tanh()
''',
        "$cls(), $cls(at=0.5)",
        "normalize -> $name(at=0.5) -> temperature(1)",
        "0.57235, 0.92682, 1.50083",
    ),
    "weigh": _Body(
        _TORCH,
        '''\
class $cls(wt.Weigh):
    """Weigh by a soft threshold: scores far below 0 hardly count.

    w = n * r / sum(r),  r = 1 / (1 + exp(-x / width))
    """

    width: wt.PositiveNumber = 1.0

    def apply(self, x: Tensor, scope: wt.Scope) -> Tensor:
        """Return the weight of each unit, [U] -> [U], mean one."""
        width = self.width(scope.step)  # a number or a schedule, at this step
        r = (x / width).sigmoid()
        total = scope.sum(r)  # over the units that count, on all ranks
        return torch.where(total > 0, r / total * scope.count(), 1)
''',
        "$cls(), $cls(width=0.5)",
        "normalize -> $name(width=0.5)",
        "0.23841, 1.0, 1.76159",
    ),
    "source": _Body(
        "from typing import ClassVar\n\n" + _IMPORTS,
        '''\
class $cls(wt.Source):
    """Score a token by how improbable it was, from 0 to 1.

    score_t = 1 - exp(-rate * loss_t)
    """

    pointwise = True  # looks at no other token, so that a token's weight need not wait
    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    rate: wt.PositiveNumber = 1.0

    def read(self, signals: wt.Signals, scope: wt.Scope) -> Tensor:
        """Return a score for each token, [T]."""
        rate = self.rate(scope.step)  # a number or a schedule, at this step
        return -(-rate * signals.loss).expm1()
''',
        "$cls(), $cls(rate=0.5)",
        "$name(rate=0.5) -> mean_one",
        "0.65489, 1.0521, 1.29302",
    ),
    "constrain": _Body(
        _TORCH,
        '''\
class $cls(wt.Constrain):
    """Draw the weights together and keep their sum; power 1 changes nothing.

    w' = sum(w) * w ** power / sum(w ** power)
    """

    power: wt.UnitNumber = 0.5

    def apply(self, x: Tensor, scope: wt.Scope) -> Tensor:
        """Return the new weight of each unit, [U] -> [U]."""
        power = self.power(scope.step)  # a number or a schedule, at this step
        raised = x**power
        total = scope.sum(raised)  # over the units that count, on all ranks
        return torch.where(total > 0, raised / total * scope.sum(x), x)
''',
        "$cls(), $cls(power=0.25)",
        "normalize -> temperature(0.5) -> $name(power=0.25)",
        "0.55897, 0.92159, 1.51944",
    ),
    "pool": _Body(
        _TORCH,
        '''\
class $cls(wt.Pool):
    """Root of the mean square: a unit scores high when some of its tokens do.

    score_u = sqrt(sum_{t in u} score_t ** 2 / |u|)
    """

    def pool(self, score: Tensor, valid: Tensor, groups: wt.Groups) -> Tensor:
        """Return a score for each unit, [T] -> [U], of its valid tokens."""
        squares = groups.sum(torch.where(valid, score**2, 0))
        return (squares / groups.sum(valid.float()).clamp(min=1)).sqrt()
''',
        '$cls(level="sequence"), $cls(level="document")',
        "$name(sequence) -> temperature(1)",
        "0.27009, 0.73419, 1.99572",
    ),
}

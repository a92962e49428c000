"""The arrows between rooms, read from the syntax trees."""

import ast
import inspect
import re
from pathlib import Path

import generators as tables
import pytest

from weighting.contract import Sugar
from weighting.registry import stages

ROOT = Path(__file__).resolve().parent.parent
ROOM = ROOT / "weighting"
FILES = sorted(ROOM.rglob("*.py"))
FORBIDDEN = ("titan_integration", "torchtitan", "torch.distributed", "logging")
STAGE_FILES = sorted(p for p in (ROOM / "stages").glob("*.py") if p.name != "__init__.py")
HELPERS = {"contract", "registry", "schedules", "project", "levels", "errors"}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOM)))


def parsed(path):
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def imports(path):
    """Return the dotted names a file imports, from anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(found, room):
    """Tell whether an imported name is a room or lies in it."""
    return any(name == room or name.startswith(f"{room}.") for name in found)


def test_there_is_something_to_look_at():
    """The laws below speak of the files of the core and of its stages."""
    assert len(FILES) >= 30
    assert len(STAGE_FILES) >= 20
    assert len(tables.own_stages()) >= 20


@each_file
def test_the_core_knows_no_trainer_no_ranks_and_no_log(path):
    """Nothing in weighting imports the integration, torchtitan, torch.distributed or logging."""
    assert not [room for room in FORBIDDEN if reaches(imports(path), room)]
    dotted = {ast.unparse(n) for n in ast.walk(parsed(path)) if isinstance(n, ast.Attribute)}
    assert not [name for name in dotted if name.startswith("torch.distributed")]


@each_file
def test_only_the_document_room_reads_yaml(path):
    """Yaml is imported in document.py alone, which does import it."""
    assert reaches(imports(path), "yaml") == (path == ROOM / "document.py")


@each_file
def test_only_the_command_line_prints(path):
    """Print and the standard streams belong to weighting/cli."""
    if path.is_relative_to(ROOM / "cli"):
        return
    names = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
    dotted = {ast.unparse(n) for n in ast.walk(parsed(path)) if isinstance(n, ast.Attribute)}
    assert not names & {"print", "breakpoint", "eval", "exec"}
    assert not dotted & {"sys.stdout", "sys.stderr"}


@each_file
def test_the_rooms_below_do_not_know_those_above(path):
    """Stages and their helpers import neither spec, build, calls, simulate nor the command line."""
    is_helper = path.stem in HELPERS and path.parent == ROOM
    if not (is_helper or path in STAGE_FILES):
        return
    above = ("spec", "build", "calls", "simulate", "cli", "losses", "document", "arrow", "testing")
    assert not [room for room in above if reaches(imports(path), f"weighting.{room}")]


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda p: p.stem)
def test_every_stage_file_is_imported(path):
    """stages/__init__.py imports every stage file, so that importing it registers every word."""
    found = imports(ROOM / "stages" / "__init__.py")
    assert f"weighting.stages.{path.stem}" in found
    registered = {cls.__module__ for cls in stages().values()}
    assert f"weighting.stages.{path.stem}" in registered


@pytest.mark.parametrize("name", sorted(tables.own_stages()))
def test_every_stage_says_its_formula(name):
    """A stage's docstring opens with a sentence and holds a formula, or its expansion."""
    cls = tables.own_stages()[name]
    text = inspect.cleandoc(cls.__doc__ or "")
    first, *rest = text.splitlines()
    assert re.match(r"[A-Z`].*[.;:,\w]$", first)
    formula = [line for line in rest if re.match(r"\S[^.]* = \S", line)]
    expansion = issubclass(cls, Sugar) and re.search(r"^Sugar: ", text, re.MULTILINE)
    assert formula or expansion, f"{name} has no formula"


@pytest.mark.parametrize("name", sorted(tables.own_stages()))
def test_every_stage_class_is_named_for_its_word(name):
    """The class of a stage is its word in capitals, and lives in the file of that name."""
    cls = tables.own_stages()[name]
    assert cls.__name__.lower() == name.replace("_", "")
    shared = {"token_scale": "mean_one", "mean": "pools", "sum": "pools", "max": "pools"}
    shared["tilted"] = "pools"
    assert cls.__module__ == f"weighting.stages.{shared.get(name, name)}"


@each_file
def test_no_branch_on_the_name_of_a_stage(path):
    """No code compares anything with the name of a stage."""
    words = set(tables.own_stages()) - {"max", "mean", "sum", "loss", "abs", "rank"}
    # A stage's own file and the list of signals may say its name; comparing with it is the sin.
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Compare):
            literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & words
            allowed = {
                "target_prob",
                "entropy",
                "error_norm",
                "mean_one",
                "running",
            }  # signals, and values of normalize: and scope:
            assert not literals - allowed, f"{path}:{node.lineno}: {ast.unparse(node)}"

"""Which rooms import which, read from the syntax trees, imports for types included."""

import ast
import functools
import inspect
import re
from pathlib import Path

import generators as tables
from looping import for_each

from weighting.contract import Sugar
from weighting.registry import stages

ROOT = Path(__file__).resolve().parent.parent
ROOM = ROOT / "weighting"
FILES = sorted(ROOM.rglob("*.py"))
FORBIDDEN = ("titan_integration", "torchtitan", "torch.distributed", "logging")
STAGE_FILES = sorted(p for p in (ROOM / "stages").glob("*.py") if p.name != "__init__.py")
BELOW_STAGES = {"contract", "registry", "schedules", "capped_simplex", "counter_rng", "errors"}
BELOW_STAGES |= {"columns"}
"""Rooms of the core that stages may use."""
BOTH = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("weighting", "titan_integration")
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Every file of core and shell, by module."""

each_file = for_each("path", FILES, ids=lambda p: str(p.relative_to(ROOM)))


@functools.cache
def parsed(path):
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


@functools.cache
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


def test_the_checks_of_architecture_see_the_files():
    """The laws below speak of the files of the core and of its stages."""
    assert len(FILES) >= 30
    assert len(STAGE_FILES) >= 20
    assert len(tables.own_stages()) >= 20


@each_file
def test_the_core_knows_no_trainer_no_ranks_and_no_log(path):
    """Nothing in weighting imports the integration, torchtitan, torch.distributed or logging.

    But weighting/ranks.py, and weighting/integrations, the shells of other hosts, which nothing
    else imports, know process groups.
    """
    found = imports(path)
    if path == ROOM / "ranks.py" or path.is_relative_to(ROOM / "integrations"):
        assert not reaches(found, "torchtitan")
        assert not reaches(found, "titan_integration")
        return
    assert not reaches(found, "weighting.integrations")
    assert not reaches(found, "weighting.ranks")
    assert not [room for room in FORBIDDEN if reaches(imports(path), room)]
    dotted = {ast.unparse(n) for n in ast.walk(parsed(path)) if isinstance(n, ast.Attribute)}
    assert not [name for name in dotted if name.startswith("torch.distributed")]


def test_no_module_imports_itself_by_way_of_others():
    """There are no circles of imports in core or shell; imports for types alone count too."""
    arrows = {}
    for module, path in BOTH.items():
        inside = {x for x in imports(path) if x in BOTH and x != module}
        # A package names what is in it; that is no circle by itself.
        arrows[module] = {x for x in inside if not module.startswith(f"{x}.")}
    done = set()

    def follow(module, above):
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(arrows[module]):
                follow(other, [*above, module])
            done.add(module)

    for module in sorted(arrows):
        follow(module, [])
    assert len(done) > 100


def test_the_functions_that_the_architecture_page_names_are_there():
    """Every `file.py:name` of docs/architecture.md is a function or class of that file."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lists = re.findall(r"`([\w/]+\.py):(\w[\w.]*)`((?:, `\w+`)*)", page)
    named = [(file, x) for file, name, more in lists for x in (name, *re.findall(r"\w+", more))]
    assert len(named) >= 30
    for file, name in named:
        paths = [x for x in BOTH.values() if str(x).endswith(f"/{file}")]
        assert paths, file
        names = {
            node.name
            for node in ast.walk(parsed(paths[0]))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert {*name.split(".")} <= names, f"{file}: {name}"


@each_file
def test_yaml_is_read_in_one_room(path):
    """Yaml is imported in language/yaml_nodes.py alone, which does import it."""
    assert reaches(imports(path), "yaml") == (path == ROOM / "language" / "yaml_nodes.py")


def test_names_of_run_files_and_of_columns_stand_in_one_place():
    """No other file spells out what a run leaves, or how a column is named among the signals."""
    # Of the shell, state and trainer still do so for columns.
    spelt = {"columns.": "weighting.columns"}
    names = ("metrics.jsonl", "validation.jsonl", "run.json", "mixture.yaml", "weighting/record")
    spelt |= dict.fromkeys((*names, ".running"), "weighting.runs.layout")
    elsewhere = ["titan_integration.state", "titan_integration.trainer"]
    elsewhere += ["titan_integration.observe", "titan_integration.config_registry"]
    for module, path in BOTH.items():
        constants = {n.value for n in ast.walk(parsed(path)) if isinstance(n, ast.Constant)}
        if not reaches({module}, "weighting") and any(reaches({module}, x) for x in elsewhere):
            constants -= {"columns."}
        found = [x for x in constants if isinstance(x, str) and spelt.get(x, module) != module]
        assert found == [], module


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
def test_stages_know_nothing_of_specs_and_what_is_made_of_them(path):
    """Stages and the rooms they use import those rooms and each other, and nothing else of ours."""
    room = path.relative_to(ROOM).parts[0].removesuffix(".py")
    if room not in {*BELOW_STAGES, "stages"}:
        return
    ours = {x.split(".")[1] for x in imports(path) if x.startswith("weighting.")}
    allowed = {*BELOW_STAGES, "saved"} | ({"stages"} if room == "stages" else set())
    assert ours <= allowed


@for_each("path", STAGE_FILES, ids=lambda p: p.stem)
def test_every_stage_file_is_imported(path):
    """stages/__init__.py imports every stage file, so that importing it registers every word."""
    found = imports(ROOM / "stages" / "__init__.py")
    assert f"weighting.stages.{path.stem}" in found
    registered = {cls.__module__ for cls in stages().values()}
    assert f"weighting.stages.{path.stem}" in registered


@for_each("name", sorted(tables.own_stages()))
def test_every_stage_says_its_formula(name):
    """A stage's docstring opens with a sentence and holds a formula, or its expansion."""
    cls = tables.own_stages()[name]
    text = inspect.cleandoc(cls.__doc__ or "")
    first, *rest = text.splitlines()
    assert re.match(r"[A-Z`].*[.;:,\w]$", first)
    formula = [line for line in rest if re.match(r"\S[^.]* = \S", line)]
    expansion = issubclass(cls, Sugar) and re.search(r"^Sugar: ", text, re.MULTILINE)
    assert formula or expansion, f"{name} has no formula"


@for_each("name", sorted(tables.own_stages()))
def test_every_stage_class_is_named_for_its_word(name):
    """The class of a stage is its word in capitals, and lives in the file of that name."""
    cls = tables.own_stages()[name]
    assert cls.__name__.lower() == name.replace("_", "")
    shared = {
        "token_scale": "mean_one",
        "mean": "pools",
        "sum": "pools",
        "max": "pools",
        "length": "pools",
    }
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
                "last",
                "ref_loss",
                "mean_one",
                "running",
            }  # signals, and values of normalize: and scope:
            assert not literals - allowed, f"{path}:{node.lineno}: {ast.unparse(node)}"

"""Every code block of the README and the pages runs, or says why not."""

import re
import shlex
import sys
from pathlib import Path

import click.testing
import pytest
from looping import for_each

import weighting as wt
from weighting import registry
from weighting.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from blocks import PAGES, ROOT, blocks

sys.path.pop(0)

BLOCKS = blocks()
ELSEWHERE = {
    "py": "tests/weighting/integrations/test_pages.py",
    "text": "a formula or a file of another program",
}
"""Languages whose blocks other tests run, or nobody can."""
TRAINERS = {"other-trainers", "fine-tuning"}
"""Pages whose `py` blocks train in other hosts."""
TRAINED_ELSEWHERE = {
    "README": "tests/titan_integration/test_newcomer.py",
    "tutorial": "tests/titan_integration/test_newcomer.py",
}
"""Pages whose blocks of commands that train are run as they stand by another test."""


def of(language):
    """Return the blocks of a language that are to be run, of which there must be some."""
    found = [block for block in BLOCKS if block.language == language and not block.reason]
    assert found, f"no {language} block left"
    return found


def named(block):
    """Return how a test of a block is called."""
    return f"{block.page}-{BLOCKS.index(block)}"


def test_every_language_of_a_block_is_known():
    """No block escapes by a language that no test here looks for."""
    known = {"yaml", "python", "console", "sh", *ELSEWHERE}

    assert {block.language for block in BLOCKS} <= known
    assert len(BLOCKS) >= 100
    assert not [x for x in BLOCKS if x.language == "py" and x.page not in TRAINERS]


def test_every_reason_is_said_before_a_block():
    """No mark is misspelt or stands where no block follows."""
    marks = sum(path.read_text(encoding="utf-8").count("not run:") for path in PAGES)

    assert marks == sum(block.reason is not None for block in BLOCKS)


@for_each("block", of("yaml"), ids=named)
def test_yaml_blocks_are_specs_that_build(block):
    """Each is a whole spec."""
    spec = wt.loads(block.text, source=block.page)
    tables = re.search(r"(?:table|dynamic_loading)\((.*?)\)", block.text)
    domains = re.findall(r"(\w+)=", tables[1]) if tables else ["a", "b"]

    assert wt.build(spec, domains=domains).needs is not None
    assert wt.loads(wt.dumps(spec, "yaml")) == spec


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_python_blocks_run(page, monkeypatch):
    """The Python blocks of a page run one after the other, and the tests they define pass."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))  # forget its stages after
    names = {}
    for block in of("python"):
        if block.page == page:
            exec(compile(block.text, f"{page}.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert bool(tests) == (page == "own-stages")
    for test in tests:
        test()
    if page == "training":
        assert names["my_config"]().weighting.spec == "specs/linupper.yaml"


@pytest.mark.parametrize("block", of("console"), ids=named)
def test_console_blocks_show_what_is_printed(block, monkeypatch):
    """Each command of a console block prints what the block shows."""
    monkeypatch.chdir(ROOT)
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    assert commands
    for command in commands:
        line, _, shown = command.partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "weighting"

        assert click.testing.CliRunner().invoke(main, arguments).output == shown


QUICK = {"check", "explain", "simulate", "list"}


@pytest.mark.parametrize("block", of("sh"), ids=named)
def test_shell_blocks_are_quick_or_run_elsewhere(block, monkeypatch):
    """Commands that only look are run; make's targets exist; a page that trains has its test."""
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert f"\n{arguments[0]}: " in makefile
        elif program == "weighting" and arguments[0] in QUICK:
            done = click.testing.CliRunner().invoke(main, arguments)
            assert done.exit_code == 0, done.output
        elif block.page == "contributing":
            assert program == "pre-commit"
        else:
            assert block.page in TRAINED_ELSEWHERE, f"{block.page}: {line} is not run"

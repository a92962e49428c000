"""The README tells the truth: its blocks run, its tables are complete."""

import re
import shlex
from pathlib import Path

import click.testing
import pytest

import weighting as wt
from weighting import registry
from weighting.cli import main
from weighting.language.find import shipped

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    """Return the README's code blocks of a language, of which there must be some."""
    found = [text for name, text in BLOCKS if name == language]
    assert found, f"no {language} block left"
    return found


def test_python_blocks_run(monkeypatch):
    """The Python blocks run one after the other, and the tests they define pass."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))  # forget its stages after
    names = {}
    for text in blocks("python"):
        exec(compile(text, "README.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
    assert names["my_config"]().weighting.spec == "specs/linupper.yaml"


def test_yaml_blocks_are_two_spellings_of_one_spec():
    """The first YAML block is arrow text, the second its lists, exactly as printed."""
    arrow, lists = blocks("yaml")
    spec = wt.loads(arrow)

    assert wt.loads(lists) == spec
    assert wt.dumps(spec, "yaml") == lists


@pytest.mark.parametrize("text", blocks("console"))
def test_console_blocks_show_what_is_printed(text, monkeypatch):
    """Each command of a console block prints what the block shows."""
    monkeypatch.chdir(ROOT)
    commands = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    assert commands
    for command in commands:
        line, _, shown = command.partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "weighting"
        found = click.testing.CliRunner().invoke(main, arguments)

        assert found.output == shown


def test_every_spec_has_a_row():
    """The table of specs names every file in specs/, and no other."""
    rows = re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)

    assert sorted(rows) == sorted(shipped())
    assert len(rows) >= 10


def test_every_config_function_is_named():
    """The README names every config function there is."""
    from titan_integration import config_registry  # noqa: PLC0415 - imports torchtitan

    functions = {name for name in vars(config_registry) if name.startswith("llama3_")}
    assert functions
    assert functions <= set(re.findall(r"`(llama3_\w+)`", README))

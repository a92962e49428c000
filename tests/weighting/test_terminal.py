"""In a terminal and in a pipe: no wide lines, no escape codes, and examples that can be typed."""

import io
import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import click
import click.testing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import weighting as wt
from weighting.cli import main
from weighting.language.find import shipped
from weighting.language.read import resolve
from weighting.language.words import words as words_of_the_language
from weighting.runs.record_reader import ABOUT

ROOT = Path(__file__).resolve().parent.parent.parent
PLAIN = {"NO_COLOR": "1", "TERM": "dumb"}


def printed(line, columns="80"):
    """Return the lines that a command prints, which must end well, escape codes and all."""
    words = shlex.split(line) if isinstance(line, str) else line
    runner = click.testing.CliRunner(env={**PLAIN, "COLUMNS": columns})
    # With colours, click would leave out none of the codes that a command prints.
    done = runner.invoke(main, words, prog_name="weighting", color=True)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\r" not in done.output
    return done.output.split("\n")


def wide(lines, *own):
    """Return the lines of more than 80 characters, but for those that hold a user's own text."""
    return [line for line in lines if len(line) > 80 and not any(text in line for text in own)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder with what the examples of all commands speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "a.txt").write_text("a text")
    for name in ("my.jsonl", "s.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "mine.yaml").write_text("version: 1\npipeline: uniform\n")
    units = [{"loss": 1.0 + i % 7, "entropy": 2.0, "domain": "web"} for i in range(30)]
    (tmp_path / "units.jsonl").write_text("\n".join(map(json.dumps, units)))
    return tmp_path


# What is printed. ---------------------------------------------------------------------------------

MANY = "linupper prop1 upper extremes linupper-gpt2 dro-kl"
LONG = "loss -> mean(sequence) -> normalize -> affine(scale=2, shift=1) -> temperature(0.5)"
QUICK = {
    "list": [],
    f"check {' '.join(shipped())}": [],
    f"check '{LONG}'": [LONG],
    f"simulate linupper --losses 1,2,3,5 --compare {MANY}": [],
    f"simulate linupper-gpt2 --losses units.jsonl --over 0:20000 --compare {MANY}": [],
    "simulate toremi mile group-dro --losses units.jsonl --over 0:99 --per token": [],
    f"simulate '{LONG}' focal --losses 1,2,3,5 --over 0:{10**9}": [],
    f"plot '{LONG}' linupper-gpt2 --out w.svg --losses units.jsonl --per token": [],
    "new-stage soft_cap": [],
    "schema --install specs_of_mine": [],
    f"replay run --spec {MANY} mile '{LONG}' rho-loss": [],
    "report run --out r.html": [],
}
"""Command lines, and the texts of a user's own that may make a line wide."""


@pytest.mark.parametrize("line", QUICK, ids=lambda line: line[:40])
def test_results_fit_80_columns(line, here):
    """Also where the terminal is wider, as a pipe may be read in another one."""
    write_run(here / "run")
    for columns in ("80", "200"):
        assert wide(printed(line, columns), *QUICK[line]) == []
        for made in ("soft_cap.py", "test_soft_cap.py"):
            (here / made).unlink(missing_ok=True)


def write_run(folder):
    """Write what a run leaves: a line of metrics for each of two steps, and a record of them."""
    spec = wt.loads("version: 1\nname: a-run-with-a-name\npipeline: normalize -> temperature(1)\n")
    said = {"name": spec.name, "hash": spec.hash, "spec": str(spec), "domains": ["code", "web"]}
    said |= {"every": 1, "ranks": 1, "rank_rows": 8, "batch_rows": 8}
    n = range(16)
    columns = {"step": [1 + i // 8 for i in n], "row": [i % 8 for i in n], "tokens": [64] * 16}
    columns |= {"domain": [["code", "web"][i % 2] for i in n], "mean_weight": [1.0] * 16}
    columns |= {"loss": [1.0 + i % 5 for i in n], "ref_loss": [1.0 + i % 3 for i in n]}
    table = pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(said)})
    out = io.BytesIO()
    pq.write_table(table, out)
    path = folder / "weighting" / "record" / "sequences-000001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(out.getvalue())
    lines = [{"step": i, "unweighted_loss": 2.0, "weighted_loss": 2.5} for i in (1, 2)]
    (folder / "weighting" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


# Help. --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_fits_80_columns(command):
    """Of the whole and of every command, whatever the terminal."""
    for columns in ("80", "200"):
        lines = printed([*command.split(), "--help"], columns)
        assert lines[0].startswith(f"Usage: weighting {command}".strip())
        assert wide(lines) == []


def examples(command):
    """Return the example lines of a command's help; one that ends in a backslash goes on."""
    lines = printed([command, "--help"])
    assert lines.count("  Examples:") == 1, "every command has examples, under one heading"
    block = takewhile(str.strip, lines[lines.index("  Examples:") + 1 :])
    return [" ".join(line.split()) for line in re.sub(r"\\\n", " ", "\n".join(block)).split("\n")]


@pytest.mark.parametrize("command", main.commands)
@pytest.mark.usefixtures("here")
def test_examples_can_be_typed(command):
    """Commands, options and arguments are there, specs exist, other flags are torchtitan's."""
    found = examples(command)
    assert any(line.startswith(f"weighting {command}") for line in found)
    for line in found:
        program, *words = shlex.split(re.split(r" (?:>>?|\|) ", line)[0])
        assert program == "weighting"
        check(words)


def check(words):
    """Have click read a command line as it would to run it, and look at what it read."""
    name, command, rest = main.resolve_command(click.Context(main), words)
    assert command is not None, f"no command {name}"
    rest = [str(x) for word in rest for x in (sorted(Path().glob(word)) if "*" in word else [word])]
    with command.make_context(name, rest) as context:
        given = dict(context.params)
    said = [*given.get("flags", ()), *given.get("words", ())]
    specs = [*takewhile(lambda word: not word.startswith("-"), given.get("words", ()))]
    specs = [] if name == "evaluate" else specs  # which takes models
    for key in ("spec", "specs", "more", "compare"):
        values = given.get(key) or ()
        specs += [values] if isinstance(values, str) else values
    known = {word.name for word in words_of_the_language()} if name == "explain" else set()
    for spec in specs:
        if spec not in known:
            resolve(spec)
    # An option of ours that is misspelt would be handed over.
    flags = [word for word in said if word.startswith("-") and word != "--"]
    assert [flag for flag in flags if not re.match(r"--\w+\.\w+$", flag)] == []


def test_an_example_that_cannot_be_typed_is_found(here):
    """Else the test above would not tell."""
    del here
    for line in (
        "chek linupper",
        "check linuper",
        "simulate linupper",
        "simulate linupper --loss 1,2",
        "simulate linupper --losses 1,2 --per document",
        "train linupper --rank 2",
        "tokens mile --checkpoint c --text b.txt",
        "tokens milee --checkpoint c --text a.txt",
    ):
        with pytest.raises((click.UsageError, wt.SpecError, AssertionError)):
            check(line.split())


def test_the_whole_shows_a_short_way_in():
    """What a spec can be, which commands there are, each with a line of its own."""
    text = "\n".join(printed("--help"))
    for form in ("specs/linupper.yaml", "linupper", "normalize -> linupper(alpha=1)"):
        assert form in text
    for name in main.commands:
        assert re.search(rf"^  {name} +[A-Z]\w", text, re.MULTILINE), name

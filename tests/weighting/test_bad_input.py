"""On bad input every command says what is wrong, where, and what to do, and leaves nothing behind.

What only one command can be given is beside its other tests; here are the gaps between them, and
what all commands say alike.
"""

import io
import json
import re
import shlex
from pathlib import Path

import click.testing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import weighting as wt
from weighting.cli import main
from weighting.runs.record_reader import ABOUT

KNOWING = [
    name
    for name, command in main.commands.items()
    if not command.context_settings.get("ignore_unknown_options")
]
"""Commands that know all of their flags; the others hand some over."""


def refused(words):
    """Return what a command says of bad input: it ends with status 2 and changes no file."""
    before = listing()
    done = click.testing.CliRunner().invoke(main, words, prog_name="weighting")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert not done.stdout, "an error is no result"
    assert listing() == before
    assert done.stderr.endswith("\n")
    assert done.stderr.strip()
    return done.stderr


def listing():
    """Return all that is below the working directory, with what is in it."""
    return {x: x.is_file() and x.read_bytes() for x in Path().rglob("*")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, where torchtitan is not called."""
    monkeypatch.chdir(tmp_path)

    def never(*called):
        pytest.fail(f"called {called}")

    for module in ("host", "replay"):
        monkeypatch.setattr(f"weighting.cli.{module}.from_host", never)
    return tmp_path


def put(stands):
    """Write files by name; None is a folder."""
    for name, content in stands.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def parquet(columns, about=None):
    """Return a Parquet file, with what it says of its run."""
    out, made = io.BytesIO(), pa.table(columns)
    if about is not None:
        made = made.replace_schema_metadata({ABOUT: json.dumps(about)})
    pq.write_table(made, out)
    return out.getvalue()


def half(data):
    """Return what is there of a file that was cut off."""
    return data[: len(data) // 2]


# A spec: every command that takes one says the same of it. ----------------------------------------

SPEC_WANTED = {
    "check": "check {}",
    "explain": "explain {}",
    "simulate": "simulate {} --losses 1,2",
    "beside": "simulate linupper --losses 1,2 --compare {}",
    "plot": "plot {} --out w.svg",
    "replay": "replay run --spec {}",
    "train": "train {}",
    "mixture": "train linupper --mixture {}",
    "tokens": "tokens {} --checkpoint c --text text",
    "compare": "compare uniform {}",
}
WRONG_SPECS = {
    "linuper": "linuper: no such file; did you mean 'linupper'?",
    "specs/linuper.yaml": "specs/linuper.yaml: no such file; did you mean 'linupper'?",
    "folder": "folder: is a directory; `weighting list` shows the specs there are",
    "empty.yaml": "empty.yaml:1:1: the file is empty; a spec starts with version: 1",
    "latin.yaml": "latin.yaml: not UTF-8 text (byte 11); save the spec as UTF-8",
    "binary.yaml": "binary.yaml:1:1: character 0x0000 is not allowed in YAML; remove it",
    "text": "text:1:1: unknown stage 'hello'; `weighting list` shows what there is\n"
    "    hello\n"
    "    ^^^^^",
    "temperature(1e999)": "<arrow>:1:13: tau of temperature: must be finite, not inf\n"
    "    temperature(1e999)\n"
    "                ^^^^^",
    "temperature(nan)": "<arrow>:1:13: tau of temperature: must be a number or a schedule, not "
    "'nan'; a statistic is median, mean, std, or mean+3*std with any number\n"
    "    temperature(nan)\n"
    "                ^^^",
}


@pytest.mark.parametrize("spec", WRONG_SPECS)
@pytest.mark.parametrize("command", SPEC_WANTED)
def test_a_wrong_spec_is_told_alike_by_all(command, spec):
    """With the place in it, and what was meant where that can be guessed."""
    put({"folder": None, "empty.yaml": "", "text": "hello"})
    put({"latin.yaml": "version: 1\n\xe9".encode("latin-1"), "binary.yaml": b"\0\1"})
    words = [word.replace("{}", spec) for word in SPEC_WANTED[command].split()]
    counted = "the spec cannot be used\n" if command == "check" else ""
    assert refused(words) == f"{WRONG_SPECS[spec]}\n{counted}"


# A file to write: every command that has --out. ---------------------------------------------------

OUT_WANTED = {
    "plot linupper": ".svg",
    "report run": ".html",
    "mix doremi": ".yaml",
    "score checkpoint": ".parquet",
    "compare uniform linupper": ".html",
}
ENDINGS = {".svg": ".png or .svg", ".html": ".html or .htm", ".parquet": ".parquet"}


@pytest.mark.parametrize("command", OUT_WANTED)
def test_an_out_that_cannot_be_is_told_at_once(command):
    """Before anything is read or computed."""
    suffix = OUT_WANTED[command]
    put({"file": "", f"folder{suffix}": None})
    for out, message in {
        f"no/a{suffix}": "no folder no; make it first",
        f"file/a{suffix}": "no folder file; make it first",
        f"/proc/nope/a{suffix}": "no folder /proc/nope; make it first",
        f"folder{suffix}": "is a folder; give the name of a file",
    }.items():
        assert refused([*command.split(), "--out", out]) == f"--out {out}: {message}\n"


@pytest.mark.parametrize("command", [x for x in OUT_WANTED if OUT_WANTED[x] in ENDINGS])
def test_an_out_of_another_kind_is_told(command):
    """So that a report never takes the place of a run's metrics."""
    put({"run/weighting/metrics.jsonl": "{}\n"})
    message = f"give it a name that ends in {ENDINGS[OUT_WANTED[command]]}\n"
    for out in ("a", "a.jpg", "run/weighting/metrics.jsonl"):
        assert refused([*command.split(), "--out", out]) == f"--out {out}: {message}"


@pytest.mark.parametrize("command", ["plot linupper", "report run"])
def test_a_disk_that_is_full_leaves_nothing(command, monkeypatch):
    """Nor a file of another name, and the message is of the name that was given."""
    put({"run/weighting/metrics.jsonl": METRICS})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = f"a{OUT_WANTED[command]}"
    message = f"--out {out}: No space left on device; choose another place\n"
    assert refused([*command.split(), "--out", out]) == message


@pytest.mark.parametrize(
    "command", ["train linupper", "mix doge --out m.yaml", "score c --out s.parquet"]
)
def test_data_that_is_not_there_is_told_at_once(command):
    """Where the name is that of a file; another may be one of Hugging Face's."""
    message = "--data my.jsonl: no such file; give one, or its folder\n"
    assert refused([*command.split(), "--data", "my.jsonl"]) == message


# Losses, runs and records. ------------------------------------------------------------------------

FORMS = 'give a .jsonl or .parquet file, or numbers such as "1,2,3,5"'
LOSSES = {
    "folder.parquet": (None, f"folder.parquet: is a directory; {FORMS}"),
    "file/a.jsonl": (..., f"file/a.jsonl: no such file; {FORMS}"),
    "a" * 300: (..., f"{'a' * 300}: no such file; {FORMS}"),
    "bytes.jsonl": (b"\x80\x81", "bytes.jsonl: not UTF-8 text (byte 0); save it as UTF-8"),
    "zeros.jsonl": (
        b"\0\0",
        'zeros.jsonl:1: not JSON (...); write an object such as {"loss": 2.5}',
    ),
    "long.jsonl": (
        '{"loss": 1}\n{"loss": %s}' % ("9" * 400),
        f"long.jsonl:2: loss is {'9' * 37}...; it must be finite, within float32",
    ),
    "step.jsonl": (
        '{"loss": 1, "step": 99999999999999999999}',
        "step.jsonl:1: step is 99999999999999999999; it must be a whole number from 0 to 1e9",
    ),
    "empty.parquet": (b"", "empty.parquet: cannot be read as parquet (...); write it anew"),
    "cut.parquet": (
        half(parquet({"loss": [1.0]})),
        "cut.parquet: cannot be read as parquet (...); write it anew",
    ),
    "OTHER.PARQUET": (parquet({"a": [1]}), "OTHER.PARQUET: no column loss, in nats; it has a"),
    "other.parquet": (parquet({"a": [1]}), "other.parquet: no column loss, in nats; it has a"),
    "none.parquet": (
        parquet({"loss": pa.array([], pa.float32())}),
        'none.parquet: no losses in it; every line is a unit, such as {"loss": 2.5}',
    ),
    "file": (
        "hello",
        "file: cannot read it, a name without suffix; give a file that ends in .jsonl or .parquet",
    ),
    "nan": (..., "nan: number 1: loss is nan; it must be finite, within float32"),
}


def alike(found, expected):
    """Tell whether a message is what was expected; (...) are another library's words."""
    pattern = re.escape(f"{expected}\n").replace(r"\(\.\.\.\)", r"\(.+\)")
    return re.fullmatch(pattern, found)


@pytest.mark.parametrize("losses", LOSSES, ids=lambda name: name[:20])
@pytest.mark.parametrize("command", ["simulate linupper", "plot linupper --out w.svg"])
def test_losses_that_cannot_be_read(command, losses):
    """Whatever reads them says the same, with the line or row."""
    content, message = LOSSES[losses]
    put({"file": ""})
    put({losses: content} if content is not ... else {})
    found = refused([*command.split(), "--losses", losses])
    assert alike(found, message), found


SPEC = wt.loads("version: 1\npipeline: normalize -> temperature(1)\n")
SAID = {"name": SPEC.name, "hash": SPEC.hash, "spec": str(SPEC), "domains": ["a", "b"]}
SAID |= {"every": 1, "ranks": 1, "rank_rows": 2, "batch_rows": 2}
COLUMNS = {"step": [1, 1], "row": [0, 1], "domain": ["a", "b"], "tokens": [8, 8]}
COLUMNS |= {"mean_weight": [1.0, 1.0], "loss": [1.0, 2.0]}
RECORD = parquet(COLUMNS, SAID)
FOLDER, FIRST = "run/weighting/record", "run/weighting/record/sequences-000001.parquet"

NO_RECORD = "give the --dump_folder of a run with --weighting.record every=10"
RECORDS = {
    "there is none": ({}, f"run: no such folder; {NO_RECORD}"),
    "a file": ({"run": ""}, f"run: is a file; {NO_RECORD}"),
    "an empty folder": ({"run": None}, f"run: no record in weighting/record; {NO_RECORD}"),
    "an empty record": ({FOLDER: None}, f"run: no record in weighting/record; {NO_RECORD}"),
    "a record that is a file": ({FOLDER: ""}, f"run: no record in weighting/record; {NO_RECORD}"),
    "no bytes": ({FIRST: b""}, "..."),
    "cut off": ({FIRST: half(RECORD)}, "..."),
    "text": ({FIRST: "hello"}, "..."),
    "a folder": ({FIRST: None}, "..."),
    "other columns": ({FIRST: parquet({"a": [1]}, SAID)}, "no column step"),
    "no rows": ({FIRST: parquet(pa.table(COLUMNS)[:0].to_pydict(), SAID)}, "no rows"),
    "words": (
        {FIRST: parquet({**COLUMNS, "loss": ["x", "y"]}, SAID)},
        "column loss has no numbers",
    ),
    "lists": (
        {FIRST: parquet({**COLUMNS, "loss": [[1.0], [2.0]]}, SAID)},
        "column loss has no numbers",
    ),
    "parts of tokens": (
        {FIRST: parquet({**COLUMNS, "tokens": [1.5, 2.0]}, SAID)},
        "column tokens has no whole numbers",
    ),
    "gaps": (
        {FIRST: parquet({**COLUMNS, "mean_weight": [1.0, None]}, SAID)},
        "column mean_weight has gaps",
    ),
    "another domain": (
        {FIRST: parquet({**COLUMNS, "domain": ["a", "zz"]}, SAID)},
        "a domain zz that its run did not have",
    ),
    "numbers for domains": (
        {FIRST: parquet({**COLUMNS, "domain": [1, 1]}, SAID)},
        "a domain 1 that its run did not have",
    ),
    "nothing said": ({FIRST: parquet(COLUMNS)}, "it does not say of which run it is"),
    "a list said": ({FIRST: parquet(COLUMNS, [1])}, "it does not say of which run it is"),
    "something else said": (
        {FIRST: parquet(COLUMNS, {"domains": []})},
        "what it says of its run is not complete",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be_replayed(name):
    """No record, or a file that is damaged or of something else."""
    stands, message = RECORDS[name]
    put(stands)
    if FIRST in stands:
        message = f"{FIRST}: no file of a record, or a damaged one ({message}); take it away"
    found = refused(["replay", "run", "--spec", "prop1"])
    assert alike(found, message), found


def test_a_damaged_file_beside_a_sound_one_is_named():
    """The sound ones can be replayed once it is away."""
    second = FIRST.replace("1.", "2.")
    put({FIRST: RECORD, second: half(RECORD)})
    message = f"{second}: no file of a record, or a damaged one (...); take it away"
    assert alike(refused(["replay", "run"]), message)
    Path(second).unlink()
    assert click.testing.CliRunner().invoke(main, ["replay", "run"]).exit_code == 0


ELSEWHERE = (
    "nothing is left to replay; weighting simulate reads the tokens that "
    "--weighting.record every=10,tokens=64 writes\n"
)


def test_specs_that_all_ask_for_what_was_not_recorded():
    """Each is named with its reason; were one left, it would be replayed."""
    put({FIRST: RECORD})
    excess = "excess_loss -> mean(sequence) -> temperature(1)"
    assert refused(["replay", "run", "--spec", "mile", excess]) == (
        "mile is not replayed: it weighs per token, and sequences were recorded\n"
        "excess_loss -> mean… is not replayed: it reads ref_loss, which the run's own spec did "
        f"not; record one that does\n{ELSEWHERE}"
    )


def test_specs_that_read_what_a_file_does_not_have():
    """Simulate and plot name all of them at once."""
    put({"a.jsonl": '{"loss": 1}\n'})
    lacking = [
        f"{name} reads {what}, and a.jsonl has loss; give a file with {it}, a value for each unit\n"
        for name, what, it in (
            ("mile", "entropy", "it"),
            ("doremi-proxy", "domain, ref_loss", "them"),
        )
    ]
    for command in ("simulate mile doremi-proxy", "plot mile doremi-proxy --out w.svg"):
        assert refused([*command.split(), "--losses", "a.jsonl"]) == "".join(lacking)


LINE = '{"step": %d, "unweighted_loss": 2.0, "weighted_loss": 2.5}\n'
METRICS = "".join(LINE % step for step in (1, 2))
FACTS = {
    "spec": {"name": "a", "hash": "0", "text": str(SPEC)},
    "config": {},
    "starts": [{"step": 1}],
}
ABOUT_RUN = json.dumps(FACTS)
LOG, SELF = "run/weighting/metrics.jsonl", "run/weighting/run.json"

NO_RUN = f"run: not the folder of a run, {LOG} is not there; give its --dump_folder"
NOT_SAID = f"{SELF}: does not say what the run is; remove it to do without"
UNREAD = "not a line of metrics; take it out"
UNLOGGED = f"{LOG}: nothing was logged; a run logs every --metrics.log_freq steps"
RUNS = {
    "there is none": ({}, "run: no such folder; give the --dump_folder of a run"),
    "a file": ({"run": ""}, NO_RUN),
    "an empty folder": ({"run": None}, NO_RUN),
    "a run that only recorded": ({FIRST: RECORD}, NO_RUN),
    "metrics that are a folder": ({LOG: None}, NO_RUN),
    "no metrics": ({LOG: ""}, UNLOGGED),
    "a torn line alone": ({LOG: LINE[:20]}, UNLOGGED),
    "no losses": ({LOG: '{"step": 1}\n'}, UNLOGGED),
    "garbage": ({LOG: METRICS + "?!\n" + LINE % 3}, f"{LOG}:3: {UNREAD}"),
    "bytes": ({LOG: b"\x80\x00\xff\n" + METRICS.encode()}, f"{LOG}:1: {UNREAD}"),
    "words for numbers": (
        {LOG: '{"step": 1, "unweighted_loss": "2"}\n' + METRICS},
        f"{LOG}:1: {UNREAD}",
    ),
    "no step": ({LOG: '{"unweighted_loss": 2}\n' + METRICS}, f"{LOG}:1: {UNREAD}"),
    "a step that is none": ({LOG: '{"step": NaN}\n' + METRICS}, f"{LOG}:1: {UNREAD}"),
    "a huge number": (
        {LOG: '{"step": 1, "a": %s}\n' % ("9" * 400) + METRICS},
        f"{LOG}:1: {UNREAD}",
    ),
    "deep": ({LOG: "[" * 10**5 + "\n" + METRICS}, f"{LOG}:1: {UNREAD}"),
    "validations": (
        {LOG: METRICS, "run/weighting/validation.jsonl": "?\n?\n"},
        f"run/weighting/validation.jsonl:1: {UNREAD}",
    ),
    **{
        f"run.json, {what}": ({LOG: METRICS, SELF: text}, NOT_SAID)
        for what, text in {
            "empty": "",
            "cut off": half(ABOUT_RUN),
            "text": "hello",
            "bytes": b"\x80\xff",
            "deep": "[" * 10**5,
            "a list": "[1]",
            "null": "null",
            "of another shape": '{"spec": {"name": 1}}',
            "no starts": json.dumps({**FACTS, "starts": []}),
            "a map of starts": json.dumps({**FACTS, "starts": {"step": 1}}),
            "a list of versions": json.dumps({**FACTS, "starts": [{"versions": [1]}]}),
        }.items()
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_reported(name):
    """No run, nothing logged, or a file that is damaged; beside a sound run as well."""
    stands, message = RUNS[name]
    put({**stands, "sound/weighting/metrics.jsonl": METRICS})
    assert refused(["report", "run", "--out", "r.html"]) == f"{message}\n"
    assert refused(["report", "sound", "run", "--out", "r.html"]) == f"{message}\n"


def test_what_stands_in_those_tables_can_be_used_when_sound():
    """Else the tables would not tell what is wrong with the others."""
    put({FIRST: RECORD, LOG: METRICS, SELF: ABOUT_RUN, "a.parquet": parquet({"loss": [1.0]})})
    for line in (
        "replay run --spec prop1",
        "report run --out r.html",
        "simulate upper --losses a.parquet",
    ):
        done = click.testing.CliRunner().invoke(main, line.split())
        assert done.exit_code == 0, done.output
    assert "No run.json" not in Path("r.html").read_text()


# Folders to write into. ---------------------------------------------------------------------------

VSCODE = "to save it alone: weighting schema > weighting.schema.json"
SOFT = "a stage name is a lower-case identifier, not"
FOLDERS = {
    "schema --install file/specs": f"file/specs: Not a directory; {VSCODE}",
    "schema --install .vscode/specs": f".vscode: Not a directory; {VSCODE}",
    "new-stage soft_cap --dir /proc": "--dir /proc: nothing was written: No such file or "
    "directory; choose another",
    "new-stage ''": f"{SOFT} ''; write one such as soft_cap",
    "new-stage ../soft_cap": f"{SOFT} '../soft_cap'; write soft_cap",
    f"new-stage {'a' * 300}": "a stage name has at most 64 characters, not 300; shorten it",
}


@pytest.mark.parametrize("line", FOLDERS, ids=lambda line: line[:40])
def test_folders_that_cannot_be_written_to(line):
    """What is there in their place is named, and nothing is begun."""
    put({"file": ""} if ".vscode" not in line else {".vscode": ""})
    assert refused(shlex.split(line)) == f"{FOLDERS[line]}\n"


# The command line itself: click says what is wrong, in its own words. -----------------------------

USAGE = {
    "check": ["Missing argument 'SPEC...'"],
    "explain": ["Missing argument 'SPEC'"],
    "explain linupper --steps 0": ["'--steps'", "1<=x<=1000000000"],
    f"explain linupper-gpt2 --steps {10**20}": ["'--steps'", "1<=x<=1000000000"],
    "explain linupper upper": ["unexpected extra argument (upper)"],
    "simulate": ["Missing argument 'SPEC'"],
    "simulate linupper": ["Missing option '--losses'"],
    f"simulate linupper --losses 1,2 --step {10**20}": ["'--step'", "0<=x<=1000000000"],
    f"simulate linupper --losses 1,2 --over 0:{'9' * 5000}": ["'--over'", "as in 0:20000"],
    f"plot linupper --out w.svg --steps {'9' * 5000}": ["'--steps'", "as in 1,500,2000"],
    "simulate linupper --losses 1,2 --per x": ["'x' is not one of 'sequence', 'token'"],
    "simulate linupper --los 1,2": ["--los", "--losses"],
    f"tokens mile --checkpoint c --text file --step {10**20}": ["'--step'", "0<=x<=1000000000"],
    "plot": ["Missing argument 'SPEC...'"],
    "plot linupper": ["Missing option '--out'"],
    "plot linupper --out w.svg --kind x": ["'x' is not one of 'weights'"],
    "replay": ["Missing argument 'RUN_FOLDER'"],
    "replay run --steps 3": ["--steps", "--spec"],
    "report": ["Missing argument 'RUN...'"],
    "report run": ["Missing option '--out'"],
    "new-stage": ["Missing argument 'NAME'"],
    "new-stage soft_cap --dir none": ["'--dir'", "'none' does not exist"],
    "new-stage soft_cap --dir file": ["'--dir'", "'file' is a file"],
    "schema --install file": ["'--install'", "'file' is a file"],
    "completion": ["Missing argument", "bash"],
    "completion tcsh": ["'tcsh' is not one of 'bash', 'zsh', 'fish'"],
    "train": ["Missing argument 'SPEC'"],
    "train linupper --ranks 0": ["'--ranks'", "x>=1"],
    "mix": ["Missing argument 'METHOD'"],
    "mix doremi": ["Missing option '--out'"],
    "mix doremi --out m.yaml --steps 0": ["'--steps'", "x>=1"],
    "score": ["Missing argument 'CHECKPOINT'"],
    "tokens mile": ["Missing option '--checkpoint'"],
    "tokens mile --checkpoint c": ["Missing option '--text'"],
    "tokens mile --checkpoint c --text none": ["'--text'", "'none' does not exist"],
    "tokens mile --checkpoint c --text folder": ["'--text'", "'folder' is a directory"],
    "list mean x": ["unexpected extra argument (x)"],
    "doctor x": ["unexpected extra argument (x)"],
    **{f"{name} --bogus": ["--bogus"] for name in KNOWING},
    "chek": ["No such command 'chek'", "check"],
    "--bogus": ["--bogus"],
}


@pytest.mark.parametrize("line", USAGE, ids=lambda line: line[:60])
def test_a_command_line_that_is_wrong_is_said_to_be(line):
    """With the option or argument, what is near it, and where there is more help."""
    put({"file": "hello", "folder": None})
    found = refused(line.split())
    usage, _, error = found.partition("\nError: ")
    assert usage.startswith("Usage: weighting ")
    first = line.split()[0]
    asked = f"weighting {first}" if first in main.commands else "weighting"
    assert f"Try '{asked} --help' for help." in usage
    assert [word for word in USAGE[line] if word not in error] == [], error


def test_what_a_user_typed_moves_no_cursor():
    """Escape codes and carriage returns in names are question marks in messages."""
    for line in ("check {}", "explain {}", "simulate upper --losses {}", "replay {}"):
        found = refused([word.replace("{}", "a\x1b[31m\rb") for word in line.split()])
        assert "a?[31m?b: no such f" in found
        assert found.replace("\n", "").isprintable()

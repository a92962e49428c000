"""`weighting train` as a user runs it: flags, results, and errors that end well."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import click.testing
import pytest
from faulty import Run
from runs import environment
from warm import weighting

from titan_integration.commands import train as launch
from titan_integration.host import flags as host_flags
from titan_integration.trainer.config import WeightingConfig
from weighting.cli import main
from weighting.runs.files import read_lines


def train(*arguments, timeout=240, cwd=None):
    """Return what `weighting train` did."""
    return weighting("train", *arguments, timeout=timeout, cwd=cwd)


@pytest.mark.processes
def test_a_stage_of_ones_own_trains_on_data_of_ones_own(tmp_path):
    """A plugin's stage and a jsonl file train; the table and the metrics file tell of it."""
    (tmp_path / "sharpening_stages.py").write_text(
        "import weighting as wt\n"
        "@wt.stage('sharpen')\n"
        "class Sharpen(wt.Shape):\n"
        "    '''Multiply the score.'''\n"
        "    by: wt.PositiveNumber = 2.0\n"
        "    def apply(self, x, scope):\n"
        "        return x * self.by(scope.step)\n"
    )
    spec = tmp_path / "sharp.yaml"
    spec.write_text(
        "version: 1\nname: sharp\nplugins: [sharpening_stages]\n"
        "factors:\n"
        "  domain: table(prose=2, verse=1) -> mean_one\n"
        "  instance: normalize -> sharpen(by=2) -> temperature(0.4) -> clamp(1.5/n)\n"
    )
    lines = [
        {"text": f"Line {i} of {kind}. " * 40, "domain": kind}
        for i in range(40)
        for kind in ("prose", "verse")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--training.steps=10", "--training.seq_len=64", f"--dump_folder={tmp_path / 'out'}"]
    flags += ["--module=small", "--config=debugmodel"]
    done = train(str(spec), "--allow-plugins", "--data", str(data), *flags, cwd=tmp_path)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = tmp_path / "out" / "weighting" / "metrics.jsonl"
    assert f"\nmetrics: {metrics}\n" in done.stdout
    assert f"report {tmp_path / 'out'} --out" in done.stdout.splitlines()[-1]
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in found] == [*range(1, 11)]
    for line in found:
        assert line["instance/max"] <= 1.5 + 1e-5
        assert line["instance/capped_frac"] > 0
        assert line["domain/max"] > line["domain/min"] > 0
        assert line["weighted_loss"] != line["unweighted_loss"]
    assert "Domains: prose, verse" in done.stdout
    assert f"Plugins: sharpening_stages ({tmp_path / 'sharpening_stages.py'})" in done.stdout
    assert "\x1b" not in done.stdout, "no colour codes in a pipe"


SHADOWS = ("torch", "torchtitan", "numpy", "json", "random", "sched", "weighting", "tyro", "yaml")
"""Modules that a file in the working folder is called like; the plugin is the first to import
`sched`."""


@pytest.fixture
def hostile(tmp_path):
    """Return a folder with files that must not be imported, a plugin, a config and data."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py was imported')\n")
    (tmp_path / "own_stages.py").write_text(
        "import random, sched, torch\n"
        "import weighting as wt\n"
        "@wt.stage('triple')\n"
        "class Triple(wt.Shape):\n"
        "    def apply(self, x, scope):\n"
        "        return x * 3\n"
    )
    (tmp_path / "own_configs.py").write_text(
        "from titan_integration.config_registry import llama3_proxy\n"
        "def small():\n"
        "    config = llama3_proxy()\n"
        "    config.training.seq_len = 64\n"
        "    config.training.local_batch_size = 2\n"
        "    config.training.steps = 2\n"
        "    return config\n"
        "def impossible():\n"
        "    from titan_integration import with_weighting\n"
        "    from torchtitan.models.flux.config_registry import flux_debugmodel\n"
        "    return with_weighting(flux_debugmodel())\n"
    )
    spec = "version: 1\nplugins: [own_stages]\npipeline: normalize -> triple -> temperature(1)\n"
    (tmp_path / "own.yaml").write_text(spec)
    names = ("a\x1b[31mb\ne\u202ef\x85", "plain")
    lines = [{"text": "A line of text. " * 40, "domain": name} for name in names * 20]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


QUICK = (["check"], ["simulate", "--losses", "1,2,3"], ["explain"])
COLD = """
import json, sys
from weighting.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print("status", end.code, flush=True)
"""
"""Several commands in one process; it is started as their script starts it, without its folder."""


@pytest.mark.processes
def test_files_called_like_modules_are_not_run(hostile):
    """Plugin, config and data of the working folder are found; nothing else of it is imported.

    Python and the rank are started afresh, where every import is still to come.
    """
    quick = [[words[0], "own.yaml", *words[1:], "--allow-plugins"] for words in QUICK]
    module = ["--module", "own_configs", "--config", "small", "--ranks", "1"]
    train = ["train", "own.yaml", "--allow-plugins", "--data", "data.jsonl", *module]
    train += ["--dump_folder=out", "--validator.enable", "--validator.steps=1"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", COLD, json.dumps([*quick, train])],
        env=environment(),
        cwd=hostile,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.count("status 0\n") == len(quick) + 1, done.stdout + done.stderr[-3000:]
    assert "was imported" not in done.stdout + done.stderr
    explained, _, trained = done.stdout.rpartition("status 0\n")[0].rpartition("status 0\n")
    assert "own_stages.py" in explained.rpartition("status 0\n")[2]
    assert "Plugins: own_stages" in trained
    # What a terminal would obey in a domain's name is a question mark.
    assert "Domains: a?[31mb?e?f?, plain" in trained
    assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr)
    assert (hostile / "out" / "weighting" / "metrics.jsonl").exists()


@pytest.mark.processes
def test_an_error_of_a_config_function_is_one_message(hostile):
    """A config that cannot be weighted ends with status 2 and no traceback."""
    module = ["--module", "own_configs", "--config", "impossible", "--ranks", "1"]
    done = train("linupper", *module, cwd=hostile)
    assert done.returncode == 2
    assert "error: cannot weight torchtitan.models.flux.trainer.FluxTrainer.Config" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.processes
def test_corrupt_data_is_one_error_on_one_rank_and_status_2(tmp_path):
    """Two ranks on a corrupt parquet file end with one message, no traceback, status 2."""
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1" + bytes(range(256)) * 4)
    done = train("linupper", "--ranks", "2", "--data", str(bad), f"--dump_folder={tmp_path}")

    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert output.count("error: ") == 1
    assert f"error: {bad}: not a readable Parquet file" in output
    assert "Traceback" not in output


@pytest.mark.processes
def test_data_without_domains_is_one_error_for_a_spec_that_weighs_them(tmp_path):
    """Group DRO on text without a domain column ends before training, on two ranks, status 2."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"Line {i}. " * 40}) for i in range(40)))
    out = tmp_path / "out"
    flags = ["--training.steps=2", "--training.seq_len=64", f"--dump_folder={out}"]
    done = train("group-dro", "--ranks", "2", "--data", str(data), *flags)

    assert done.returncode == 2, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert output.count("error: ") == 1
    assert "the data has one, 'all', so that every weight would be 1" in output
    assert "--dataloader.domain_column" in output
    assert "Traceback" not in output
    assert not (out / "weighting" / "metrics.jsonl").exists()


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "times"), [(1, 1), (2, 0)])
def test_a_run_says_once_that_its_batches_have_one_sequence(tmp_path, ranks, times):
    """One row a batch: every weight is 1, which is logged once; with a row on another rank not."""
    flags = [
        "--training.local_batch_size=1",
        "--training.global_batch_size=2",
        "--training.steps=3",
    ]
    flags += ["--metrics.log_freq=1", f"--dump_folder={tmp_path}"]
    run = Run(tmp_path / "log", ranks, "--weighting.spec=linupper", *flags)
    status, said = run.ended(300)

    assert status == 0, said[-3000:]
    sentence = "linupper: pipeline compares sequences with each other, and every batch so far had"
    assert said.count(sentence) == times
    assert said.count("--training.local_batch_size") == times
    lines = read_lines(tmp_path / "weighting" / "metrics.jsonl")
    assert (max(line["weight/max"] for line in lines) > 1) == (ranks == 2)


@pytest.mark.processes
def test_a_run_says_once_that_its_batches_have_one_document_or_domain(tmp_path):
    """Short rows of one domain each, one a batch: documents and domains have none beside them."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "version: 1\nname: alone\nfactors:\n"
        "  a: max(document) -> temperature(1)\n  b: mean(domain) -> temperature(1)\n"
    )
    flags = ["--training.local_batch_size=1", "--training.steps=2", "--dataloader.rows=drawn"]
    flags += ["--metrics.log_freq=1", f"--dump_folder={tmp_path}"]
    status, said = Run(tmp_path / "log", 1, f"--weighting.spec={spec}", *flags).ended(300)

    assert status == 0, said[-3000:]
    for factor, level in (("a", "document"), ("b", "domain")):
        assert said.count(f"alone: {factor} compares {level}s with each other") == 1


@pytest.mark.processes
def test_an_error_of_another_rank_alone_is_shown_once(tmp_path):
    """What the second rank alone finds wrong is said by the first, whose output is shown."""
    (tmp_path / "lonely_stages.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    raise RuntimeError('only here')\n"
    )
    spec = "version: 1\nplugins: [lonely_stages]\npipeline: normalize -> temperature(1)\n"
    (tmp_path / "lonely.yaml").write_text(spec)
    (tmp_path / "lonely_configs.py").write_text(
        "import sys, small\n"
        "def debugmodel():\n"
        "    sys.modules.pop('lonely_stages', None)  # ranks are forked from who has imported it\n"
        "    return small.debugmodel()\n"
    )
    flags = ["--ranks", "2", "--training.steps=2", "--training.seq_len=64", "--dump_folder=out"]
    flags += ["--module=lonely_configs", "--config=debugmodel"]
    done = train("lonely.yaml", "--allow-plugins", *flags, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    error = next(line for line in done.stderr.splitlines() if "error: " in line)
    assert error.startswith("[rank0]:error: rank 1 on ")
    assert "only here" in error
    assert "Traceback" not in done.stderr
    assert "[rank1]" not in done.stdout


@pytest.mark.processes
def test_an_interrupt_ends_ranks_without_a_word(tmp_path):
    """As Ctrl-C in a terminal: no traceback of where it met them, and the status a shell gives."""
    (tmp_path / "waits.py").write_text(
        "import signal\nprint('ready', flush=True)\nsignal.pause()\n"
    )
    code = "import sys; from titan_integration.commands.train import on_ranks; "
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.exit(on_ranks(2, 'waits', []))"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert "ready" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.endswith("stopped by SIGINT\n")
    assert "Traceback" not in err


@pytest.mark.processes
def test_an_unknown_config_is_said_at_once():
    """A config function that does not exist is named with the nearest one, before torchrun."""
    done = train("linupper", "--config", "llama3_9b", timeout=60)

    assert done.returncode == 2
    assert "no config function 'llama3_9b'; did you mean 'llama3_8b'?" in done.stderr
    assert "llama3_405b" in done.stderr


def options(**more):
    """Return what `weighting train mile` is given, and more."""
    given = {"module": "titan_integration", "config": "llama3_debugmodel"}
    return launch.Options(spec="mile", name="mile", **given, **more)


def test_users_flags_win_over_defaults():
    """What a user passes on is not given twice, in either spelling, and comes last."""
    flags = launch.run_flags(options(flags=["--training.steps=7", "--dump-folder", "here"]))

    assert flags[-3:] == ["--training.steps=7", "--dump-folder", "here"]
    assert "--training.steps" not in flags
    assert "--dump_folder" not in flags
    assert launch.value_of(flags, "--dump_folder") == "here"


def test_a_path_and_a_name_of_data_go_where_they_belong(tmp_path):
    """Data that exists is a path; anything else is a Hugging Face name."""
    names = (str(tmp_path), "dataset_path"), ("allenai/c4", "dataset"), ("", "dataset_path")
    for data, flag in names:
        flags = launch.run_flags(options(data=data))
        assert flags[flags.index(data) - 1] == f"--dataloader.{flag}"


# Words and flags ----------------------------------------------------------------------------------


def given_to(monkeypatch, module, *arguments):
    """Return the options that a command calls its module with."""
    called = {}
    main_of = f"titan_integration.commands.{module}.main"
    monkeypatch.setattr(main_of, lambda **options: called.update(options) or 0)
    done = click.testing.CliRunner().invoke(main, [module, *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return called


def test_short_words_of_train_are_flags_of_torchtitan(monkeypatch, tmp_path):
    """A flag that is written out comes after them, and wins."""
    words = ["uniform", "--steps", 7, "--seed=3", "--reference", "ema:0.9"]
    more = ["--training.steps=9", "--", "--metrics.log_freq", "1"]
    for folder in ("--out", "--dump_folder"):
        given = given_to(monkeypatch, "train", *words, folder, tmp_path, *more)
        assert [*given["flags"]] == [
            "--training.steps=7",
            "--debug.seed=3",
            f"--dump_folder={tmp_path}",
            "--weighting.reference=ema:0.9",
            "--training.steps=9",
            "--metrics.log_freq",
            "1",
        ]
        assert launch.value_of(given["flags"], "--training.steps") == "9"
    assert [*given_to(monkeypatch, "train", "uniform")["flags"]] == []


def test_commands_share_their_words_and_old_spellings_work(monkeypatch, tmp_path):
    """--dump_folder is where runs go, --out what is written, --steps and --seed are numbers."""
    for folder in ("--dump_folder", "--folder"):
        given = given_to(monkeypatch, "compare", "uniform", "mile", folder, "runs", "--seed=2")
        assert (given["folder"], given["seed"], given["steps"]) == ("runs", 2, None)
        words = ["doge", "--out=m.yaml", folder, "runs", "--seed=2", "--steps=5"]
        given = given_to(monkeypatch, "mix", *words)
        assert (given["folder"], given["seed"], given["steps"]) == ("runs", 2, 5)
    (tmp_path / "a.txt").write_text("a")
    for page in ("--out", "--html"):
        words = ["mile", "--checkpoint=c", f"--text={tmp_path / 'a.txt'}", page, "a.html"]
        assert given_to(monkeypatch, "tokens", *words)["html"] == "a.html"


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["train", "uniform", "--stpes", "3"], "no flag '--stpes'; did you mean '--steps'?"),
        (["train", "uniform", "--referense=a"], "'--referense'; did you mean '--reference'?"),
        (["compare", "uniform", "mile", "--sede=3"], "'--sede'; did you mean '--seed'?"),
        (["score", "c", "--out=a.parquet", "--rank=3"], "'--rank'; did you mean '--ranks'?"),
    ],
)
def test_a_misspelt_option_is_one_line_at_once(words, near, monkeypatch):
    """Torchtitan is not imported for that, and says nothing."""
    monkeypatch.setattr("weighting.cli.host.from_host", lambda *_: pytest.fail("called"))
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert near in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--training.stepz=3", "no flag '--training.stepz'; did you mean '--training.steps'?"),
        ("--weighting.recrod", "no flag '--weighting.recrod'; did you mean '--weighting.record'?"),
        ("--log_freq=3", "no flag '--log_freq'; did you mean '--metrics.log_freq'?"),
        ("--lr=3", "no flag '--lr'; did you mean '--optimizer.param_groups.0.optimizer_kwargs.lr'"),
        ("--batch_size=3", "no flag '--batch_size'; did you mean '--training.local_batch_size'?"),
        ("--trianing.steps=3", "no flag '--trianing.steps'; did you mean '--training.steps'?"),
        ("--training.lenght=3", "no flag '--training.lenght'; weighting train --help-all lists"),
        ("--what.ever=3", "no flag '--what.ever'; weighting train --help-all lists them"),
    ],
)
def test_a_misspelt_flag_of_torchtitan_is_one_line(flag, message, capsys):
    """Not the host's box of them; other mistakes are the host's to tell."""
    base = ["--module=titan_integration", "--config=llama3_debugmodel"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        host_flags.parse([*base, "--no-compile.enable", "--training.steps=3", flag, "3"])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        host_flags.parse([*base, "--training.steps=many"])
    assert "many" in capsys.readouterr().err


def test_help_has_groups_and_tells_where_the_hosts_flags_are(monkeypatch):
    """The flags of weighting that it names are there; --help-all needs no spec and no ranks."""
    text = click.testing.CliRunner().invoke(main, ["train", "--help"]).output
    for title in ("On which data:", "Where results go:", "Torchtitan's flags, of weighting:"):
        assert f"\n{title}\n" in text
    named = re.findall(r"--weighting\.(\w+)", text)
    fields = {field.name for field in dataclasses.fields(WeightingConfig)}
    assert named
    assert fields >= {*named}
    assert "--help-all" in text

    asked = []
    monkeypatch.setattr(launch, "print_help", lambda *given: asked.append(given))
    words = ["train", "--config", "llama3_8b", "--help-all"]
    assert click.testing.CliRunner().invoke(main, words).exit_code == 0
    assert asked == [("titan_integration", "llama3_8b")]


def test_all_flags_of_the_host_are_shown_without_rank_prefixes(capsys):
    """As the host prints them, of the config that was asked for."""
    with pytest.raises(SystemExit, match="0"):
        launch.print_help("titan_integration", "llama3_debugmodel")
    text = capsys.readouterr().out
    assert "--training.steps" in text
    assert "--weighting.record" in text
    assert "[rank0]" not in text

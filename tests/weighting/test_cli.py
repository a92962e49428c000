"""The command line: what it prints, and how it ends."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import click.testing
import pytest
import torch
from looping import for_each

import weighting as wt
from weighting.build import plan_of
from weighting.build.domains import proportions
from weighting.cli import main
from weighting.language.find import shipped
from weighting.language.words import words
from weighting.loss.path import Sizes, path_of
from weighting.registry import stages
from weighting.schedules import SCHEDULES


def run(*arguments):
    """Return what a command did."""
    return click.testing.CliRunner().invoke(main, arguments)


QUICK = """
import sys
import click.testing
from weighting.cli import main

def quick(line, status=0, **env):
    done = click.testing.CliRunner(env=env).invoke(main, line.split(), prog_name="weighting")
    assert done.exit_code == status, (line, done.output)
    assert "torch" not in sys.modules, line

quick("--version")
quick("--help")
for name in main.commands:
    quick(f"{name} --help")
quick("list")
quick("schema")
quick("completion bash")
for start in ("", "che", "check lin", "explain temp", "train linupper --", "list st"):
    quick("", _WEIGHTING_COMPLETE="bash_complete", COMP_WORDS=f"weighting {start}", COMP_CWORD="1")
for command in ("check", "explain", "train", "simulate --losses 1,2", "plot --out x.svg"):
    for file in ("missing.yaml", "folder.yaml", "binary.yaml", "broken.yaml", "linuper"):
        quick(f"{command} {file}", status=2)
quick("new-stage temperature", status=2)
quick("chekc linupper", status=2)
"""
"""Commands that answer at once; one that imports torch, which takes seconds, is named."""


def test_help_lists_completion_and_refusals_of_bad_files_import_no_torch(tmp_path):
    """Nothing that can be said without a tensor waits for torch."""
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.yaml").write_text("version: 1\npipeline: [uniform\n")
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", QUICK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_check_accepts_every_shipped_spec():
    """Checking all shipped specs says ok of each and ends well."""
    done = run("check", *shipped())

    assert done.exit_code == 0
    sound = re.findall(r"^ok  ([\w-]+), ", done.output, re.MULTILINE)
    assert sound == [*shipped()]
    assert sound


def test_check_shows_the_errors_of_all_files_and_exits_2(tmp_path):
    """Every wrong file is reported, the right ones too, and the status is 2."""
    (tmp_path / "a.yaml").write_text("version: 1\npipeline: normaliz -> clamp(2/n)\n")
    (tmp_path / "b.yaml").write_text("version: 1\npipline: uniform\n")
    done = run("check", str(tmp_path / "a.yaml"), "linupper", str(tmp_path / "b.yaml"))

    assert done.exit_code == 2
    assert "a.yaml:2:11: unknown stage 'normaliz'; did you mean 'normalize'?" in done.output
    assert "b.yaml:2:1: unknown key 'pipline'; did you mean 'pipeline'?" in done.output
    assert "ok  linupper" in done.output
    assert "2 of 3 specs cannot be used" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "temprature"], "nothing is called 'temprature'; did you mean 'temperature'?"),
        (["explain", "linuper"], "linuper: no such file; did you mean 'linupper'?"),
        (["mix", "dormi", "--out", "m.yaml"], "no method 'dormi'; did you mean 'doremi'?"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_of_what_is_asked_for(words, message):
    """A stage, a spec or a method; nothing is imported for it."""
    done = run(*words)
    assert done.exit_code == 2
    assert done.output == f"{message}\n"


@pytest.mark.parametrize("command", ["check", "explain", "train"])
def test_a_missing_file_is_one_line_and_status_2(command):
    """A file that does not exist is named, with the nearest shipped spec."""
    done = run(command, "specs/linuper.yaml")

    assert done.exit_code == 2
    first = done.output.splitlines()[0]
    assert first == "specs/linuper.yaml: no such file; did you mean 'linupper'?"


@pytest.mark.slow
@for_each("name", shipped())
def test_explain_fits_a_terminal(name):
    """An explanation stays within 80 columns, and ends with the spec as it is, as a YAML list."""
    done = run("explain", name)

    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    assert f"name: {name}" in done.output
    assert "signals: " in done.output
    assert wt.loads(done.output.partition("as a YAML list:")[2]) == wt.load(name)


def test_explain_fills_in_what_was_left_out():
    """Sugar is expanded, defaults are shown, and each statistic has its level and scope."""
    done = run("explain", "normalize -> linupper -> temperature(step(100, 0.4, at=500))")

    for text in (
        "loss -> mean(sequence) -> normalize(delta=1) -> affine(scale=1,",
        "clip(max=1)",
        "min, max over all sequences",
        "scope: microbatch, statistics run over",
        "the microbatch, on all data-parallel ranks",
        "signals: loss",
    ):
        assert text in done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["499", "100"] in rows
    assert ["500", "0.4"] in rows


def test_explain_says_what_further_forward_passes_cost():
    """A scope of the step, and a reference, cost time; the spec that has neither says nothing."""
    done = run("explain", "rho-1")
    assert "a second model goes forward" in done.output
    assert "goes forward twice" not in done.output
    text = "{version: 1, scope: step, pipeline: normalize -> temperature(1)}"
    done = run("explain", text)
    assert "each goes forward twice" in done.output
    assert "a second model" not in done.output
    assert "once more" not in done.output
    several = run("explain", "excess_loss(a) -> plus(kl(b)) -> plus(kl(a)) -> mean_one")
    assert "2 models go forward beside the one that trains" in " ".join(several.output.split())
    assert "the model itself goes forward once more" in several.output


LOSS_PATHS = {
    "uniform": """
loss path: the trainer's own loss, nothing added
collectives: none
""",
    "dft": """
loss path: how weights meet the output layer, width D x vocabulary V
  local    pipeline: known token by token
  late     nothing
  memory     products  more memory, in elements
  late       3         none
  keep       3         (T - c) x V, T tokens on a rank, c in a chunk
  recompute  4         none
  auto takes, for D 4096, V 128256, bfloat16, 8192 tokens a sequence, 80 GB:
    1 sequence    late (one pass, nothing kept; 0.0 MiB beside a chunk)
    2 sequences   late (one pass, nothing kept; 0.0 MiB beside a chunk)
collectives: none
""",
    "linupper-x-mile": """
loss path: how weights meet the output layer, width D x vocabulary V
  local    token: known token by token
  late     instance per sequence: a number for each sequence
  memory     products  more memory, in elements
  late       3         (n - 1) x D x V, n sequences on a rank
  keep       3         (T - c) x V, T tokens on a rank, c in a chunk
  recompute  4         none
  auto takes, for D 4096, V 128256, bfloat16, 8192 tokens a sequence, 80 GB:
    1 sequence    late (one pass, nothing kept; 0.0 MiB beside a chunk)
    2 sequences   late (one pass, 2 gradients of the output layer; 1002.0 MiB
                  beside a chunk)
collectives: 1 gather, 1 sum per batch
  1 sum more where sequences are cut over ranks
""",
    "rho-1": """
loss path: how weights meet the output layer, width D x vocabulary V
  local    nothing
  late     pipeline per token: a number for each token
  memory     products  more memory, in elements
  keep       1 + 2k    (T - c) x V, T tokens on a rank, c in a chunk
  recompute  1 + 3k    none
  k = 0.6 of the tokens can weigh more than 0; more on some of several ranks
  auto takes, for D 4096, V 128256, bfloat16, 8192 tokens a sequence, 80 GB:
    1 sequence    keep (logits kept until the weights are known; gradients of at
                  most 4917 tokens; 1753.5 MiB beside a chunk)
    2 sequences   keep (logits kept until the weights are known; gradients of at
                  most 9833 tokens; 3507.0 MiB beside a chunk)
collectives: 10 sums per batch
""",
}


@pytest.mark.parametrize("name", LOSS_PATHS)
def test_explain_says_what_the_weights_cost(name):
    """It says what is known when, what each way costs, which one is taken, and who is asked."""
    assert f"\n{LOSS_PATHS[name]}\n" in run("explain", name).output


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("entropy -> mean_one", "late     one number, which scales all weights to mean one\n"),
        ("max(document) -> temperature(1)", "late     pipeline per document: a number for each t"),
        ("loss -> select(0.6, within=sequence)", "k = 0.6 of the tokens can weigh more than 0\n"),
        (
            "loss -> temperature(1, within=sequence)",
            "1 sum per batch\n  1 maximum, 1 sum more where sequences are cut over ranks\n",
        ),
    ],
)
def test_explain_words_what_comes_late(pipeline, words):
    """Scaling, documents, selections within sequences and calls among parts have their words."""
    assert words in run("explain", pipeline).output


@pytest.mark.parametrize("name", ["mile", "linupper", "rho-loss", "sstoken", "group-dro"])
def test_explain_takes_the_way_that_training_takes(name):
    """The examples are what `path_of` says of such a layer, for one sequence and for two."""
    plan = plan_of(wt.load(name))
    out = " ".join(run("explain", name).output.split())
    for rows, label in ((1, "1 sequence"), (2, "2 sequences")):
        path = path_of(plan, Sizes(rows * 8192, rows, 128256, 4096, 2, 5 * 10**9))
        assert f"{label} {path} " in out


DRAWS = {
    "table-x-linupper": """
domains: p_d, the share drawn, and w_d, a factor's weight
  domain       loss      multiplies the loss by w
  effective    p, as the data comes, x w[domain]
    domain   drawn  effective  (if the data has as much of each)
    code    0.2000     0.2222
    data    0.2000     0.1111
    docs    0.2000     0.3333
    tables  0.2000     0.1111
    tests   0.2000     0.2222
""",
    "doremi-proxy": """
domains: p_d, the share drawn, and w_d, a factor's weight
  draw         sampling  draws by w
  domain       both      multiplies the loss by w / p
  effective    w[domain]
""",
    "dynamic-loading": """
domains: p_d, the share drawn, and w_d, a factor's weight
  start        sampling  draws by w
  catch_up     sampling  draws by w
  effective    w[start] x w[catch_up]
  what is remembered draws a step late: step t by the state after step t - 2,
  so that no step waits for the device
""",
    "uniform-domains": """
domains: p_d, the share drawn, and w_d, a factor's weight
  pipeline     sampling  draws by w
  effective    w[pipeline]
""",
    """version: 1
apply: both
pipeline: table(code=3, web=1) -> mean_one
""": """
domains: p_d, the share drawn, and w_d, a factor's weight
  pipeline     both      multiplies the loss by w / p and draws by w
  effective    w[pipeline]
    domain   drawn  effective
    code    0.7500     0.7500
    web     0.2500     0.2500
""",
    """version: 1
apply: {draw: sampling, fix: both}
factors:
  draw: table(code=3, web=1) -> mean_one
  weigh: table(code=1, web=2) -> mean_one
  fix: table(code=1, web=4) -> mean_one
""": """
domains: p_d, the share drawn, and w_d, a factor's weight
  draw         sampling  draws by w
  weigh        loss      multiplies the loss by w
  fix          both      multiplies the loss by w / p
  effective    w[fix] x w[weigh]
    domain   drawn  effective
    code    0.7500     0.1111
    web     0.2500     0.8889
""",
    """version: 1
apply: sampling
factors:
  domain: table(code=3, web=1) -> mean_one
  other: table(code=1, web=1.5) -> mean_one
  instance: normalize -> temperature(1)
""": """
domains: p_d, the share drawn, and w_d, a factor's weight
  domain       sampling  draws by w
  other        sampling  draws by w
  effective    w[domain] x w[other]
    domain   drawn  effective
    code    0.6667     0.6667
    web     0.3333     0.3333
""",
}


@pytest.mark.parametrize("spec", DRAWS, ids=lambda spec: spec.replace("\n", " ")[:40])
def test_explain_says_where_the_weights_of_domains_act(spec):
    """It says what draws, what multiplies, what comes of both, and in numbers where it can."""
    out = run("explain", spec).output
    assert f"\n{DRAWS[spec]}\nloss path: " in out


@pytest.mark.parametrize("spec", [x for x in DRAWS if "table" in x])
def test_the_effective_shares_are_those_of_the_weights(spec):
    """The numbers are what a batch in the shares drawn weighs, domain by domain."""
    read = wt.load(spec) if spec in shipped() else wt.loads(spec)
    names = sorted({x for p in read.factors.values() for s in p for x in getattr(s, "weights", {})})
    rows = [line.split() for line in run("explain", spec).output.splitlines()]
    shown = [row for row in rows if len(row) == 3 and row[0] in names]
    assert [row[0] for row in shown] == names
    drawn, effective = (torch.tensor([float(row[i]) for row in shown]) for i in (1, 2))
    fn = wt.build(read, domains=names)
    if hasattr(fn, "drawn"):
        fn.drawn.copy_(proportions(fn))
    counts = (drawn * 60).round().long()  # whole numbers of tokens, of equal losses
    ids = torch.arange(len(names)).repeat_interleave(counts)[None]
    token = fn(wt.Signals(loss=torch.ones(ids.shape), domain_ids=ids)).token
    found = torch.stack([token[ids == d].sum() for d in range(len(names))])
    # Four digits are shown.
    torch.testing.assert_close(found / found.sum(), effective, rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", ["uniform", "linupper", "mile", "toremi-topics"])
def test_explain_is_silent_on_domains_where_none_are_weighed(name):
    """A spec that knows no domains has no section on them."""
    assert "domains: " not in run("explain", name).output


def test_list_names_every_word_of_the_language():
    """Every stage, schedule and shipped spec is listed."""
    done = run("list")

    assert done.exit_code == 0
    words = {line.split()[0].partition("(")[0] for line in done.output.splitlines() if line.strip()}
    own = {name for name, cls in stages().items() if cls.__module__.startswith("weighting.")}
    assert own | set(SCHEDULES) | set(shipped()) <= words


@pytest.mark.parametrize(
    ("what", "there", "not_there"),
    [
        ("stages", "temperature(tau, within)", "cosine("),
        ("schedules", "cosine(start, end, over, begin=0)", "temperature("),
        ("specs", "group-dro", "cosine("),
        ("Domain", "dynamic_loading(name=value, ...)", "normalize"),
    ],
)
def test_list_shows_a_part_when_asked_to(what, there, not_there):
    """Stages, specs or schedules, or what has a word in its name or description."""
    done = run("list", what)
    assert done.exit_code == 0
    assert f"\n  {there}" in done.output
    assert f"\n  {not_there}" not in done.output
    assert not done.output.startswith("\n")
    assert max(map(len, done.output.splitlines())) <= 80


def test_list_shows_the_levels_of_stages_that_stand_at_some():
    """The others stand at any level, which their heading says."""
    text = " ".join(run("list", "stages").output.split())
    for name in ("bernoulli", "rank", "topical"):
        assert f"per {' or '.join(stages()[name].levels)}" in text.partition(f"{name}(")[2]
    assert "at any level unless said" in text


def test_list_says_what_is_near_a_word_that_nothing_has():
    """It ends with status 2, as a misspelt spec does."""
    done = run("list", "tempratur")
    assert done.exit_code == 2
    assert done.output == "nothing here has 'tempratur' in it; did you mean 'temperature'?\n"


@for_each("word", words(), ids=lambda word: word.name)
def test_explain_shows_a_stage_or_schedule(word):
    """Arguments with defaults, levels, formula and source, within 80 columns."""
    done = run("explain", word.name)
    assert done.exit_code == 0, done.output
    block, _, spec = done.output.partition("\nThe shipped spec ")
    lines = block.splitlines()
    assert max(map(len, lines)) <= 80
    kind = "schedule" if word.kind == "schedule" else "stage"
    assert lines[:2] == [f"{word.name}  (a {kind})", f"  written    {word.call}"]
    cls = SCHEDULES.get(word.name) or stages()[word.name]
    rows, name = {}, ""
    for line in lines:
        if re.match(" {4}\\S", line):
            name = line.split()[0]
        if line.startswith("    "):
            rows[name] = f"{rows.get(name, '')} {line.strip()}"
    for name, field in cls.model_fields.items():
        assert name in rows, "each argument has a line"
        assert ("required" in rows[name]) == field.is_required()
    said = " ".join(block.split())
    assert " ".join(inspect.cleandoc(cls.__doc__).split()) in said
    for level in word.levels:
        assert level in next(line for line in lines if line.startswith("  level "))
    assert (word.name in shipped()) == bool(spec)
    if spec:
        assert f"\n{word.name}  (version 1, hash {wt.load(word.name).hash})\n" in spec


def test_words_are_completed_where_they_can_be_explained():
    """Stages, schedules and specs, after `explain` alone."""
    for command, wanted in (("explain", {"temperature"}), ("check", set())):
        argument = main.commands[command].params[0]
        with click.Context(main.commands[command]) as context:
            found = {x.value for x in argument.shell_complete(context, "temp") if x.type == "plain"}
        assert found == wanted


def test_plugins_are_imported_only_when_allowed(tmp_path, monkeypatch):
    """A spec with plugins is refused until that is allowed; then it is said what was imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halving_stages.py").write_text(
        "import weighting as wt\n"
        "@wt.stage('halve')\n"
        "class Halve(wt.Shape):\n"
        "    '''Half the score.'''\n"
        "    def apply(self, x, scope):\n"
        "        return x / 2\n"
    )
    spec = "version: 1\nplugins: [halving_stages]\npipeline: normalize -> halve -> temperature(1)\n"
    (tmp_path / "halve.yaml").write_text(spec)

    refused = run("check", "halve.yaml")
    assert refused.exit_code == 2
    assert "halve.yaml:2:11: importing halving_stages runs its code" in refused.output
    where = f"plugins: halving_stages ({tmp_path / 'halving_stages.py'})"
    for command in ("check", "explain"):
        allowed = run(command, "halve.yaml", "--allow-plugins")
        assert allowed.exit_code == 0, allowed.output
        assert where in [line.strip() for line in allowed.output.splitlines()]
    assert "plugins" not in run("explain", "linupper").output


@pytest.mark.parametrize("command", ["check", "explain"])
def test_names_in_a_spec_cannot_move_the_cursor(command, tmp_path):
    """Domains of a table and the name of a good file are printed without what a terminal obeys."""
    path = tmp_path / "good\u202e\x1b[31m.yaml"
    names = r'"a\u001b[31mb": 1, "c\u202ed": 2, "e\u0085f": 3'
    path.write_text(f"version: 1\npipeline:\n- table: {{{names}}}\n- mean_one\n")
    done = click.testing.CliRunner().invoke(main, [command, str(path)], color=True)
    assert done.exit_code == 0, done.output
    assert all(c.isprintable() or c == "\n" for c in done.output)

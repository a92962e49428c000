"""The command line: what it prints, and how it ends."""

import click.testing
import pytest

import weighting as wt
from weighting.build import sketch
from weighting.cli import main
from weighting.linear import Sizes, path_of
from weighting.registry import stages
from weighting.schedules import SCHEDULES
from weighting.spec import shipped


def run(*arguments):
    """Return what a command did."""
    return click.testing.CliRunner().invoke(main, arguments)


def test_check_accepts_every_shipped_spec():
    """Checking all shipped specs prints a line each and ends well."""
    done = run("check", *shipped())

    assert done.exit_code == 0
    assert len(done.output.splitlines()) == len(shipped()) > 0


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


@pytest.mark.parametrize("command", ["check", "explain", "train"])
def test_a_missing_file_is_one_line_and_status_2(command):
    """A file that does not exist is named, with the nearest shipped spec."""
    done = run(command, "specs/linuper.yaml")

    assert done.exit_code == 2
    first = done.output.splitlines()[0]
    assert first == "specs/linuper.yaml: no such file; did you mean 'linupper'?"


@pytest.mark.parametrize("name", shipped())
def test_explain_fits_a_terminal(name):
    """An explanation names every written stage and stays within 80 columns."""
    done = run("explain", name)

    assert done.exit_code == 0
    for_people, _, _ = done.output.partition("as a YAML list:")
    assert max(map(len, for_people.splitlines())) <= 80
    assert f"name: {name}" in done.output
    assert "signals: " in done.output


def test_explain_fills_in_what_was_left_out():
    """Sugar is expanded, defaults are shown, and each statistic has its level and scope."""
    done = run("explain", "normalize -> linupper -> temperature(step(100, 0.4, at=500))")

    for text in (
        "loss -> mean(sequence) -> normalize -> affine(scale=1, shift=1)",
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
  keep       3         T x V, T tokens on a rank
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
  keep       3         T x V, T tokens on a rank
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
  keep       1 + 2k    T x V, T tokens on a rank
  recompute  1 + 3k    none
  k = 0.6 of the tokens can weigh more than 0; more on some of several ranks
  auto takes, for D 4096, V 128256, bfloat16, 8192 tokens a sequence, 80 GB:
    1 sequence    keep (logits kept until the weights are known; gradients of at
                  most 4917 tokens; 2004.0 MiB beside a chunk)
    2 sequences   keep (logits kept until the weights are known; gradients of at
                  most 9833 tokens; 4008.0 MiB beside a chunk)
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
    fn = sketch(wt.load(name))
    out = " ".join(run("explain", name).output.split())
    for rows, label in ((1, "1 sequence"), (2, "2 sequences")):
        path = path_of(fn, Sizes(rows * 8192, rows, 128256, 4096, 2, 5 * 10**9))
        assert f"{label} {path} " in out


def test_list_names_every_word_of_the_language():
    """Every stage, schedule and shipped spec is listed."""
    done = run("list")

    assert done.exit_code == 0
    words = {line.split()[0].partition("(")[0] for line in done.output.splitlines() if line.strip()}
    own = {name for name, cls in stages().items() if cls.__module__.startswith("weighting.")}
    assert own | set(SCHEDULES) | set(shipped()) <= words


def test_plugins_are_imported_only_when_allowed(tmp_path, monkeypatch):
    """A spec with plugins is refused until the import is allowed; then its stages are words."""
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
    allowed = run("check", "halve.yaml", "--allow-plugins")
    assert allowed.exit_code == 0, allowed.output

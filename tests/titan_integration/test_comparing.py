"""`weighting compare`: specs trained alike, cut off and gone on with, and its messages."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import click.testing
import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import ROOT, environment
from warm import Started, weighting

from titan_integration.commands import compare as comparing
from titan_integration.commands import progress
from titan_integration.commands import run_queue as series
from titan_integration.host import run_dir
from weighting.cli import main
from weighting.language.read import resolve

SPECS = ("uniform", "group-dro")
"""The second keeps a state, which is to start afresh and to be resumed."""
STEPS = 8
FLAGS = ("--training.seq_len=32", "--training.local_batch_size=4", "--metrics.log_freq=1")
FLAGS += ("--validator.enable", f"--validator.freq={STEPS}", "--validator.steps=1")
COMMAND = ["compare", *SPECS, "--module", "small", "--config", "debugmodel"]
COMMAND += ["--steps", str(STEPS), "--folder", "runs", "--seed", "1", "--", *FLAGS]


def lines(folder, name):
    """Return what a run logged, the last line of each step."""
    texts = (folder / "runs" / name / "weighting" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, texts)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return where two specs were compared, and what was printed into a pipe."""
    folder = tmp_path_factory.mktemp("whole")
    done = weighting(*COMMAND, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.processes
def test_two_specs_start_alike_and_are_reported(whole):
    """The first step sees the same weights and data; each run has its folder, log and report."""
    folder, _ = whole
    first, second = (lines(folder, name) for name in SPECS)
    assert [*first] == [*second] == [*range(1, STEPS + 1)]
    # Two ways to the same cross entropy: rounding.
    assert first[1]["unweighted_loss"] == pytest.approx(second[1]["unweighted_loss"], rel=1e-5)
    assert first[STEPS]["unweighted_loss"] != second[STEPS]["unweighted_loss"]
    for name in SPECS:
        assert f"Training completed{os.linesep}" in (folder / "runs" / f"{name}.log").read_text()
        about = json.loads((folder / "runs" / name / "weighting" / "run.json").read_text())
        assert about["spec"]["name"] == name
        assert about["config"]["debug"]["seed"] == 1
    page = (folder / "runs" / "report.html").read_text()
    assert "that of uniform" in page
    assert "group-dro" in page


@pytest.mark.processes
def test_a_pipe_gets_plain_short_lines(whole):
    """A line as a run begins and one as it ends, then a table: no colours, no overwriting."""
    folder, printed = whole
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    ends, told = [], []
    for name in SPECS:
        line = lines(folder, name)[STEPS]
        text = (folder / "runs" / name / "weighting" / "validation.jsonl").read_text()
        validation = json.loads(text.splitlines()[-1])["domain_mean_loss"]
        ends.append(line["unweighted_loss"])
        told.append(validation)
    shown = re.sub(r"\d+ s$", "N s", printed, flags=re.MULTILINE)
    assert shown == (
        "seed: makes the first weights, the same for all runs\n"
        "uniform: trains 8 steps\n"
        f"uniform: unweighted loss {ends[0]:.4f}, N s\n"
        "group-dro: trains 8 steps\n"
        f"group-dro: unweighted loss {ends[1]:.4f}, N s\n"
        "\n"
        "           unweighted  difference  validation  difference\n"
        f"uniform    {ends[0]:10.4f}              {told[0]:10.4f}\n"
        f"group-dro  {ends[1]:10.4f}  {ends[1] - ends[0]:+10.4f}"
        f"  {told[1]:10.4f}  {told[1] - told[0]:+10.4f}\n"
        "\n"
        "last losses in nats, differences to uniform; validation: mean over domains\n"
        "\n"
        "report: runs/report.html\n"
    )


@pytest.mark.processes
def test_a_comparison_goes_on_with_more_seeds_and_ends_in_intervals(whole, tmp_path):
    """What is trained stays; the second seed begins from weights of its own; means over both."""
    shutil.copytree(whole[0] / "runs", tmp_path / "runs")
    more = [*COMMAND[: COMMAND.index("--")], "--seeds", "2", *COMMAND[COMMAND.index("--") :]]
    done = weighting(*more, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    told = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in told[:7]] == [
        *SPECS,
        "seed@2",
        *("uniform@2", "uniform@2", "group-dro@2", "group-dro@2"),
    ]
    assert told[0].endswith("trained already")
    first = [lines(tmp_path, name)[1]["unweighted_loss"] for name in ("uniform", "uniform@2")]
    assert abs(first[0] - first[1]) > 1e-4
    ends = {name: [] for name in SPECS}
    for name in SPECS:
        for again in ("", "@2"):
            path = tmp_path / "runs" / f"{name}{again}" / "weighting" / "validation.jsonl"
            ends[name].append(json.loads(path.read_text().splitlines()[-1])["domain_mean_loss"])
    # The t quantile of one degree of freedom is 12.706, and the deviation of two half their gap.
    gaps = [y - x for x, y in zip(*ends.values(), strict=True)]
    half = 12.706 * abs(gaps[0] - gaps[1]) / 2
    wanted = [sum(gaps) / 2 + x for x in (0, -half, half)]
    [at] = [i for i, line in enumerate(told) if line.startswith("validation, mean over domains")]
    base, row = told[at].split()[4:], told[at + 1].split()
    assert base[0] == "uniform"
    assert float(base[1]) == pytest.approx(sum(ends["uniform"]) / 2, abs=1e-4)
    assert row[0] == "group-dro"
    assert [float(x) for x in row[-3:]] == pytest.approx(wanted, abs=2e-4)
    assert "over 2 seeds, and minus those of uniform by seed" in done.stdout
    assert told[-1] == "report: runs/report.html"


def started(folder, step):
    """Start the comparison, wait until its second run has saved a step, and return it."""
    command = Started("-m", "weighting", *COMMAND, folder=folder, cwd=folder)
    saved = folder / "runs" / SPECS[1] / "checkpoint" / f"step-{step}" / ".metadata"
    command.until(saved.exists)
    return command


def descendants(pid):
    """Return all processes that came of one."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found[1:]


def trainer(folder):
    """Return the process that trains the second spec, which has signed the folder of its run."""
    return int((folder / "runs" / SPECS[1] / run_dir.LOCK).read_text().split()[1])


@pytest.mark.processes
def test_a_comparison_that_was_cut_off_goes_on(whole, tmp_path):
    """Interrupted, then with its trainer killed, it ends in the numbers of the whole one."""
    folder, _ = whole
    for name in ("seed", SPECS[0], comparing.ORDERS):
        copy = shutil.copytree if (folder / "runs" / name).is_dir() else shutil.copy
        (tmp_path / "runs").mkdir(exist_ok=True)
        copy(folder / "runs" / name, tmp_path / "runs" / name)

    command = started(tmp_path, 2)
    left = descendants(command.pid)
    assert trainer(tmp_path) in left
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does
    done = command.ended(300)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted; the same command goes on\n"
    assert "uniform: trained already\ngroup-dro: trains 8 steps\n" in done.stdout
    assert not [pid for pid in left if alive(pid)]

    command = started(tmp_path, 5)
    os.kill(trainer(tmp_path), signal.SIGKILL)
    done = command.ended(300)
    assert done.returncode == 1
    went_on = r"^group-dro: goes on after step [2-7] of 8 steps$"
    assert re.search(went_on, done.stdout, re.MULTILINE)
    reason = "error: group-dro ended with status 1; its log, runs/group-dro.log, "
    assert done.stderr.startswith(reason)
    assert done.stderr.endswith("\nwhen that is mended, the same command goes on\n")

    done = weighting(*COMMAND, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    went_on = r"^group-dro: goes on after step [5-7] of 8 steps$"
    assert re.search(went_on, done.stdout, re.MULTILINE)
    there, here = (lines(x, SPECS[1]) for x in (folder, tmp_path))
    # One rank resumes bit for bit; only the clock differs.
    assert [{**x, "tps": 0} for x in here.values()] == [{**x, "tps": 0} for x in there.values()]
    assert "report: runs/report.html" in done.stdout


def alive(pid):
    """Tell whether a process is there and not just waiting to be collected."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


# What is refused ----------------------------------------------------------------------------------


def said(*arguments, specs=SPECS):
    """Return what is said of a comparison that cannot be made."""
    given = ["compare", *map(str, specs), "--config=llama3_proxy", *map(str, arguments)]
    done = click.testing.CliRunner().invoke(main, given)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return done.stderr.removeprefix("error: ")


def test_seeds_need_a_text_to_validate_on(tmp_path):
    """With data of one's own it is to be named, and validation may not be turned off."""
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    assert said("--seeds=2", f"--data={data}") == (
        "--seeds compares validation losses; say on which text, with "
        "--validator.dataloader.dataset_path FILE\n"
    )
    assert "leave out --validator.no-enable" in said("--seeds=2", "--validator.no-enable")


def test_each_seed_has_its_own_folders_and_the_first_keeps_the_plain_names():
    """So a comparison of one seed, validated at its end, goes on with more."""
    runs = [comparing.Run(name, name, resolve(name), []) for name in SPECS]
    options = comparing.Options(
        **dict.fromkeys(("module", "config", "folder"), "x"),
        **dict.fromkeys(("out", "steps", "mixture", "reference")),
        specs=[],
        seed=5,
        seeds=3,
        allow_plugins=False,
    )
    names = [run.name for run in comparing._repeated(runs, options)]
    assert names == [f"{name}{x}" for x in ("", "@6", "@7") for name in SPECS]
    assert [run.again for run in comparing._repeated(runs, options)] == [0, 0, 1, 1, 2, 2]


def test_wrong_comparisons_are_refused(tmp_path, monkeypatch):
    """Each is one message, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    where = f"--folder={folder}"
    other = "version: 1\nname: mine\npipeline: uniform\n"
    (tmp_path / "mine.yaml").write_text(other)
    before = sorted(tmp_path.rglob("*"))

    message = said(where, specs=["uniform", "linuper"])
    assert message == "linuper: no such file; did you mean 'linupper'?\n"
    message = said(where, specs=["uniform"])
    assert message == "a comparison takes two specs or more; given: uniform\n"
    message = said(where, specs=["uniform", "mile", "uniform"])
    assert message == "uniform and uniform are the same weighting; give it once\n"
    message = said(where, specs=["uniform", "mine.yaml"])
    assert message == "mine.yaml and uniform are the same weighting; give it once\n"
    message = said(where, "--config=llama3_prox")
    assert "no config function 'llama3_prox'; did you mean 'llama3_proxy'?" in message
    message = said(where, "--reference=ema:0.9")
    assert message == "none of the specs reads ref_loss; leave out --reference ema:0.9\n"
    message = said(where, "--", "--training.steps=7")
    assert message == "--training.steps is set for every run; leave it out, and use --steps\n"
    out = tmp_path / "mine.yaml" / "report.html"
    message = said(where, f"--out={out}")
    assert message == f"--out {out}: no folder {out.parent}; make it first\n"
    message = said(f"--folder={out.parent}")
    assert "mine.yaml" in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_frequency_that_leaves_out_the_last_step_is_refused(tmp_path):
    """What is compared is the validation of the last step, and not of an earlier one."""
    words = ["compare", *SPECS, "--steps=8", f"--folder={tmp_path / 'runs'}", "--", *FLAGS[:3]]
    words += ["--validator.enable", "--validator.freq=5"]
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert "--validator.freq 5 does not validate the last of 8 steps" in done.output
    assert not (tmp_path / "runs").exists()


def test_a_run_that_was_stopped_in_its_last_validation_is_not_done(tmp_path):
    """Its loss would be that of an earlier step."""
    path = tmp_path / "weighting" / "validation.jsonl"
    path.parent.mkdir()
    for text in (None, '{"step": 1}\n'):
        if text:
            path.write_text(text)
        with pytest.raises(ValueError, match=r"stopped before the validation .*step-8, and the"):
            comparing._refuse_unvalidated(tmp_path, 8)
    path.write_text('{"step": 1}\n{"step": 8}\n')
    comparing._refuse_unvalidated(tmp_path, 8)


@pytest.mark.slow
def test_what_a_later_run_would_refuse_is_said_first(tmp_path, monkeypatch):
    """Data, columns, references and flags are looked at before the first run."""
    monkeypatch.chdir(tmp_path)
    where = f"--folder={tmp_path / 'runs'}"
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "a", "domain": "b"}\n')
    before = sorted(tmp_path.rglob("*"))
    needy = ["uniform", "rho-1"]

    message = said(where, "--data=./nothing")
    assert message == "uniform: nothing: no such file or directory\n"
    message = said(where, f"--data={data}", specs=needy)
    assert message.startswith(f"rho-1: {data}:1: no column 'ref_loss'; there are: text, domain.")
    message = said(where, specs=needy)
    assert message.startswith("rho-1: 'stdlib': no column 'ref_loss'")
    message = said(where, "--reference=nowhere", specs=needy)
    assert message.startswith("--weighting.reference nowhere: no such folder")
    message = said(where, "--", "--training.seq_length=3")
    assert message == "no flag '--training.seq_length'; did you mean '--training.seq_len'?\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_changed_orders_are_refused_and_more_specs_are_not(tmp_path):
    """Runs that have begun keep to what they were asked for; says what is another now."""
    folder = tmp_path / "runs"
    (folder / "seed" / "checkpoint").mkdir(parents=True)
    (folder / "uniform" / "checkpoint").mkdir(parents=True)
    orders = dict.fromkeys(comparing._COMMON) | {"steps": 60, "seed": 0, "flags": []}
    orders |= {"config": "llama3_proxy", "module": "titan_integration"}
    orders |= {"the spec of uniform": "another", "the spec of group-dro": "another"}
    (folder / comparing.ORDERS).write_text(json.dumps(orders))
    before = sorted(tmp_path.rglob("*"))

    where = f"--folder={folder}"
    end = "take another --folder, or remove that one\n"
    message = said(where, "--steps=61")
    assert message == f"{folder} holds a comparison with steps = 60, and now it is 61; {end}"
    message = said(where, "--seed=2")
    assert message == f"{folder} holds a comparison with seed = 0, and now it is 2; {end}"
    message = said(where)  # group-dro has not begun, and may be another
    assert f"comparison with the spec of uniform = 'another', and now it is '{'c'}" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_specs_of_one_name_get_folders_of_their_own():
    """By their order on the command line; the seed's folder is nobody else's."""
    texts = ["temperature(0.4)", "mile", "temperature(0.5)"]
    given = dict.fromkeys(("folder", "out", "steps", "mixture", "reference"))
    given |= {"module": "titan_integration", "config": "llama3_proxy"}
    read = [(text, resolve(text)) for text in texts]
    options = comparing.Options(specs=read, seed=0, allow_plugins=False, **given)
    runs = comparing._runs(options)
    assert [run.name for run in runs] == ["unnamed", "mile", "unnamed-2"]
    assert comparing._free("seed", ["seed"]) == "seed-2"
    assert comparing._free("a", ["a", "a-2"]) == "a-3"


# What is seen -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self):
        """Say that it is one."""
        return True


def test_a_terminal_has_one_live_line(monkeypatch):
    """Spec, step, loss and, once a pace is known, the time that is left; never a second line."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress.View(100, [100, 20, 0]) as view:
        assert view.left() is None
        assert view.text() == ""
        view.seed()
        assert view.text() == "seed starts"
        view.begin("linupper", 20)
        assert view.text() == "linupper starts"
        clock[0] += 10
        view.look([{"step": 30, "unweighted_loss": 4.5}])
        assert view.text() == "linupper 30/100  loss 4.5000"
        clock[0] += 20
        view.look([{"step": 35, "unweighted_loss": 4.6}, {"step": 40, "unweighted_loss": 4.25}])
        # 160 steps of 2 s are left, and one start of 10 s.
        assert view.left() == 330
        assert view.text() == "linupper 40/100  loss 4.2500  0:05:30 left"
        view.end(4.25)
    written = sys.stdout.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("\n")
    assert "linupper 40/100  loss 4.2500  0:05:30 left" in written
    assert max(map(len, re.sub(r"\x1b\[[?0-9]*[a-z]", "", written).split("\r"))) <= 80


def test_a_log_tells_why_a_run_ended():
    """The last error of a user's, without the rank before it; else the last lines."""
    log = "[rank0]:fine\n\n[rank0]:error: no such thing\n[rank0]:  at all\n"
    assert comparing.telling(log) == ["error: no such thing", "  at all"]
    many = "\n".join(f"[rank0]:[titan] {i}" for i in range(40))
    assert comparing.telling(many)[-1] == "[titan] 39"
    assert len(comparing.telling(many)) == 12


def test_new_lines_are_read_once_and_a_new_file_from_its_start(tmp_path):
    """A torn line waits for its end; what a run set aside does not count."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    found = series.new_lines(path)
    assert next(found) == []
    with path.open("a") as file:
        file.write('{"step": 2}\n{"st')
    assert next(found) == [{"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert next(found) == [{"step": 3}]
    path.rename(tmp_path / "metrics.jsonl.1")
    assert next(found) == []
    path.write_text('{"step": 1}\n')
    assert next(found) == [{"step": 1}]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_torn_checkpoint_is_not_the_last_one_saved(tmp_path):
    """A run goes on from a whole checkpoint, and so that is what a comparison counts from."""
    folder = tmp_path / "checkpoint"
    assert series.last_saved(tmp_path) == -1
    for step in (2, 10):
        dcp.save({"x": torch.ones(64)}, checkpoint_id=folder / f"step-{step}")
    assert series.last_saved(tmp_path) == 10
    next((folder / "step-10").glob("*.distcp")).unlink()
    assert series.last_saved(tmp_path) == 2


@pytest.mark.slow
def test_a_trainer_that_outlives_its_command_keeps_the_folder(tmp_path):
    """Killed for good, a command leaves what it started; until that ends, others are refused."""
    script = (
        "import sys, pathlib; from titan_integration.commands import run_queue as series\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with series.alone(folder) as lock:\n"
        "    series.logged(['sleep', '300'], folder / 'log', lock, lambda: None)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment()
    )
    lock, until = tmp_path / series.LOCK, time.monotonic() + 300
    while not lock.exists() or len(lock.read_text().split()) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    command, sleeper = map(int, lock.read_text().split())
    assert command == process.pid
    with pytest.raises(ValueError, match=f"process {command} is at work there"), folder_of(lock):
        pass
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match=rf"process {sleeper} .* kill {sleeper}$"), folder_of(lock):
        pass
    os.kill(sleeper, signal.SIGKILL)
    while alive(sleeper):
        time.sleep(0.02)
    with folder_of(lock):
        pass


def folder_of(lock):
    """Return the folder of a lock, to be kept."""
    return series.alone(lock.parent)

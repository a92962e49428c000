"""`weighting mix`: the chain from text to a mixture, cut off and gone on with, and its messages."""

import json
import os
import random
import shutil
import signal
import subprocess

import click.testing
import pytest
from warm import Started, weighting

import weighting as wt
from titan_integration.commands import mix as mixing
from weighting.build.domains import proportions
from weighting.cli import main

DOMAINS = ("alphabet", "digits", "mixed words")
FLAGS = ("--training.seq_len=32", "--training.local_batch_size=6", "--metrics.log_freq=1")
MODEL = ("--module=small", "--config=debugmodel")
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a file of text of three domains, one of them with a space in its name."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    texts = {
        "alphabet": lambda: " ".join("abcdefghijklmnopqrstuvwxyz" * 4),
        "digits": lambda: " ".join(str(n * n) for n in range(rng.randrange(90), 100)),
        "mixed words": lambda: " ".join(rng.choices(words, k=40)),
    }
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    with path.open("w") as file:
        for i in range(90):
            domain = DOMAINS[i % 3]
            file.write(json.dumps({"text": texts[domain](), "domain": domain}) + "\n")
    return path


def ran(*arguments):
    """Run `weighting` to its end."""
    return weighting(*arguments, timeout=600)


def mix(method, data, out, folder, *flags):
    """Return the arguments of a search."""
    given = (*MODEL, "--out", out, "--folder", folder, "--data", data, "--steps", STEPS)
    return ("mix", method, *given, *flags, *FLAGS)


@pytest.fixture(scope="module")
def doremi(data, tmp_path_factory):
    """Return the folder of a whole search, with the mixture in it, and what was printed."""
    folder = tmp_path_factory.mktemp("doremi")
    done = ran(*mix("doremi", data, folder / "mixture.yaml", folder / "runs"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.processes
def test_three_commands_from_text_to_a_weighted_run_on_a_mixture(doremi, data):
    """Reference, proxy and mixture come of one command; the next one draws by the mixture."""
    folder, printed = doremi
    text = (folder / "mixture.yaml").read_text()
    assert text in printed.replace("--mixture FILE", f"--mixture {folder / 'mixture.yaml'}")
    found = wt.build(wt.loads(text), domains=DOMAINS)
    assert found.plan.targets == {"pipeline": "sampling"}
    assert f"reference: {folder / 'runs' / 'reference' / 'checkpoint'}" in text
    given = ("--data", data, *MODEL, "--training.steps", 2)
    given += ("--dump_folder", folder / "main")
    done = ran("train", "linupper", "--mixture", folder / "mixture.yaml", *given, *FLAGS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = json.loads((folder / "main/weighting/metrics.jsonl").read_text().splitlines()[-1])
    drawn = [line[f"domain/{name}/drawn"] for name in DOMAINS]
    assert drawn == pytest.approx(proportions(found).tolist(), abs=1e-6)
    assert line["weight/max"] > line["weight/min"], "LinUpper weighs as well"


@pytest.mark.processes
def test_a_search_that_was_killed_goes_on_and_finds_the_same(doremi, data, tmp_path):
    """Killed in the proxy's run, the same command ends with the mixture of the whole search."""
    folder, _ = doremi
    shutil.copytree(folder / "runs" / "reference", tmp_path / "runs" / "reference")
    shutil.copy(folder / "runs" / mixing.ORDERS, tmp_path / "runs")
    arguments = mix("doremi", data, tmp_path / "mixture.yaml", tmp_path / "runs")
    search = Started("-m", "weighting", *arguments, folder=tmp_path)
    half = tmp_path / "runs" / "proxy" / "checkpoint" / "step-2" / ".metadata"
    search.until(half.exists)
    for pid in descendants(search.pid):
        os.kill(pid, signal.SIGKILL)
    assert search.ended(300).returncode == -signal.SIGKILL
    assert not (tmp_path / "mixture.yaml").exists()

    done = ran(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "reference: trained already" in done.stdout
    whole, gone_on = (
        wt.build(wt.load(x / "mixture.yaml"), domains=DOMAINS) for x in (folder, tmp_path)
    )
    # Another folder holds the same reference; one rank resumes bit for bit.
    assert proportions(gone_on).tolist() == proportions(whole).tolist()


def descendants(pid):
    """Return a process and all that came of it, children first."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found[::-1]


@pytest.mark.processes
def test_doge_needs_no_reference(data, tmp_path):
    """One run of gradients compared finds DoGE's mixture."""
    done = ran(*mix("doge", data, tmp_path / "doge.yaml", tmp_path / "runs"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    shares = proportions(wt.build(wt.load(tmp_path / "doge.yaml"), domains=DOMAINS))
    assert shares.sum().item() == pytest.approx(1)
    assert shares.max() > shares.min()
    assert not (tmp_path / "runs" / "reference").exists()


def said(method, *arguments):
    """Return what is said of a search that cannot be made."""
    done = click.testing.CliRunner().invoke(main, ["mix", method, *map(str, arguments)])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_wrong_searches_are_refused(tmp_path):
    """A method that finds nothing, an output that exists, another search's folder: each is said."""
    out, folder = tmp_path / "mixture.yaml", tmp_path / "runs"
    message = said("linupper", f"--out={out}", f"--folder={folder}")
    assert message == (
        "error: linupper has no domain weights that move, so it finds no mixture; methods are "
        "doremi, doge, or a spec with such weights\n"
    )
    assert "did you mean" in said("doremy", f"--out={out}")
    out.write_text("mine")
    message = said("doge", f"--out={out}", f"--folder={folder}")
    assert message == f"error: {out} exists; take another --out, or --overwrite\n"
    assert out.read_text() == "mine"
    assert not folder.exists()
    (folder / mixing.PROXY / "checkpoint").mkdir(parents=True)
    orders = {"spec": wt.load("doge-proxy").hash, "config": "llama3_proxy", "steps": 7}
    (folder / mixing.ORDERS).write_text(json.dumps(orders | {"module": "titan_integration"}))
    nowhere = "/proc/none/mixture.yaml"
    assert "/proc/none" in said("doge", f"--out={nowhere}", f"--folder={folder}")
    message = said("doge", f"--out={out}", f"--folder={folder}", "--overwrite")
    assert "holds a search with steps = 7, and now it is 200" in message

"""Three newcomers: who writes a spec, who trains, who makes a stage; their pages as they stand.

All their lines run in one folder, and one of them trains, a third of the steps on a quarter of the
rows.
`newcomers.py` says who they are.
"""

import contextlib
import html.parser
import io
import json
import re
import shlex
import xml.etree.ElementTree as ET

import pytest
from recorded import steps_of

pytest.importorskip("torchtitan")

import torch
from matplotlib import image
from newcomers import ROOT, after_make_train, newcomers, page, settle, ten_minutes
from warm import python, weighting

from titan_integration.commands import train as launch
from titan_integration.commands.screen import Live
from weighting.runs.record_reader import read_record

SVG = "{http://www.w3.org/2000/svg}"
STEPS = 20
FEWER = ["--training.local_batch_size=4", f"--training.steps={STEPS}"]

pytestmark = pytest.mark.processes


def after(command, flag):
    """Return the words that follow a flag of a command, up to the next one."""
    rest = command[command.index(flag) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


def named(verb):
    """Return the commands of the tutorial with this verb, of which there must be one at least."""
    found = [command for command in ten_minutes() if command[1] == verb]
    assert found, f"no {verb} in the tutorial's ten minutes"
    return found


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Run every line in a folder with the README alone; return that, and what each line printed."""
    folder, said = tmp_path_factory.mktemp("newcomer"), {}
    settle(folder)
    with contextlib.chdir(folder):
        for newcomer in newcomers():
            said |= {shlex.join(line): printed(line) for line in newcomer.lines}
    return folder, said


def printed(line):
    """Return what a line prints, in a process of its own."""
    if line[0] == "python":
        assert line[1] == "-m"
        done = python(*line[1:], timeout=900)  # seconds of work, where nobody else works
    else:
        assert line[0] == "weighting"
        done = weighting(*line[1:], *(FEWER if line[1] == "train" else ()), timeout=900)
    assert done.returncode == 0, shlex.join(line) + done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("newcomer", newcomers(), ids=lambda x: x.who)
def test_a_newcomer_is_answered_by_two_pages_and_few_lines(ten, newcomer):
    """What they open is linked from what they have open; what they type answers them."""
    opened, *others = newcomer.pages
    assert opened == "README.md"
    assert len(newcomer.pages) == 2
    assert all(f"]({name})" in page(opened) for name in others)
    assert 4 <= len(newcomer.lines) <= 6
    said = "".join(ten[1][shlex.join(line)] for line in newcomer.lines)
    assert re.search(newcomer.answer, said, re.MULTILINE)


def test_the_stage_author_sees_the_laws_pass_and_a_spec_that_uses_the_stage(ten):
    """The test that was written with the stage passes; the spec is right, and weighs."""
    said = [ten[1][shlex.join(line)] for line in newcomers()[2].lines]
    made, tested, checked, weighed = said
    assert "python -m pytest test_soft_cap.py" in made
    assert re.search(r"\b\d+ passed", tested)
    assert checked.startswith("ok  soft.yaml: soft, weighs per sequence, reads loss\n")
    assert re.search(r"^ +mean +1\.0000$", weighed, re.MULTILINE)


def test_the_tutorial_has_every_command_from_check_to_report():
    """From the first look to the report; it names no file that it has not made."""
    verbs = [command[1] for command in ten_minutes()]
    assert [*dict.fromkeys(verbs)] == [
        "check",
        "explain",
        "simulate",
        "plot",
        "train",
        "replay",
        "report",
    ]
    [train], [replay], [report] = map(named, ("train", "replay", "report"))
    assert replay[2] == report[2] == f"outputs/{train[2]}"


def test_what_is_printed_before_training(ten):
    """The spec is right, its stages are told, every spec has weights of mean one."""
    _, said = ten
    [check], [explain], [simulate] = map(named, ("check", "explain", "simulate"))
    assert said[shlex.join(check)].startswith("ok  ")
    assert re.search(r"^  stage +gives +statistics$", said[shlex.join(explain)], re.MULTILINE)
    lines = said[shlex.join(simulate)].splitlines()
    specs = [simulate[2], *after(simulate, "--compare")]
    [head] = [line.split() for line in lines if line.split()[:1] == ["loss"]]
    assert head == ["loss", *specs]
    [mean] = [line.split() for line in lines if line.split()[:1] == ["mean"]]
    assert mean == ["mean", *["1.0000"] * len(specs)]


def test_pictures_show_what_was_asked_for(ten):
    """Text that is text: title, axes with units, every spec's name; and lines of many points."""
    folder, _ = ten
    for command in named("plot"):
        [name] = after(command, "--out")
        if name.endswith(".png"):
            pixels = torch.from_numpy(image.imread(folder / name).copy())[..., :3]
            assert min(pixels.shape[:2]) > 400
            dark = (pixels.amax(-1) < 0.1).float().mean()
            # Words, axes and a line are ink; most of a picture is paper.
            assert 0.001 < dark < 0.2, name
            continue
        root = ET.fromstring((folder / name).read_bytes())
        words = {"".join(node.itertext()) for node in root.iter(f"{SVG}text")}
        specs = command[2 : command.index("--out")]
        assert {"loss (nats)", "weight (mean one)", *specs} <= words
        assert any(word.startswith("Weights of ") for word in words)
        paths = [path.get("d", "") for path in root.iter(f"{SVG}path")]
        assert sum(d.count("L") > 20 for d in paths) == len(specs)


def test_make_train_is_the_line_of_the_tutorial():
    """So that what is tried here of one holds for the other."""
    [train] = named("train")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [line] = re.findall(r"^train: .*\n\t\$\(BIN\)/(.*)", makefile, re.MULTILINE)
    assert shlex.split(line) == train


def test_it_trains_the_steps_that_the_tutorial_tells(monkeypatch):
    """As many as are asked for where there is no accelerator and the user asks for none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    [told] = re.findall(r"^weighting train .*# (\d+) steps", page("docs/tutorial.md"), re.MULTILINE)
    given = launch.Options(
        spec="linupper", name="linupper", module="titan_integration", config="llama3_debugmodel"
    )
    assert launch.value_of(launch.run_flags(given), "--training.steps") == told


def test_training_ends_in_a_summary_of_the_run(ten):
    """First, last, least, mean and largest are those of the metrics; every step was recorded."""
    folder, said = ten
    [train] = named("train")
    text = said[shlex.join(train)]
    run = folder / "outputs" / train[2]
    path = run / "weighting" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    names = {
        "loss (nats)": "unweighted_loss",
        "weighted loss (nats)": "weighted_loss",
        "largest weight (mean 1)": "weight/max",
        "effective sample size (share)": "weight/ess_frac",
        "share at the cap": "pipeline/capped_frac",
    }
    for label, name in names.items():
        [row] = re.findall(rf"^{re.escape(label)} +(.*)$", text, re.MULTILINE)
        values = [line[name] for line in lines]
        wanted = [values[0], values[-1], min(values), sum(values) / STEPS, max(values)]
        # The table rounds to three or four digits after the point.
        assert [float(x) for x in row.split()] == pytest.approx(wanted, abs=6e-4), label
    assert re.search(r"^tokens per second( +[\d,]+){5}$", text, re.MULTILINE)
    at_cap = sum(line["pipeline/capped_frac"] > 0 for line in lines)
    told = f"a cap held weights down at {at_cap} of these: " if at_cap else "no cap held a weight"
    assert told in text
    assert lines[-1]["unweighted_loss"] < lines[0]["unweighted_loss"] - 1, "it learns"
    assert [step.step for step in steps_of(read_record(run))] == [*range(1, STEPS + 1)]
    metrics = page("docs/metrics.md")
    told = {re.sub(r"^(domain/)\w+", r"\1<name>", name) for name in lines[-1]}
    told = {re.sub(r"^pipeline(?=/)", "<factor>", name) for name in told}
    assert not [name for name in told if f"| `{name}` |" not in metrics]


def test_what_was_saved_is_there_and_the_next_commands_are_those_of_the_readme(ten):
    """Every place exists; the commands that are named after it are filled in and work."""
    folder, said = ten
    [train] = named("train")
    _, _, last = said[shlex.join(train)].rpartition("\n\nmetrics: ")
    saved, _, following = last.partition("\n\nnext:\n")
    places = dict(line.split(": ") for line in f"metrics: {saved}".splitlines())
    assert [*places] == ["metrics", "record", "checkpoint"]
    assert all((folder / place).exists() for place in places.values())
    given = [shlex.split(line, comments=True) for line in following.splitlines()]
    lines = [line[line.index("weighting") + 1 :] for line in given]
    lines[0][-1] = lines[0][-1].removeprefix(f"outputs/{train[2]}/")  # beside the run's files
    assert lines == [line[1:] for line in after_make_train()]


def test_nothing_is_logged_that_no_user_can_change(ten):
    """The host's doubts about its version and about flags nobody gave are left out."""
    text = ten[1][shlex.join(*named("train"))]
    assert "torchtitan version: " in text
    for noise in ("0.0.0", "initial_load_model_only", "TORCH_NCCL", "safetensors"):
        assert noise not in text


def test_a_terminal_shows_one_line_of_that_log(ten, tmp_path):
    """The step, the total, the loss and the time left; the log is kept in a file."""
    text = ten[1][shlex.join(*named("train"))]
    (tmp_path / "weighting").mkdir()
    shown, log = io.StringIO(), text.partition("\n\n")[0].splitlines()
    live = Live(shown, tmp_path)
    for line in log:
        live.line(line)
    live.end()
    pieces = shown.getvalue().split("\r\x1b[K")
    assert sum(piece.startswith("step ") for piece in pieces) == STEPS + 1  # the last one twice
    assert re.fullmatch(rf"step {STEPS} of {STEPS}  loss [\d.]+  0:00:00 left\n", pieces[-1])
    assert not any("\n" in piece for piece in pieces[:-1]), "nothing else takes a line"
    kept = (tmp_path / "weighting" / "train.log").read_text().splitlines()
    assert kept == [line.removeprefix("[rank0]:") for line in log]


def test_tokens_of_the_readme_are_weighed_under_the_checkpoint(ten):
    """A row for each of the first tokens in a pipe, by the checkpoint of the last step."""
    [tokens] = [line for line in after_make_train() if line[1] == "tokens"]
    text = ten[1][shlex.join(tokens)]
    assert f"outputs/linupper/checkpoint/step-{STEPS}" in text
    assert len(text.splitlines()) > 200


def test_replay_has_a_column_for_each_spec(ten):
    """Beside what was recorded; each with an effective sample size, and shares that add up."""
    _, said = ten
    [replay] = named("replay")
    text, specs = said[shlex.join(replay)], after(replay, "--spec")
    assert len(specs) == 2
    assert re.search(rf"^ +recorded +{' +'.join(specs)}$", text, re.MULTILINE)
    sizes = re.search(r"^ESS / n, mean over steps +(.*)$", text, re.MULTILINE)[1].split()
    assert len(sizes) == 3
    assert all(0 < float(size) <= 1 for size in sizes)
    shares = re.search(r"^share of weight.*?\n\n", text, re.MULTILINE | re.DOTALL)[0]
    rows = [line.split()[1:] for line in shares.strip().splitlines()[1:]]
    # Four decimals each.
    columns = [sum(map(float, column)) for column in zip(*rows, strict=True)]
    assert columns == pytest.approx([1] * len(columns), abs=5e-4)
    for spec in specs:
        assert f"most raised by {spec}" in text


class Charts(html.parser.HTMLParser):
    """Notes what figures and tables of a page say, and every attribute of its tags."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.attributes, self.tags, self.heads = [], [], [], []
        self.inside = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Note a tag; a figure and a cell of a table's head begin anew."""
        self.tags.append(tag)
        self.attributes += attrs
        self.inside.append(tag)
        if tag == "figure":
            self.figures.append({"strong": [], "text": [], "li": [], "path": 0})
        if tag in {"path", "rect", "circle"} and "figure" in self.inside:
            self.figures[-1]["path"] += 1

    def handle_endtag(self, tag):
        """Leave a tag, and those inside that need no end."""
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        """Note words by the tag they stand in."""
        if "figure" in self.inside and self.inside[-1] in {"strong", "text", "li"}:
            self.figures[-1][self.inside[-1]].append(data)


def test_the_report_is_a_page_of_charts(ten):
    """Each has a title, labelled axes and a legend, and nothing is fetched from elsewhere."""
    folder, said = ten
    [report] = named("report")
    [name] = after(report, "--out")
    text = (folder / name).read_text(encoding="utf-8")
    page = Charts(text)
    titles = ["".join(figure["strong"]) for figure in page.figures]
    for title in ("Unweighted loss", "Weighted loss", "Maximum weight", "Effective sample size"):
        assert title in titles
    labels = ("nats", "mean", "share", "tokens/s")
    for title, figure in zip(titles, page.figures, strict=True):
        assert title
        assert any(label in word for word in figure["text"] for label in labels), title
        assert "step" in figure["text"] or "mean over steps" in " ".join(figure["text"]), title
        ticks = [word for word in figure["text"] if re.fullmatch(r"[-\d.,]+", word)]
        assert len(ticks) >= 4, title
        assert figure["li"], title
        assert figure["path"] > 0, title
    assert not {"link", "img", "iframe", "object"} & {*page.tags}
    assert not {"src", "xlink:href"} & {key for key, _ in page.attributes}
    assert all(value.startswith("#") for key, value in page.attributes if key == "href")
    rest = text.replace("http://www.w3.org/2000/svg", "")  # a name that nobody fetches
    assert not re.findall(r".{0,60}(?:https?://|url\(|@import).{0,40}", rest)
    [train] = named("train")
    assert f"{train[2]} " in text
    assert name in said[shlex.join(report)]

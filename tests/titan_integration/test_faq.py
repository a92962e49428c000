"""Every message that the page of questions names is raised here by the code that says it."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch

import weighting as wt
from titan_integration.data.records import Columns, numbers_of
from titan_integration.host import together
from titan_integration.host.checkpoints import lost
from titan_integration.host.run_dir import claim, refuse_unwritable, writing
from titan_integration.observe.agreement import check_agreement
from titan_integration.state import checkpoint
from titan_integration.state.run import start
from titan_integration.state.saved_weighting import SavedWeighting
from titan_integration.trainer.preflight import refuse_one_domain
from weighting.build import plan_of
from weighting.build.statistics import raise_if_nonfinite

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
DOMAINS = "table(a=1, b=2) -> mean_one"


def spec(pipeline, more=""):
    """Return a spec, or raise what is wrong with it."""
    return wt.loads(f"version: 1\n{more}pipeline: {pipeline}\n")


def bad_signal():
    """Read the statistics of a step with three such tokens."""
    fn = wt.build(spec("normalize -> temperature(1)"))
    raise_if_nonfinite(fn.spec, 3)


def bad_label():
    """Take the loss of a label outside the vocabulary."""
    logits, labels = torch.randn(1, 2, 5), torch.tensor([[0, 7]])
    wt.weighted_cross_entropy(logits, labels, wt.build(spec("normalize -> temperature(1)")), step=1)


def other_data(monkeypatch):
    """Be rank 0 of two, of which the other one reads another file."""
    monkeypatch.setenv("RANK", "0")
    answers = [["a", "b"], [json.dumps(["host", {"training": {"file": x}}]) for x in "ab"]]
    monkeypatch.setattr(together, "exchange", lambda *_: answers.pop(0))
    together.refuse_other_data({"training": {"file": "a"}})


def one_sequence():
    """Weigh a batch of one sequence, which is warned of when the step is read."""
    fn = wt.build(spec("normalize -> temperature(1)"))
    with pytest.warns(wt.OneUnitWarning) as caught:
        wt.weighted_cross_entropy(torch.randn(1, 2, 5), torch.zeros(1, 2).long(), fn, step=1)
    raise ValueError(str(caught[0].message))


def separate_disks(tmp_path, monkeypatch):
    """Be the first of two ranks, of which the other one has a disk of its own."""
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoint, "_on_first_rank", lambda do: do())
    monkeypatch.setattr(checkpoint, "_blind", lambda _: "rank 1 on b does not see")
    checkpoint._refuse_separate(tmp_path)


class Two:
    """A rank of two, of which the other one is at another step."""

    rank = 0

    def gather(self, mine):
        """Return what both say."""
        other = mine.clone()
        other[0] += 1
        other[2] += 1
        return torch.stack([mine, other])


def changed_spec():
    """Load the state of one spec into another."""
    one, other = (
        SavedWeighting(
            start(wt.build(spec(f"normalize -> temperature({tau})")), torch.device("cpu"))
        )
        for tau in (1, 2)
    )
    other.load_state_dict(one.state_dict())


def torn(tmp_path):
    """Say why a folder of torn checkpoints is no new one."""
    (tmp_path / "step-20").mkdir()
    raise ValueError(lost(tmp_path, 10))


def taken(tmp_path, monkeypatch):
    """Claim a folder that another process has."""
    import fcntl  # noqa: PLC0415 - only here

    def held(*_):
        raise BlockingIOError

    (tmp_path / ".running").write_text("process 1 on host\n")
    monkeypatch.setattr(fcntl, "lockf", held)
    claim(tmp_path)


def full():
    """Write to a disk without room."""
    with writing("a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def read_only(tmp_path, monkeypatch):
    """Ask for a folder in one that cannot be written, whoever asks."""
    monkeypatch.setattr("os.access", lambda *_: False)
    refuse_unwritable(tmp_path / "runs")


SAYS = {
    "unknown stage": lambda: spec("linuper"),
    "unknown key": lambda: spec("uniform", "factor: 1\n"),
    "must be positive, at least 1e-30": lambda: spec("temperature(0)"),
    "needs tau: temperature(tau=...)": lambda: spec("temperature"),
    "changes weights and cannot come first": lambda: plan_of(spec("clamp(2/n)")),
    "the pipeline ends in a score": lambda: plan_of(spec("normalize")),
    "is given twice": lambda: spec("uniform\npipeline: uniform"),
    "anchors are not allowed": lambda: spec("&a uniform"),
    "importing mine runs its code": lambda: spec("uniform", "plugins: [mine]\n"),
    "the data has no domain 'b'": lambda: wt.build(spec(DOMAINS), domains=["a", "c"]),
    "so that every weight would be 1": lambda: refuse_one_domain(plan_of(spec(DOMAINS)), ["a"]),
    "is a share of the run": lambda: wt.build(spec("temperature(step(1, 2, at=5%))")),
    "tokens had a NaN or infinite signal": bad_signal,
    "is outside the vocabulary": bad_label,
    "so it weighs all tokens alike": one_sequence,
    "every node needs the same folder": separate_disks,
    "makes its rows from other data than rank 0": other_data,
    "start all ranks with the same files": lambda: check_agreement(
        wt.build(spec("normalize -> temperature(1)")), torch.tensor(3), Two()
    ),
    "was trained with another weighting spec": changed_spec,
    "none of them whole": torn,
    "is training there": taken,
    "make room there": full,
    "make it writable or take another folder": read_only,
    "no column 'ref_loss'": lambda: numbers_of(
        {"text": "a"}, Columns("text", "domain", ("ref_loss",)), "a.jsonl:1"
    ),
}
"""What raises each message of the page."""


def test_the_page_names_these_messages():
    """And no other."""
    assert re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE) == [*SAYS]


@pytest.mark.parametrize("words", SAYS)
def test_the_code_says_what_the_page_names(words, request):
    """The words of the page are in the message, and the error is one of the project's own."""
    asked = SAYS[words].__code__.co_varnames[: SAYS[words].__code__.co_argcount]
    given = {name: request.getfixturevalue(name) for name in asked}
    with pytest.raises((ValueError, RuntimeError)) as info:
        SAYS[words](**given)
    assert words in str(info.value)

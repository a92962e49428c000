"""Ranks that find something wrong before they begin end together, with one message on each node."""

import contextlib
import functools
import json
import os
import re
import signal
import socket

import pytest
from faulty import Run
from runs import torchrun

from titan_integration.host import together

PATIENCE = 300
FLAGS = [
    "--training.steps=2",
    "--training.local_batch_size=2",
    "--weighting.spec=linupper",
    "--dataloader.dataset_path=data.jsonl",
]


def write(folder, *names, count=60):
    """Write documents that are in these domains in turn; return the folder."""
    folder.mkdir()
    records = [{"text": f"word {i} " * 20, "domain": names[i % len(names)]} for i in range(count)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def enter(folders):
    """Be in the folder of this rank."""
    os.chdir(folders[int(os.environ["RANK"])])


def ended(*runs):
    """Return the status of each run, and what it said; whatever is still there is killed."""
    try:
        return [run.ended(PATIENCE) for run in runs]
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.agent.pid, signal.SIGKILL)


def message(status, said):
    """Return the one error of a run that ended with status 2 and without a traceback."""
    assert status == 2, said
    assert "Traceback" not in said, said
    assert "Building" not in said, "the model was built first"
    (text,) = re.findall(r"^error: (.*)$", said, re.MULTILINE)
    return text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("names", "count", "told"),
    [
        (
            ("aaa", "web"),
            60,
            r"domains = \['rare', 'web'\], on rank 1 it is \['aaa', 'web'\]; ",
        ),
        (("rare", "web"), 30, r"documents = 60, on rank 1 it is 30; look at data\.jsonl"),
    ],
    ids=["other domains", "half the documents"],
)
def test_two_ranks_with_other_data_do_not_train(tmp_path, names, count, told):
    """Domain ids would mean other domains on one rank, or rows would be of other documents."""
    folders = [write(tmp_path / "0", "rare", "web"), write(tmp_path / "1", *names, count=count)]
    first = functools.partial(enter, folders)
    run = Run(tmp_path / "log", 2, *FLAGS, f"--dump_folder={tmp_path}/dump", first=first)
    (one,) = ended(run)
    host = re.escape(socket.gethostname())
    begin = rf"rank 1 on {host} makes its rows from other data than rank 0 on {host}\. training: "
    assert re.match(begin + told, message(*one))


@pytest.mark.processes
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_file_that_one_node_lacks_is_said_once(tmp_path, lacking):
    """One node says it, with rank and host; the launcher of the other says who does."""
    folders = [write(tmp_path / f"{node}", "rare", "web") for node in range(2)]
    (folders[lacking] / "data.jsonl").unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"localhost:{free.getsockname()[1]}"
    flags = [*FLAGS, f"--dump_folder={tmp_path}/dump"]
    runs = [
        Run(
            tmp_path / f"log{node}",
            1,
            *flags,
            first=functools.partial(enter, folders),
            nodes=2,
            node=node,
            meeting=meeting,
        )
        for node in range(2)
    ]
    expected = f"rank {lacking} on {socket.gethostname()}: data.jsonl: no such file or directory"
    both = ended(*runs)
    assert [status for status, _ in both] == [2, 2], both
    assert message(2, "".join(said for _, said in both)) == expected
    assert sum("says why" in said for _, said in both) == 1


SCRIPT = """
import os, sys
from titan_integration.host.together import exchange, fail_together, refuse_other_data
rank = int(os.environ["RANK"])

def say(text):  # in one piece, as both ranks write to one file
    os.write(1, f"{rank}: {text}\\n".encode())

say(f"{exchange(f'a{rank}')} {exchange(f'b{rank}')}")
for error in (ValueError("bad data"), OSError("bad disk")):
    try:
        with fail_together():
            if rank == 1:
                raise error
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
with fail_together():
    pass
refuse_other_data({"training": {"documents": 7}})
try:
    if rank == 0:
        exchange("here", patience=1)
except ValueError as error:
    say(f"{error}")
"""


@pytest.mark.processes
def test_every_rank_gets_the_values_of_all_or_the_error_of_one(tmp_path):
    """Twice in a row, of a user's error and of any other, and of a rank that says nothing."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"{rank}: ['a0', 'a1'] ['b0', 'b1']" in done.stdout
    host = socket.gethostname()
    assert done.stdout.count(f"ValueError: rank 1 on {host}: bad data") == 2
    assert f"0: ValueError: rank 1 on {host}: OSError: bad disk" in done.stdout
    assert "1: OSError: bad disk" in done.stdout
    assert "0: rank 1 has said nothing for 1 s" in done.stdout
    assert "--comm.init_timeout_seconds" in done.stdout


def test_what_all_ranks_find_is_said_without_a_rank():
    """And what some of them find names the first of these, and how many more there are."""
    words = [json.dumps([f"node{rank // 2}", "no such file"]) for rank in range(4)]
    assert together._first_failure(["", ""]) == ""
    assert together._first_failure(words) == "no such file"
    told = together._first_failure(["", "", *words[2:]])
    assert told == "rank 2 on node1 (and 1 more): no such file"
    other = json.dumps(["node0", "another thing"])
    assert together._first_failure([other, *words[1:]]) == "rank 0 on node0: another thing"


def test_a_single_process_raises_its_own_error(monkeypatch):
    """Without a launcher its own error is the message."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"^invalid literal for int"), together.fail_together():
        int("x")
    together.refuse_other_data({"training": {"documents": 7}})

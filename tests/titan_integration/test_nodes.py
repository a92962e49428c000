"""Launchers of several nodes: where they meet, and two of them on this machine."""

import contextlib
import os
import re
import shutil
import signal
import socket

import pytest
from faulty import Run, on_node
from forked import process
from warm import weighting

from titan_integration.commands import train_and_export
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.host.nodes import Nodes, first_host, meeting, resolved
from weighting.runs.files import read_lines

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NNODES": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
    "SLURM_NODEID": "1",
}


def test_one_node_needs_no_meeting():
    """Nothing given, or restarts alone: torchrun's standalone mode, and nothing to tell."""
    assert meeting(Nodes(), {}) == (["--standalone"], "")
    assert meeting(Nodes(max_restarts=3), {}) == (["--standalone", "--max-restarts=3"], "")
    one = {**SLURM, "SLURM_STEP_NUM_NODES": "1"}
    assert meeting(Nodes(), one) == (["--standalone"], "")
    assert meeting(Nodes(nnodes=1), SLURM) == (["--standalone"], "")


def test_nodes_meet_where_the_user_says():
    """The first serves the meeting, whatever it is called; the user is told what was taken."""
    given = Nodes(nnodes=2, node_rank=0, rdzv_endpoint="head:29500", rdzv_id="a", max_restarts=1)
    options, told = meeting(given, SLURM)
    assert options == [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=head:29500",
        "--rdzv-id=a",
        "--log-line-prefix-template=[${role_name}${rank}]:",
        "--max-restarts=1",
        "--rdzv-conf=read_timeout=600,is_host=1",
    ]
    here = socket.gethostname()
    assert told == f"2 nodes, from options: this is {here}, number 0; meeting at head:29500, as a"
    static = Nodes(nnodes=2, node_rank=1, rdzv_endpoint="head:1", rdzv_backend="static")
    assert meeting(static, {})[0][-1] == "--node-rank=1"


def test_nodes_meet_where_slurm_says():
    """Of the step rather than of the job; restarts may be given beside it."""
    options, told = meeting(Nodes(max_restarts=2), SLURM)
    assert "--nnodes=2" in options
    assert "--rdzv-endpoint=gpu007:24711" in options
    assert "--rdzv-id=4711" in options
    assert "--max-restarts=2" in options
    assert options[-1].endswith("is_host=0")
    assert "from SLURM job 4711" in told


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("alone", "alone"),
        ("a,b", "a"),
        ("gpu[007-010,12]", "gpu007"),
        ("rack[1-2]node[3,5],z", "rack1node3"),
        ("n[4,6].site,other", "n4.site"),
    ],
)
def test_the_first_host_of_a_list_of_slurms(names, first):
    """Ranges and lists in brackets, also several in a name."""
    assert first_host(names) == first


@pytest.mark.parametrize(
    ("given", "environment", "reason"),
    [
        (Nodes(nnodes=2), {}, "--nnodes 2: say where the nodes meet"),
        (Nodes(rdzv_endpoint="a:1"), {}, "say how many nodes meet there: --nnodes N"),
        (Nodes(nnodes=2, node_rank=2, rdzv_endpoint="a:1"), {}, "numbered from 0 to 1"),
        (Nodes(nnodes=2, rdzv_endpoint="a:1", rdzv_backend="static"), {}, "--node-rank N"),
        (Nodes(), {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, "by `srun weighting train ...`"),
        (Nodes(), {**SLURM, "SLURM_STEP_NUM_TASKS": "16"}, "--ntasks-per-node=1"),
    ],
)
def test_nodes_that_could_not_meet_are_refused(given, environment, reason):
    """Before torchrun waits for others that never come."""
    with pytest.raises(ValueError, match=re.escape(reason)):
        meeting(given, environment)


def launched(tmp_path, *words, dump=None, fresh=False):
    """Return the status of two launchers with homes of their own, and what each said.

    A tokenizer is in the homes already, unless they are to be fresh.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    launchers = []
    for node in range(2):
        own = ["--nnodes=2", f"--node-rank={node}", endpoint, "--ranks=1"]
        own += [f"--dump_folder={(dump or '{}/out').format(tmp_path / f'node{node}')}"]
        place = home, _ = tmp_path / f"node{node}", tmp_path / f"log{node}"
        if not fresh:
            shutil.copytree(ensure_tokenizer().parent, home / "cache/weighting-dsl/tokenizers")
        launchers.append(process(on_node, *place, [*words, *own]))
        launchers[-1].start()
    try:
        for launcher in launchers:
            launcher.join(300)
            assert launcher.exitcode is not None, (tmp_path / "log0").read_text()
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    return [
        (launcher.exitcode, (tmp_path / f"log{node}").read_text())
        for node, launcher in enumerate(launchers)
    ]


FLAGS = ["--training.steps=4", "--training.seq_len=32", "--training.local_batch_size=2"]
FLAGS += ["--debug.seed=1", "--checkpoint.enable", "--checkpoint.interval=2"]


@pytest.mark.processes
@pytest.mark.slow
def test_two_launchers_train_as_one_with_two_ranks(tmp_path):
    """On a shared disk, with homes of their own, in which each makes its tokenizer."""
    words = ["linupper", "--module=faulty", "--config=tiny", *FLAGS]
    ended = launched(tmp_path, *words, dump=str(tmp_path / "both"), fresh=True)
    assert [status for status, _ in ended] == [0, 0], ended
    for node, (_, said) in enumerate(ended):
        assert f"2 nodes, from options: this is {socket.gethostname()}, number {node}" in said

    flags = ["--weighting.spec=linupper", f"--dump_folder={tmp_path / 'one'}", *FLAGS]
    status, said = Run(tmp_path / "log", 2, *flags).ended(300)
    assert status == 0, said
    both, one = (
        {line["step"]: line for line in read_lines(tmp_path / name / "weighting/metrics.jsonl")}
        for name in ("both", "one")
    )
    assert [*both] == [*one] == [*range(1, 5)]
    for step, line in one.items():
        for name in ("weighted_loss", "unweighted_loss", "weight/max"):
            assert both[step][name] == pytest.approx(line[name], rel=1e-6), (step, name)


def check_that_it_went_on(folder, said):
    """Check that a run of which a rank was killed before step 4 ended as if nothing had been."""
    assert "Training starts at step 3" in said, said
    found = {line["step"]: line for line in read_lines(folder / "weighting/metrics.jsonl")}
    assert [*found] == [*range(1, 5)]
    assert (folder / "checkpoint/step-4/.metadata").exists()


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_goes_on_after_a_rank_was_killed(tmp_path):
    """From the last whole checkpoint, if restarts are asked for; on one node."""
    words = ["train", "linupper", "--module=faulty", "--config=dies_once", *FLAGS, "--ranks=2"]
    done = weighting(*words, "--max-restarts=1", f"--dump_folder={tmp_path / 'out'}", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    check_that_it_went_on(tmp_path / "out", done.stdout + done.stderr)


@pytest.mark.processes
@pytest.mark.slow
def test_two_launchers_go_on_after_a_rank_was_killed(tmp_path):
    """Whichever launcher notices first; where one counts a restart and the other does not."""
    words = ["linupper", "--module=faulty", "--config=dies_once", "--max-restarts=1", *FLAGS]
    ended = launched(tmp_path, *words, dump=str(tmp_path / "both"))
    said = "".join(said for _, said in ended)
    assert [status for status, _ in ended] == [0, 0], said
    check_that_it_went_on(tmp_path / "both", said)


@pytest.mark.processes
@pytest.mark.slow
def test_nodes_with_disks_of_their_own_are_refused_with_one_message(tmp_path):
    """Before the first step; the other node says who has said it."""
    ended = launched(tmp_path, "linupper", "--module=faulty", "--config=impatient", *FLAGS)
    assert [status for status, _ in ended] == [2, 2], ended
    said = "".join(said for _, said in ended)
    here = socket.gethostname()
    (error,) = (line for line in said.splitlines() if "error: " in line)
    assert f"rank 1 on {here} does not see what the first rank writes" in error
    assert f"rank 1 on {here}: ended, as rank 0 on {here} says why" in said
    assert "Traceback" not in said
    assert "Training starts" not in said


@pytest.mark.processes
@pytest.mark.slow
def test_an_error_of_one_node_alone_is_said_once_with_its_name(tmp_path):
    """Though the others see but a connection that is lost."""
    words = ["linupper", "--module=faulty", "--config=fails_alone", *FLAGS]
    ended = launched(tmp_path, *words, dump=str(tmp_path / "both"))
    assert [status for status, _ in ended] == [2, 2], ended
    said = "".join(said for _, said in ended)
    here = socket.gethostname()
    assert said.count("error: ") == 1, said
    assert f"error: rank 1 on {here}: only here" in said
    assert f"rank 0 on {here}: ended, as rank 1 on {here} says why" in said
    assert "Traceback" not in said


def test_one_of_several_nodes_exports():
    """The first: SLURM says which it is, or the user has to."""
    options = {"spec": "mile", "name": "mile", "module": "titan_integration", "flags": []}
    options |= {"config": "llama3_debugmodel", "nodes": {"nnodes": 2, "rdzv_endpoint": "a:1"}}
    with pytest.raises(ValueError, match="--hf: the first of several nodes exports; say which"):
        train_and_export.main(**options)
    nodes, source = resolved(Nodes(max_restarts=1), SLURM)
    assert (nodes.node_rank, nodes.max_restarts, source) == (1, 1, "SLURM job 4711")

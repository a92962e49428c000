"""Where the nodes of a run meet: what the user says, or what SLURM does, as options of torchrun."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PATIENCE = 600
"""Seconds that a node waits for the one that serves the meeting, as long as torchrun waits for the
others once it is there."""
_PORT = 29_500


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How the launchers of a run find each other; the names are torchrun's.

    Attributes:
        nnodes: How many nodes there are, each with a launcher.
        node_rank: Which of them this is; the first serves the meeting.
        rdzv_endpoint: Where they meet: the first node's name and a port.
        rdzv_backend: How they meet: `c10d`, or another of torchrun's.
        rdzv_id: Tells this run from others that meet there.
        max_restarts: How often all processes are started again after one has failed.
    """

    nnodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_backend: str | None = None
    rdzv_id: str | None = None
    max_restarts: int | None = None


def resolved(given: Nodes, environment: Mapping[str, str] = os.environ) -> tuple[Nodes, str]:
    """Return how launchers meet and who says so: what is given, or SLURM where nothing is.

    Raises:
        ValueError: SLURM has not started the command once on each node.
    """
    if given == Nodes(max_restarts=given.max_restarts) and (found := _of_slurm(environment)):
        return replace(found, max_restarts=given.max_restarts), f"SLURM job {found.rdzv_id}"
    return given, "options"


def meeting(given: Nodes, environment: Mapping[str, str] = os.environ) -> tuple[list[str], str]:
    """Return torchrun's options for a launcher, and what to tell the user; "" for one node alone.

    Raises:
        ValueError: The nodes could not meet; says what to give.
    """
    given, source = resolved(given, environment)
    restarts = [f"--max-restarts={given.max_restarts}"] if given.max_restarts else []
    count = given.nnodes or 1
    if count == 1 and given.rdzv_endpoint is None:
        return ["--standalone", *restarts], ""
    if given.rdzv_endpoint is None:
        msg = (
            f"--nnodes {count}: say where the nodes meet, the same on each of them: "
            f"--rdzv-endpoint HOST:{_PORT}, with the name of the first node"
        )
        raise ValueError(msg)
    if given.nnodes is None:
        msg = f"--rdzv-endpoint {given.rdzv_endpoint}: say how many nodes meet there: --nnodes N"
        raise ValueError(msg)
    rank = given.node_rank
    if rank is not None and rank >= count:
        msg = f"--node-rank {rank}: {count} nodes are numbered from 0 to {count - 1}"
        raise ValueError(msg)
    backend = given.rdzv_backend or "c10d"
    if backend == "static" and rank is None:
        msg = "--rdzv-backend static: say which node this is: --node-rank N"
        raise ValueError(msg)
    name = given.rdzv_id or "weighting"
    options = [
        f"--nnodes={count}",
        f"--rdzv-backend={backend}",
        f"--rdzv-endpoint={given.rdzv_endpoint}",
        f"--rdzv-id={name}",
        "--log-line-prefix-template=[${role_name}${rank}]:",  # else each node has a rank 0
        *restarts,
    ]
    if backend == "static":
        options.append(f"--node-rank={rank}")
    elif backend == "c10d":
        # Without a number torchrun compares names of hosts, which differ in many clusters.
        serves = "" if rank is None else f",is_host={int(rank == 0)}"
        options.append(f"--rdzv-conf=read_timeout={_PATIENCE}{serves}")
    which = socket.gethostname() if rank is None else f"{socket.gethostname()}, number {rank}"
    told = f"{count} nodes, from {source}: this is {which}; meeting at {given.rdzv_endpoint}"
    return options, f"{told}, as {name}"


def _of_slurm(environment: Mapping[str, str]) -> Nodes | None:
    """Return what SLURM says of a job on several nodes; None where there is no such job.

    Raises:
        ValueError: The command was not started once on each node.
    """
    job = environment.get("SLURM_JOB_ID")
    count = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    if job is None or count == 1:
        return None
    if "SLURM_STEP_ID" not in environment:
        msg = (
            f"SLURM job {job} has {count} nodes, and this command was started on one of them; "
            "start it on each by `srun weighting train ...`, or give --nnodes 1 to train here alone"
        )
        raise ValueError(msg)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or count)
    if tasks != count:
        msg = (
            f"SLURM job {job} starts this command {tasks} times on {count} nodes, and each starts "
            "the processes of a whole node: give srun, or sbatch, --ntasks-per-node=1"
        )
        raise ValueError(msg)
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    digits = re.sub(r"\D", "", job) or "0"
    return Nodes(
        nnodes=count,
        node_rank=int(environment["SLURM_NODEID"]),
        # Jobs that share a node must not meet at the same port.
        rdzv_endpoint=f"{first_host(names)}:{20_000 + int(digits) % 10_000}",
        rdzv_id=job,
    )


def first_host(names: str) -> str:
    """Return the first host of a list as SLURM writes it: node003 of `node[003-005,9],other`."""
    first = re.split(r",(?![^\[]*\])", names)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)

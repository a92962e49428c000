"""Ranks that drift apart are caught: another spec, step or state, or another rank's sequences."""

from pathlib import Path

import generators as tables
import pytest
import torch
from looping import for_each
from runs import torchrun

from titan_integration.observe.agreement import DisagreementError, check_agreement

SPECS = [name for name in tables.CASES if name.startswith("spec ")]


def on_two(part):
    """Return what both ranks of two come to: a value, or the message of a disagreement."""

    def one(rank, ranks):
        try:
            return part(rank, ranks)
        except DisagreementError as error:
            return str(error)

    return tables.Lockstep(2).run(one)


@pytest.mark.slow
@for_each("case", SPECS)
def test_ranks_of_every_spec_agree(case):
    """Nothing is said of ranks that weigh as they should, at any step."""
    text = tables.CASES[case]

    def part(rank, ranks):
        fn = tables.built(text, collectives=ranks)
        check_agreement(fn, torch.tensor(1), ranks)
        for step in (1, 2, 3):
            signals = tables.batch(8, 6, seed=step)
            mine = tables.changed(signals, lambda _, x: x.chunk(2)[rank])
            check_agreement(fn, torch.tensor(step), ranks, fn(mine, step).moments)
        return "agreed"

    assert on_two(part) == ["agreed"] * 2


@pytest.mark.parametrize("what", ["spec", "step", "state", "data set"])
def test_what_differs_is_named_on_every_rank(what):
    """Another spec on one rank, a step it is ahead, a state that was not restored, other data."""

    def part(rank, ranks):
        odd = rank == 1
        text = tables.CASES["spec doremi-proxy"]
        if odd and what == "spec":
            text = tables.CASES["spec group-dro"]
        fn = tables.built(text, collectives=ranks)
        if odd and what == "state":
            name, value = next((n, x) for n, x in fn.state_dict().items() if n.endswith("last"))
            fn.load_state_dict({name: value + 1}, strict=False)
        step = torch.tensor(7 + (odd and what == "step"))
        check_agreement(fn, step, ranks, data="half" if odd and what == "data set" else "whole")

    told = on_two(part)
    assert all(f"another {what}" in message for message in told), told
    assert all("start all ranks with the same files" in message for message in told)


def test_weights_that_add_up_to_something_else_are_caught():
    """A rank that weighs by statistics of its own."""

    def part(rank, ranks):
        fn = tables.built(tables.CASES["spec linupper"], collectives=ranks)
        mine = tables.changed(tables.batch(8, 6, seed=4), lambda _, x: x.chunk(2)[rank])
        moments = fn(mine, 2).moments.clone()
        if rank == 1:
            moments[-1] *= 1.5
            moments[-1, 0] /= 1.5
        check_agreement(fn, torch.tensor(2), ranks, moments)

    told = on_two(part)
    assert all("not to their number" in message for message in told), told


LOCAL = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import generators as tables
from titan_integration.observe.agreement import DisagreementError, check_agreement
from looping import for_each
from weighting.ranks import OverRanks

def main():  # nothing holds the group when the interpreter ends: its threads end with the last hold
    me = dist.get_rank()
    ranks = OverRanks(dist.group.WORLD)
    if sys.argv[2] == "local":
        ranks.rank = 0  # two nodes of one process each: the local rank is 0 on both
    fn = tables.built(tables.CASES["spec linupper"], collectives=ranks)
    signals = tables.batch(8, 6, seed=5)
    whole = tables.built(tables.CASES["spec linupper"])(signals, 2).token.chunk(2)[me]
    found = fn(tables.changed(signals, lambda _, x: x.chunk(2)[me]), 2)
    print(f"rank {me} right {torch.allclose(found.token, whole, atol=1e-5)}", flush=True)
    try:
        check_agreement(fn, torch.tensor(2), ranks, found.moments)
        print(f"rank {me} agreed", flush=True)
    except DisagreementError as error:
        print(f"rank {me} {error}", flush=True)
    dist.barrier()

dist.init_process_group("gloo")
main()
dist.destroy_process_group()
"""


@pytest.mark.processes
@pytest.mark.parametrize("place", ["global", "local"])
def test_a_local_rank_for_a_rank_is_caught(tmp_path, place):
    """The mistake of a published trainer: every node but the first weighs by another's losses."""
    script = tmp_path / "local.py"
    script.write_text(LOCAL)
    tests = Path(__file__).resolve().parents[1]
    done = torchrun(2, str(script), str(tests), place)
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout
    if place == "global":
        assert told.count("right True") == 2
        assert told.count("agreed") == 2
        return
    assert "rank 1 right False" in told, "the mistake is one"
    assert told.count("never a local rank") == 2, told

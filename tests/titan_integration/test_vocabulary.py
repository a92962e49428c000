"""Signals from slices of the vocabulary against those from whole logits."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titan_integration.vocabulary import Slices, sliced_signals
from weighting.losses import IGNORE_INDEX, distribution_signals, token_loss

NEEDS = frozenset({"entropy", "error_norm"})


def compare(rank, ranks, vocab, address):
    """Compare, in one of several processes, the signals of its slice with the whole ones."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, vocab, generator=generator) * 4
    logits[0, 0] = -40.0
    logits[0, 0, 1] = 40.0  # all but certain
    logits[0, 1, 2:] = -torch.inf  # words that cannot be
    labels = torch.randint(0, 2, (3, 5), generator=generator)
    labels[1, 1:] = torch.randint(0, vocab, (4,), generator=generator)
    labels[2, 0] = IGNORE_INDEX
    cut = Slices(dist.group.WORLD, vocab)
    width = -(-vocab // ranks)
    mine = logits[..., cut.start : cut.start + width]
    found = sliced_signals(mine, labels, cut, NEEDS)
    expected = {"loss": token_loss(logits, labels), **distribution_signals(logits, labels, NEEDS)}
    valid = labels != IGNORE_INDEX
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Other order of sums in float32; the norm of a certain prediction is a cancelled 1 - 1.
        atol = 1e-3 if name == "error_norm" else 1e-5
        torch.testing.assert_close(found[name][valid], value[valid], rtol=1e-5, atol=atol)
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "vocab"), [(2, 8), (3, 10)])
def test_slices_give_the_signals_of_the_whole(ranks, vocab, tmp_path):
    """Equal and uneven slices give loss, entropy and error norm of the whole vocabulary."""
    address = f"file://{tmp_path}/rendezvous"
    mp.spawn(compare, args=(ranks, vocab, address), nprocs=ranks)

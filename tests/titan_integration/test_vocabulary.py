"""Losses, signals and gradients from parts of the vocabulary against those from whole logits."""

import generators as tables
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from forked import process

from titan_integration.loss.vocab_parallel import part_of, token_losses_of
from weighting.loss.logits import IGNORE_INDEX, Slice, statistics

NEEDS = frozenset({"entropy", "error_norm", "columns.topk_entropy_3", "columns.label_is_top"})


def compare(rank, ranks, vocab, address):
    """Compare, in one of several processes, what its part gives with what the whole gives."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15, vocab, generator=generator) * 4
    logits[0] = -40.0
    logits[0, 1] = 40.0  # all but certain
    logits[1, 2:] = -torch.inf  # words that cannot be
    labels = torch.randint(0, 2, (15,), generator=generator)
    labels[6:] = torch.randint(0, vocab, (9,), generator=generator)
    labels[10] = IGNORE_INDEX
    cut = part_of(dist.group.WORLD, vocab)
    mine = slice(cut.start, cut.start + -(-vocab // ranks))

    found = statistics(logits[:, mine], labels, NEEDS, cut)
    expected = statistics(logits, labels, NEEDS)
    valid = labels != IGNORE_INDEX
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Other order of sums in float32; the norm of a certain prediction is a cancelled 1 - 1.
        atol = 1e-3 if name == "error_norm" else 1e-5
        torch.testing.assert_close(found[name][valid], value[valid], rtol=1e-5, atol=atol)

    weight = (torch.rand(15, generator=generator) * 2 - 0.5).where(valid, 0)
    weight[3] = 0
    whole, part = logits.clone().requires_grad_(), logits[:, mine].clone().requires_grad_()
    (F.cross_entropy(whole, labels, reduction="none") * weight).sum().backward()
    (token_losses_of(part, labels, cut)[0] * weight).sum().backward()
    torch.testing.assert_close(part.grad, whole.grad[:, mine], rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "vocab"), [(2, 8), (3, 10)])
def test_parts_give_what_the_whole_gives(ranks, vocab, tmp_path):
    """Equal and uneven parts give the signals and the gradient of the whole vocabulary."""
    address = f"file://{tmp_path}/rendezvous"
    started = [process(compare, rank, ranks, vocab, address) for rank in range(ranks)]
    for each in started:
        each.start()
    for each in started:
        each.join(120)
    assert [each.exitcode for each in started] == [0] * ranks


@pytest.mark.parametrize("label", [-1, 8, 13])
def test_a_label_that_no_rank_holds_is_refused(label):
    """Whatever the part of this rank; a label on another rank is none of these."""
    ranks = tables.Lockstep(1)
    cut = Slice(4, tables.RankCollectives(ranks, 0), 8)
    token_losses_of(torch.zeros(2, 4), torch.tensor([0, 7], dtype=torch.int32), cut)
    with pytest.raises(IndexError, match=rf"label {label} at \[1\] .* of 8;"):
        token_losses_of(torch.zeros(2, 4), torch.tensor([0, label]), cut)

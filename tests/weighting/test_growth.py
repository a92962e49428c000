"""Ways that are faster for many units find what the plain ones find, and do not grow faster."""

import pytest
import torch

import weighting as wt
from weighting.contract import Alone, Scope
from weighting.contract.levels import Groups, _segment_sum, sum_by
from weighting.contract.scope import ScopeWithin

STEP = torch.tensor(1)


class AsIfOverRanks(Alone):
    """Says that there are two ranks, so that the k-th largest is found by counting."""

    size = 2


def scopes(valid, ids=None):
    """Return a scope whose units are all here, and the same as if some were elsewhere."""
    for ranks in (Alone(), AsIfOverRanks()):
        if ids is None:
            yield Scope("token", STEP, valid, collectives=ranks)
        else:
            groups = Groups("document", ids, int(ids.max()) + 1, 0, ranks)
            yield ScopeWithin("token", STEP, valid, (), ranks, {}, groups)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_sorting_finds_the_kth_largest_that_counting_finds(seed, grouped):
    """Ties, zeros of both signs, units that do not count, k beyond the last, groups of none."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, generator=g).mul(4).round() / 4 * torch.tensor([1.0, -1.0]).repeat(150)
    valid = torch.rand(300, generator=g) < 0.8
    ids = torch.randint(0, 7, (300,), generator=g) if grouped else None
    if grouped:
        valid &= ids != 3
    sorting, counting = scopes(valid, ids)
    for k in (1, 2, 17, 60, 250, 400):
        wanted = torch.tensor(float(k)).expand(300 if grouped else ())
        mine, other = (scope.kth_largest(x, wanted) for scope in (sorting, counting))
        known = sorting.count() > 0
        assert torch.equal(mine[known], other[known])
        assert not (x >= mine)[~known.expand_as(x)].any()


def test_rank_counts_the_lower_ones():
    """Among many, with ties, with and without a history."""
    g = torch.Generator().manual_seed(0)
    losses = torch.randint(0, 40, (3, 200), generator=g).float()
    plain, remembering = wt.build(wt.loads("rank -> mean_one")), None
    remembering = wt.build(wt.loads("rank(history=350) -> mean_one"))
    seen = torch.zeros(0)
    for batch in losses:
        x = batch[:, None].expand(200, 2)
        seen = torch.cat([batch, seen])[:350]
        for fn, others in ((plain, batch), (remembering, seen)):
            lower = (others[None] < batch[:, None]).sum(1).float() / len(others)
            expected = lower / lower.mean()
            torch.testing.assert_close(fn(wt.Signals(loss=x), 1).token[:, 0], expected)


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_sums_by_id_are_those_of_a_loop(size):
    """A product for few ids, segments for many; also as devices take them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (400,), generator=g)
    x = torch.randn(2, 400, generator=g)
    expected = torch.zeros(2, size)
    for t, i in enumerate(ids.tolist()):
        expected[:, i] += x[:, t]
    for found in (sum_by(ids, size, x), _segment_sum(ids, size, x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert _segment_sum(ids, size, x[0]).shape == (size,)


def test_many_domains_take_no_matrix_of_tokens_times_domains():
    """With 100,000 domains that would be 400 MB for 1,000 tokens; the largest tensor is small."""
    fn = wt.build(wt.loads("mean(domain) -> mean_one"), domains=[f"d{i}" for i in range(100_000)])
    ids = torch.arange(1000)[None] * 50
    with torch.profiler.profile(profile_memory=True) as profile:
        fn(wt.Signals(loss=torch.rand(1, 1000), domain_ids=ids), 1)
    most = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert most < 64 * 100_000

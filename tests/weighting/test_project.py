"""The projections against exact water filling."""

import math

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from weighting.capped_simplex import cap, raise_to
from weighting.contract import Alone, Scope

# Weights have mean one over their scope, as every `Weigh` stage gives them.
weights = st.lists(
    st.one_of(
        st.floats(0, 10, width=32),
        st.sampled_from([0.0, 1.0, 1.0, 2.0, 1e-20, 1e-8, 1e4]),
    ),
    min_size=1,
    max_size=64,
).filter(lambda w: sum(w) > 0)
caps = st.one_of(st.floats(1, 64, width=32), st.sampled_from([1.0, 1.0 + 2**-20, 2.0]))
floors = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.5]))


def mean_one(values):
    """Return values scaled to mean one, as the float32 numbers they become."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x * len(values) / x.sum()).float()


def scope(n, valid=None):
    """Return a scope of n units."""
    ok = torch.ones(n, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Scope("sequence", torch.tensor(0), ok)


@given(weights, caps)
@example([0.0, 0.0, 0.0, 1.0], 2.0)
@example([0.0, 0.0, 1e-20, 1.0], 1.5)
@example([1.0], 1.0)
@example([3.0, 1.0, 2.0], 1.0)
@example([1.0] * 63 + [1e4], 2.0)
@example([1e-8] * 63 + [1e4], 1.0000009536743164)
@example([2.0, 2.0, 0.0, 0.0], 2.0)
def test_cap_is_water_filling(values, largest):
    """min(cap, s w) with the s found by trying every number of capped units."""
    w = mean_one(values)
    got = cap(w, torch.tensor(largest), scope(len(w)))
    expected = torch.tensor(reference.water_fill(w.tolist(), largest))
    # Float32 rounding of weights that reach the cap.
    assert_close(got, expected, rtol=1e-5, atol=2e-6 * max(1.0, min(largest, len(w))))


@given(weights, floors)
@example([0.0, 0.0, 0.0, 1.0], 0.5)
@example([1.0], 1.0)
@example([3.0, 1.0, 2.0], 1.0)
@example([1.0] * 63 + [1e4], 0.9)
@example([0.0, 2.0, 2.0], 0.0)
def test_floor_is_water_filling(values, smallest):
    """max(floor, s w) with the s found by trying every number of units at the floor."""
    w = mean_one(values)
    got = raise_to(w, torch.tensor(smallest), scope(len(w)))
    expected = torch.tensor(reference.raise_floor(w.tolist(), smallest))
    # Float32 rounding of weights that reach the number of units.
    assert_close(got, expected, rtol=1e-5, atol=2e-6 * len(w))


@pytest.mark.parametrize("project", [cap, raise_to])
@given(weights, st.floats(1, 8), st.floats(0, 1))
def test_projections_keep_sum_order_and_bound(project, values, above, below):
    """The sum stays, no unit overtakes another, the bound holds, and a second time does nothing."""
    w = mean_one(values)
    bound = torch.tensor(above if project is cap else below)
    got = project(w, bound, scope(len(w)))
    # A float32 sum of up to 64 numbers.
    assert_close(got.double().sum(), w.double().sum(), rtol=1e-5, atol=0)
    order = w.argsort()
    assert (got[order].diff() >= -1e-6 * got.max()).all()  # rounding of s w
    assert (got <= bound).all() if project is cap else (got >= bound).all()
    # The sum is now off by float32 rounding, which the second projection makes up for.
    assert_close(project(got, bound, scope(len(w))), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("project", [cap, raise_to])
@given(weights)
def test_weights_within_the_bound_stay_bit_by_bit(project, values):
    """A projection changes nothing when nothing violates its bound."""
    w = mean_one(values)
    bound = w.max().clamp(min=1) if project is cap else w.min()
    assert torch.equal(project(w, bound, scope(len(w))), w)


def test_a_zero_nobody_needs_stays_zero():
    """Capping gives weight to a unit of weight zero only when the others cannot hold the sum."""
    w = mean_one([0.0, 1.0, 2.0, 9.0])
    assert cap(w, torch.tensor(2.0), scope(4))[0] == 0
    assert cap(mean_one([0.0, 0.0, 0.0, 1.0]), torch.tensor(2.0), scope(4)).tolist() == (
        pytest.approx([2 / 3, 2 / 3, 2 / 3, 2], abs=1e-5)
    )


@pytest.mark.parametrize("project", [cap, raise_to])
def test_units_that_do_not_count_do_not_count(project):
    """Invalid units, whatever they hold, change no weight of the valid ones."""
    bound = torch.tensor(1.5 if project is cap else 0.5)
    kept = torch.tensor([3.0, 0.25, 0.5, 0.25])
    expected = project(kept, bound, scope(4))
    for junk in (0.0, 7.0, 1e30):
        w = torch.tensor([3.0, junk, 0.25, 0.5, junk, 0.25])
        got = project(w, bound, scope(6, [True, False, True, True, False, True]))
        assert torch.equal(got[torch.tensor([0, 2, 3, 5])], expected)


@pytest.mark.parametrize("project", [cap, raise_to])
def test_an_empty_scope_is_no_trouble(project):
    """Without a unit that counts the result is finite."""
    got = project(torch.zeros(3), torch.tensor(1.0), scope(3, [False] * 3))
    assert got.isfinite().all()


@pytest.mark.parametrize("n", [3000])
def test_thousands_of_weights_are_capped_and_floored_exactly(n):
    """Thousands of heavy-tailed weights are capped and floored exactly."""
    w = (3 * torch.randn(n)).exp()
    w = (w.double() * n / w.double().sum()).float()
    # Sums of some thousand float32 numbers.
    expected = torch.tensor(reference.water_fill(w.tolist(), 2.0))
    assert_close(cap(w, torch.tensor(2.0), scope(n)), expected, rtol=1e-4, atol=1e-5)
    expected = torch.tensor(reference.raise_floor(w.tolist(), 0.5))
    assert_close(raise_to(w, torch.tensor(0.5), scope(n)), expected, rtol=1e-4, atol=1e-5)


def test_the_oracles_agree_with_bisection():
    """Water filling by trying numbers of units gives what bisection for s gives."""
    w = [0.1, 0.4, 0.5, 1.0, 3.0]

    def bisected(value, low, high):
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if value(middle) < sum(w) else (low, middle)
        return low

    s = bisected(lambda s: math.fsum(min(1.2, s * x) for x in w), 1, 1e6)
    assert reference.water_fill(w, 1.2) == pytest.approx([min(1.2, s * x) for x in w], abs=1e-12)
    s = bisected(lambda s: math.fsum(max(0.6, s * x) for x in w), 0, 1)
    assert reference.raise_floor(w, 0.6) == pytest.approx([max(0.6, s * x) for x in w], abs=1e-12)


def test_a_scope_of_one_rank_is_a_scope_of_none():
    """Statistics over a single rank's collectives are those without any."""
    w = mean_one([5.0, 1.0, 0.0, 2.0])
    alone = Scope("token", torch.tensor(0), torch.ones(4, dtype=torch.bool), (), Alone())
    assert torch.equal(cap(w, torch.tensor(1.5), alone), cap(w, torch.tensor(1.5), scope(4)))

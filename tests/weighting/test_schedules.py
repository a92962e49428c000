"""Each schedule against the sentence that defines it."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import for_each

import weighting as wt
from weighting.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    ShareOfN,
    Step,
)

EXAMPLES = {
    "constant": [Constant(value=-2.5)],
    "step": [Step(before=100, after=0.4, at=500), Step(before=1, after=2, at=0)],
    "linear": [
        Linear(start=2, end=-1, over=7),
        Linear(start=0.1, end=0.7, over=500, begin=100),
        Linear(start=5, end=6, over=1),
    ],
    "cosine": [Cosine(start=2, end=-1, over=7), Cosine(start=0, end=1, over=500, begin=100)],
    "exponential": [Exponential(start=100, end=0.4, over=500), Exponential(start=1, end=1, over=1)],
    "piecewise": [Piecewise(values={500: 0.4, 0: 100, 900: 3}), Piecewise(values={10: 1.5})],
}
STEPS = (0, 1, 2, 3, 6, 7, 8, 9, 10, 99, 100, 101, 350, 499, 500, 501, 600, 601, 899, 900, 10**6)

each_example = for_each("schedule", [s for row in EXAMPLES.values() for s in row], ids=repr)


def test_every_schedule_has_an_example():
    """The examples cover the schedules of the language, and there are some."""
    assert set(EXAMPLES) == set(SCHEDULES)
    assert len(EXAMPLES) >= 6


@each_example
@for_each("step", STEPS)
def test_value_is_that_of_the_definition(schedule, step):
    """Before, inside and after its span a schedule has the value its definition gives."""
    expected = reference.schedule(schedule.name, step, **schedule.model_dump())
    got = schedule(torch.tensor(step))
    assert got.shape == ()
    assert got.dtype == torch.float32
    # A float32 interpolation, of logarithms for the exponential.
    assert got.item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


@each_example
def test_the_value_of_a_schedule_is_within_its_bounds(schedule):
    """What the range of an argument is checked against bounds every value."""
    low, high = min(schedule.extremes()), max(schedule.extremes())
    for step in STEPS:
        value = schedule(torch.tensor(step)).item()
        assert low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high)  # float32 ends


@given(
    st.sampled_from(["linear", "cosine", "exponential"]),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 3 * 10**6),
)
def test_ramps_follow_their_formula(kind, start, end, over, begin, step):
    """Any ramp has the value of its formula at any step."""
    given_ = {"start": start, "end": end, "over": over, "begin": begin}
    if kind == "exponential":
        del given_["begin"]
    expected = reference.schedule(kind, step, **given_)
    got = SCHEDULES[kind](**given_)(torch.tensor(step)).item()
    # The progress is rounded to float32, and the interpolation with it.
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6 * max(start, end))


@pytest.mark.slow
@given(st.dictionaries(st.integers(0, 50), st.floats(-9, 9, width=32), min_size=1))
def test_piecewise_holds_the_last_value_reached(values):
    """Whatever the order the steps are given in, the last one reached counts."""
    schedule = Piecewise(values=values)
    for step in range(52):
        expected = reference.schedule("piecewise", step, values=values)
        assert schedule(torch.tensor(step)).item() == expected


def test_a_share_of_n_is_its_numerator():
    """k/n of the total is k times the mean weight, at every step."""
    assert ShareOfN(numerator=2)(torch.tensor(5)).item() == 2


def test_a_schedule_changes_the_weights_when_it_should():
    """temperature(step(100, 0.4, at=500)) is 100 up to step 499 and 0.4 from step 500 on."""
    text = "normalize -> temperature(step(100, 0.4, at=500))"
    loss = [1.0, 2.0, 3.0, 5.0]
    assert torch.equal(
        wt.simulate(text, loss, 499), wt.simulate("normalize -> temperature(100)", loss)
    )
    assert torch.equal(
        wt.simulate(text, loss, 500), wt.simulate("normalize -> temperature(0.4)", loss)
    )


def test_large_steps_do_not_lose_the_ramp():
    """A ramp that begins at step ten million still resolves single steps."""
    ramp = Linear(start=0, end=1, over=10, begin=10_000_000)
    got = [ramp(torch.tensor(10_000_000 + i)).item() for i in range(11)]
    assert got == pytest.approx([i / 10 for i in range(11)], abs=1e-6)

"""Signals that should not be: the declared policy or finite weights, and all ranks agree."""

import dataclasses
import functools
import re

import generators as tables
import pytest
import torch
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.build import plan_of
from weighting.build.statistics import MOMENTS

CASES = tables.CASES
WITHOUT_LUCK = [
    name for name, text in CASES.items() if not re.search("bernoulli|multinomial", text)
]
NOT_FINITE = MOMENTS.index("nonfinite")
TINY = torch.finfo(torch.float32).tiny / 8
POISONS = {
    "NaN": torch.nan,
    "infinite": torch.inf,
    "minus infinite": -torch.inf,
    "largest": torch.finfo(torch.float32).max,
    "1e30": 1e30,
    "minus 1e30": -1e30,
    "minus zero": -0.0,
    "denormal": TINY,
}

FINITE = {x for x in POISONS.values() if torch.tensor(x).isfinite()}

each_case = for_each("case", CASES)
each_poison = for_each("poison", POISONS)


def poisoned(signals, value, place=(0, 0)):
    """Return signals whose losses and columns have a value at one valid token."""
    signals = tables.changed(signals, lambda _, x: x.clone())
    for x in (signals.loss, signals.entropy, signals.ref_loss, *signals.columns.values()):
        x[place] = value
    return signals


def of_rank(signals, rank, ranks):
    """Return a rank's rows."""
    return tables.changed(signals, lambda _, x: x.chunk(ranks)[rank])


def on_ranks(text, signals, ranks=2, step=2):
    """Return what each rank makes of its rows."""

    def part(rank, collectives):
        return tables.built(text, collectives=collectives)(of_rank(signals, rank, ranks), step)

    return tables.Lockstep(ranks).run(part)


@pytest.mark.slow
@each_poison
@each_case
def test_a_bad_number_is_counted_or_does_no_harm(case, poison):
    """Either `check` raises at the next log step, or all weights are finite and none below 0."""
    fn = tables.built(CASES[case])
    out = fn(poisoned(tables.batch(seed=60), POISONS[poison]), 2)
    reads = fn.needs & {"loss", "entropy", "ref_loss", *tables.COLUMNS}
    if reads and not torch.tensor(POISONS[poison]).isfinite():
        assert int(out.moments[-1, NOT_FINITE]) >= 1, "it was seen"
    if int(out.moments[-1, NOT_FINITE]) and fn.spec.on_nonfinite == "error":
        with pytest.raises(wt.NonFiniteSignalError, match="NaN or infinite"):
            fn.check(out)
        return
    fn.check(out)
    for weight in (out.token, *out.factors.values()):
        assert weight.isfinite().all()
        assert (weight >= 0).all() or fn.plan.signed


@functools.cache
def dropping(case):
    """Return the plan of a case that drops what is not finite."""
    return plan_of(wt.loads(CASES[case]).model_copy(update={"on_nonfinite": "drop"}))


@pytest.mark.slow
@each_poison
@each_case
def test_dropped_units_leave_finite_weights(case, poison):
    """With `on_nonfinite: drop` a bad unit weighs 0 and the others what they can."""
    plan = dropping(case)
    if POISONS[poison] in FINITE and not plan.has_state:
        return  # nothing is dropped, and the law above holds
    fn = wt.build(plan, domains=tables.domains_of(CASES[case]))
    out = fn(poisoned(tables.batch(seed=61), POISONS[poison]), 2)
    fn.check(out)
    assert out.token.isfinite().all()
    assert (out.token >= 0).all() or plan.signed
    for step in (3, 4) if plan.has_state else ():  # nothing of it stays in the state
        out = fn(tables.batch(seed=60 + step), step)
        assert out.token.isfinite().all()
        if poison in {"NaN", "infinite", "minus infinite"}:
            assert all(
                x.isfinite().all() for x in fn.state_dict().values() if x.is_floating_point()
            )


@pytest.mark.slow
@for_each("poison", ["NaN", "infinite", "1e30"])
@for_each("case", WITHOUT_LUCK)
def test_ranks_agree_on_what_one_of_them_saw(case, poison):
    """A bad number on one rank: all count it, or all weigh as one rank with the whole batch."""
    signals = poisoned(tables.batch(4, 6, seed=62), POISONS[poison])
    whole = tables.built(CASES[case])(signals, 2)
    parts = on_ranks(CASES[case], signals)
    moments = torch.stack([part.moments for part in parts])
    assert int(moments[:, -1, NOT_FINITE].sum()) == int(whole.moments[-1, NOT_FINITE])
    if int(whole.moments[-1, NOT_FINITE]) and whole.token.isnan().any():
        return
    got = torch.cat([part.token for part in parts])
    # Partial sums are added in another order: float32 rounding.
    assert_close(got, whole.token, rtol=1e-4, atol=1e-5, equal_nan=True)


STARVED = {
    "a rank without a valid token": lambda s: s.valid[2:].zero_(),
    "no rank with a valid token": lambda s: s.valid.zero_(),
    "one token in all": lambda s: s.valid.copy_(
        torch.arange(s.valid.numel()).view_as(s.valid) == 0
    ),
    "a rank without a domain": lambda s: s.domain_ids[2:].zero_(),
    "one domain in all": lambda s: s.domain_ids.zero_(),
    "all alike": lambda s: s.loss.fill_(2.5),
}


@pytest.mark.slow
@for_each("starved", STARVED)
@for_each("case", WITHOUT_LUCK)
def test_ranks_agree_when_one_has_nothing(case, starved):
    """No rank waits for another, and they weigh as one would with the whole batch."""
    signals = tables.changed(tables.batch(4, 6, seed=63), lambda _, x: x.clone())
    STARVED[starved](signals)
    signals = dataclasses.replace(signals, target_prob=(-signals.loss).exp())
    whole = tables.built(CASES[case])(signals, 2)
    parts = on_ranks(CASES[case], signals)
    # Partial sums are added in another order: float32 rounding.
    got = torch.cat([part.token for part in parts])
    assert_close(got, whole.token, rtol=1e-4, atol=1e-5)
    assert got.isfinite().all()

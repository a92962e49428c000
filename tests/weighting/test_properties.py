"""What the published methods are proved or said to do."""

import dataclasses
import functools
import math

import generators as tables
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.testing import assert_close

import weighting as wt
from weighting.language.read import resolve

FAMILY = ("linupper", "quadratic", "extremes", "prop1")
LINUPPER = "normalize -> linupper -> temperature({})"


spec_of = functools.cache(resolve)


def simulate(text, loss, **given):
    """Return what `weighting.simulate` does, of a spec that is read once."""
    return wt.simulate(spec_of(text), loss, **given)


def spread(values):
    """Return how far apart the values of a list lie."""
    return max(values) - min(values)


@pytest.mark.slow
@given(tables.losses(2, 24), tables.float32s(0.125, 50.0), tables.float32s(-20.0, 20.0))
def test_normalised_methods_ignore_scale_and_shift(loss, scale, shift):
    """Losses a * l + b, a > 0, weigh as the losses l do in every method that normalises."""
    assume(spread(loss) > 1e-2)
    x = torch.tensor(loss, dtype=torch.float64)
    for name in FAMILY:
        moved = simulate(name, (scale * x + shift).float())
        # The moved losses are rounded: eps * |a l + b| / (a * range), times 2 / 0.4.
        atol = 5e-5 + 1e-5 * (scale * max(loss) + abs(shift)) / (scale * spread(loss))
        assert_close(moved, simulate(name, loss), rtol=0, atol=atol)


@given(tables.losses(2, 24), tables.float32s(-20.0, 20.0))
def test_dro_kl_ignores_shift(loss, shift):
    """Adding a constant to all losses changes no weight of DRO-KL."""
    x = torch.tensor(loss, dtype=torch.float64)
    moved = simulate("dro-kl", (x + shift).float())
    # Weights reach n; the exponent is rounded by eps * 40.
    assert_close(moved, simulate("dro-kl", loss), rtol=2e-5, atol=1e-5)


def test_dro_kl_does_not_ignore_scale():
    """Twice the losses are not weighed alike, but as at half the temperature."""
    loss = torch.tensor([1.0, 2.0, 4.0])
    assert not torch.allclose(simulate("dro-kl", 2 * loss), simulate("dro-kl", loss), atol=0.1)
    # The same exponents but for rounding.
    assert_close(simulate("dro-kl", 2 * loss), simulate("temperature(0.5)", loss))


@given(tables.losses(2, 24), st.integers(-4, 4))
def test_upper_is_dro_kl_at_the_temperature_of_the_range(loss, exponent):
    """The uncapped line at r is DRO-KL at r times the range of the losses."""
    assume(spread(loss) > 1e-2)
    r = 2.0**exponent
    upper = simulate(f"normalize -> affine(0.5, 0.5) -> temperature({r})", loss)
    dro = simulate(f"temperature({r * spread(loss)!r})", loss)
    # The losses are rounded before they are divided by r * range.
    assert_close(upper, dro, rtol=1e-4, atol=1e-5 * max(1, max(loss) / spread(loss) / r))


@given(tables.losses(2, 24))
def test_linupper_with_the_cap_out_of_reach_is_upper(loss):
    """linupper(alpha=2) at 2r is the uncapped line at r."""
    line = simulate("normalize -> affine(0.5, 0.5) -> temperature(0.4)", loss)
    # The same exponents but for rounding.
    assert_close(simulate("normalize -> linupper(2) -> temperature(0.8)", loss), line)


@given(tables.losses(1, 24), tables.float32s(0.0, 8.0))
def test_mile_with_equal_entropies_is_cross_entropy(loss, entropy):
    """When every prediction is equally uncertain, MiLe weighs every token one."""
    weight = simulate("mile", loss, entropy=[entropy] * len(loss))
    # A float32 mean of equal numbers.
    assert_close(weight, torch.ones(len(loss)), rtol=1e-6, atol=1e-6)


@given(tables.losses(1, 24))
def test_high_temperature_is_uniform(loss):
    """All weights tend to one as the temperature grows."""
    for shape in ("linupper", "quadratic", "extremes", "affine(1)"):
        weight = simulate(f"normalize -> {shape} -> temperature(1e6)", loss)
        # exp(2e-6) and float32 rounding.
        assert_close(weight, torch.ones(len(loss)), rtol=5e-6, atol=0)


@given(tables.float32s(0.0, 1e4), st.integers(1, 40))
def test_flat_losses_weigh_the_same(loss, n):
    """Equal losses weigh one each in every method that reads losses alone."""
    for name in (*FAMILY, "dro-kl", "focal"):
        # A float32 mean of equal numbers.
        assert_close(simulate(name, [loss] * n), torch.ones(n), rtol=1e-6, atol=1e-6)


def worst_losses(shape, n):
    """Return losses of which one gets the largest weight its shape allows, all others the least."""
    if shape == "quadratic":  # one in the middle, the others at the ends
        return [0.0] * (n // 2) + [1.0] * (n - 1 - n // 2) + [0.5]
    return [0.0] * (n - 1) + [1.0]


@pytest.mark.parametrize("shape", ["linupper", "quadratic", "affine(0.5, 0.5)"])
@pytest.mark.parametrize("n", [4, 32, 48, 128])
def test_the_cap_holds_by_itself_exactly_above_the_threshold(shape, n):
    """Without clamp, 2/n holds iff exp(-1/r) >= (n/2 - 1)/(n - 1), at the worst losses."""
    bound = -1 / math.log((n / 2 - 1) / (n - 1))
    loss = worst_losses(shape, n)
    above = simulate(f"normalize -> {shape} -> temperature({bound * 1.001})", loss)
    below = simulate(f"normalize -> {shape} -> temperature({bound * 0.999})", loss)
    assert above.max() < 2
    assert below.max() > 2


def test_the_threshold_is_the_one_in_the_stage_documentation():
    """The published thresholds, 1.378 for 32, 1.399 for 48 and 1.426 for 128, are this bound."""
    for n, published in ((32, 1.378), (48, 1.399), (128, 1.426)):
        bound = -1 / math.log((n / 2 - 1) / (n - 1))
        assert bound == pytest.approx(published, abs=1e-3)


@given(st.data(), st.sampled_from([32, 48, 128]))
def test_above_the_threshold_no_losses_break_the_cap(data, n):
    """Whatever the losses, LinUpper stays below 2/n above the threshold, and clamp does nothing."""
    loss = data.draw(tables.losses(n, n))
    free = simulate(LINUPPER.format(1.45), loss)
    assert free.max() <= 2
    assert torch.equal(simulate(LINUPPER.format(1.45) + " -> clamp(2/n)", loss), free)


@given(
    st.integers(2, 512),
    st.floats(0.05, 100),
    st.integers(0, 10**6),
    st.sampled_from(["uniform", "normal", "heavy", "two", "spike"]),
    st.sampled_from(["linupper", "quadratic", "extremes", "affine(1)"]),
)
@example(2, 0.05, 0, "spike", "affine(1)")
@example(512, 0.05, 0, "spike", "affine(1)")
@example(3, 1e-6, 0, "two", "affine(1)")
def test_the_cap_holds_for_any_losses(n, r, seed, kind, shape):
    """With clamp(2/n) no share exceeds 2/n, shares sum to one, order is kept, nothing is NaN."""
    g = torch.Generator().manual_seed(seed)
    loss = {
        "uniform": torch.rand(n, generator=g) * 10,
        "normal": 3 + torch.randn(n, generator=g),
        "heavy": (3 * torch.randn(n, generator=g)).exp(),
        "two": torch.randint(0, 2, (n,), generator=g).float(),
        "spike": torch.cat([torch.zeros(n - 1), torch.tensor([50.0])]),
    }[kind]
    raw = simulate(f"normalize -> {shape} -> temperature({r!r})", loss)
    share = simulate(f"normalize -> {shape} -> temperature({r!r}) -> clamp(2/n)", loss) / n
    assert share.isfinite().all()
    assert share.max() <= 2 / n + 1e-6 / n  # float32 rounding of a weight near 2
    assert abs(share.double().sum().item() - 1) <= 1e-5
    order = raw.argsort(stable=True)
    assert (share[order].diff() >= -1e-6 / n).all()  # float32 rounding of a weight near 1


def _batch_of_lengths(lengths):
    rows, longest = len(lengths), max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return dataclasses.replace(tables.batch(rows, longest, seed=3), valid=valid)


PER_SEQUENCE = "version: 1\nreduction: {}\npipeline: normalize -> linupper -> temperature(0.4)\n"


def test_equal_lengths_make_the_reductions_agree():
    """With equally long sequences token_mean and sequence_mean weigh alike."""
    signals = _batch_of_lengths([5, 5, 5, 5])
    by_token, by_sequence = (
        tables.built(PER_SEQUENCE.format(f"{unit}_mean"))(signals).token
        for unit in ("token", "sequence")
    )
    # The same product, scaled in two ways: float32 rounding.
    assert_close(by_token, by_sequence, rtol=1e-6, atol=0)


def test_unequal_lengths_make_the_reductions_differ_by_the_length():
    """Unequal sequences differ by their length over the weighted mean length."""
    lengths = torch.tensor([1.0, 7.0, 3.0, 5.0])
    signals = _batch_of_lengths([1, 7, 3, 5])
    by_token, by_sequence = (
        tables.built(PER_SEQUENCE.format(f"{unit}_mean"))(signals).token[:, 0]
        for unit in ("token", "sequence")
    )
    ratio = by_token / by_sequence / lengths
    # One constant for all rows, to float32 rounding.
    assert_close(ratio, ratio[:1].expand(4), rtol=1e-5, atol=0)
    # Sequence weights of mean one over sequences, whatever the lengths: sum over a row is T/n w.
    row = by_sequence * lengths
    assert_close(row.sum(), lengths.sum(), rtol=1e-5, atol=0)


def test_sequence_mean_of_uniform_is_the_mean_of_sequence_means():
    """Plain training by sequence gives every sequence the same total, at either normalisation."""
    signals = _batch_of_lengths([1, 7, 3, 5])
    for normalize in ("mean_one", "none"):
        text = f"version: 1\nnormalize: {normalize}\nreduction: sequence_mean\npipeline: uniform\n"
        token = tables.built(text)(signals).token
        loss = (token * signals.loss).sum() / signals.valid.sum()
        rows = zip(signals.loss, signals.valid, strict=True)
        expected = torch.stack([x[ok].mean() for x, ok in rows]).mean()
        # Another order of the same sums: float32 rounding.
        assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_prop1_is_the_optimum_of_its_problem(seed):
    """Spec prop1 maximises sum w h - r KL(w || 1/n) over the capped simplex, found numerically."""
    from scipy.optimize import minimize  # noqa: PLC0415 - takes a second, of every process

    n = 3 + seed
    loss = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    h = (2 * (loss - loss.min()) / (loss.max() - loss.min()) - 1).numpy()

    def negative(w):
        return -(w @ h) + 0.4 * np.sum(w * np.log(n * w))

    best = minimize(
        negative,
        np.full(n, 1 / n),
        jac=lambda w: -h + 0.4 * (np.log(n * w) + 1),
        bounds=[(1e-9, 2 / n)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert best.success, best.message
    share = simulate("prop1", loss.float()).double() / n
    # What the solver reaches.
    assert_close(share, torch.from_numpy(best.x), rtol=0, atol=1e-4)
    assert share.max() > 2 / n - 1e-6, "no cap binds: the case is too easy"


@given(tables.losses(1, 16), st.integers(0, 8))
def test_interpolate_mixes_with_uniform(loss, eighths):
    """interpolate(lam) is lam plus 1 - lam times the weight."""
    lam = eighths / 8
    plain = simulate("temperature(1)", loss)
    mixed = simulate(f"temperature(1) -> interpolate({lam})", loss)
    # One multiplication and one addition more.
    assert_close(mixed, lam + (1 - lam) * plain, rtol=1e-5, atol=1e-5)


def test_sugar_means_what_it_says():
    """Every sugared stage weighs as the stages it stands for, bit by bit."""
    loss, entropy = [0.3, 1.0, 2.0, 4.5, 3.9], [0.1, 2.0, 0.7, 3.0, 1.0]
    pairs = {
        "normalize -> temperature(1)": "loss -> mean(sequence) -> normalize -> temperature(1)",
        "temperature(1)": "mean(sequence) -> temperature(1)",
        "normalize -> linupper(1.2) -> temperature(1)": (
            "normalize -> affine(shift=1) -> clip(max=1.2) -> temperature(1)"
        ),
        "normalize -> quadratic -> temperature(1)": (
            "normalize -> pow(2) -> affine(scale=-1, shift=1) -> temperature(1)"
        ),
        "normalize -> extremes -> temperature(1)": "normalize -> abs -> temperature(1)",
        "entropy(2, sigma=0.5) -> token_scale": (
            "entropy -> affine(shift=0.5) -> pow(2) -> mean_one"
        ),
        "entropy(2) -> mean_one": "entropy -> affine(shift=1) -> pow(2) -> mean_one",
        "focal(2) -> mean_one": "target_prob -> affine(scale=-1, shift=1) -> pow(2) -> mean_one",
    }
    for sugar, plain in pairs.items():
        got, expected = (simulate(text, loss, entropy=entropy) for text in (sugar, plain))
        if sugar.startswith("focal"):  # whose formula is exact where the other rounds
            assert_close(got, expected)
        else:
            assert torch.equal(got, expected), sugar


@given(tables.losses(1, 16, high=10.0), st.sampled_from([0.5, 1.0, 2.0]))
def test_tempered_target_probability_is_the_power_of_the_loss(loss, q):
    """The weight p ** q is exp(-q * loss), whether p is given or taken from the loss."""
    x = torch.tensor(loss)
    derived = simulate(f"target_prob -> pow({q}) -> mean_one", loss)
    given_p = simulate(f"target_prob -> pow({q}) -> mean_one", loss, target_prob=(-x).exp())
    assert torch.equal(derived, given_p)
    p = (-q * x.double()).exp()
    # Two float32 exponentials of up to 20.
    assert_close(derived.double(), p / p.mean(), rtol=1e-4, atol=1e-6)

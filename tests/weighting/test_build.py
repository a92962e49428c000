"""What a built spec refuses, drops, counts and reports."""

import dataclasses

import generators as tables
import pytest
import torch
from torch.testing import assert_close

import weighting as wt
from weighting.build.statistics import MOMENTS

NONFINITE = MOMENTS.index("nonfinite")
LEVELS = {
    "token": "loss -> mean_one",
    "sequence": "mean(sequence) -> mean_one",
    "document": "mean(document) -> mean_one",
    "domain": "mean(domain) -> mean_one",
}
BAD = (torch.nan, torch.inf, -torch.inf)


def spec(pipeline, policy="drop"):
    """Return a built spec with a policy on non-finite signals."""
    return tables.built(f"version: 1\nname: s\non_nonfinite: {policy}\npipeline: {pipeline}\n")


def spoilt(value, row=1, column=2):
    """Return a batch without ignored tokens, and the same with one loss spoilt."""
    signals = tables.batch(4, 6, seed=1, keep=2)
    loss = signals.loss.clone()
    loss[row, column] = value
    return signals, dataclasses.replace(signals, loss=loss)


def unit_of(signals, level, row=1, column=2):
    """Return which tokens weigh nothing once the given one has a signal that is not finite."""
    alone = torch.zeros_like(signals.valid)
    alone[row, column] = True
    if level == "sequence":
        alone[row] = True
    if level == "document":
        alone[row] = signals.segment_ids[row] == signals.segment_ids[row, column]
    return alone


@pytest.mark.parametrize("policy", ["drop", "error"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("level", LEVELS)
def test_a_unit_with_a_signal_that_is_not_finite_weighs_nothing(level, bad, policy):
    """Its token, document or sequence weighs 0 (in a domain the token alone), the rest as if away.

    The policy decides only what `check` does.
    """
    pipeline = LEVELS[level]
    signals, broken = spoilt(bad)
    dropped = unit_of(signals, level)
    assert dropped.any()
    assert not dropped.all()
    got = spec(pipeline, policy)(broken)
    without = dataclasses.replace(signals, valid=~dropped)
    expected = spec(pipeline, policy)(without)
    assert (got.token[dropped] == 0).all()
    # Mean one is over all 24 valid tokens, the dropped ones too: the rest makes up for them.
    scale = dropped.numel() / (~dropped).sum()
    assert_close(got.token, expected.token * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_dropped_tokens_are_counted(level):
    """The moments count the tokens left out, by factor and over all; a share is reported."""
    signals, broken = spoilt(torch.nan)
    dropped = unit_of(signals, level).sum().item()
    out = spec(LEVELS[level])(broken)
    assert out.moments[0, NONFINITE] == dropped
    assert out.moments[-1, NONFINITE] == dropped
    assert out.metrics["weight/nonfinite_frac"].item() == pytest.approx(dropped / 24)
    clean = spec(LEVELS[level])(signals)
    assert (clean.moments[:, NONFINITE] == 0).all()


def test_policy_error_raises_when_asked_and_drop_does_not():
    """`check` names the spec, the number of tokens and the way out; `drop` is silent."""
    _, broken = spoilt(torch.nan)
    strict, lenient = spec("loss -> mean_one", "error"), spec("loss -> mean_one", "drop")
    lenient.check(lenient(broken))
    with pytest.raises(wt.NonFiniteSignalError, match=r"s: 1 tokens .* on_nonfinite: drop"):
        strict.check(strict(broken))
    strict.check(strict(tables.batch()))


def test_a_signal_nobody_reads_may_be_anything():
    """A NaN entropy is no concern of a spec that reads the loss."""
    signals = tables.batch(keep=2)
    nan = torch.full_like(signals.loss, torch.nan)
    fn = spec("normalize -> temperature(1)", "error")
    fn.check(fn(dataclasses.replace(signals, entropy=nan)))


@pytest.mark.parametrize("pipeline", ["focal -> mean_one", "target_prob -> mean_one"])
@pytest.mark.parametrize("bad", BAD)
def test_a_stage_does_not_hide_a_signal_that_is_not_finite(pipeline, bad):
    """An infinite loss is dropped and counted although the score made of it is finite."""
    _, broken = spoilt(bad)
    out = spec(pipeline)(dataclasses.replace(broken, target_prob=None))
    assert out.token[1, 2] == 0
    assert out.moments[-1, NONFINITE] == 1


def test_several_factors_drop_what_any_of_them_drops():
    """A token left out by one factor weighs 0 in the product and is counted once."""
    text = "version: 1\non_nonfinite: drop\nfactors:\n  a: mean(sequence) -> mean_one\n"
    fn = tables.built(text + "  b: entropy -> mean_one\n")
    signals, broken = spoilt(torch.nan)
    entropy = signals.entropy.clone()
    entropy[1, 0] = entropy[3, 3] = torch.inf
    out = fn(dataclasses.replace(broken, entropy=entropy))
    assert out.moments[:, NONFINITE].tolist() == [6, 3, 7]
    assert (out.token == 0).sum() == 7


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["linupper", "focal", "dro-kl", "uniform"])
def test_simulate_refuses_signals_that_are_not_finite(name, bad):
    """Simulating a NaN or infinite loss is an error, whatever the spec."""
    with pytest.raises(ValueError, match="NaN or infinite"):
        wt.simulate(name, [1.0, bad, 2.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one value per unit"),
        ({"loss": []}, "one value per unit"),
        ({"loss": [1.0], "entropy": [1.0, 2.0]}, "equally many"),
        ({"loss": [1.0, 2.0]}, r"reads entropy; give Signals\(entropy=...\)"),
    ],
)
def test_simulate_asks_for_what_it_needs(given, message):
    """No units, lengths that differ and a missing signal are errors that say so."""
    with pytest.raises(ValueError, match=message):
        wt.simulate("mile", **given)


def test_simulate_takes_long_arrow_text():
    """Arrow text longer than a file name may be is still arrow text."""
    text = "normalize -> " + "affine(1) -> " * 60 + "temperature(1)"
    assert wt.simulate(text, [1.0, 2.0]).shape == (2,)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("name", ["uniform", "linupper", "mile"])
def test_an_empty_batch_has_no_weights(name, shape):
    """A batch without tokens is an error: other ranks would wait for its statistics."""
    empty = torch.zeros(shape)
    with pytest.raises(ValueError, match="an empty batch"):
        wt.build(wt.load(name))(wt.Signals(loss=empty, entropy=empty))


def test_signals_of_another_shape_are_refused():
    """A signal that is not shaped like the loss is an error that names both shapes."""
    fn = wt.build(wt.load("mile"))
    signals = wt.Signals(loss=torch.ones(2, 3), entropy=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"entropy has shape \[2, 4\], the loss \[2, 3\]"):
        fn(signals)


def test_needs_are_what_the_stages_read():
    """`needs` lists the signals and ids of all factors, and nothing else."""
    expected = {
        "uniform": set(),
        "linupper": {"loss"},
        "mile": {"entropy"},
        "linupper-x-mile": {"loss", "entropy"},
        "table-x-linupper": {"loss", "domain_ids"},
        "focal": {"loss"},
    }
    for name, needs in expected.items():
        assert tables.built(tables.SPEC_TEXTS[name]).needs == needs, name
    text = "version: 1\npipeline: max(document) -> mean_one\n"
    assert tables.built(text).needs == {"loss", "segment_ids"}


def test_metrics_are_their_definitions():
    """Minimum, maximum, effective sample share and capped share are those of the units' weights."""
    text = "version: 1\npipeline: normalize -> temperature(0.3) -> clamp(1.8)\n"
    signals = dataclasses.replace(tables.batch(8, 3, seed=3), valid=torch.ones(8, 3).bool())
    out = tables.built(text)(signals)
    unit = out.factors["pipeline"][:, 0].double()
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["pipeline/min"] == pytest.approx(unit.min().item())
    assert metrics["pipeline/max"] == pytest.approx(unit.max().item())
    share = (unit.sum() ** 2 / (8 * (unit**2).sum())).item()
    assert metrics["pipeline/ess_frac"] == pytest.approx(share, rel=1e-5)
    assert metrics["pipeline/capped_frac"] == (unit > 1.7999).double().mean().item() > 0
    assert metrics["weight/ess_frac"] == pytest.approx(share, rel=1e-5)
    assert metrics["weight/nonfinite_frac"] == 0


def test_factors_multiply():
    """The token weight is the product of the factors, scaled to mean one, or left as it is."""
    signals = tables.batch(seed=4)
    text = tables.SPEC_TEXTS["linupper-x-mile"]
    out = tables.built(text)(signals)
    product = out.factors["instance"] * out.factors["token"]
    # The same product and one scale: float32 rounding.
    assert_close(out.token, product * signals.valid.sum() / product.sum(), rtol=1e-6, atol=0)
    plain = tables.built(text.replace("version: 1", "version: 1\nnormalize: none"))(signals)
    assert torch.equal(plain.token, product)


def test_domains_are_asked_for_and_checked():
    """A table without names, with an unknown name or a missing one is a SpecError that says so."""
    parsed = wt.loads("table(web=1, cod=2) -> mean_one")
    with pytest.raises(wt.SpecError, match=r"needs domain names; give build\(spec, domains="):
        wt.build(parsed)
    with pytest.raises(wt.SpecError, match=r"no domain 'cod'; did you mean 'code'\?"):
        wt.build(parsed, domains=["web", "code"])
    with pytest.raises(wt.SpecError, match="no entry for books"):
        wt.build(parsed, domains=["web", "cod", "books"])


def test_a_spec_made_in_python_is_checked_without_places():
    """Without source text the message names the factor and the stage."""
    parsed = wt.loads("normalize -> temperature(1)")
    (normalize, temperature) = parsed.factors["pipeline"]
    twice = wt.Spec(factors={"mine": (normalize, temperature, temperature)})
    with pytest.raises(wt.SpecError, match=r"^mine, stage 3: temperature takes a score") as caught:
        wt.build(twice)
    assert (caught.value.file, caught.value.line, caught.value.column) == ("", 0, 0)

"""`start:` trains plainly before a step, and exactly as the spec without it from that step on."""

import generators as tables
import pytest
import torch
from torch.nn import functional

import weighting as wt

STARTED = {
    "one factor": "pipeline: normalize -> linupper(alpha=1) -> temperature(0.4) -> clamp(2/n)",
    "token-local": "pipeline: entropy(1) -> token_scale",
    "two factors": (
        "factors:\n"
        "  a: normalize -> temperature(0.5)\n"
        "  b: entropy(1) -> token_scale\n"
        "  c: focal -> mean_one"
    ),
    "selection": "pipeline: excess_loss -> select(0.6)",
    "unscaled": "normalize: none\npipeline: normalize -> temperature(0.5)",
    "by sequence": "reduction: sequence_mean\npipeline: normalize -> temperature(0.5)",
    "running": "scope: running\npipeline: normalize -> temperature(0.5)",
}


def spec_of(body, start=None):
    """Return a spec, with or without a start."""
    return wt.loads(f"version: 1\n{f'start: {start}' if start else ''}\n{body}\n")


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute", "full"])
@pytest.mark.parametrize("name", STARTED)
def test_the_loss_is_plain_before_the_start_and_weighted_from_it_on(name, memory):
    """Loss and gradients, on every way through the output layer."""
    signals = tables.batch(4, 6)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 6, 5, generator=g, requires_grad=True)
    head = torch.randn(11, 5, generator=g, requires_grad=True)
    labels = torch.randint(0, 11, (4, 6), generator=g)
    labels = torch.where(signals.valid, labels, -100)
    started, ever = (wt.build(spec_of(STARTED[name], start)) for start in (3, None))

    def gradients(fn, step):
        loss, _ = wt.linear_weighted_cross_entropy(
            hidden, head, labels, fn, step=step, memory=memory, ref_loss=signals.ref_loss
        )
        return loss, *torch.autograd.grad(loss, [hidden, head])

    logits = functional.linear(hidden, head).flatten(0, 1)
    plain = functional.cross_entropy(logits, labels.flatten())
    expected = plain, *torch.autograd.grad(plain, [hidden, head])
    for step in (1, 2):
        for mine, other in zip(gradients(started, step), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)
        gradients(ever, step)  # what is remembered moves alike
    for mine, other in zip(gradients(started, 3), gradients(ever, 3), strict=True):
        # A selection alone is gathered before its products, all tokens are not.
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)


def test_what_is_remembered_moves_before_the_start():
    """Domain weights are where they are without a start."""
    signals = tables.batch(4, 6)
    body = "pipeline: mean(domain) -> exponentiated(0.5)"
    started, ever = (wt.build(spec_of(body, s), domains=tables.DOMAINS) for s in (9, None))
    for step in (1, 2):
        assert torch.equal(started(signals, step).token, signals.valid.float())
        assert not torch.equal(ever(signals, step).token, signals.valid.float())
    for name, x in ever.state_dict().items():
        assert torch.equal(started.state_dict()[name], x)


@pytest.mark.parametrize("text", ["0", "-3", "true", "soon", "1.5", "[1]", "1e400", "9" * 40])
def test_a_start_that_is_no_step_is_refused_with_its_place(text):
    """In a file and in Python."""
    with pytest.raises(wt.SpecError, match=r"<spec>:2:8: start is the first optimizer step"):
        spec_of("pipeline: focal", text)


def test_gradients_of_domains_cannot_be_turned_off():
    """A spec whose weights never touch the loss says so."""
    with pytest.raises(wt.SpecError, match="start: does not turn off"):
        wt.build(spec_of("pipeline: doge(step_size=1)", 5), domains=["a", "b"])


def test_a_start_is_part_of_what_a_spec_means():
    """It is printed, read back, and told by the hash; 1 is as if it were left out."""
    spec = spec_of("pipeline: focal", 1001)
    assert "\nstart: 1001\n" in str(spec)
    assert wt.loads(str(spec)) == spec
    assert spec.hash != spec_of("pipeline: focal").hash == spec_of("pipeline: focal", 1).hash

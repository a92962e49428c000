"""Weights worked out by hand from the published formulas."""

import pytest
import torch
from torch.testing import assert_close

import weighting as wt

LOSS = [1.0, 2.0, 3.0, 5.0]
LINUPPER = "normalize -> linupper(alpha=1) -> temperature({})"
UPPER = "normalize -> affine(0.5, 0.5) -> temperature({})"
QUADRATIC = "normalize -> quadratic -> temperature({})"

SHARES = {
    LINUPPER.format(0.4): [0.034656, 0.120960, 0.422192, 0.422192],
    LINUPPER.format(1): [0.123681, 0.203916, 0.336201, 0.336201],
    "linupper": [0.034656, 0.120960, 0.422192, 0.422192],
    UPPER.format(0.4): [0.053934, 0.100763, 0.188249, 0.657054],
    UPPER.format(1): [0.150353, 0.193057, 0.247890, 0.408701],
    QUADRATIC.format(0.4): [0.048301, 0.314965, 0.588432, 0.048301],
    QUADRATIC.format(1): [0.146300, 0.309717, 0.397684, 0.146300],
    "normalize -> extremes -> temperature(0.4)": [0.422192, 0.120960, 0.034656, 0.422192],
    "extremes": [0.422192, 0.120960, 0.034656, 0.422192],
    "dro-kl": [0.015219, 0.041371, 0.112457, 0.830953],
    "loss -> mean(sequence) -> temperature(1)": [0.015219, 0.041371, 0.112457, 0.830953],
    # Where the cap of 2/4 binds: 0.588432 falls to 0.5, and the others grow alike to fill it.
    "quadratic": [0.058680, 0.382640, 0.5, 0.058680],
    # exp(h / 0.4) for h = -1, -0.5, 0, 1 is 0.899005 for the last: 0.5, the others fill it.
    "prop1": [0.029989, 0.104672, 0.365340, 0.5],
}
"""Sum-to-one weights of `LOSS`."""

TOKEN_LOSS = [0.1, 1.0, 2.0, 4.0]
ENTROPY = [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("spec", SHARES)
def test_shares_of_four_losses(spec):
    """Losses 1, 2, 3 and 5 get the published share of the total weight each."""
    got = wt.simulate(spec, LOSS) / len(LOSS)
    # The vectors are given to six decimals.
    assert_close(got, torch.tensor(SHARES[spec]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["mile", "entropy(gamma=1) -> token_scale", "entropy(1) -> mean_one"]
)
def test_mile_weights_are_those_of_the_formula(spec):
    """Entropies 0 to 3 weigh 0.4 to 1.6, and the weighted loss of the four tokens is 2.41."""
    weight = wt.simulate(spec, TOKEN_LOSS, entropy=ENTROPY)
    assert_close(weight, torch.tensor([0.4, 0.8, 1.2, 1.6]), rtol=0, atol=1e-6)
    loss = (weight * torch.tensor(TOKEN_LOSS)).mean().item()
    assert loss == pytest.approx(2.41, abs=1e-6)


@pytest.mark.parametrize("spec", ["focal", "focal -> mean_one", "focal(1) -> token_scale"])
def test_focal_weights_are_those_of_the_formula(spec):
    """Token losses 0.1 to 4 get the weights and the weighted loss of the focal formula."""
    weight = wt.simulate(spec, TOKEN_LOSS)
    expected = torch.tensor([0.147904, 0.982457, 1.343882, 1.525757])
    assert_close(weight, expected, rtol=0, atol=1e-6)
    loss = (weight * torch.tensor(TOKEN_LOSS)).mean().item()
    assert loss == pytest.approx(2.447010, abs=1e-6)


def test_a_table_weighs_units_by_the_share_of_their_domain():
    """A table weighs every unit by the share of its domain."""
    weight = wt.simulate("table(web=1, code=3) -> mean_one", domain=["web", "code", "web", "web"])
    # 1, 3, 1, 1 over their mean 1.5.
    assert_close(weight, torch.tensor([2 / 3, 2, 2 / 3, 2 / 3]), rtol=0, atol=1e-6)


def test_uniform_weighs_every_unit_one():
    """Plain training weighs every unit exactly one."""
    assert wt.simulate("uniform", LOSS).tolist() == [1, 1, 1, 1]

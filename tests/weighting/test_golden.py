"""Weights worked out by hand from the published formulas."""

import pytest
import torch
import weighting as wt
from torch.testing import assert_close

LOSS = [1.0, 2.0, 3.0, 5.0]
UPPER = "normalize -> affine(0.5, 0.5) -> temperature({})"
LINUPPER = "normalize -> linupper(alpha=1) -> temperature({})"
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
}
"""Sum-to-one weights of `LOSS`."""

# The quadratic's largest share, 0.588432, exceeds 2/4: the rest shares what the cap leaves over.
_REST = 0.5 / (1 - 0.588432)
CAPPED = {
    "quadratic": [0.048301 * _REST, 0.314965 * _REST, 0.5, 0.048301 * _REST],
    "prop1": [0.5 * x / 0.342946 for x in (0.053934**0, 0, 0)],
}


@pytest.mark.parametrize("spec", SHARES)
def test_shares_of_four_losses(spec):
    """Losses 1, 2, 3 and 5 get the published share of the total weight each."""
    got = wt.simulate(spec, LOSS) / len(LOSS)
    # The vectors are given to six decimals.
    assert_close(got, torch.tensor(SHARES[spec]), rtol=0, atol=1e-6)

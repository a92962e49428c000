"""Drawing by fitted laws: the fit and the draw against loops over all losses, in float64."""

import pytest
import torch

import weighting as wt
from weighting.build.domains import proportions
from weighting.stages.ado import fitted

DOMAINS = ("web", "code", "docs")
POWERS = [0.0125 * (i + 1) for i in range(64)]
LAWS = {"web": (1.5, 3.0, 0.3), "code": (0.4, 2.0, 0.6), "docs": (2.0, 0.0, 0.5)}
"""e, a and alpha of each domain's losses; those of docs do not fall."""


def loss_of(domain, t):
    """Return a domain's loss after so many batches, with a ripple that is no law."""
    e, a, alpha = LAWS[domain]
    return e + a * t**-alpha + 0.01 * ((7 * t) % 5 - 2) / 2


def least_squares(points):
    """Return a, alpha of the best law through (t, loss): the first power as good as any."""
    n, tried = len(points), []
    if n < 2:
        return 0.0, POWERS[0]
    for alpha in POWERS:
        z = [t**-alpha for t, _ in points]
        mean_z, mean = sum(z) / n, sum(x for _, x in points) / n
        spread = sum((q - mean_z) ** 2 for q in z)
        a = sum((q - mean_z) * x for q, (_, x) in zip(z, points, strict=True)) / spread
        e = mean - a * mean_z
        if a < 0:
            a, e = 0.0, mean
        elif e < 0:
            e = 0.0
            a = sum(q * x for q, (_, x) in zip(z, points, strict=True)) / sum(q * q for q in z)
        error = sum((x - e - a * q) ** 2 for q, (_, x) in zip(z, points, strict=True))
        tried.append((error, a, alpha))
    enough = min(tried)[0] + 1e-10 * sum(x * x for _, x in points)
    return next((a, alpha) for error, a, alpha in tried if error <= enough)


def drawn_by_hand(batches, warmup, every):
    """Return the proportions after each batch, from the losses of all before it."""
    count = len(DOMAINS)
    p, r, h = [[1 / count] * count for _ in range(3)]
    points, laws, found = {d: [] for d in DOMAINS}, dict.fromkeys(DOMAINS, (0.0, 0.0)), []
    for t, losses in enumerate(batches, 1):
        if t > warmup:
            for d, loss in losses.items():
                points[d].append((t, loss))
        if t > warmup and t % every == 0:
            laws = {d: least_squares(points[d]) for d in DOMAINS}
        h = [0.9 * old + 0.1 * new for old, new in zip(h, p, strict=True)]
        q = [
            max(laws[d][1], 0.05) * laws[d][0] * t ** -laws[d][1] * h[i] ** 0.5
            for i, d in enumerate(DOMAINS)
        ]
        q = [x / sum(q) for x in q] if sum(q) > 0 else [1 / count] * count
        q = [max(x, 0.01) for x in q]
        q = [x / sum(q) for x in q]
        p = [0.9 * old + 0.1 * new for old, new in zip(r, q, strict=True)]
        r = [old + (new - old) / (t + 1) for old, new in zip(r, q, strict=True)]
        found.append(p)
    return found


def drawn(batches, text):
    """Return the proportions after each batch, by the stage."""
    fn = wt.build(wt.loads(f"version: 1\napply: sampling\npipeline: {text}\n"), domains=DOMAINS)
    found = [proportions(fn).tolist()]
    for t, losses in enumerate(batches, 1):
        ids = torch.tensor([[DOMAINS.index(d) for d in losses]])
        fn(wt.Signals(loss=torch.tensor([[*losses.values()]]), domain_ids=ids), t)
        found.append(proportions(fn).tolist())
    assert found[0] == pytest.approx([1 / 3] * 3)
    return found[1:]


def history(count, absent=()):
    """Return the losses of batches, by domain; of some a domain is absent."""
    return [
        {d: loss_of(d, t) for i, d in enumerate(DOMAINS) if (t + i) % 7 not in absent}
        for t in range(1, count + 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("absent", [(), (0, 3)])
@pytest.mark.parametrize(("warmup", "every"), [(10, 20), (0, 30), (25, 1)])
def test_proportions_are_those_of_loops_over_all_losses(warmup, every, absent):
    """Fits, credit, both averages and the least share, with domains present or not."""
    batches = history(90, absent)
    found = drawn(batches, f"mean(domain) -> ado(every={every}, warmup={warmup})")
    expected = drawn_by_hand(batches, warmup, every)
    for t, (mine, other) in enumerate(zip(found, expected, strict=True), 1):
        assert mine == pytest.approx(other, abs=1e-6), t
    assert max(found[-1]) > 0.36, "domains are told apart"


def test_a_law_that_is_there_is_found():
    """Losses on a curve of the grid: its a and its power; a flat one and a rising one have none."""
    t = torch.arange(100, 3000, dtype=torch.float64)
    curves = torch.stack([1.5 + 3 * t**-0.3, 2 * t**-0.5, 0 * t + 2, t.log()])
    z = t ** -torch.tensor(POWERS, dtype=torch.float64)[:, None]
    sums = torch.stack([0 * curves.sum(1) + len(t), curves.sum(1), (curves**2).sum(1)], 1)
    power_sums = torch.stack(
        [z.sum(1).expand(4, -1), (z * z).sum(1).expand(4, -1), curves @ z.T], 1
    )
    a, alpha = fitted(sums, power_sums).unbind(1)
    assert a[:2].tolist() == pytest.approx([3, 2], rel=1e-6)
    assert alpha[:2].tolist() == pytest.approx([0.3, 0.5])
    assert a[2:].abs().max() < 1e-9


def test_nothing_moves_before_the_first_fit_and_equal_domains_stay_equal():
    """A warm-up draws evenly; losses that are all alike are no reason to draw unevenly."""
    assert (
        drawn(history(60), "mean(domain) -> ado(every=50, warmup=50)")
        == [pytest.approx([1 / 3] * 3)] * 60
    )
    alike = [dict.fromkeys(DOMAINS, 2 + 1 / t) for t in range(1, 40)]
    assert drawn(alike, "mean(domain) -> ado(every=5, warmup=5)")[-1] == pytest.approx([1 / 3] * 3)

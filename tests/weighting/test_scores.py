"""Two scores, statistics as numbers, units inside their domains, and LinUpper's delta, by hand."""

import statistics

import pytest
import torch
from torch.testing import assert_close

import weighting as wt

LOSS = [1.0, 2.0, 3.0, 5.0]


def weigh(text, domains=None, **signals):
    """Return the weights of one batch."""
    given = {name: torch.as_tensor(x) for name, x in signals.items()}
    return wt.build(wt.loads(text), domains=domains)(wt.Signals(**given), 1).token


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("plus", [3.0, 3.0, 7.0, 1.0]),
        ("minus", [1.0, 0.0, 0.0, 1.0]),
        ("times", [2.0, 2.0, 12.0, 0.0]),
        ("over", [2.0, 0.5, 0.75, 1e12]),
    ],
)
def test_two_scores_are_combined_token_by_token(word, expected):
    """The second score is that of the brackets; a quotient by 0 is large, and not infinite."""
    text = f"version: 1\nnormalize: none\npipeline: loss -> {word}(ref_loss) -> as_is\n"
    got = weigh(text, loss=[[2.0, 1.0, 3.0, 1.0]], ref_loss=[[1.0, 2.0, 4.0, 0.0]])
    assert_close(got[0], torch.tensor(expected).clamp(min=0), rtol=1e-6, atol=0)


def test_the_difference_with_the_reference_is_the_excess_loss():
    """`loss -> minus(ref_loss)` and `excess_loss` weigh alike, bit by bit."""
    signals = {"loss": torch.rand(3, 5) * 4, "ref_loss": torch.rand(3, 5) * 4}
    one = weigh("loss -> minus(ref_loss) -> exp -> mean_one", **signals)
    assert torch.equal(one, weigh("excess_loss -> exp -> mean_one", **signals))


def test_a_unit_counts_where_both_scores_are_finite():
    """With on_nonfinite: drop a bad reference loss leaves its token out, and no other."""
    text = "version: 1\non_nonfinite: drop\npipeline: loss -> over(ref_loss) -> mean_one\n"
    got = weigh(text, loss=[[2.0, 1.0, 3.0]], ref_loss=[[1.0, float("nan"), 1.0]])
    assert got[0].tolist() == pytest.approx([1.2, 0.0, 1.8])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("median", 2.0),
        ("mean", statistics.mean(LOSS)),
        ("std", statistics.pstdev(LOSS)),
        ("mean+0.5*std", statistics.mean(LOSS) + 0.5 * statistics.pstdev(LOSS)),
        ("mean-0.5*std", statistics.mean(LOSS) - 0.5 * statistics.pstdev(LOSS)),
    ],
)
def test_a_statistic_is_the_number_it_names(text, value):
    """A temperature and a threshold given a statistic weigh as they do given its value."""
    for pipeline in ("temperature({})", "indicator({}) -> mean_one", "threshold(at={})"):
        got, wanted = (wt.simulate(pipeline.format(x), LOSS) for x in (text, value))
        # A float32 sum of four numbers.
        assert_close(got, wanted, rtol=1e-5, atol=0)


def test_a_temperature_takes_the_size_of_the_scores():
    """Negative scores have a positive median size."""
    got = wt.simulate("affine(-1) -> temperature(median)", LOSS)
    assert_close(got, wt.simulate("affine(-1) -> temperature(2)", LOSS))


def test_what_is_three_deviations_out_is_dropped():
    """The three-sigma rule drops one outlier of many and keeps the rest alike."""
    got = weigh("loss -> threshold(at=mean+3*std, side=below)", loss=[[1.0] * 30 + [100.0]])
    assert got[0].tolist() == pytest.approx([31 / 30] * 30 + [0])


def test_sequences_are_normalised_within_their_domain():
    """Each sequence is compared with those of the domain most of its tokens are of."""
    text = "normalize(within=domain) -> clip(min=0) -> mean_one(within=domain)"
    loss = torch.tensor([1.0, 3.0, 10.0, 30.0, 20.0])[:, None].expand(5, 3)
    domain_ids = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]])
    got = weigh(text, domains=["a", "b"], loss=loss, domain_ids=domain_ids)
    assert got[:, 0].tolist() == pytest.approx([0, 2, 0, 3, 0])


@pytest.mark.parametrize("normalize", ["mean_one", "none"])
def test_documents_of_a_packed_row_count_alike(normalize):
    """With reduction: document_mean the loss is the mean over documents of their mean losses."""
    text = f"version: 1\nnormalize: {normalize}\nreduction: document_mean\npipeline: uniform\n"
    loss = torch.rand(2, 6) * 5
    segments = torch.tensor([[0, 0, 0, 0, 1, 2], [0, 0, 1, 1, 1, 1]])
    weight = weigh(text, loss=loss, segment_ids=segments)
    pieces = [loss[0, :4], loss[0, 4:5], loss[0, 5:], loss[1, :2], loss[1, 2:]]
    expected = torch.stack([x.mean() for x in pieces]).mean()
    assert_close((weight * loss).sum() / loss.numel(), expected)


@pytest.mark.parametrize("delta", [0.5, 1, 2])
def test_the_papers_delta_divides_the_temperature(delta):
    """min(h + delta, delta) of h in [-delta, delta] is LinUpper at tau / delta, by any spelling."""
    paper = f"normalize(delta={delta}) -> affine(shift={delta}) -> clip(max={delta})"
    got = wt.simulate(f"{paper} -> temperature(0.4)", LOSS)
    assert_close(got, wt.simulate(f"normalize -> linupper -> temperature({0.4 / delta})", LOSS))
    h = [-delta, -delta / 2, 0.0, delta]
    powers = torch.tensor([min(x + delta, delta) / 0.4 for x in h]).exp()
    assert_close(got, powers / powers.mean())


@pytest.mark.parametrize(("delta", "gap"), [(0.5, 0.3), (2, 0.3)])
def test_alpha_is_not_the_papers_delta(delta, gap):
    """LinUpper with alpha for delta weighs otherwise, unless delta is 1."""
    paper = f"normalize(delta={delta}) -> affine(shift={delta}) -> clip(max={delta})"
    got = wt.simulate(f"{paper} -> temperature(0.4)", LOSS)
    other = wt.simulate(f"normalize -> linupper(alpha={delta}) -> temperature(0.4)", LOSS)
    assert (got - other).abs().max() > gap

"""Words of the language worked out by hand: two scores, statistics, memory, some tokens only."""

import decimal
import statistics

import pytest
import torch
from torch.testing import assert_close

import weighting as wt
from weighting.build.domains import proportions

LOSS = [1.0, 2.0, 3.0, 5.0]


def weigh(text, domains=None, **signals):
    """Return the weights of one batch."""
    given = {n: x if n == "columns" else torch.as_tensor(x) for n, x in signals.items()}
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


def test_references_have_names():
    """Each reads the column of its name, and not the unnamed reference; both spellings say so."""
    text = "version: 1\nnormalize: none\npipeline: {}\n"
    old, b2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 5.0]])
    columns = {"ref_loss_old": old, "ref_loss_b2": b2}
    signals = {"loss": old * 2, "ref_loss": torch.zeros(1, 2), "columns": columns}
    for pipeline, expected in {
        "ref_loss(old) -> minus(ref_loss(b2)) -> as_is": [0.5, 0.0],
        "excess_loss(of=old) -> as_is": [1.0, 2.0],
        "[{excess_loss: {of: b2}}, as_is]": [1.5, 0.0],
        "excess_loss -> as_is": [2.0, 4.0],
    }.items():
        spec = wt.loads(text.format(pipeline))
        assert wt.loads(wt.dumps(spec, "yaml")) == spec == wt.loads(wt.dumps(spec))
        assert wt.build(spec)(wt.Signals(**signals), 1).token[0].tolist() == expected
    assert wt.build(wt.loads("ref_loss(old) -> mean_one")).needs == {"columns.ref_loss_old"}
    with pytest.raises(wt.SpecError, match="of of ref_loss: string should match pattern"):
        wt.loads('ref_loss("a b") -> mean_one')


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


@pytest.mark.parametrize("volume", [2, 10, 1000, 10_000, 10**9])
def test_the_effective_number_is_that_of_exact_arithmetic(volume):
    """(1 - beta^n) / (1 - beta) with beta = 1 - 1 / volume, from one to ten billion of a word."""
    counts = [0, 1, 2, 3, 7, 99, 12_345, 10**6, 10**10]
    text = (
        f"version: 1\nnormalize: none\npipeline: column(n) -> effective_number({volume}) -> as_is"
    )
    n = torch.tensor([counts], dtype=torch.float32)
    got = weigh(text, loss=torch.ones(1, len(counts)), columns={"n": n})[0]
    with decimal.localcontext(prec=60):
        beta = 1 - decimal.Decimal(1) / volume
        expected = [float((1 - beta ** decimal.Decimal(x)) / (1 - beta)) for x in n[0].tolist()]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


def test_only_tokens_in_range_are_weighed():
    """The others weigh one: the first two tokens of each document keep their weight."""
    text = "version: 1\nnormalize: none\npipeline: loss -> as_is -> where(position, below=2)\n"
    columns = {"position": torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.0]])}
    signals = wt.Signals(loss=torch.tensor([[5.0, 4.0, 3.0, 2.0, 7.0]]), columns=columns)
    assert wt.build(wt.loads(text))(signals).token.tolist() == [[5, 4, 1, 2, 7]]


def test_all_bounds_hold_at_once():
    """Of at_least, below and equals each that is given must hold."""
    text = "version: 1\nnormalize: none\npipeline: loss -> as_is -> where(token_id, {})\n"
    columns = {"token_id": torch.arange(4.0)[None]}
    signals = wt.Signals(loss=torch.full((1, 4), 9.0), columns=columns)
    for bounds, expected in {
        "at_least=1, below=3": [1, 9, 9, 1],
        "equals=3": [1, 1, 1, 9],
        "at_least=2, equals=1": [1, 1, 1, 1],
    }.items():
        assert wt.build(wt.loads(text.format(bounds)))(signals).token.tolist() == [expected]


def remembered(stage, rounds):
    """Return the scores a stage makes of rounds of (loss of a, loss of b); None: not in it."""
    text = f"version: 1\nnormalize: none\npipeline: mean(domain) -> {stage} -> as_is\n"
    fn, found = wt.build(wt.loads(text), domains=["a", "b"]), []
    for step, losses in enumerate(rounds):
        valid = torch.tensor([[x is not None for x in losses]])
        loss = torch.tensor([[0.0 if x is None else x for x in losses]])
        ids = torch.tensor([[0, 1]])
        found.append(fn(wt.Signals(loss=loss, valid=valid, domain_ids=ids), step).token[0].tolist())
    return found


def test_memory_of_domains_by_hand():
    """Averages, earlier scores and slopes are those of the batches that a domain was in."""
    rounds = [(4.0, None), (2.0, 8.0), (None, 4.0), (6.0, 6.0)]
    ema = [[4, 0], [3, 8], [0, 6], [4.5, 6]]
    assert remembered("ema(0.5)", rounds) == ema
    assert remembered("last", rounds) == [[4, 0], [2, 8], [0, 4], [6, 6]]
    assert remembered("last(1)", rounds) == [[4, 0], [4, 8], [0, 8], [2, 4]]
    falling = [(10.0, 1.0), (8.0, 2.0), (3.0, 6.0)]
    got = remembered("slope(3) -> abs", falling)
    assert [x for row in got for x in row] == pytest.approx([0, 0, 2, 1, 3.5, 2.5])
    got = remembered("slope(2) -> abs", falling)
    assert [x for row in got for x in row] == pytest.approx([0, 0, 2, 1, 5, 4])


def test_data_is_drawn_by_remembered_losses():
    """A softmax over averages draws; a domain not yet seen is drawn as the mean of the others."""
    text = "version: 1\napply: sampling\npipeline: mean(domain) -> ema(0.5) -> temperature(2)\n"
    fn = wt.build(wt.loads(text), domains=["a", "b", "c"])
    assert proportions(fn).tolist() == pytest.approx([1 / 3] * 3)
    fn(wt.Signals(loss=torch.tensor([[1.0, 3.0]]), domain_ids=torch.tensor([[0, 1]])), 1)
    powers = torch.tensor([1.0, 3.0, 2.0]).div(2).exp().double()
    assert_close(proportions(fn), powers / powers.sum(), rtol=1e-6, atol=0)


def test_a_ratio_of_two_memories_draws():
    """What is drawn by may be combined of several memories: the ratio of the last two losses."""
    pipeline = "mean(domain) -> last -> over(mean(domain) -> last(1)) -> temperature(1)"
    fn = wt.build(wt.loads(f"version: 1\napply: sampling\npipeline: {pipeline}\n"), domains="ab")
    for losses in ([4.0, 4.0], [2.0, 8.0]):
        fn(wt.Signals(loss=torch.tensor([losses]), domain_ids=torch.tensor([[0, 1]])), 1)
    expected = torch.tensor([0.5, 2.0]).double().softmax(0)
    assert_close(proportions(fn), expected, rtol=1e-6, atol=0)


def test_a_score_of_the_batch_beside_a_memory_draws_nothing():
    """A ratio with the loss of the batch at hand is not known before the batch."""
    pipeline = "mean(domain) -> over(mean(domain) -> last(1)) -> temperature(1)"
    with pytest.raises(wt.SpecError, match="knows its weights only after"):
        wt.build(wt.loads(f"version: 1\napply: sampling\npipeline: {pipeline}\n"), domains="ab")

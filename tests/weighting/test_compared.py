"""A batch with one unit of what a spec compares is warned of, once, with what to do."""

import copy
import warnings

import generators as tables
import pytest
import torch

import weighting as wt
from weighting.build.compared import compared_levels, domains_compared

DOMAINS = ("code", "web")
SHIPPED = {name: tables.built(text) for name, text in tables.SPEC_TEXTS.items()}
IDS = torch.tensor([[0, 0, 0, 1, 1, 1]])


def built(text, **given):
    """Return a spec's body as a module for two domains."""
    body = text if ":" in text else f"pipeline: {text}"
    return wt.build(wt.loads(f"version: 1\nname: x\n{body}\n"), domains=DOMAINS, **given)


def train(fn, shape=(1, 6), **given):
    """Call the loss on random logits of so many tokens; return what it warned of."""
    logits, labels = torch.randn(*shape, 5), torch.randint(0, 5, shape)
    given = {"domain_ids": torch.zeros_like(labels), **given}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wt.weighted_cross_entropy(logits, labels, fn, **given)
        hidden, weight = logits.requires_grad_(), torch.eye(5)
        wt.linear_weighted_cross_entropy(hidden, weight, labels, fn, **given)
    assert all(each.category is wt.OneUnitWarning for each in caught)
    return [str(each.message) for each in caught]


COMPARING = {
    "sequence": "normalize -> temperature(0.4)",
    "as it is, then scaled": "mean(sequence) -> as_is",
    "document": "max(document) -> temperature(2)",
    "domain": "mean(domain) -> exponentiated(0.1)",
    "one mean per sequence": "reduction: sequence_mean\npipeline: uniform",
    "one mean per domain": "reduction: domain_mean\npipeline: uniform",
    "unscaled": "normalize: none\npipeline: normalize -> temperature(0.4)",
}


@pytest.mark.parametrize("text", COMPARING.values(), ids=COMPARING)
def test_one_unit_is_warned_of_once(text):
    """All tokens of a lone sequence, document or domain weigh alike, which is said once."""
    fn, again = built(text), built(text)
    one_document = {"segment_ids": torch.zeros(1, 6, dtype=torch.long)}
    [message] = train(fn, **one_document)
    assert "so it weighs all tokens alike; " in message
    assert train(fn, **one_document) == []
    assert len(train(again, **one_document)) == 1, "another one says it too"


@pytest.mark.parametrize("text", COMPARING.values(), ids=COMPARING)
def test_several_units_are_not_warned_of(text):
    """Ids that tell two sequences, documents or domains apart leave nothing to say."""
    given = {"segment_ids": IDS, "sequence_ids": IDS, "domain_ids": IDS}
    assert train(built(text), **given) == []


def test_the_warning_says_what_to_do():
    """It names the spec, the factor, what it compares, and the ids that would help."""
    [message] = train(built("factors: {hard: normalize -> temperature(0.4)}"))
    assert message == (
        "x: hard compares sequences with each other, and this batch has only one, so it weighs all "
        "tokens alike; a row is one sequence unless sequence_ids tell them apart, as they must in "
        "a padding-free batch: give sequence_ids, or larger batches, or write scope: running into "
        "the spec"
    )


NOT_COMPARING = {
    "plain training": "uniform",
    "tokens": "entropy(1) -> token_scale",
    "its own score alone": "normalize: none\npipeline: mean(sequence) -> as_is",
    "earlier batches": "scope: running\npipeline: normalize -> temperature(0.4)",
    "a memory of its own": (
        "normalize: none\npipeline: mean(sequence) -> rank(history=8) -> as_is"
    ),
    "what it draws": "apply: sampling\npipeline: mean(domain) -> exponentiated(0.1)",
}


@pytest.mark.parametrize("text", NOT_COMPARING.values(), ids=NOT_COMPARING)
def test_what_compares_nothing_in_a_batch_is_not_warned_of(text):
    """Tokens, a unit's own score and what compares with earlier batches do with one unit."""
    assert train(built(text)) == []


def test_evaluation_and_a_batch_without_labels_are_not_warned_of():
    """Nothing is trained on there."""
    assert train(built(COMPARING["sequence"]).eval()) == []
    logits, labels = torch.randn(1, 3, 5), torch.full((1, 3), -100)
    wt.weighted_cross_entropy(logits, labels, built(COMPARING["sequence"]))


def test_a_sequence_on_each_of_two_ranks_is_not_alone():
    """Units are counted over all ranks."""
    signals = tables.batch(2, 5, keep=2.0)

    def one(rank, collectives):
        fn = built(COMPARING["sequence"], collectives=collectives)
        mine = tables.changed(signals, lambda _, x: x[rank : rank + 1])
        out = fn(mine)
        fn.check(out)
        fn.warn_of_one_unit(out, rows_are_sequences=True)
        return int(out.compared["pipeline"])

    assert tables.Lockstep(2).run(one) == [2, 2]


def test_shapes_alone_are_looked_at_where_values_would_have_to_be_waited_for():
    """On a device without values one row is seen, and two rows, ids or two domains are not."""
    fn = built("factors: {a: normalize -> temperature(1), b: mean(domain) -> temperature(1)}")
    counts = {name: torch.empty((), device="meta") for name in ("a", "b")}

    def weights(*shape):
        token = torch.empty(shape, device="meta")
        return wt.Weights(token, {}, torch.empty(0, device="meta"), counts)

    quiet = copy.deepcopy(fn)
    quiet.warn_of_one_unit(weights(2, 3), rows_are_sequences=True)
    quiet.warn_of_one_unit(weights(1, 3), rows_are_sequences=False)
    quiet.warn_of_one_unit(weights(3), rows_are_sequences=True)
    with pytest.warns(wt.OneUnitWarning, match="a compares sequences"):
        fn.warn_of_one_unit(weights(1, 3), rows_are_sequences=True)
    alone = wt.build(wt.load("group-dro"), domains=["all"])
    counts = {"pipeline": counts["b"]}
    with pytest.warns(wt.OneUnitWarning, match="pipeline compares domains"):
        alone.warn_of_one_unit(weights(4, 3), rows_are_sequences=True)


def test_the_check_that_waits_anyway_counts_units():
    """Whoever calls a built spec on signals of their own is told by `check`."""
    fn = built(COMPARING["sequence"])
    out = fn(wt.Signals(loss=torch.rand(1, 4)))
    with pytest.warns(wt.OneUnitWarning, match="compares sequences"):
        fn.check(out)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_compiled_loss_is_whole_and_says_nothing():
    """Looking would break the graph."""
    fn = built(COMPARING["sequence"])

    def loss(logits, labels):
        return wt.weighted_cross_entropy(logits, labels, fn)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    logits, labels = torch.randn(1, 3, 5), torch.randint(0, 5, (1, 3))
    assert compiled(logits, labels).isfinite()


def test_what_weighs_domains_is_found_wherever_it_stands():
    """Factors on domains, tables, what draws and the reduction; tokens within domains are not."""
    found = {
        "group-dro": ["pipeline", "reduction: domain_mean"],
        "doremi-x-linupper-x-mile": ["domain"],
        "table-x-linupper": ["domain"],
        "uniform-domains": ["pipeline"],
        "doge-proxy": ["pipeline"],
        "odm": ["pipeline"],
        "ado": ["pipeline"],
        "odm-validation": ["pipeline"],
        "linupper-x-mile": [],
    }
    assert {name: domains_compared(SHIPPED[name].plan) for name in found} == found
    assert domains_compared(built("entropy -> temperature(1, within=domain)").plan) == []


def test_every_shipped_spec_that_compares_sequences_says_so():
    """LinUpper and its like are among what one sequence would turn off; token specs are not."""
    compared = {
        name for name, fn in SHIPPED.items() if "sequence" in compared_levels(fn.plan).values()
    }
    assert {"linupper", "extremes", "quadratic", "term", "rho-loss"} <= compared
    assert {"mile", "focal", "rgd", "uniform", "rho-1"}.isdisjoint(compared)

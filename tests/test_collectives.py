"""How often a batch talks to other ranks, and how much it says: no more than it must."""

import dataclasses
from collections import Counter

import generators as tables
import pytest
import torch
from looping import for_each

CALLS = {
    # case: gathers, maxima, sums, bytes a rank hands over; maxima and sums among the ranks that
    # share its sequences, which cost nothing where sequences are whole
    "spec absgd": (1, 0, 0, 16, 0, 1),
    "spec ado": (0, 0, 2, 88, 0, 0),
    "spec beyond-ll": (0, 0, 0, 0, 0, 0),
    "spec class-balanced": (0, 0, 1, 16, 0, 0),
    "spec cvar": (0, 0, 10, 1176, 0, 0),
    "spec dft": (0, 0, 0, 0, 0, 0),
    "spec loshchilov-hutter": (1, 0, 2, 800024, 0, 1),
    "spec critical-tokens": (0, 0, 0, 0, 0, 0),
    "spec doge-proxy": (0, 0, 1, 8, 0, 0),
    "spec doge-table": (0, 0, 0, 0, 0, 0),
    "spec doge-table-x-linupper": (1, 0, 1, 24, 0, 1),
    "spec doremi-clip-by-domain": (0, 0, 3, 108, 0, 0),
    "spec doremi-proxy": (0, 0, 2, 88, 0, 0),
    "spec doremi-table": (0, 0, 0, 0, 0, 0),
    "spec doremi-table-x-linupper": (1, 0, 1, 24, 0, 1),
    "spec doremi-x-linupper-x-mile": (1, 0, 2, 112, 0, 1),
    "spec dro-kl": (1, 0, 1, 24, 0, 1),
    "spec dro-kl-gpt2": (1, 0, 1, 24, 0, 1),
    "spec dynamic-loading": (0, 0, 0, 0, 0, 0),
    "spec dwa": (0, 0, 4, 188, 0, 0),
    "spec eaft": (0, 0, 0, 0, 0, 0),
    "spec error-norm": (0, 0, 8, 1160, 0, 0),
    "spec eslm": (0, 0, 9, 1168, 0, 0),
    "spec extremes-gpt2": (1, 0, 1, 24, 0, 1),
    "spec extremes": (1, 0, 1, 24, 0, 1),
    "spec flow": (1, 0, 1, 24, 0, 1),
    "spec focal": (0, 0, 1, 16, 0, 0),
    "spec gce": (0, 0, 0, 0, 0, 0),
    "spec group-dro": (0, 0, 3, 108, 0, 0),
    "spec ifd": (4, 0, 1, 72, 0, 4),
    "spec importance": (1, 0, 1, 24, 0, 1),
    "spec infobatch": (1, 0, 0, 16, 0, 1),
    "spec inverse-frequency": (0, 0, 1, 16, 0, 0),
    "spec irdro-rank": (1, 0, 1, 24, 0, 1),
    "spec iw-sft": (1, 0, 0, 16, 0, 1),
    "spec iwsi-column": (0, 0, 0, 0, 0, 0),
    "spec linupper-1p4b": (1, 0, 1, 24, 0, 1),
    "spec linupper-7b": (1, 0, 1, 24, 0, 1),
    "spec linupper-gpt2": (1, 0, 1, 24, 0, 1),
    "spec linupper-x-mile": (1, 0, 1, 32, 0, 1),
    "spec linupper": (1, 0, 1, 24, 0, 1),
    "spec longce": (0, 0, 0, 0, 0, 0),
    "spec loss-truncation": (1, 0, 0, 16, 0, 2),
    "spec mile": (0, 0, 1, 16, 0, 0),
    "spec npo": (2, 0, 0, 32, 0, 2),
    "spec odm": (0, 0, 2, 88, 0, 0),
    "spec odm-validation": (0, 0, 0, 0, 0, 0),
    "spec ohem": (1, 0, 1, 24, 0, 1),
    "spec profit": (0, 0, 0, 0, 0, 0),
    "spec prop1": (1, 0, 1, 24, 0, 1),
    "spec psft": (0, 0, 0, 0, 0, 0),
    "spec quadratic-gpt2": (1, 0, 1, 24, 0, 1),
    "spec quadratic": (1, 0, 1, 24, 0, 1),
    "spec rgd": (1, 0, 0, 16, 0, 1),
    "spec rho-1": (0, 0, 10, 1176, 0, 0),
    "spec rho-loss": (1, 0, 1, 24, 0, 1),
    "spec sce": (0, 0, 0, 0, 0, 0),
    "spec selective-backprop": (1, 0, 1, 24, 0, 1),
    "spec self-paced": (1, 0, 0, 16, 0, 1),
    "spec sstoken": (0, 0, 1, 8, 2, 3),
    "spec talr": (0, 1, 10, 1180, 0, 0),
    "spec table-x-linupper": (1, 0, 1, 32, 0, 1),
    "spec term-hierarchical": (0, 2, 3, 168, 0, 0),
    "spec term": (1, 0, 1, 24, 0, 1),
    "spec token-cleaning": (0, 0, 10, 1176, 0, 0),
    "spec toremi-topics": (0, 0, 1, 64, 0, 0),
    "spec toremi": (0, 0, 1, 80, 0, 0),
    "spec ukpl": (0, 0, 1, 8, 0, 1),
    "spec uniform-domains": (0, 0, 0, 0, 0, 0),
    "spec uniform": (0, 0, 0, 0, 0, 0),
    "spec unlearning": (0, 0, 0, 0, 0, 0),
    "spec upper": (1, 0, 1, 24, 0, 1),
    "spec velocitune": (0, 0, 4, 248, 0, 0),
    "stage abs": (1, 0, 1, 24, 0, 1),
    "stage ado": (0, 0, 2, 88, 0, 0),
    "stage affine": (1, 0, 1, 24, 0, 1),
    "stage as_is": (0, 0, 1, 8, 0, 0),
    "stage bandit": (0, 0, 2, 88, 0, 0),
    "stage bernoulli": (1, 0, 1, 24, 0, 1),
    "stage center": (1, 0, 1, 24, 0, 1),
    "stage clamp": (1, 0, 1, 24, 0, 1),
    "stage clip": (1, 0, 1, 24, 0, 1),
    "stage column": (0, 0, 1, 16, 0, 0),
    "stage context_gain": (0, 0, 1, 8, 0, 1),
    "stage correct": (0, 0, 1, 16, 0, 0),
    "stage doge": (0, 0, 1, 8, 0, 0),
    "stage doremi": (0, 0, 2, 88, 0, 0),
    "stage dynamic_loading": (0, 0, 1, 8, 0, 0),
    "stage effective_number": (0, 0, 1, 16, 0, 0),
    "stage ema": (0, 0, 2, 88, 0, 0),
    "stage entropy": (0, 0, 1, 16, 0, 0),
    "stage error_norm": (1, 0, 1, 24, 0, 1),
    "stage excess_loss": (0, 0, 1, 16, 0, 0),
    "stage exp": (1, 0, 1, 24, 0, 1),
    "stage exponentiated": (0, 0, 2, 88, 0, 0),
    "stage extremes": (1, 0, 1, 24, 0, 1),
    "stage floor": (1, 0, 1, 24, 0, 1),
    "stage focal": (0, 0, 1, 16, 0, 0),
    "stage forgotten": (0, 0, 3, 72, 0, 0),
    "stage gate": (1, 0, 1, 24, 0, 1),
    "stage indicator": (0, 0, 4, 28, 0, 0),
    "stage interpolate": (1, 0, 1, 24, 0, 1),
    "stage kl": (0, 0, 1, 16, 0, 0),
    "stage last": (0, 0, 3, 168, 0, 0),
    "stage length": (0, 0, 3, 20, 0, 1),
    "stage linupper": (1, 0, 1, 24, 0, 1),
    "stage log": (0, 0, 2, 88, 0, 0),
    "stage loss": (0, 0, 1, 16, 0, 0),
    "stage max": (0, 1, 3, 24, 1, 1),
    "stage mean": (0, 0, 2, 88, 0, 0),
    "stage minus": (0, 0, 1, 16, 0, 0),
    "stage mean_one": (0, 0, 1, 16, 0, 0),
    "stage multinomial": (1, 0, 1, 24, 0, 1),
    "stage normalize": (1, 0, 1, 24, 0, 1),
    "stage over": (0, 2, 3, 32, 1, 2),
    "stage plus": (0, 0, 3, 168, 0, 0),
    "stage position": (0, 0, 1, 16, 0, 0),
    "stage pow": (1, 0, 1, 24, 0, 1),
    "stage quadratic": (1, 0, 1, 24, 0, 1),
    "stage rank": (1, 0, 1, 24, 0, 1),
    "stage remembered": (0, 1, 4, 80, 0, 1),
    "stage ref_entropy": (0, 1, 3, 24, 0, 1),
    "stage ref_loss": (0, 0, 1, 16, 0, 0),
    "stage running": (1, 0, 1, 24, 0, 1),
    "stage select": (0, 0, 10, 1176, 0, 0),
    "stage short_loss": (0, 0, 1, 16, 0, 0),
    "stage signed": (0, 0, 1, 8, 0, 0),
    "stage sigmoid": (0, 0, 2, 16, 0, 2),
    "stage standardize": (1, 0, 1, 24, 0, 1),
    "stage slope": (0, 0, 2, 88, 0, 0),
    "stage sum": (0, 2, 3, 32, 0, 1),
    "stage table": (0, 0, 1, 16, 0, 0),
    "stage tanh": (0, 1, 2, 20, 0, 2),
    "stage target_prob": (0, 0, 1, 16, 0, 0),
    "stage temperature": (1, 0, 1, 24, 0, 1),
    "stage threshold": (0, 0, 9, 1168, 0, 0),
    "stage times": (2, 0, 1, 40, 0, 2),
    "stage tilted": (0, 1, 3, 24, 1, 1),
    "stage topical": (0, 0, 2, 88, 0, 0),
    "stage topics": (0, 0, 2, 72, 0, 0),
    "stage topk_entropy": (0, 1, 2, 20, 2, 0),
    "stage token_id": (0, 0, 2, 16, 0, 0),
    "stage token_scale": (0, 0, 1, 16, 0, 0),
    "stage uniform": (0, 0, 0, 0, 0, 0),
    "stage validation_bandit": (0, 0, 1, 8, 0, 0),
    "stage variability": (0, 0, 3, 72, 0, 0),
    "stage where": (0, 0, 1, 8, 0, 0),
    "extra sequence-mean": (1, 0, 1, 24, 0, 2),
    "extra uniform-by-sequence": (0, 0, 1, 8, 0, 1),
    "extra within domains": (1, 0, 1, 32, 0, 2),
    "extra documents within domains": (0, 0, 13, 5912, 1, 2),
    "extra statistics": (2, 0, 3, 52, 0, 2),
    "extra document-mean": (0, 0, 1, 16, 0, 1),
    "extra none-by-document": (2, 0, 1, 24, 0, 2),
    "extra none": (1, 0, 0, 16, 0, 1),
    "extra none-by-sequence": (1, 0, 2, 24, 0, 1),
    "extra all-levels": (1, 3, 14, 808, 1, 2),
    "extra tokens": (0, 4, 20, 1372, 0, 0),
    "extra running": (1, 0, 1, 28, 0, 2),  # how many sequences fade those before
    "extra both": (1, 0, 2, 104, 0, 1),
    "extra both alone": (0, 0, 1, 16, 0, 0),
    "extra live draw": (0, 0, 2, 96, 0, 0),
    "extra late start": (1, 0, 1, 32, 0, 1),
    "extra some sequences": (2, 0, 2, 48, 0, 2),
    "extra remembered draw": (0, 0, 3, 176, 0, 0),
    "extra signed with sizes of every level": (1, 0, 2, 112, 0, 1),
    "extra signed sequences": (1, 0, 1, 24, 0, 2),
    "extra signed selection": (0, 0, 9, 1168, 0, 0),
    "extra signed domains": (0, 0, 2, 28, 0, 0),
    "extra drop": (1, 0, 1, 24, 0, 1),
}
"""Of a batch of four sequences of six tokens on two ranks.

Pooled sequences take one gather of their scores; what then looks at them is free.
Domains take one sum.  Statistics over documents and single tokens are a call each, and one counts
the documents: normalize a maximum,
temperature a maximum and a sum, a k-th largest a count and six sums, a cap or a floor a maximum
and nine sums.  Scaling to mean one is one sum, for all factors and their product together.
Drawing by a table is free.
"""


class Heard:
    """Collectives that note kind and size of what is asked of them."""

    def __init__(self, ranks, heard, only_parts=False):
        """Pass all calls on."""
        self.ranks, self.heard, self.only_parts = ranks, heard, only_parts
        self.rank, self.size = ranks.rank, ranks.size

    @property
    def parts(self):
        """Note the calls among the ranks that share sequences too, as such."""
        return Heard(self.ranks.parts, self.heard, only_parts=True)

    def gather(self, x):
        """Note a gather."""
        return self._noted("gather", x)

    def sum(self, x):
        """Note a sum."""
        return self._noted("sum", x)

    def max(self, x):
        """Note a maximum."""
        return self._noted("max", x)

    def _noted(self, kind, x):
        self.heard.append((f"{kind} of parts" if self.only_parts else kind, x.nbytes))
        return getattr(self.ranks, kind)(x)


def heard(case, signals, batches=1):
    """Return the calls of a rank in its last batch, after checking that the other makes the same.

    Returns:
        Kind and bytes of each call.
    """

    def one(rank, ranks):
        calls = []
        fn = tables.built(tables.CASES[case], collectives=Heard(ranks, calls))
        mine = tables.changed(signals, lambda _, x: x.chunk(2)[rank])
        for step in range(batches):
            calls.clear()
            fn(mine, step)
        return calls

    first, second = tables.Lockstep(2).run(one)
    assert first == second
    return first


def summed_up(calls):
    """Return calls as a row of `CALLS`."""
    kinds = Counter(kind for kind, _ in calls)
    moved = sum(size for kind, size in calls if "parts" not in kind)
    whole = (kinds["gather"], kinds["max"], kinds["sum"], moved)
    return (*whole, kinds["max of parts"], kinds["sum of parts"])


def test_the_table_holds_every_case():
    """No case is left out, so that none can grow unseen."""
    assert CALLS.keys() == tables.CASES.keys()


@pytest.mark.slow
@for_each("case", tables.CASES)
def test_a_batch_takes_the_calls_of_the_table(case):
    """Number and size of the collectives of every case are those of the table, batch by batch."""
    signals = tables.batch(4, 6)
    assert summed_up(heard(case, signals)) == CALLS[case]
    assert summed_up(heard(case, signals, batches=3)) == CALLS[case]
    masked = dataclasses.replace(signals, valid=torch.zeros_like(signals.valid))
    assert summed_up(heard(case, masked)) == CALLS[case], "values must not matter"


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        "uniform-domains",
        "dft",
        "beyond-ll",
        "eaft",
        "iwsi-column",
        "critical-tokens",
        "longce",
    ],
)
def test_weights_of_single_tokens_take_no_collective(name):
    """Weights that each token has by itself, unscaled, take no collective."""
    assert heard(f"spec {name}", tables.batch(4, 6)) == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mile", ["sum"]),
        ("focal", ["sum"]),
        ("linupper", ["gather", "sum"]),
        ("linupper-x-mile", ["gather", "sum"]),
        ("table-x-linupper", ["gather", "sum"]),
        ("doge-table-x-linupper", ["gather", "sum"]),
    ],
)
def test_sequences_take_one_gather_and_scaling_one_sum(name, kinds):
    """The gather brings the scores of all sequences together; one sum scales all factors."""
    calls = heard(f"spec {name}", tables.batch(4, 6))
    assert [kind for kind, _ in calls if "parts" not in kind] == kinds


@pytest.mark.parametrize("name", ["doge-table-x-linupper", "doremi-table-x-linupper"])
def test_drawing_by_a_table_is_free(name):
    """The calls are those of the factor that weighs the loss, kind by kind and byte by byte."""
    signals = tables.batch(4, 6)
    assert heard(f"spec {name}", signals) == heard("spec linupper", signals)


def test_thousands_of_sequences_move_some_kilobytes():
    """With 4,096 sequences in scope each rank gets eight bytes of each, and eight bytes more."""
    calls = dict(heard("spec linupper", tables.batch(4096, 2)))
    gathered = 2 * calls["gather"]
    assert gathered == 4096 * 8 == 32 * 1024
    assert calls["sum"] == 8


def test_scope_rank_takes_no_collective():
    """With scope: rank no case takes a collective."""
    for case in ("spec linupper-x-mile", "spec cvar", "spec group-dro", "extra all-levels"):
        text = tables.CASES[case].replace("version: 1\n", "version: 1\nscope: rank\n")
        calls = []

        def one(rank, ranks, text=text, calls=calls):
            mine = tables.changed(tables.batch(4, 6), lambda _, x: x.chunk(2)[rank])
            tables.built(text, collectives=Heard(ranks, calls))(mine)

        tables.Lockstep(2).run(one)
        assert calls == [], case

"""Tokens to units and back."""

import dataclasses

import generators as tables
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from weighting.contract import Alone, Signals
from weighting.contract.levels import documents, group

LEVELS = ("document", "sequence", "domain")
K = len(tables.DOMAINS)


def members(signals, level):
    """Return the unit every token belongs to, as any hashable, in plain Python."""
    rows, length = signals.loss.shape
    unit = {
        "sequence": lambda b, _: b,
        "document": lambda b, t: (b, int(signals.segment_ids[b, t])),
        "domain": lambda b, t: int(signals.domain_ids[b, t]),
    }[level]
    return [unit(b, t) for b in range(rows) for t in range(length)]


@pytest.mark.parametrize("level", LEVELS)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_reduce_and_broadcast_are_loops(level, rows, length, seed):
    """The sum and the maximum of each unit, given back to its tokens, are what loops find."""
    signals = tables.batch(rows, length, seed=seed, keep=2)
    units, x = members(signals, level), signals.loss.flatten()
    groups = group(signals, level, K, Alone())
    sums, maxima = groups.broadcast(groups.sum(x)), groups.broadcast(groups.max(x))
    for t, unit in enumerate(units):
        mine = [x[i].item() for i, other in enumerate(units) if other == unit]
        assert sums[t].item() == pytest.approx(sum(mine), rel=1e-5)  # float32 sums
        assert maxima[t].item() == max(mine)


@pytest.mark.parametrize("level", LEVELS)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_reduce_then_broadcast_keeps_the_masked_sum(level, rows, length, seed):
    """The mean of its unit given to every valid token adds up to what the tokens held."""
    signals = tables.batch(rows, length, seed=seed, keep=0.5)
    x = torch.where(signals.valid, signals.loss, 0).flatten()
    groups = group(signals, level, K, Alone())
    total, count = groups.sum(torch.stack([x, signals.valid.flatten().float()]))
    mean = groups.broadcast(total / count.clamp(min=1))
    kept = torch.where(signals.valid.flatten(), mean, 0).sum()
    # Float32 sums of some fifty numbers.
    assert_close(kept, x.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_units_without_tokens_are_empty(level):
    """Empty slots sum to 0 and have no maximum."""
    signals = tables.batch(3, 4, seed=1)
    ids = torch.zeros_like(signals.domain_ids)
    signals = dataclasses.replace(signals, domain_ids=ids, segment_ids=ids)
    groups = group(signals, level, K, Alone())
    used = set(groups.ids.tolist())
    for unit in range(groups.size):
        if unit not in used:
            assert groups.sum(torch.ones(12))[unit] == 0
            assert groups.max(torch.ones(12))[unit] == -torch.inf


def test_tokens_need_no_groups():
    """The token level has no units to gather."""
    assert group(tables.batch(), "token", K, Alone()) is None


@pytest.mark.parametrize(("level", "name"), [("document", "segment_ids"), ("domain", "domain_ids")])
@pytest.mark.parametrize("bad", [-1, 24])
def test_ids_out_of_range_are_refused(level, name, bad):
    """An id below 0 or beyond the number of units is an error that names the field."""
    signals = tables.batch(4, 6, seed=2)
    ids = getattr(signals, name).clone()
    ids[0, 0] = bad
    with pytest.raises(ValueError, match=f"{name} must run from 0 to"):
        group(dataclasses.replace(signals, **{name: ids}), level, K, Alone())


@pytest.mark.parametrize(("level", "name"), [("document", "segment_ids"), ("domain", "domain_ids")])
def test_missing_ids_are_asked_for(level, name):
    """A level without its ids is an error that names the field."""
    with pytest.raises(ValueError, match=f"Signals\\({name}=...\\)"):
        group(Signals(loss=torch.ones(2, 3)), level, K, Alone())


def test_sequence_ids_tell_the_sequences_of_a_row():
    """Equal ids in one row are one sequence, whether they begin anew in each row or count on."""
    for ids in ([[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 0, 1, 1], [2, 3, 3, 3]]):
        signals = Signals(loss=torch.ones(2, 4), sequence_ids=torch.tensor(ids))
        groups = group(signals, "sequence", 0, Alone())
        found = groups.broadcast(groups.sum(signals.loss.flatten()))
        assert found.view(2, 4).tolist() == [[2, 2, 2, 2], [1, 3, 3, 3]]


def test_sequence_ids_may_count_beyond_the_length_of_a_row():
    """Ids that count on through many short rows keep the sequences of each row apart."""
    ids = torch.arange(12).view(4, 3)  # every token is a sequence
    signals = Signals(loss=torch.ones(4, 3), sequence_ids=ids)
    groups = group(signals, "sequence", 0, Alone())
    assert groups.broadcast(groups.sum(signals.loss.flatten())).tolist() == [1.0] * 12


def test_sequence_ids_too_far_apart_in_a_row_are_refused():
    """Two ids that might count as one sequence are an error that names the row."""
    valid = torch.tensor([[True, True, True], [True, True, False]])
    signals = Signals(torch.ones(2, 3), valid, sequence_ids=torch.tensor([[3, 4, 5], [0, 3, 9]]))
    with pytest.raises(ValueError, match=r"sequence_ids of row 1 run from 0 to 3"):
        group(signals, "sequence", 0, Alone())


@pytest.mark.parametrize("bad", [-1, 12])
def test_sequence_ids_out_of_range_are_refused(bad):
    """An id below 0, or one that no batch of so many tokens has, is an error with the range."""
    ids = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, bad]])
    with pytest.raises(ValueError, match="sequence_ids must run from 0 to 11"):
        group(Signals(loss=torch.ones(3, 4), sequence_ids=ids), "sequence", 0, Alone())


def test_sequence_ids_of_another_shape_are_refused():
    """One id per row instead of one per token is an error with both shapes."""
    signals = Signals(loss=torch.ones(2, 3), sequence_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"sequence_ids has shape \[2\], the loss \[2, 3\]"):
        group(signals, "sequence", 0, Alone())


def test_flat_tokens_without_any_ids_are_told_what_to_give():
    """Flat tokens have no rows, so a level of sequences asks for ids by both names."""
    with pytest.raises(ValueError, match=r"give Signals\(sequence_ids=...\), or segment_ids"):
        group(Signals(loss=torch.ones(5)), "sequence", 0, Alone())


def test_flat_tokens_without_sequences_have_one_per_document():
    """Flat tokens with document ids alone have one sequence per document."""
    signals = Signals(loss=torch.ones(5), segment_ids=torch.tensor([0, 0, 1, 2, 2]))
    groups = group(signals, "sequence", 0, Alone())
    assert groups.broadcast(groups.sum(signals.loss)).tolist() == [2, 2, 1, 2, 2]


def documents_by_loop(positions):
    """Return the document of each token, counting zeros after the first token of a row."""
    out = []
    for row in positions:
        number, ids = 0, []
        for t, position in enumerate(row):
            number += position == 0 and t > 0
            ids.append(number)
        out.append(ids)
    return out


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5))
def test_documents_start_where_positions_are_zero(positions):
    """Every zero but a row's first token begins a new document of that row."""
    assert documents(torch.tensor(positions)).tolist() == documents_by_loop(positions)


def test_a_row_may_begin_inside_a_document():
    """The rest of a document from an earlier row is document 0 of its row."""
    positions = torch.tensor([[5, 6, 0, 1, 0], [0, 1, 2, 3, 4], [0, 0, 0, 7, 8]])
    assert documents(positions).tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 2, 2]]


def test_flat_positions_tell_documents_too():
    """Positions [T] give the ids of the row [1, T]."""
    positions = torch.tensor([3, 4, 0, 1, 0, 0, 1])
    assert documents(positions).tolist() == documents(positions[None])[0].tolist()
    assert documents(positions).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_document_weights_never_mix_documents():
    """What happens in one document of a packed row changes no score of another."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    loss = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    fn = tables.built("version: 1\npipeline: mean(document) -> mean_one\n")
    segments = documents(positions)
    token = fn(Signals(loss=loss, segment_ids=segments)).token
    # Means 2 and 5 over their mean 3.5.
    assert_close(token, torch.tensor([[2.0, 2.0, 2.0, 5.0, 5.0, 5.0]]) / 3.5)

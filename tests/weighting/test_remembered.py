"""Losses remembered by example: which batch they are of, on many ranks, resumed, and bounded."""

import generators as tables
import pytest
import torch

import weighting as wt


def built(examples, word="remembered", **given):
    """Return a spec whose weights are the scores of a word that remembers, losses by default."""
    text = f"version: 1\nnormalize: none\npipeline: {word}(examples={examples}) -> as_is\n"
    return wt.build(wt.loads(text), **given)


def batch(losses, examples):
    """Return a row of tokens."""
    columns = {"example": torch.tensor([examples]).float()}
    return wt.Signals(torch.tensor([losses]).float(), columns=columns)


def test_a_token_has_the_mean_loss_of_its_example_when_that_was_last_seen():
    """That of now when it never was; what is away is kept."""
    fn = built(5)
    assert fn(batch([1, 3, 8], [0, 0, 4]), 1).token.tolist() == [[2, 2, 8]]
    assert fn(batch([5, 7, 9], [0, 2, 2]), 2).token.tolist() == [[2, 8, 8]]
    assert fn(batch([0, 0, 0], [0, 2, 4]), 3).token.tolist() == [[5, 8, 8]]


def test_ignored_tokens_are_not_remembered():
    """Whatever their loss and number are."""
    fn = built(3)
    given = batch([1, 9, 9], [0, 0, 2])
    valid = torch.tensor([[True, False, False]])
    fn(wt.Signals(given.loss, valid, columns=given.columns), 1)
    assert fn(batch([4, 6, 6], [0, 2, 2]), 2).token.tolist() == [[1, 6, 6]]


def test_more_examples_than_places_share_them():
    """So the memory is bounded; numbers that far apart are one example."""
    fn = built(3)
    fn(batch([2.0], [1]), 1)
    assert fn(batch([7.0], [4]), 2).token.tolist() == [[2]]
    assert sum(x.numel() for x in fn.state_dict().values()) == 4 * 3


WORDS = ["remembered", "variability"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_rank_remembers_what_any_has_seen(parts, word):
    """State and scores over several batches are those of one rank, rows cut over ranks or not."""
    batches = [tables.batch(4, 6, seed=seed) for seed in range(4)]
    whole = built(9, word)
    expected = [whole(signals, step).token for step, signals in enumerate(batches)]

    def one(rank, collectives):
        fn = built(9, word, collectives=collectives)
        dim = 1 if parts == 2 else 0
        mine = (tables.changed(signals, lambda _, x: x.chunk(2, dim)[rank]) for signals in batches)
        return [fn(signals, step).token for step, signals in enumerate(mine)], fn.state_dict()

    found = tables.Lockstep(2, parts).run(one)
    for token, *own in zip(expected, *(tokens for tokens, _ in found), strict=True):
        assert torch.allclose(torch.cat(own, 1 if parts == 2 else 0), token, atol=1e-6)
    for _, state in found:
        for name, x in whole.state_dict().items():
            assert torch.allclose(state[name], x, atol=1e-6), name


@pytest.mark.parametrize("word", WORDS)
def test_a_resumed_memory_goes_on(word):
    """After a state dict the next scores are those of the memory that never stopped."""
    batches = [tables.batch(4, 6, seed=seed) for seed in range(4)]
    fn = built(9, word)
    for step, signals in enumerate(batches[:2]):
        fn(signals, step)
    other = built(9, word)
    other.load_state_dict({name: x.clone() for name, x in fn.state_dict().items()})
    for step, signals in enumerate(batches[2:], 2):
        assert torch.equal(other(signals, step).token, fn(signals, step).token)


def test_infobatch_can_judge_by_the_epoch_before():
    """Easy is who had a loss below the mean when it was last seen, whatever its loss is now."""
    scores = "remembered(examples=4) -> mean(sequence)"
    fn = wt.build(wt.loads(f"{scores} -> indicator(mean) -> affine(1, 1) -> as_is"))
    columns = {"example": torch.arange(4.0)[:, None]}
    fn(wt.Signals(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), columns=columns), 1)
    weight = fn(wt.Signals(torch.tensor([[4.0], [3.0], [2.0], [1.0]]), columns=columns), 2).token
    assert torch.allclose(weight.flatten(), torch.tensor([1, 1, 2, 2]) * 2 / 3)

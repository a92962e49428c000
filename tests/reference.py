"""Slow, obvious references: plain Python loops over floats, one formula after the other.

Nothing here is clever, vectorised or float32, and nothing is shared with what is tested.  A batch
is rows of tokens; `reference_methods` weighs them by these parts.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: what the forward pass knows about each, in nested lists."""

    loss: list[list[float]]
    valid: list[list[bool]]
    entropy: list[list[float]]
    target_prob: list[list[float]]
    error_norm: list[list[float]]
    ref_loss: list[list[float]]
    domain: list[list[str]]
    document: list[list[int]]
    columns: dict[str, list[list[float]]]
    domains: tuple[str, ...]
    step: int = 0


def minus(left, right):
    """Return the difference of two signals, token by token."""
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def each(batch, weight):
    """Return `weight(row, column)` of every valid token and 0 of the others."""
    return [
        [weight(row, column) if ok else 0.0 for column, ok in enumerate(oks)]
        for row, oks in enumerate(batch.valid)
    ]


def flat(batch, values):
    """Return the values of the valid tokens, row after row."""
    return [
        x
        for row, oks in zip(values, batch.valid, strict=True)
        for x, ok in zip(row, oks, strict=True)
        if ok
    ]


def placed(batch, weights):
    """Return the weights of the valid tokens, row after row, in rows again."""
    following = iter(weights)
    return each(batch, lambda _row, _column: next(following))


def row_means(batch, values):
    """Return the mean of the valid tokens of each row; None for a row without any."""
    means = []
    for row, oks in zip(values, batch.valid, strict=True):
        there = [x for x, ok in zip(row, oks, strict=True) if ok]
        means.append(math.fsum(there) / len(there) if there else None)
    return means


def by_domain(batch, values):
    """Return the values of the valid tokens of each domain of which there are any."""
    found = {}
    for name, x in zip(flat(batch, batch.domain), flat(batch, values), strict=True):
        found.setdefault(name, []).append(x)
    return found


def domain_means(batch, values):
    """Return the mean of the valid tokens of each domain of which there are any."""
    return {name: math.fsum(xs) / len(xs) for name, xs in by_domain(batch, values).items()}


def sequence_losses(batch):
    """Return the mean loss of the valid tokens of each row; None for a row without any."""
    return row_means(batch, batch.loss)


def normalized(values):
    """Return 2 (x - min) / (max - min) - 1 of the values that are there; 0 when all are equal."""
    there = [x for x in values if x is not None]
    out = []
    for x in values:
        if x is None:
            out.append(None)
        elif max(there) == min(there):
            out.append(0.0)
        else:
            out.append(2 * (x - min(there)) / (max(there) - min(there)) - 1)
    return out


def softmax(scores, temperature):
    """Return n exp(x / r) / sum exp(x / r) over the scores that are there."""
    there = [x for x in scores if x is not None]
    if not there:
        return [None for _ in scores]
    powers = [None if x is None else math.exp((x - max(there)) / temperature) for x in scores]
    total = math.fsum(p for p in powers if p is not None)
    return [None if p is None else len(there) * p / total for p in powers]


def water_fill(weights, cap):
    """Return min(cap, s w) with the s that keeps the sum, by trying every number of capped units.

    A weight of zero counts as 1e-30, so that there is always something to fill.
    """
    if not weights or max(weights) <= cap:
        return list(weights)
    total = math.fsum(weights)
    if len(weights) * cap <= total:
        return [cap] * len(weights)
    ordered = sorted((max(w, 1e-30) for w in weights), reverse=True)
    for capped in range(len(ordered)):
        rest = ordered[capped:]
        scale = (total - capped * cap) / math.fsum(rest)
        if scale * rest[0] <= cap:
            return [min(cap, scale * max(w, 1e-30)) for w in weights]
    return [cap] * len(weights)


def raise_floor(weights, floor):
    """Return max(floor, s w) with the s that keeps the sum, by trying every number at the floor."""
    if not weights or min(weights) >= floor:
        return list(weights)
    total = math.fsum(weights)
    if len(weights) * floor >= total:
        return [floor] * len(weights)
    ordered = sorted(weights)
    for low in range(len(ordered)):
        rest = ordered[low:]
        scale = (total - low * floor) / math.fsum(rest)
        if scale * rest[0] >= floor:
            return [max(floor, scale * w) for w in weights]
    return [floor] * len(weights)


def capped(weights, cap):
    """Return `water_fill` of the weights that are there."""
    filled = iter(water_fill([w for w in weights if w is not None], cap))
    return [None if w is None else next(filled) for w in weights]


def mean_one(weights, valid, of_nothing=1.0):
    """Scale token weights to mean one over valid tokens and put 0 at the others.

    Weights that are all zero become `of_nothing`.
    """
    count = sum(ok for row in valid for ok in row)
    total = math.fsum(
        w
        for row, oks in zip(weights, valid, strict=True)
        for w, ok in zip(row, oks, strict=True)
        if ok
    )
    return [
        [
            (w * count / total if total else of_nothing) if ok else 0.0
            for w, ok in zip(r, o, strict=True)
        ]
        for r, o in zip(weights, valid, strict=True)
    ]


def by_sequence(batch, weights):
    """Give every token the weight of its row, then scale to mean one over valid tokens."""
    return mean_one(each(batch, lambda row, _: weights[row]), batch.valid)


def kept(values, keep, skip=0):
    """Return n / k where a value is among the k = floor(keep n) highest, at least one, else 0.

    The highest `skip` k are left out first.  Ties are kept together: then k is more.
    """
    if not values:
        return []
    ordered, n = sorted(values, reverse=True), len(values)
    k = max(1, math.floor(keep * n))
    lowest = ordered[min((skip + 1) * k, n) - 1]
    chosen = [x >= lowest for x in values]
    if skip:
        bound = ordered[min(skip * k, n) - 1]
        chosen = [is_in and x < bound for is_in, x in zip(chosen, values, strict=True)]
    if not any(chosen):  # all of the slice is one tie
        chosen = [x == lowest for x in values]
    return [n / sum(chosen) if is_in else 0.0 for is_in in chosen]


def mixed(number):
    """Return 32 well-mixed bits of a whole number."""
    x = (number + 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
    x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def draws(seed, counter, number):
    """Return the numbers from 0 below 1 that a seed and a counter give the units of a batch."""
    start = mixed(counter + mixed(seed))
    return [mixed(start + index) // 2**8 / 2**24 for index in range(number)]


def schedule(kind, step, **given):
    """Return the value of a schedule at one step, by the sentence that defines it."""
    if kind == "constant":
        return given["value"]
    if kind == "step":
        return given["before"] if step < given["at"] else given["after"]
    if kind == "piecewise":
        reached = [at for at in given["values"] if at <= step]
        return given["values"][max(reached) if reached else min(given["values"])]
    t = min(1.0, max(0.0, (step - given.get("begin", 0)) / given["over"]))
    start, end = given["start"], given["end"]
    if kind == "linear":
        return start + (end - start) * t
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
    assert kind == "exponential"
    return start * (end / start) ** t


def softmax_cross_entropy(logits, label):
    """Return -log softmax(logits)[label] of one token."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[label]


def distribution(logits):
    """Return softmax(logits) of one token."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / math.fsum(powers) for p in powers]

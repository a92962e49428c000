"""Slow, obvious references: plain Python loops over floats, one formula after the other.

Nothing here is clever, vectorised or float32.  A batch is rows of tokens; a reference returns the
weight of every token of every row, as the header of the spec file of the same name says.
"""

import math
from dataclasses import dataclass

CAP = 2.0
TEMPERATURE = 0.4
TABLE = {"code": 1.0, "data": 0.5, "docs": 1.5, "tables": 0.5, "tests": 1.0}


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: what the forward pass knows about each, in nested lists."""

    loss: list[list[float]]
    valid: list[list[bool]]
    entropy: list[list[float]]
    domain: list[list[str]]


def sequence_losses(batch):
    """Return the mean loss of the valid tokens of each row; None for a row without any."""
    means = []
    for losses, valid in zip(batch.loss, batch.valid, strict=True):
        kept = [x for x, ok in zip(losses, valid, strict=True) if ok]
        means.append(math.fsum(kept) / len(kept) if kept else None)
    return means


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


def capped(weights, cap=CAP):
    """Return `water_fill` of the weights that are there."""
    filled = iter(water_fill([w for w in weights if w is not None], cap))
    return [None if w is None else next(filled) for w in weights]


def mean_one(weights, valid):
    """Scale token weights to mean one over valid tokens and put 0 at the others."""
    count = sum(ok for row in valid for ok in row)
    total = math.fsum(
        w
        for row, oks in zip(weights, valid, strict=True)
        for w, ok in zip(row, oks, strict=True)
        if ok
    )
    return [
        [(w * count / total if total else 1.0) if ok else 0.0 for w, ok in zip(r, o, strict=True)]
        for r, o in zip(weights, valid, strict=True)
    ]


def by_sequence(batch, weights):
    """Give every token the weight of its row, then scale to mean one over valid tokens."""
    rows = [
        [0.0 if w is None else w for _ in losses]
        for w, losses in zip(weights, batch.loss, strict=True)
    ]
    return mean_one(rows, batch.valid)


def _sequence_shape(batch, shape):
    h = normalized(sequence_losses(batch))
    return softmax([None if x is None else shape(x) for x in h], TEMPERATURE)


def _linupper_sequences(batch):
    return capped(_sequence_shape(batch, lambda h: min(h + 1, 1)))


def uniform(batch):
    """w_t = 1."""
    return [[1.0 if ok else 0.0 for ok in row] for row in batch.valid]


def linupper(batch):
    """W = softmax(min(h + 1, 1) / r), w <= 2/n."""
    return by_sequence(batch, _linupper_sequences(batch))


def quadratic(batch):
    """W = softmax((1 - h^2) / r), w <= 2/n."""
    return by_sequence(batch, capped(_sequence_shape(batch, lambda h: 1 - h * h)))


def extremes(batch):
    """W = softmax(|h| / r), w <= 2/n."""
    return by_sequence(batch, capped(_sequence_shape(batch, abs)))


def prop1(batch):
    """W = min(2/n, s exp(h / r)) with the s that makes the sum one."""
    return by_sequence(batch, capped(_sequence_shape(batch, lambda h: h)))


def dro_kl(batch):
    """W = softmax(l / lambda), lambda = 1."""
    return by_sequence(batch, softmax(sequence_losses(batch), 1.0))


def focal(batch):
    """w_t = (1 - p_t) / mean_t (1 - p_t)."""
    return mean_one([[-math.expm1(-x) for x in row] for row in batch.loss], batch.valid)


def mile(batch):
    """w_t = (1 + H_t) / mean_t (1 + H_t)."""
    return mean_one([[1 + h for h in row] for row in batch.entropy], batch.valid)


def linupper_x_mile(batch):
    """u_t = w_s v_t / mean_t (w_s v_t), w of LinUpper and v of MiLe."""
    sequences = _linupper_sequences(batch)
    rows = [
        [(w or 0.0) * v for v in tokens] for w, tokens in zip(sequences, mile(batch), strict=True)
    ]
    return mean_one(rows, batch.valid)


def table_x_linupper(batch):
    """u_t = a_d w_s / mean_t (a_d w_s), a of the table and w of LinUpper."""
    sequences = _linupper_sequences(batch)
    rows = [
        [(w or 0.0) * TABLE[name] for name in names]
        for w, names in zip(sequences, batch.domain, strict=True)
    ]
    return mean_one(rows, batch.valid)


REFERENCES = {
    "dro-kl": dro_kl,
    "extremes": extremes,
    "focal": focal,
    "linupper": linupper,
    "linupper-x-mile": linupper_x_mile,
    "mile": mile,
    "prop1": prop1,
    "quadratic": quadratic,
    "table-x-linupper": table_x_linupper,
    "uniform": uniform,
}


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

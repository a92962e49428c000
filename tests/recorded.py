"""What a run recorded, step by step, as tests look at it."""

from typing import Any, NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """What `Record` says of the units of one step."""

    step: int
    row: Tensor
    document: Tensor
    documents: Tensor
    domain: Tensor
    tokens: Tensor
    weight: Tensor
    signals: dict[str, Tensor]


def steps_of(record: Any) -> list[Step]:
    """Return the recorded steps, in order."""
    sizes = record.sizes.tolist()
    columns = [getattr(record, name).split(sizes) for name in Step._fields[1:-1]]
    signals = [x.split(sizes) for x in record.signals.values()]
    found = []
    for i, number in enumerate(record.numbers.tolist()):
        own = {name: x[i] for name, x in zip(record.signals, signals, strict=True)}
        found.append(Step(number, *(x[i] for x in columns), own))
    return found

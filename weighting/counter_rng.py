"""Random numbers that are a function of a seed, a counter and an index.

A generator's hidden state could neither be captured in a graph nor be the same on ranks that hold
different parts of a batch; a hash of where the number is used can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def uniform(seed: int, counter: Tensor, number: int) -> Tensor:
    """Return `number` float32 numbers, evenly spread over [0, 1), for one value of a counter.

    Args:
        seed: From 0 below 2**31.
        counter: 0-D int64; another value gives other numbers.
        number: How many.
    """
    index = torch.arange(number, device=counter.device, dtype=torch.int64)
    mixed = _mix(_mix(counter + _mix(torch.full_like(counter, seed))) + index)
    return (mixed >> 8).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    """Return 32 well-mixed bits of each integer, without overflowing 64."""
    mask = 0xFFFFFFFF
    x = (x + 0x9E3779B9) & mask
    for factor, shift in ((0x21F0AAAD, 16), (0x735A2D97, 15)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 15)

"""Which operators run, which make the host wait for a device, and what products are taken."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BY_MASK = "index by mask"
BETWEEN = "between devices: "
WAITS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "bincount"),
    *("is_nonzero", "equal", "repeat_interleave", "histc", BY_MASK),
)
"""Operators whose result the host has to wait for."""


class Census(TorchDispatchMode):
    """Writes down the operators that run."""

    def __init__(self):
        """Begin with none."""
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note and run one."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        masks = (torch.bool, torch.uint8)
        by_mask = isinstance(indices, list | tuple) and any(
            isinstance(x, torch.Tensor) and x.dtype in masks for x in indices
        )
        tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        if len({x.device.type for x in tensors}) > 1:
            name = BETWEEN + name
        self.names.append(BY_MASK if by_mask else name)
        return out

    @property
    def waits(self):
        """Those that wait."""
        begins = ("_unique", "unique", BETWEEN)
        return [x for x in self.names if x in WAITS or x.startswith(begins)]


class Products(TorchDispatchMode):
    """Adds up how many tokens go through products of an output layer."""

    def __init__(self, width, vocabulary):
        """Count no products but those of these two sizes."""
        super().__init__()
        self._layer, self.tokens = {width, vocabulary}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count and run one operator."""
        if func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}:
            sizes = [*args[-2].shape, args[-1].shape[1]]
            if self._layer <= {*sizes}:
                self.tokens += math.prod(sizes) // math.prod(self._layer)
        return func(*args, **(kwargs or {}))

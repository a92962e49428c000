"""Which operators run, and which of them make the host wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BY_MASK = "index by mask"
WAITS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "bincount"),
    *("is_nonzero", "equal", "repeat_interleave", "histc", BY_MASK),
)
"""Operators whose result the host has to wait for, or how they begin."""


class Census(TorchDispatchMode):
    """Writes down the operators that run."""

    def __init__(self):
        """Begin with none."""
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note and run one."""
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        masks = (torch.bool, torch.uint8)
        by_mask = isinstance(indices, list | tuple) and any(
            isinstance(x, torch.Tensor) and x.dtype in masks for x in indices
        )
        self.names.append(BY_MASK if by_mask else name)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        """Those that wait."""
        return [x for x in self.names if x in WAITS or x.startswith(("_unique", "unique"))]

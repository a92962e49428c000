"""Functions compiled where that works, and run as they are where it does not."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that compiles another at its first call; the same one for the same.

    Where there is no compiler, or it cannot do it, a warning says so once and the function runs as
    it is from then on.  Nothing has run by then: it is compiled to one graph or not at all.
    """
    found = torch.compile(function, fullgraph=True)
    works = True

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - what the function takes and returns
        nonlocal works
        if works and not torch.compiler.is_compiling():
            try:
                return found(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:  # noqa: SLF001 - has no other name
                works = False
                first = f"{error}".strip().partition("\n")[0]
                name = getattr(function, "__qualname__", type(function).__qualname__)
                msg = f"{name} runs without being compiled, which takes longer: {first}"
                warnings.warn(msg, stacklevel=2)
        return function(*args, **kwargs)

    return call


def compiles(device: torch.device) -> bool:
    """Tell whether all of the work on a chunk is compiled at once.

    On CPU it is not: blocks stay in the cache, and compiling takes seconds to gain little.
    """
    return device.type != "cpu" and not torch.compiler.is_compiling()

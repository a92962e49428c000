"""Who is shown every weighted batch of a run, such as a recorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Observer(Protocol):
    """Sees batches in tensors that are written in place, and may keep what it saw."""

    @property
    def reads_documents(self) -> bool:
        """Whether it asks which document each token is in."""
        ...

    def begin_step(self, step: int) -> None:
        """Start an optimizer step."""
        ...

    def next_call(self, into: Tensor | None) -> Tensor:
        """Return which call of its step the next one is, 0-D, in the tensor it was in before."""
        ...

    def add(self, number: Tensor, signals: Mapping[str, Tensor], token: Tensor) -> None:
        """See the signals and weights of a call, each [B, L]."""
        ...

    def end_step(self) -> None:
        """End an optimizer step."""
        ...

    def flush(self) -> None:
        """Write what was kept."""
        ...

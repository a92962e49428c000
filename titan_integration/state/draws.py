"""The proportions that the data of a step is drawn in, where they move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weighting.build.domains import proportions
from weighting.saved import shares, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from weighting import Weighting

PROPORTIONS = "proportions"
"""Their entry of a weighting's saved state.  Version 0.1.0 has none."""


@dataclass(eq=False)
class Draws:
    """What is known of the draws, on the device and on its way to the data.

        p_t = proportions(s_(t-2), t),   p_1 = proportions(s_0, 1)

    s_t is the state after step t.  Schedules stand where step t has them; what is remembered
    reaches the data a step late, so that it can be copied while the device works, and no step
    waits for it.  Version 0.1.0 waited, and drew by s_(t-1).

    Attributes:
        fn: The built spec.
        used: What the step at hand is drawn in, [K] float64.
        coming: What the next step is drawn in, [K] float64; 0 until that is known.
        late: Whether these are those of a step before.  Not in a run that 0.1.0 began.
    """

    fn: Weighting
    device: torch.device
    used: Tensor = field(init=False)
    coming: Tensor = field(init=False)
    late: bool = True

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        none = torch.zeros(len(self.fn.domains), dtype=torch.float64)
        self.used, self.coming = none.to(self.device, copy=True), none.to(self.device, copy=True)
        pinned = self.device.type != "cpu"
        self._host = none.pin_memory() if pinned else none
        self._copied = torch.Event(self.device) if pinned else None
        self._known = self._told = False

    def begin_step(
        self, step: Tensor, agreed: Callable[[Tensor], Tensor], tell: Callable[[list[float]], None]
    ) -> None:
        """Begin a step.

        Args:
            step: Its number, 0-D on the device.
            agreed: Makes proportions alike on all ranks.
            tell: Takes the proportions of the next step of which it has none.
        """
        if not (self.late and self._known):
            self._take(agreed(proportions(self.fn, step)))
            self._told = False
        self._tell(tell)
        self.used.copy_(self.coming)
        if self.late:
            self._take(agreed(proportions(self.fn, step + 1)))
            self._told = False
            if self._copied is None:
                self._tell(tell)

    def end_step(self, tell: Callable[[list[float]], None]) -> None:
        """Tell the proportions of the next step, which reached the host while this one ran."""
        if self.late:
            self._tell(tell)

    def load(self, saved: Tensor) -> None:
        """Go on with proportions that were saved.

        Raises:
            ValueError: They can be none.
        """
        if not saved.any():  # saved before the first step
            return
        if must := shares(saved):
            msg = (
                f"the saved state of the weighting cannot be: {PROPORTIONS} is {shown(saved)} and "
                f"must be {must}"
            )
            raise ValueError(msg)
        self._take(saved)

    def _take(self, x: Tensor) -> None:
        self.coming.copy_(x)
        self._host.copy_(self.coming, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._known = True

    def _tell(self, tell: Callable[[list[float]], None]) -> None:
        if self._told:
            return
        if self._copied is not None:
            self._copied.synchronize()
        tell(self._host.tolist())
        self._told = True

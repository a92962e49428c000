"""The calls of the loss that a step is made of: what each brings, and when it is weighed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titan_integration.data.signals import comes_with_batch, missing
from weighting.loss.logits import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from titan_integration.state.observer import Observer
    from weighting import Weighting

WEIGHTS = "weights"
"""Name among the signals of a call whose weights are known before it."""


class When(Enum):
    """When the weights of a call of the loss are made."""

    NOW = "now"
    """In the call itself, or before it."""
    DEFERRED = "deferred"
    """After the forward passes of all calls of its batch, before their backward passes."""
    LOOKAHEAD = "lookahead"
    """In forward passes over the whole step without gradient, which come before the others."""


@dataclass(eq=False)
class Microbatch:
    """What one call of the loss is about.

    Attributes:
        given: Signals that came with the batch, by name, [B, L].
        found: All of its signals, once the loss has taken them.
        token: Its weights, [B, L], where they are known before the call or come with others'.
        number: Which call of its step it is, 0-D, where somebody observes it.
        when: NOW where its weights are made in the call or known, DEFERRED where its signals are
            noted until those of all its batch are, LOOKAHEAD where it is noted and not trained on.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)
    token: Tensor | None = None
    number: Tensor | None = None
    when: When = When.NOW

    def known(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the signals that predictions do not tell, [B, L]; weights if they are known."""
        weights = {} if self.token is None else {WEIGHTS: self.token}
        return {**self.given, **weights, "valid": labels != IGNORE_INDEX}


class Microbatches:
    """The calls of a step.

    Most batches are one call of the loss, whose weights are made in it.  A pipeline calls it for
    each of its microbatches, and a scope may take in all of a step: then their signals are noted
    until all are there, and weighed together.

    Attributes:
        when: When the weights of this run are made.
        calls: How many calls of the loss make up a batch of a pipeline.
    """

    def __init__(
        self, fn: Weighting, when: When, calls: int, observer: Observer | None, device: torch.device
    ) -> None:
        self.when, self.calls = when, calls
        self._device, self._observer = device, observer
        self._required = {name for name in fn.needs if comes_with_batch(name)}
        self._reported = {"segment_ids", "domain_ids"} if fn.domains else {"segment_ids"}
        self._looking_ahead = False
        self._current = Microbatch()
        self._by_labels: dict[int, tuple[Tensor, Microbatch]] = {}
        self._noted: list[Microbatch] = []
        self._weighed: list[Tensor] = []

    def set_batch(self, given: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        """Take what the weighting reads of the next call and the loss cannot find, each [B, L].

        Args:
            given: Signals by name, columns as "columns.name"; those it does not read are left.
            labels: What the loss will be called with, where several calls are prepared at once;
                without it the next call is meant, and tensors stay where they are.

        Raises:
            ValueError: One that it reads is missing.
        """
        call = self._current if labels is None else Microbatch()
        for name in sorted(self._required | (self._reported & given.keys())):
            if name not in given:
                raise ValueError(missing(name))
            call.given[name] = _copied(given[name].to(self._device), call.given.get(name))
        if self._looking_ahead:
            call.when = When.LOOKAHEAD
        elif self._weighed:
            call.when, call.token = When.NOW, _copied(self._weighed.pop(0), call.token)
        else:
            call.when = When.DEFERRED if self.when is When.DEFERRED else When.NOW
        if self._observer is not None:
            call.number = self._observer.next_call(call.number)
        if labels is not None:
            self._by_labels[id(labels)] = labels, call

    def of(self, labels: Tensor) -> Microbatch | None:
        """Return what a call of the loss with these labels is about, or None if it is a rehearsal.

        A pipeline calls the loss once on stand-ins, to learn shapes.
        """
        if not self._by_labels:
            return self._current
        _, call = self._by_labels.get(id(labels), (None, None))
        return call

    def note(self, call: Microbatch, found: Mapping[str, Tensor]) -> None:
        """Keep the signals of a call until its batch is complete."""
        self._noted.append(Microbatch() if self._looking_ahead else call)
        # Copies: what came with this batch will be overwritten by the next one.
        self._noted[-1].found = {n: x.clone() for n, x in found.items() if n != WEIGHTS}

    def noted(self) -> dict[str, Tensor]:
        """Return the signals of all calls that were noted, as those of one batch."""
        calls = self._noted
        return {name: torch.cat([call.found[name] for call in calls]) for name in calls[0].found}

    def weigh_noted(self, token: Tensor) -> None:
        """Give each call that was noted its part of their weights."""
        parts = token.chunk(len(self._noted))
        for call, own in zip(self._noted, parts, strict=True):
            call.token = own
        if self._looking_ahead:
            self._weighed = [*parts]

    def forget(self) -> None:
        """Forget the calls that were prepared, and those that were noted."""
        self.forget_prepared()
        self._noted.clear()

    def forget_prepared(self) -> None:
        """Forget the calls that were prepared; those that were noted stay."""
        self._by_labels.clear()

    def begin_step(self) -> None:
        """Forget the weights of a step that was looked at ahead."""
        self._weighed.clear()

    @contextlib.contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Take the calls that follow for those of the look ahead."""
        self.forget()
        self._looking_ahead = True
        try:
            yield
        finally:
            self._looking_ahead = False
            self.forget()


def _copied(x: Tensor, into: Tensor | None) -> Tensor:
    """Return x in the tensor it was in before, which a captured graph may be reading."""
    return x.clone() if into is None else into.copy_(x)

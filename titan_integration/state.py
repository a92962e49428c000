"""What a run keeps between steps, in tensors that are written in place and never replaced.

The host captures forward, loss and backward in a CUDA graph: the Python of the loss runs twice and
never again.  So the step, what the batch brings along, the state of the stages and the statistics
all live in tensors at fixed addresses; the trainer fills them before a step and reads them when it
logs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import override

from weighting.build import MOMENTS, raise_if_nonfinite, summarize
from weighting.contract import Alone, Collectives, Signals
from weighting.levels import documents
from weighting.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weighting import Weighting, Weights

_ADDED = MOMENTS.index("min")
"""Columns of the moments before this one add up; from here on they are a minimum, a maximum."""


_COLUMN = "columns."
_FROM_LOGITS = re.compile(r"columns\.topk_entropy_[1-9]\d*")
"""Columns that the loss finds in the logits it has at hand."""
_SHORT_LOSS = re.compile(r"columns\.short_loss_([1-9]\d*)")
"""Columns that are the model's own loss on a short context."""


def short_contexts(needs: frozenset[str]) -> dict[str, int]:
    """Return the signals that are losses on a short context, with the most tokens of it."""
    found = ((name, _SHORT_LOSS.fullmatch(name)) for name in sorted(needs))
    return {name: int(match[1]) for name, match in found if match}


def data_columns(needs: frozenset[str]) -> list[str]:
    """Return the columns that can come from nowhere but the data, by their names there."""
    computed = [*short_contexts(needs), *filter(_FROM_LOGITS.fullmatch, needs)]
    columns = {name for name in needs if name.startswith(_COLUMN)}
    return sorted(name.removeprefix(_COLUMN) for name in columns.difference(computed))


class RunState(Stateful):
    """A built weighting with its step, the batch's signals, and statistics of the current step.

    Attributes:
        fn: The built spec.
        step: Optimizer step, 0-D int64 on the device.
    """

    def __init__(self, fn: Weighting, device: torch.device, *, allow_changed_spec: bool) -> None:
        self.fn = fn.to(device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._weigh: Callable[[Signals, Tensor], Weights] = self.fn
        self._allow_changed_spec = allow_changed_spec
        self._batch: dict[str, Tensor] = {}
        rows = len(fn.plans) + 1
        self._empty = torch.zeros(rows, len(MOMENTS), device=device)
        self._empty[:, _ADDED], self._empty[:, _ADDED + 1] = torch.inf, -torch.inf
        self._moments = self._empty.clone()
        self._cross_entropy = torch.zeros((), device=device)
        self._nonfinite = torch.zeros((), device=device)

    def compile(self, backend: str) -> None:
        """Run the weighting as one compiled graph from now on."""
        self._weigh = torch.compile(self.fn, fullgraph=True, dynamic=False, backend=backend)

    def begin_step(self, step: int) -> None:
        """Set the optimizer step and forget the statistics of the last one."""
        self.step.fill_(step)
        self._moments.copy_(self._empty)
        self._cross_entropy.zero_()

    def set_batch(self, given: Mapping[str, Tensor]) -> None:
        """Take what the weighting reads of the next batch and the loss cannot find, each [B, L].

        Args:
            given: Signals by name, columns as "columns.name"; those it does not read are left.

        Raises:
            ValueError: One that it reads is missing.
        """
        for name in sorted(self.fn.needs):
            if name not in {"domain_ids", "ref_loss"} and not name.startswith(_COLUMN):
                continue
            if _FROM_LOGITS.fullmatch(name):
                continue
            if name not in given:
                raise ValueError(_missing(name))
            if name not in self._batch:
                self._batch[name] = torch.zeros_like(given[name], device=self.step.device)
            self._batch[name].copy_(given[name])

    def weigh(self, labels: Tensor, positions: Tensor | None, found: dict[str, Tensor]) -> Weights:
        """Return the weights of a batch and add to the statistics of the step.

        Args:
            labels: [B, L].
            positions: [B, L], 0 where a document starts; one document per row when None.
            found: `loss` in nats and the other signals the weighting needs and the batch did not
                bring, each [B, L].
        """
        needs = self.fn.needs
        segment_ids = None
        if "segment_ids" in needs:
            segment_ids = torch.zeros_like(labels) if positions is None else documents(positions)
        known = {**self._batch, **found}
        columns = {name: known.pop(name) for name in list(known) if name.startswith(_COLUMN)}
        signals = Signals(
            valid=labels != IGNORE_INDEX,
            segment_ids=segment_ids,
            columns={name.removeprefix(_COLUMN): value for name, value in columns.items()},
            **known,
        )
        out = self._weigh(signals, self.step)
        self._moments[:, :_ADDED] += out.moments[:, :_ADDED]
        low, high = out.moments[:, _ADDED:].unbind(1)
        self._moments[:, _ADDED].copy_(torch.minimum(self._moments[:, _ADDED], low))
        self._moments[:, _ADDED + 1].copy_(torch.maximum(self._moments[:, _ADDED + 1], high))
        self._nonfinite += out.moments[-1, MOMENTS.index("nonfinite")]
        return out

    def add_cross_entropy(self, share: Tensor) -> None:
        """Add a batch's share of the step's unweighted mean cross entropy, nats."""
        self._cross_entropy += share.detach()

    def statistics(self, collectives: Collectives | None = None) -> dict[str, float]:
        """Return the step's statistics over all ranks, and forget the non-finite count.

        Every rank must call it.  `unweighted_loss` is in nats; the others are those of
        `weighting.build.summarize`.

        Raises:
            NonFiniteSignalError: A signal was not finite since the last call and the spec says
                `on_nonfinite: error`.
        """
        ranks = collectives or Alone()
        totals = torch.cat(
            [
                self._moments[:, :_ADDED].flatten(),
                torch.stack([self._cross_entropy, self._nonfinite]),
            ]
        )
        added = ranks.sum(totals)
        low, high = self._moments[:, _ADDED:].unbind(1)
        lowest, highest = ranks.max(torch.stack([-low, high]))
        moments = torch.cat(
            [added[:-2].view(len(self._moments), _ADDED), -lowest[:, None], highest[:, None]], dim=1
        )
        self._nonfinite.zero_()
        raise_if_nonfinite(self.fn.spec, int(added[-1]))
        metrics = {
            name: value.item() for name, value in summarize(moments, [*self.fn.plans]).items()
        }
        return {"unweighted_loss": added[-2].item(), **metrics}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stages, and the spec they belong to."""
        return {"spec_hash": self.fn.spec.hash, "spec": str(self.fn.spec), **self.fn.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the stages.

        Raises:
            ValueError: The state belongs to another spec and that was not allowed.
        """
        state = dict(state_dict)
        saved_hash, saved = state.pop("spec_hash"), state.pop("spec")
        if saved_hash != self.fn.spec.hash:
            if not self._allow_changed_spec:
                msg = (
                    "the checkpoint was trained with another weighting spec.\n"
                    f"--- in the checkpoint\n{saved}--- now\n{self.fn.spec}"
                    "Resume with the old one, or pass --weighting.allow_changed_spec to go on with "
                    "the new one from fresh state."
                )
                raise ValueError(msg)
            return
        self.fn.load_state_dict(state)


def _missing(name: str) -> str:
    """Say that a signal should have come with the batch, and how it could."""
    if name == "domain_ids":
        reads, key = "weighs by domain", name
    elif name == "ref_loss":
        reads, key = "reads ref_loss", f"{_COLUMN}{name}"
    else:
        reads, key = f"reads {name}", name
    model = ", or give a model: --weighting.reference CHECKPOINT" if name == "ref_loss" else ""
    return (
        f"the spec {reads}, but the data loader yields no {key!r}; use "
        f"titan_integration.data.DomainTextDataLoader, or yield them beside 'input'{model}"
    )

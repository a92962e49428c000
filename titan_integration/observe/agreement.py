"""Whether ranks still weigh as one: the same spec, step, state and data, each its own sequences.

Ranks that drift apart train on silently: another file on another node, a state restored on some of
them, a local rank taken for a rank.  The check takes one gather of a few numbers, one sum of two,
and a wait for the device, so it is made every so many steps, and once as a run starts.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from weighting.build.statistics import MOMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from weighting import Weighting
    from weighting.contract import Collectives

FACTS = ("spec", "step", "state", "data set")
"""What must be alike on all ranks."""
_ADDED = [MOMENTS.index(name) for name in ("count", "nonfinite", "sum")]
_SLACK = 1e-3
"""Relative; sums of float32 weights over very many tokens stay well below."""


class DisagreementError(RuntimeError):
    """Ranks have drifted apart; says which of them, and in what."""


def check_agreement(
    fn: Weighting,
    step: Tensor,
    ranks: Collectives,
    moments: Tensor | None = None,
    data: str = "",
) -> None:
    """Check that all ranks weigh as one; every rank must call it, and all raise if one differs.

        sum over ranks of token weights = number of valid tokens, where mean one is promised

    Args:
        fn: What weighs.
        step: The optimizer step, 0-D, where the ranks' tensors are.
        ranks: Reaches the ranks whose tokens count together.
        moments: The step's, of this rank's tokens, as `Weights.moments`; None before a step.
        data: What this rank's rows are made from, in any words.

    Raises:
        DisagreementError: They do not.
    """
    spec, read = (_digest(text.encode()) for text in (fn.spec.hash, data))
    facts = [_me(), spec, int(step), _of_state(fn), read]
    mine = torch.tensor(facts, dtype=torch.int64, device=step.device)
    found = ranks.gather(mine).tolist()
    for name, *its in found:
        differing = [x for x, a, b in zip(FACTS, its, found[0][1:], strict=True) if a != b]
        if differing:
            msg = (
                f"step {step}: rank {name} has another {' and another '.join(differing)} than "
                f"rank {found[0][0]}; start all ranks with the same files and from one checkpoint"
            )
            raise DisagreementError(msg)
    wrong = found[ranks.rank][0] != facts[0]
    if int(ranks.max(torch.tensor(float(wrong), device=mine.device))):
        msg = (
            f"step {step}: a rank takes another one's place among {len(found)}, and so other "
            "sequences' weights for its own; its place is its rank in the group that gathers, "
            "never a local rank"
        )
        raise DisagreementError(msg)
    if moments is None or fn.spec.normalize == "none" or fn.spec.scope == "running":
        return
    finite, others, total = ranks.sum(moments[-1, _ADDED].double()).tolist()
    count = finite + others
    if total and abs(total - count) > _SLACK * count:
        msg = (
            f"step {step}: the weights of {count:.0f} tokens on {len(found)} ranks add up to "
            f"{total:.6g}, not to their number; ranks weigh by different statistics"
        )
        raise DisagreementError(msg)


def _me() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _of_state(fn: Weighting) -> int:
    """Return a number that tells states apart."""
    digest = hashlib.sha256()
    for name, value in sorted(fn.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return _number(digest.digest())


def _digest(data: bytes) -> int:
    return _number(hashlib.sha256(data).digest())


def _number(digest: bytes) -> int:
    """Return the beginning of a digest as an int64."""
    return int.from_bytes(digest[:8], "big", signed=True)

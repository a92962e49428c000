"""How a batch goes through the output layer: what is kept, in which chunks, and what that costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from weighting.build import Plan
    from weighting.contract import Collectives

Memory = Literal["auto", "late", "keep", "recompute", "full"]
CHUNKS = 8
"""Chunks a batch is cut into where nothing else is asked."""
MIN_CHUNK, MAX_CHUNK = 512, 2048
"""Tokens in a chunk, if there are as many: with fewer, adding each chunk's part to the gradient of
the layer takes as long as making it; products are no faster with more."""


class Sizes(NamedTuple):
    """How large the output layer's work is on this rank.

    Attributes:
        tokens: Tokens of the batch.
        rows: Sequences of the batch, if each is a row; 0 where ids tell them.
        domains: How many domains the rows may be of, each row of one; 0 where it may be of more.
        vocabulary: Rows of the weight.
        width: Columns of the weight.
        itemsize: Bytes of an element of the weight.
        budget: Bytes that may be spent beside one chunk of logits in any case; see `path_of`.
    """

    tokens: int
    rows: int
    vocabulary: int
    width: int
    itemsize: int
    budget: int
    domains: int = 0

    @property
    def row_of_logits(self) -> int:
        """Bytes of the logits of a token."""
        return self.vocabulary * self.itemsize

    @classmethod
    def of(cls, labels: Tensor, weight: Tensor, domains: int = 0) -> Sizes:
        """Return the sizes for labels [B, L] or [T] and a weight [V, D]."""
        rows = labels.shape[0] if labels.dim() > 1 else 0
        vocabulary, width = weight.shape
        item = weight.element_size()
        most = budget(weight.device)
        return cls(labels.numel(), rows, vocabulary, width, item, most, domains)


SHARE = 16
"""Of an accelerator's memory, the part that may be spent is one in so many."""


def budget(device: torch.device) -> int:
    """Return a sixteenth of an accelerator's memory, or 1 GiB of a CPU's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // SHARE
    return 2**30


class Path(NamedTuple):
    """How a batch goes through the output layer.

    Attributes:
        memory: late, keep or recompute.
        units: How many late units there are; they share the tokens evenly.
        chunk: Tokens in a chunk, at most.
        most: How many tokens can weigh more than 0; all of them when None.
        extra: Bytes beside one chunk of logits and the gradients themselves.
        by_domain: How many rows there are, where late units are the domains of rows; 0 otherwise.
    """

    memory: Literal["late", "keep", "recompute"]
    units: int
    chunk: int
    most: int | None
    extra: int
    by_domain: int = 0

    def __str__(self) -> str:
        """Say what is done, and what it costs."""
        if self.memory == "late":
            kept = "nothing kept" if self.extra == 0 else "a gradient of the output layer a call"
            what = f"one pass, {kept}"
            if self.units > 1:
                by = ", one for each domain" if self.by_domain else ""
                what = f"one pass, {self.units} gradients of the output layer{by}"
        elif self.memory == "keep":
            what = "logits kept until the weights are known"
        else:
            what = "logits computed twice"
        if self.most is not None:
            what += f"; gradients of at most {self.most} tokens"
        return f"{self.memory} ({what}; {self.extra / 2**20:.1f} MiB beside a chunk)"


def path_of(
    plan: Plan,
    sizes: Sizes,
    memory: Memory = "auto",
    *,
    chunks: int = CHUNKS,
    parts: int = 1,
    collectives: Collectives | None = None,
) -> Path:
    """Return the way through the output layer for a spec, given the sizes of a call.

        late       3 matrix products; a gradient of the layer for each further sequence, or for
                   each domain, if these are fewer and each sequence is of one, and no shorter
                   than the layer is wide
        keep       3 matrix products; the gradients of all logits, in the dtype of the weight
        recompute  4 matrix products; nothing more

    Where sequences are so short that their gradients take more than all logits, `late` is `keep`.
    The last two skip the gradient of tokens that a selection drops.  `auto` takes the one of the
    first two that needs less memory, `keep` where that is the same, if it is within the budget, and
    recompute otherwise.
    The budget is what an unweighted loss of as many chunks would take, if that is more than
    `sizes.budget`.  Where weights wait for `parts` calls, what each keeps is there at once, and
    counted.

    Raises:
        ValueError: `late` is asked for, but the weights come late for every token.
    """
    late, units, by_domain = plan.deferred_level, 1, 0
    needs_domains = late in {"domain", "sequence of a domain"}
    if late is not None and (not sizes.rows or (needs_domains and not sizes.domains)):
        late = "token"
    if late == "domain":
        # Shorter ones take longer to add to a gradient found on the device than a product takes.
        long = sizes.tokens >= sizes.rows * sizes.width
        by_domain = sizes.rows if long and 1 < sizes.domains < sizes.rows - 1 else 0
        units = sizes.domains if by_domain or sizes.domains == 1 else sizes.rows
    elif late is not None:
        units = sizes.rows
    chunk = chunk_of(sizes.tokens, chunks)
    logits = parts * sizes.tokens * sizes.row_of_logits
    extra = {
        "late": ((units + bool(by_domain)) * parts - 1) * sizes.width * sizes.row_of_logits,
        "keep": logits - chunk * sizes.row_of_logits,
        "recompute": 0,
    }
    least = "keep" if extra["keep"] <= extra["late"] > 0 else "late"
    if late == "token":
        least = "keep"
        del extra["late"]
        if memory == "late":
            rows = " where rows mix domains" if needs_domains and not sizes.domains else ""
            msg = (
                f"{plan.spec.name} weighs every token late{rows}; "
                "use memory auto, keep or recompute"
            )
            raise ValueError(msg)
    taken = memory
    if memory == "auto":
        allowed = max(sizes.budget, _plain_bytes(sizes, chunks) - chunk * sizes.row_of_logits)
        taken = least if extra[least] <= allowed else "recompute"
    elif memory == "late" and extra["late"] > logits:
        taken = "keep"
    assert taken in extra, "full logits take no path"
    share = plan.max_active_fraction(collectives)
    most = None
    if taken != "late" and share < 1 and sizes.rows:
        most = min(sizes.tokens, math.ceil(share * sizes.tokens * parts) + sizes.rows * parts)
    if taken != "late":
        units, by_domain = 1, 0
    return Path(taken, units, chunk, most, extra[taken], by_domain)


def chunk_of(tokens: int, chunks: int) -> int:
    """Return how many tokens a chunk has at most, of a batch cut into `chunks` of a good size."""
    return max(1, min(max(-(-tokens // chunks), MIN_CHUNK), MAX_CHUNK, tokens))


def _plain_bytes(sizes: Sizes, chunks: int) -> int:
    """Return what a chunk takes in the cross entropy of torch and torchtitan.

    Beside logits of 16 bits there is a copy in float32; then log probabilities and their gradient.
    """
    copies = 12 if sizes.itemsize == 4 else 12 + sizes.itemsize  # noqa: PLR2004 - float32
    return -(-sizes.tokens // chunks) * sizes.vocabulary * copies


LLAMA3_8B = Sizes(
    tokens=8192, rows=1, vocabulary=128256, width=4096, itemsize=2, budget=80 * 10**9 // SHARE
)
"""The output layer of Llama 3 8B for one sequence, in bfloat16 on a device of 80 GB."""


def matrix_products(memory: str, active_fraction: float = 1.0) -> float:
    """Return how many products of the output layer's size a path takes; an unweighted loss takes 3.

    Args:
        memory: late, keep or recompute.
        active_fraction: Share of the tokens that may weigh more than 0.
    """
    further = {"late": 2.0, "keep": 2 * active_fraction, "recompute": 3 * active_fraction}
    return 1 + further[memory]

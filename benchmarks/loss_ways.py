"""The ways from hidden states to gradients that loss_path.py compares, and the batch they share."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor
from typing_extensions import override

import weighting as wt
from weighting.language.read import resolve
from weighting.loss.path import CHUNKS, Memory, Sizes, path_of

IGNORED = -100
STOCK = "torchtitan chunked"
CCE = "CCE compiled, given weights"
FLOOR = "the three products alone"
BEFORE = "before: "
"""What the names of another version's rows begin with."""
MODES = ("late", "keep", "recompute", "full")
SPECS = {
    "uniform": "uniform",
    "linupper": "linupper",
    "mile": "mile",
    "linupper-x-mile": "linupper-x-mile",
    "rho-1": "rho-1",
    "given": "version: 1\nnormalize: none\npipeline: column(w) -> as_is\n",
}
"""Specs by the name of their rows; `given` takes the weights of a data column as they are."""


class Setting(NamedTuple):
    """What is run: sizes, dtype and device by name, how many rounds."""

    tokens: int
    sequences: int
    width: int
    vocabulary: int
    dtype: str
    device: str
    rounds: int


class Batch(NamedTuple):
    """Inputs of the loss part.

    Attributes:
        hidden: [B, L, D].
        weight: [V, D].
        labels: [B, L], -100 for every sixteenth token and the end of the last sequence.
        given: [B, L] weights that differ, the first of them 0.
        ref_loss: [B, L], losses of a reference, nats.
        count: 0-D; how many labels are valid.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    given: Tensor
    ref_loss: Tensor
    count: Tensor


class Variant(NamedTuple):
    """One way to the gradients.

    Attributes:
        name: Of its row.
        way: From a batch, hidden states and weight, both leaves, to the loss and token weights.
        note: Said beside the name.
    """

    name: str
    way: Callable[[Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
    note: str = ""


def variants(batch: Batch) -> list[Variant]:
    """Return all ways there are on the device of a batch, torchtitan's first."""
    anew = "" if importlib.util.find_spec("torchtitan") else "; not installed, written anew"
    found = [Variant(STOCK, stock, f"unweighted{anew}")]
    sizes = Sizes.of(batch.labels, batch.weight)
    for spec in SPECS:
        taken = path_of(built(spec, batch.hidden.device).plan, sizes).memory
        for memory in MODES:
            way = functools.partial(ours, spec=spec, memory=memory)
            found.append(Variant(f"{spec} {memory}", way, "auto" if memory == taken else ""))
    found += [
        Variant("full logits", whole, "eager, unweighted"),
        Variant("full logits, MiLe", published_mile, "as its authors compute it"),
    ]
    size = batch.labels.numel() // CHUNKS
    for name, rows in (("torch", None), (f"torch, chunks of {size}", size)):
        for weighted in (False, True):
            kind = "given weights" if weighted else "unweighted"
            way = functools.partial(torchs, weighted=weighted, rows=rows)
            found.append(Variant(f"{name}, {kind}", way, "linear_cross_entropy"))
    compiled = functools.partial(cut, filtered=None, how="torch_compile")
    found.append(Variant(CCE, compiled, "logits are kept"))
    found += [
        Variant("Liger, unweighted", functools.partial(ligers, weighted=False)),
        Variant("Liger, given weights", functools.partial(ligers, weighted=True)),
        Variant("Liger scaled, given weights", functools.partial(ligers_scaled, mile=False)),
        Variant("Liger scaled, MiLe", functools.partial(ligers_scaled, mile=True)),
    ]
    if batch.hidden.is_cuda:
        found += [
            Variant("CCE exact, given weights", functools.partial(cut, filtered=None)),
            Variant("CCE default, given weights", functools.partial(cut, filtered="high")),
        ]
    return found


def with_other(candidates: list[Variant], package: Path) -> list[Variant]:
    """Return the ways with those of ours as another version has them, "before: " in their names.

    Args:
        candidates: The ways.
        package: Folder in which the other version's `weighting` is.
    """
    mine = _taken_out()
    sys.path.insert(0, str(package))
    try:
        other = importlib.import_module("weighting")
        assert str(other.__file__).startswith(str(package)), other.__file__
        theirs = {}
        for spec, text in SPECS.items():
            read = other.loads if "\n" in text else other.load
            theirs[spec] = other.build(read(text))
    finally:
        sys.path.pop(0)
        _taken_out()
        sys.modules.update(mine)
    found = []
    for variant in candidates:
        found.append(variant)
        spec, _, memory = variant.name.rpartition(" ")
        if spec in SPECS and memory in MODES:
            way = functools.partial(ours, spec=spec, memory=memory, module=other, fn=theirs[spec])
            found.append(Variant(f"{BEFORE}{variant.name}", way))
    return found


def _taken_out() -> dict[str, Any]:
    """Take the modules of `weighting` out of those that are imported, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "weighting"]
    return {name: sys.modules.pop(name) for name in names}


def batch_of(setting: Setting) -> Batch:
    """Return the inputs: sequences and tokens that the weights predict better or worse."""
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    g = torch.Generator(device).manual_seed(0)
    rows, length = setting.sequences, setting.tokens // setting.sequences
    draw = functools.partial(torch.rand, generator=g, device=device)
    weight = torch.empty(setting.vocabulary, setting.width, device=device, dtype=dtype)
    weight.normal_(generator=g).mul_(setting.width**-0.5)
    labels = torch.randint(setting.vocabulary, (rows, length), generator=g, device=device)
    ease = 10 * draw(rows, 1) * draw(rows, length)
    hidden = torch.empty(rows, length, setting.width, device=device, dtype=dtype)
    hidden.normal_(generator=g).add_(ease[:, :, None] * weight[labels])
    labels.view(-1)[15::16] = IGNORED
    labels[-1, -length // 8 :] = IGNORED
    given = 2 * draw(rows, length)
    given[0, 0] = 0
    return Batch(hidden, weight, labels, given, 10 - ease + draw(rows, length), _valid(labels))


def _valid(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def stock(batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Torchtitan's own chunked cross entropy; where it is not installed, the same written anew."""
    ones = torch.ones_like(batch.given)
    if not importlib.util.find_spec("torchtitan"):
        return Chunked.apply(hidden, weight, batch), ones
    from torchtitan.components.loss import ChunkedLossWrapper  # noqa: PLC0415 - may be missing

    chunked = ChunkedLossWrapper(ChunkedLossWrapper.Config(num_chunks=CHUNKS))
    chunked.lm_head = functools.partial(F.linear, weight=weight)
    return chunked(hidden, batch.labels, batch.count)[0], ones


class Chunked(torch.autograd.Function):
    """Cross entropy chunk by chunk, each with a backward of its own, as torchtitan has it."""

    @staticmethod
    @override
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        """Make the gradients; that of the weight adds up where autograd keeps it."""
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden, dtype=torch.float32)
        chunks = (x.chunk(CHUNKS, 1) for x in (hidden, batch.labels, gradient))
        for chunk, labels, into in zip(*chunks, strict=True):
            leaf = chunk.detach().contiguous().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(leaf, weight).flatten(0, 1).float()
                nll = F.cross_entropy(
                    logits, labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                loss = nll / batch.count
            loss.backward()
            total += loss.detach()
            into.copy_(leaf.grad)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return total

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Hand out the gradient of hidden states."""
        return ctx.saved_tensors[0] * grads[0], None, None


def ours(
    batch: Batch,
    hidden: Tensor,
    weight: Tensor,
    *,
    spec: str,
    memory: Memory,
    module: ModuleType = wt,
    fn: wt.Weighting | None = None,
) -> tuple[Tensor, Tensor]:
    """`wt.linear_weighted_cross_entropy`; `full` is `wt.weighted_cross_entropy` of the logits."""
    loss, out = module.linear_weighted_cross_entropy(
        hidden,
        weight,
        batch.labels,
        fn or built(spec, hidden.device),
        ref_loss=batch.ref_loss,
        columns={"w": batch.given},
        memory=memory,
    )
    return loss, out.token


@functools.cache
def built(spec: str, device: torch.device) -> wt.Weighting:
    """Return a built spec; none of those here remembers anything."""
    return wt.build(resolve(SPECS[spec])).to(device)


def products_alone(batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The products of logits, of hidden states' gradient and of the weight's, and nothing else."""
    rows, head = hidden.detach().flatten(0, 1), weight.detach()
    of_hidden, of_weight = torch.empty_like(rows), torch.zeros_like(head)
    size = -(-len(rows) // CHUNKS)
    room = rows.new_empty(size, len(head))
    for x, into in zip(rows.split(size), of_hidden.split(size), strict=True):
        logits = torch.mm(x, head.t(), out=room[: len(x)])
        torch.mm(logits, head, out=into)
        of_weight.addmm_(logits.t(), x)
    return torch.zeros((), requires_grad=True), batch.given


def whole(batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of full logits, as everybody writes it."""
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    labels = batch.labels.flatten()
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return nll / batch.count, torch.ones_like(batch.given)


def published_mile(batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MiLe loss as its authors compute it: probabilities of all words, clamped, and their logs."""
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    labels = batch.labels.flatten()
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        p = logits.softmax(-1).clamp(1e-8, 1)
        score = 1 - (p * p.log()).sum(-1)
        token = score / score.mean()
    # Their means count ignored tokens; the last factor makes them sums over the number of others.
    return (token * nll).mean(), (token * batch.count / len(token)).view_as(batch.given)


def torchs(
    batch: Batch, hidden: Tensor, weight: Tensor, *, weighted: bool, rows: int | None
) -> tuple[Tensor, Tensor]:
    """Torch's chunked `linear_cross_entropy`, by default or in chunks of some rows."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        msg = f"torch {torch.__version__} has no chunked linear_cross_entropy"
        raise NotImplementedError(msg)
    options = torch.nn.LinearCrossEntropyOptions()
    if rows is not None:
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    loss = functools.partial(
        F.linear_cross_entropy, hidden.flatten(0, 1), weight, batch.labels.flatten()
    )
    if weighted:
        nll = loss(options=options, reduction="none")
        return (batch.given.flatten() * nll).sum() / batch.count, batch.given
    return loss(options=options, reduction="sum") / batch.count, torch.ones_like(batch.given)


def ligers(
    batch: Batch, hidden: Tensor, weight: Tensor, *, weighted: bool
) -> tuple[Tensor, Tensor]:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # noqa: PLC0415
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none" if weighted else "sum")
    nll = loss(weight, hidden.flatten(0, 1), batch.labels.flatten())
    if weighted:
        return (batch.given.flatten() * nll).sum() / batch.count, batch.given
    return nll / batch.count, torch.ones_like(batch.given)


def ligers_scaled(
    batch: Batch, hidden: Tensor, weight: Tensor, *, mile: bool
) -> tuple[Tensor, Tensor]:
    """Liger's fused scaled cross entropy: losses of tokens, and their entropy for MiLe weights."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # noqa: PLC0415
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    labels = batch.labels.flatten()
    scaled = functools.partial(
        LigerFusedLinearScaledCrossEntropyFunction.apply,
        *(hidden.flatten(0, 1), weight, labels, 1.0, IGNORED, 1),
    )
    if not mile:
        return (batch.given.flatten() * scaled(False)).sum() / batch.count, batch.given
    nll, entropy = scaled(True)
    score = torch.where(labels == IGNORED, 0, 1 + entropy.detach())
    token = score * batch.count / score.sum()
    return (token * nll).sum() / batch.count, token.view_as(batch.given)


def cut(
    batch: Batch, hidden: Tensor, weight: Tensor, *, filtered: str | None, how: str = "cce"
) -> tuple[Tensor, Tensor]:
    """Apple's cut cross entropy, exact or with small gradients left out, which is its default."""
    from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415

    labels = batch.labels.flatten()
    nll = linear_cross_entropy(
        hidden.flatten(0, 1), weight, labels, reduction="none", filter_eps=filtered, impl=how
    )
    return (batch.given.flatten() * nll).sum() / batch.count, batch.given

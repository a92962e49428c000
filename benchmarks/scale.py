"""What a weighting costs at scale, on paper: writes scale.md beside this file.

    python benchmarks/scale.py

Nothing is run at scale.  Models are torchtitan's, ways through the output layer are what `path_of`
answers, and collectives are counted by weighing a small batch on ranks that only count.  What can
be checked against `loss_path.md` is.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchtitan.models.llama3 import llama3_configs

import weighting as wt
from weighting.build import Weighting, plan_of
from weighting.contract import Alone
from weighting.language.read import resolve
from weighting.loss.logits import Slice, statistics
from weighting.loss.path import (
    CHUNKS,
    MAX_CHUNK,
    MIN_CHUNK,
    SHARE,
    Memory,
    Sizes,
    chunk_of,
    path_of,
)
from weighting.loss.path import Path as Way
from weighting.testing.batches import batch

FOLDER = Path(__file__).resolve().parent
MEASURED = FOLDER / "loss_path.md"

# Settings and assumptions; the page states them all.

LENGTH = 8192
"""Tokens of a sequence."""
GPUS = (8, 64, 512, 4096, 16384)
DEVICE = 80 * 10**9
"""Bytes of a GPU."""
BF16, FP32 = 2, 4
"""Bytes of an element."""
STATE = 4 * FP32
"""Bytes of a parameter that trains: itself, its gradient, Adam's two moments."""
MOST_SHARDS = 128
"""Data-parallel ranks over which parameters are cut; further ones hold copies (HSDP)."""
CALL, HOP, BANDWIDTH = 20e-6, 5e-6, 50e9
"""Seconds to start a collective, seconds for each doubling of its ranks, bytes a second."""
PEAK, UTILISATION = 989e12, 0.4
"""FLOPs a second of an H100 in bfloat16, and the part of them that training reaches."""
PUBLISHED = {8: 6667, 128: 6514}
"""Tokens a second of each of so many H100, Llama 3.1 8B, FSDP and torch.compile: torchtitan's
benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3."""
DOMAINS = 7
"""As many as SlimPajama has."""
TOLERANCE = 0.15
"""A prediction that is further off than this part of what was measured is explained."""


class Model(NamedTuple):
    """A Llama: layers, width D, width of the feed-forward, heads, their keys, vocabulary V."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """All of them; embedding and output layer count once where they are tied."""
        keys = self.width // self.heads * self.keys
        attention = 2 * self.width * (self.width + keys)
        block = attention + 3 * self.width * self.inner + 2 * self.width
        tables = 1 if self.tied else 2
        return self.layers * block + tables * self.vocabulary * self.width + self.width

    @property
    def flops(self) -> int:
        """FLOPs of training on a token, as torchtitan counts them: no recomputation, no mask."""
        embedding = 0 if self.tied else self.vocabulary * self.width
        attention = 12 * self.layers * self.width * LENGTH
        return 6 * (self.parameters - embedding) + attention


class Layout(NamedTuple):
    """How a model is cut.

    Attributes:
        rows: Sequences of a microbatch on a rank, n.
        tensor: Ranks that share the vocabulary, t.
        stages: Stages of the pipeline, p.
        calls: Microbatches that a pipeline takes in a step, m.
    """

    rows: int
    tensor: int = 1
    stages: int = 1
    calls: int = 1

    @property
    def of_a_copy(self) -> int:
        """GPUs that take part in one microbatch."""
        return self.tensor * self.stages


LAYOUTS = {"1B": Layout(4), "8B": Layout(2), "70B": Layout(8, 8), "405B": Layout(1, 8, 16, 16)}


def model_of(name: str) -> Model:
    """Return a model's sizes from torchtitan's config of that name; no weights are made."""
    # What the host's tables are typed by says little of the fields of their entries.
    config: Any = llama3_configs[name](attn_backend="flex")
    block = config.layers[0]
    return Model(
        name,
        len(config.layers),
        config.dim,
        block.feed_forward.w1.out_features,
        block.attention.n_heads,
        block.attention.n_kv_heads,
        config.vocab_size,
        config.enable_weight_tying,
    )


MODELS = {name: model_of(name) for name in LAYOUTS}


# What ranks say to each other


class Counting:
    """Ranks of which one exists, which notes kind and bytes of all that it hands over."""

    rank = 0
    parts = Alone()

    def __init__(self, size: int) -> None:
        """Pretend to be so many."""
        self.size = size
        self.calls: list[tuple[str, int]] = []

    def gather(self, x: Tensor) -> Tensor:
        """Return x as if all had it."""
        return self._noted("gather", x).expand(self.size, *x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum as if all had x."""
        return self._noted("sum", x) * self.size

    def max(self, x: Tensor) -> Tensor:
        """Return x."""
        return self._noted("max", x)

    def _noted(self, kind: str, x: Tensor) -> Tensor:
        self.calls.append((kind, x.nbytes))
        return x


def heard(spec: str, *, rows: int, ranks: int, domains: int = DOMAINS) -> list[tuple[str, int]]:
    """Return kind and bytes of each collective that a batch takes, by weighing one.

    Args:
        spec: Name of a spec.
        rows: Sequences of the batch on a rank.
        ranks: Data-parallel ranks.
        domains: Domains of the data.
    """
    counting = Counting(ranks)
    names = [f"domain {i}" for i in range(domains)]
    fn = wt.build(resolve(spec), domains=names, collectives=counting)
    columns = [x.removeprefix("columns.") for x in sorted(fn.needs) if x.startswith("columns.")]
    # Sequences of two tokens say as much as long ones: what is handed over is per sequence.
    fn(batch(rows, 2, domains=domains, columns=columns))
    return counting.calls


def heard_in_a_chunk(needs: frozenset[str], tokens: int) -> list[tuple[str, int]]:
    """Return the collectives of a chunk of logits whose vocabulary is cut over ranks."""
    counting = Counting(2)
    logits, labels = torch.zeros(tokens, 2), torch.zeros(tokens, dtype=torch.int64)
    statistics(logits, labels, needs, Slice(0, counting))
    return counting.calls


def seconds(calls: list[tuple[str, int]], ranks: int) -> float:
    """Return the time of collectives under the assumptions; a ring moves what is large."""
    if ranks == 1:
        return 0.0
    start = CALL + HOP * math.ceil(math.log2(ranks))
    rounds = {"gather": ranks - 1, "sum": 2 * (ranks - 1) / ranks, "max": 2 * (ranks - 1) / ranks}
    return sum(start + rounds[kind] * size / BANDWIDTH for kind, size in calls)


def step_seconds(model: Model, layout: Layout) -> float:
    """Return the time of a step under the assumptions."""
    tokens = layout.calls * layout.rows * LENGTH
    return tokens * model.flops / layout.of_a_copy / (PEAK * UTILISATION)


def bytes_formula(spec: str) -> str:
    """Return what a rank hands over in a batch of n sequences with K domains, in bytes."""

    def total(rows: int, domains: int) -> int:
        return sum(size for _, size in heard(spec, rows=rows, ranks=2, domains=domains))

    base, per_row = total(1, 7), total(2, 7) - total(1, 7)
    per_domain = total(1, 8) - base
    rest = base - per_row - 7 * per_domain
    assert total(5, 11) == 5 * per_row + 11 * per_domain + rest, f"{spec}: bytes are not linear"
    terms = [f"{per_row} n"] * (per_row > 0) + [f"{per_domain} K"] * (per_domain > 0)
    return " + ".join([*terms, *[f"{rest}"] * (rest > 0)]) or "0"


# What a way through the output layer takes


class Layer(NamedTuple):
    """The output layer's work on a rank in one call of the loss, and how many calls wait.

    Attributes:
        tokens: T, of the call.
        rows: Its sequences, n.
        vocabulary: Words on this rank, V / t.
        width: D.
        itemsize: e, bytes of an element.
        calls: m, calls whose weights come together.
        on_ranks: Whether there are other data-parallel ranks.
    """

    tokens: int
    rows: int
    vocabulary: int
    width: int
    itemsize: int
    calls: int = 1
    on_ranks: bool = True

    @property
    def gradient(self) -> int:
        """Bytes of one gradient of the layer."""
        return self.vocabulary * self.width * self.itemsize

    @property
    def logits(self) -> int:
        """Bytes of all logits."""
        return self.tokens * self.vocabulary * self.itemsize

    @property
    def chunk(self) -> int:
        """Bytes of a chunk of logits; chunks are even, and none is longer than `chunk_of` says."""
        chunks = -(-self.tokens // chunk_of(self.tokens, CHUNKS))
        return -(-self.tokens // chunks) * self.vocabulary * self.itemsize

    @property
    def plain(self) -> int:
        """Bytes without any weighting: a chunk, the layer's gradient, that of hidden states."""
        return self.chunk + self.gradient + self.tokens * self.width * self.itemsize


def layer_of(model: Model, layout: Layout) -> Layer:
    """Return the output layer's work in bfloat16, all microbatches of a pipeline waiting."""
    vocabulary = math.ceil(model.vocabulary / layout.tensor)
    tokens = layout.rows * LENGTH
    return Layer(tokens, layout.rows, vocabulary, model.width, BF16, layout.calls)


def weighting_of(spec: str, *, on_ranks: bool) -> Weighting:
    """Return a spec as a rank builds it; its own selection may keep more on one of several."""
    domains = [f"domain {i}" for i in range(DOMAINS)]
    ranks = Counting(2) if on_ranks else None
    return wt.build(resolve(spec), domains=domains, collectives=ranks)


def way_of(spec: str, layer: Layer, memory: Memory = "auto") -> Way:
    """Return the way a call takes, as the loss chooses it for all that wait together."""
    plan, ranks = plan_of(resolve(spec)), Counting(2) if layer.on_ranks else None
    sizes = Sizes(
        layer.tokens, layer.rows, layer.vocabulary, layer.width, layer.itemsize, DEVICE // SHARE
    )
    return path_of(plan, sizes, memory, parts=layer.calls, collectives=ranks)


def products(layer: Layer, way: Way | None) -> float:
    """Return the matrix products of the output layer, U; `None` is full logits.

    late, keep, full 3      recompute 4 less a chunk's part      selections 1 + 2k and 1 + 3k
    """
    if way is None or way.memory == "late":
        return 3.0
    k = 1.0 if way.most is None else way.most / layer.tokens
    if way.memory == "keep":
        return 1 + 2 * k
    return 4 - layer.chunk / layer.logits if way.most is None else 1 + 3 * k


def peak(layer: Layer, way: Way | None, *, copies: int = 2) -> int:
    """Return the most bytes there are beside inputs; `None` is full logits, in so many copies."""
    gradients = layer.plain - layer.chunk
    if way is None:
        return max(copies * layer.logits, layer.logits + gradients)
    if way.memory == "late":
        return layer.plain + (layer.calls * way.units - 1) * layer.gradient
    if way.memory == "recompute":
        return layer.plain + (layer.calls - 1) * layer.chunk
    # The gradients that a selection leaves are copied out, chunk by chunk; else all hidden states
    # are there once more, times the weights.
    states = layer.tokens * layer.width * layer.itemsize
    copied = states if way.most is None else layer.chunk
    return gradients + layer.calls * layer.logits + copied


def extra_flops(model: Model, units: float) -> float:
    """Return products beyond an unweighted loss's three as a part of a step's FLOPs."""
    return (units - 3) * 2 * model.width * model.vocabulary / model.flops


# What was measured


class Point(NamedTuple):
    """A row of loss_path.md: products counted, time and MiB of its own and as predicted."""

    name: str
    products: tuple[float, float]
    mib: tuple[float, float]
    time: tuple[float, float]

    @property
    def off(self) -> list[str]:
        """What is further off than the tolerance: products, memory, time."""
        pairs = {"products": self.products, "memory": self.mib, "time": self.time}
        return [what for what, (said, found) in pairs.items() if abs(said / found - 1) > TOLERANCE]


def points(text: str) -> list[Point]:
    """Return our own ways through the output layer in loss_path.md, predicted and measured.

    Time is relative to `uniform late`, and predicted from products alone.  On a CPU, only tokens
    that count go through the layer, unless there are full logits.
    """
    sizes = re.search(_SIZES, text)
    assert sizes, "loss_path.md says what was run"
    tokens, counted, rows, width, vocabulary = map(int, sizes.groups())
    layer = Layer(tokens, rows, vocabulary, width, FP32, on_ranks=False)
    fewer = layer._replace(tokens=counted)
    pattern = r"^\| ([\w-]+) (late|keep|recompute|full)(?: \(auto\))? \| ([\d.]+) \| ([\d.]+) .*$"
    found: list[tuple[str, tuple[float, float], tuple[float, float], float]] = []
    for match in re.finditer(pattern, text, re.MULTILINE):
        spec, memory, measured, time = match.groups()
        *_, mib, _ = match[0].rstrip("| ").split("|")
        if memory == "full":
            # The core's own full logits go through torch's cross entropy: three copies.
            said, taken = products(layer, None), peak(layer, None, copies=3)
        else:
            way = way_of(_GIVEN if spec == "given" else spec, layer, memory)
            # Hidden states of tokens that count stand beside all; in the end so do the gradients
            # of both, with the room for logits still there unless the way is late or keep.
            beside = 1 if memory in {"late", "keep"} and way.most is None else 2
            said = products(fewer, way) * counted / tokens
            taken = peak(fewer, way) + beside * counted * width * FP32
        sizes = (said, float(measured)), (taken / 2**20, float(mib))
        found.append((f"{spec} {memory}", *sizes, float(time)))
    (base,) = (row for row in found if row[0] == "uniform late")
    return [
        Point(name, units, mib, (units[0] / base[1][0], time / base[3]))
        for name, units, mib, time in found
    ]


_SIZES = r"N=(\d+) tokens, of which (\d+) count, in B=(\d+) sequences, D=(\d+), V=(\d+), float32"
_GIVEN = "version: 1\nnormalize: none\npipeline: column(w) -> as_is\n"
"""The benchmark's spec for weights that are given."""


# The page


def page() -> str:
    """Return the page."""
    parts = [_HEAD, *_models(), *_talk(), *_ways()]
    for name, model in MODELS.items():
        parts += _of_model(model, LAYOUTS[name])
    return "\n\n".join([*parts, *_check(), _UNKNOWN]) + "\n"


def _table(head: str, rows: list[list[str]]) -> str:
    """Return a Markdown table; the head has its cells between bars."""
    ruler = "|".join("---" for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{ruler}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


_HEAD = f"""# Scale, on paper

Written by `python benchmarks/scale.py`; edit the script, not this page.
Nothing here has been measured on a GPU.
Models are torchtitan's configs, ways through the output layer are the code's own choice,
collectives are counted by weighing a batch on ranks that only count.

| symbol | is | unit |
|---|---|---|
| n, L | sequences of a microbatch on a rank; tokens of each, here {LENGTH:,} | sequences, tokens |
| T = n L | tokens of a microbatch on a rank | tokens |
| D, V | width; vocabulary | elements |
| t, p | tensor-parallel ranks; stages of a pipeline | ranks, stages |
| m | microbatches that a pipeline takes in a step; 1 without one | microbatches |
| R, S | data-parallel ranks, GPUs / (t p); those of them that share a copy of the model | ranks |
| N | parameters | elements |
| F | FLOPs of training on a token: 6 N without the input embedding, 12 layers D L | FLOPs |
| U | a product of the output layer, 2 T D V FLOPs; an unweighted loss takes 3 | U |
| e | bytes of an element, {BF16} in bfloat16 | bytes |
| g, h | a gradient, e V D / t; hidden states, e T D | bytes |
| c | a chunk, e V / t min(max(T / {CHUNKS}, {MIN_CHUNK}), {MAX_CHUNK:,}) | bytes |
| K | domains, here {DOMAINS} | domains |
| k | largest part of a rank's tokens that a selection keeps | 1 |

Assumed, not measured:

- a collective takes {CALL * 1e6:.0f} us, {HOP * 1e6:.0f} us more for each doubling of its ranks,
  and what it moves at {BANDWIDTH / 1e9:.0f} GB/s, a NIC of 400 Gb/s for each GPU: a gather
  (R - 1) b, a sum or a maximum 2 b (R - 1) / R, where a rank hands over b bytes;
- a GPU has {DEVICE / 1e9:.0f} GB and does {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s;
- a parameter that trains takes {STATE} bytes, cut over S <= {MOST_SHARDS} ranks; further ranks
  hold copies (HSDP);
- the local batch stays as GPUs are added; a step is one microbatch, or the m of a pipeline.

Activation checkpointing makes a step longer and every share of it smaller; F leaves it out."""


def _models() -> list[str]:
    rows = [
        [
            x.name,
            *(f"{size:,}" for size in (x.layers, x.width, x.inner)),
            f"{x.heads} / {x.keys}",
            f"{x.vocabulary:,}{', tied' if x.tied else ''}",
            f"{x.parameters:,}",
            f"{x.flops / 1e9:,.1f} G",
        ]
        for x in MODELS.values()
    ]
    head = "Llama 3 | layers | D | feed-forward | heads / keys | V | N | F"
    return ["## Models", _table(head, rows)]


SPECS = {
    "uniform": "the host's loss",
    "mile": "per token",
    "linupper": "per sequence",
    "linupper-x-mile": "both",
    "rho-1": "selection over the batch",
    "sstoken": "selection in each sequence",
    "doremi-proxy": "per domain",
    "doremi-x-linupper-x-mile": "all three levels",
    "doge-proxy": "per domain, by gradients",
}
"""Specs of the page, and how they weigh."""


def _talk() -> list[str]:
    rows = []
    for spec, kind in SPECS.items():
        calls = heard(spec, rows=8, ranks=2048)
        counts = (sum(kind == name for kind, _ in calls) for name in ("gather", "max", "sum"))
        got = sum(2048 * size for kind, size in calls if kind == "gather")
        times = (seconds(heard(spec, rows=8, ranks=ranks), ranks) for ranks in (8, 2048))
        cells = [spec, kind, " / ".join(map(str, counts)), bytes_formula(spec)]
        rows.append([*cells, f"{got / 1024:,.0f}", *(f"{time * 1e3:.2f}" for time in times)])
    head = "spec | weighs | gathers / maxima / sums | bytes a rank hands over | KiB it gathers, "
    head += "R = 2,048, n = 8 | ms, R = 8 | ms, R = 2,048"
    cut = []
    for signals, needs in (("loss", ()), ("loss, entropy", ("entropy",))):
        calls = heard_in_a_chunk(frozenset(needs), 1024)
        cut.append([signals, f"{len(calls)}", f"{sum(size for _, size in calls) / 1024:g}"])
    cut.append(["torchtitan's own loss", "3", "12"])
    cut_head = "signals | collectives a chunk | bytes a token"
    return [_TALK, _table(head, rows), _CUT, _table(cut_head, cut), _NEITHER]


_TALK = """## What ranks say to each other

Of a microbatch, once; with `scope: step`, or in a pipeline, once for all of a step.
A log step adds one sum and one maximum; a drawn mixture that moves, one broadcast of K numbers a
step; `scope: rank` takes nothing."""
_CUT = """Where the vocabulary is cut over t ranks, which sit in one machine, these talk about each
chunk of logits as well."""
_NEITHER = """None of it grows with V or D, and no gradient is communicated that an unweighted run
would not communicate.  FSDP itself moves about 8 N / t bytes on each rank in a step, parameters in
bfloat16 twice and gradients in float32 once: 64 GB for 8B."""


def _ways() -> list[str]:
    return [_WAYS, _PASSES]


_WAYS = """## Ways through the output layer

Beside c + g + h, which a chunked loss without weights takes as well.

| way | for weights | U | more bytes on a rank | where |
|---|---|---|---|---|
| late | per token or sequence | 3 | (m u - 1) g | u = n if sequences come late, else 1 |
| keep | any | 3; 1 + 2k | m e T V / t - c + h | a selection c, not h, more |
| recompute | any | 4 - c t / (e T V); 1 + 3k | (m - 1) c | the last chunk is there still |
| full | any, no pipeline | 3 | max(2 e T V / t, e T V / t + g + h) - c - g - h | |

A selection inside sequences keeps its k on every rank; one over the batch, such as `rho-1`, may
keep all tokens of one rank and few of another, so with other ranks its k is 1.
`weighting explain` counts e T V / t for `keep`; c less is what it adds.
While the microbatches of a pipeline wait for their weights, the gathered output layer stays too: g.
Where only a scale comes late (`mile`) each of the m microbatches keeps a gradient of its own too:
(m - 1) g."""
_PASSES = """## Passes over the whole model

| what | FLOPs of a token | bytes on a rank | communicated more |
|---|---|---|---|
| `scope: step` | F / 3 | signals of the step | parameters once more, 2 N / (t p) |
| reference model, `ema:` | F / 3 | 4 N / (t S) | parameters once more, 2 N / t |
| `ref_loss` as a column | 0 | 0 | 0 |
| short context | at most F / 3 | 0 | parameters once more, 2 N / t |
| DoGE | 2 K N / (S T) | 4 K N / (t S) | a sum of K numbers, one of K K or more |

A third is torchtitan's own count: 2 of the 6 N, 4 of the 12 in attention.
Reference, short contexts and DoGE are refused under a pipeline.
DoReMi's search is a run of a small model and one with a reference, 2.33 runs; DoGE's is one.
For a moment DoGE takes K shards of the largest parameter as well."""


WAYS: list[tuple[str, str, tuple[Memory, ...]]] = [
    ("`mile`: one number late", "mile", ("late", "keep", "recompute")),
    (
        "`linupper`, `linupper-x-mile`: a number a sequence",
        "linupper-x-mile",
        ("late", "keep", "recompute", "full"),
    ),
    ("`rho-1`: a number a token", "rho-1", ("keep", "recompute")),
    ("`sstoken`: selected in each sequence", "sstoken", ("keep", "recompute")),
    (
        "`doremi-proxy`, with `linupper` and `mile` too: domains",
        "doremi-x-linupper-x-mile",
        ("keep", "recompute"),
    ),
]
"""Rows of a model: what is said, spec, ways."""
_REFUSED = "refused under a pipeline"


def _of_model(model: Model, layout: Layout) -> list[str]:
    layer, piped = layer_of(model, layout), layout.stages > 1
    rows = [["`uniform`: the host's loss", "", "3.00", "0", "0", "0"]]
    for said, spec, memories in WAYS:
        auto = way_of(spec, layer).memory
        for memory in memories:
            label = f"{memory} (auto)" if memory == auto else memory
            if memory == "full" and piped:
                rows.append([said, label, _REFUSED, "", "", ""])
                continue
            way = None if memory == "full" else way_of(spec, layer, memory)
            units = products(layer, way)
            flops = extra_flops(model, units)
            more = peak(layer, way) - layer.plain + (layer.gradient if piped else 0)
            cells = [f"{flops:+.2%}" if flops else "0", _mib(more)]
            cells.append(f"{more / DEVICE:.1%}" if more else "0")
            rows.append([said, label, f"{units:.2f}", *cells])
    rows.append(["`scope: step`", "late", "4.00", f"{1 / 3:+.1%}", "0", "0"])
    third = _REFUSED if piped else f"{1 / 3:+.1%}"
    rows.append(["reference, `ema:` or short context", "beside these", "", third, "below", ""])
    cut = f"n = {layout.rows}, t = {layout.tensor}, p = {layout.stages}"
    cut += f", m = {layout.calls}, schedule `GPipe`" if piped else ""
    tokens, spent = layout.calls * layout.rows * LENGTH, step_seconds(model, layout)
    lines = [
        f"{cut}: {tokens:,} tokens a step on a data-parallel rank, {spent:.1f} s at that speed.",
        f"g = {_mib(layer.gradient)} MiB, c = {_mib(layer.chunk)} MiB.",
    ]
    return [
        f"## Llama 3 {model.name}",
        "\n".join(lines) + _SOURCES.get(model.name, ""),
        _table("weights | way | U | FLOPs of a step | MiB more | of a GPU", rows),
        _at_scale(model, layout),
    ]


_SOURCES = {
    "8B": "\nn is that of torchtitan's published runs; with n = 1, its config's, `late` takes 0.",
    "70B": "\nn and t are those of torchtitan's own config.",
    "405B": """
t, p and tokens a step are those of Llama 3 on 16,384 GPUs (arXiv:2407.21783, table 4).
Its schedule was interleaved; that takes `scope: step` or `scope: running`, with which no
microbatch waits for another and m is 1 in the formulas for memory.""",
}


def _at_scale(model: Model, layout: Layout) -> str:
    rows = []
    for gpus in GPUS:
        ranks = gpus // layout.of_a_copy
        if not ranks:
            rows.append([f"{gpus:,}", f"needs {layout.of_a_copy}", *[""] * 6])
            continue
        shards = min(ranks, MOST_SHARDS)
        own = model.parameters / layout.of_a_copy / shards
        cells = [f"{gpus:,}", f"{shards} x {ranks // shards}", f"{STATE * own / 1e9:.1f}"]
        if STATE * own > DEVICE:
            rows.append([*cells, "does not fit", *[""] * 4])
            continue
        calls = {
            spec: heard(spec, rows=layout.rows * layout.calls, ranks=ranks)
            for spec in ("linupper", "rho-1")
        }
        gathered = sum(size for kind, size in calls["linupper"] if kind == "gather") * ranks
        cells.append(f"{gathered / 1024:,.1f}")
        for taken in calls.values():
            time = seconds(taken, ranks)
            cells.append(f"{time * 1e3:.2f} ({time / step_seconds(model, layout):.3%})")
        for copies in (1, DOMAINS):
            bytes_ = copies * FP32 * own
            cells.append("refused" if layout.stages > 1 else f"{bytes_ / 2**30:.2f}")
        rows.append(cells)
    head = "GPUs | R = shards x copies | training state, GB | `linupper` gathers, KiB"
    head += " | its collectives, ms (of a step) | `rho-1`'s | reference, GiB"
    return _table(f"{head} | DoGE, K = {DOMAINS}, GiB", rows)


def _check() -> list[str]:
    found = points(MEASURED.read_text(encoding="utf-8"))
    rows = [
        [
            x.name,
            *(f"{value:.2f}" for value in x.products),
            *(f"{value:,.0f}" for value in x.mib),
            f"{x.mib[0] / x.mib[1]:.2f}",
            *(f"{value:.2f}" for value in x.time),
        ]
        for x in found
    ]
    worst = min(x.mib[0] / x.mib[1] for x in found)
    misses = _misses(found)
    speed = LAYOUTS["8B"].rows * LENGTH / step_seconds(MODELS["8B"], LAYOUTS["8B"])
    speeds = [
        [f"8B, {gpus} GPUs", f"{speed:,.0f}", f"{said:,}", f"{speed / said:.2f}"]
        for gpus, said in PUBLISHED.items()
    ]
    return [
        _CHECKED,
        _table("way | U | counted | MiB | measured | ratio | time, by U | measured", rows),
        f"Memory comes out as {worst:.2f} of what was measured, or more.{_ALIKE}",
        f"More than {TOLERANCE:.0%} off:",
        "\n".join(misses) or "- nothing.",
        _SPEED,
        _table("tokens a second and GPU | here | published | ratio", speeds),
    ]


def _misses(found: list[Point]) -> list[str]:
    """Return a line for each kind of prediction that is off: of what, for which ways, and why.

    Raises:
        ValueError: The reason is not known.
    """
    off: dict[str, list[str]] = {}
    for x in found:
        for what in x.off:
            off.setdefault(f"{what} of `{x.name.rpartition(' ')[2]}`", []).append(x.name)
    if unknown := off.keys() - _REASONS.keys():
        msg = (
            f"{', '.join(unknown)}: more than {TOLERANCE:.0%} off; find out why, say so in _REASONS"
        )
        raise ValueError(msg)
    return [f"- {what}: {', '.join(names)}.\n  {_REASONS[what]}" for what, names in off.items()]


_CHECKED = """## Checked against what was measured

The same functions, for the sizes of [the loss path](loss_path.md) on one CPU rank in float32,
against the numbers in that file.
Time is relative to `uniform late`, and predicted from matrix products with nothing for the rest.
`full` is the core's there, through torch's cross entropy: three copies of the logits, not two."""
_ALIKE = """
About 12 MiB in each row are small tensors and working memory that the formulas leave out.
A chunk of logits and a gradient of the layer are of one size there (T / 8 = D), so
these rows cannot tell them apart; `tests/test_scale.py` measures at sizes where they differ, and
compares all collectives, call by call and byte by byte, with those of two ranks in lockstep."""
_SPEED = """The assumed speed, against what torchtitan publishes for Llama 3.1 8B on H100 without a
weighting (n = 2, FSDP, torch.compile, selective checkpointing; benchmarks/llama3_h100_202412):"""
_REASONS = {
    "time of `full`": "All logits exist several times over and leave the cache between passes; "
    "products do not\n  count that traffic.",
    "time of `keep`": "A selection saves products, but not the pass over all logits for their "
    "statistics, and it\n  copies the logits it keeps.",
}
"""Why predictions are off, by what is."""
_UNKNOWN = """## What paper does not tell

- Times on a GPU: of the kernels that read and write logits, of the sum over n gradients of the
  layer in `late` (n g read, g written), under CUDA graphs.
- What waiting costs: the gather joins all R ranks before the backward pass, so each waits for the
  slowest.  FSDP joins its S ranks anyway, copies of a model meet only at the end of a step.
- Whether collectives of some bytes hide behind other work; the times above hide nothing.
- Fragmentation, and the memory pools of CUDA graphs.
- What a real network under load does to 20 us and 5 us, which are round numbers; ten times as much
  makes the shares ten times as large."""


if __name__ == "__main__":
    (FOLDER / "scale.md").write_text(page(), encoding="utf-8")

"""Train a GPT with any weighting, on one GPU and without torchtitan: one method, one command.

    python benchmarks/pack.py --data FOLDER --tokenizer FOLDER --out tokens.npz
    python benchmarks/gpu.py uniform --tokens tokens.npz
    python benchmarks/gpu.py linupper --tokens tokens.npz
    python benchmarks/gpu.py rho-1 --tokens tokens.npz --reference outputs/gpu/uniform-seed1
    python benchmarks/gpu.py table outputs/gpu

It takes torch, numpy and what `weighting` needs.  A method is a spec: a file, a shipped name or
arrow text.  Runs of one seed have the same first weights and see the same rows in the same order;
only the weighting differs.  Cut off, the same command goes on from the last checkpoint, on CPU to
the same bits; on a GPU torch is asked for kernels that repeat, where it has them.

The model is the paper's smallest, 12 layers of width 768: 124 million parameters with GPT-2's
vocabulary of 50,257, 91 million with one of 8,192.  Batch, learning rates, clipping and decay are
the paper's too (Sow et al., ICLR 2025, Table 7); warm-up is its fortieth of the steps.

A step of 32 x 512 tokens takes 6 * 124e6 * 16,384 = 1.2e13 floating-point operations, 35 ms at
35 % of the 989 TFLOP/s that an H200 is said to reach in bfloat16.  By this, 4,000 steps take 2.4
minutes and 10,000 take 5.9, and a third more with a reference.  That is arithmetic, not measured.

Schedules in specs count steps: `linupper-gpt2` trains plainly for 1,000, a twentieth of the paper's
20,000; of 4,000 that is a quarter, and `... -> interpolate(step(1, 0, at=201))` a twentieth.

Differs from `paper_124m`: tokens attend to all of their row before them, other documents too;
evaluation reads all rows of `valid`; specs that draw data or wait for news are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

import weighting as wt
from weighting.language.read import resolve
from weighting.loss.cross_entropy import token_loss
from weighting.loss.logits import TOPK
from weighting.runs.files import json_text, read_lines, write_whole, writing_whole


class Size(NamedTuple):
    """A model's layers, heads, width, and width of the feed-forward part."""

    layers: int
    heads: int
    width: int
    hidden: int


SIZES = {"124M": Size(12, 12, 768, 2_048), "tiny": Size(2, 4, 64, 256)}
STEPS = 4_000
"""A fifth of the paper's: minutes, and on a corpus of some ten million tokens few passes."""
BATCH = 32
LR, LR_END = 5e-4, 1e-4
WARMUP = 40
"""One in so many steps; 500 of the paper's 20,000."""
LOG, SAVE, EVALUATIONS = 10, 500, 8
"""Steps between lines of metrics, and between checkpoints; evaluations of a run."""
SHOW = 5
"""Seconds between lines of progress."""
PARTS = {"frequent": 0.5, "medium": 0.9, "rare": 1.0}
"""Of the training tokens: the commonest words that make up a half, to nine tenths, and the rest."""
ENOUGH = 3
"""Seeds from which on the table gives an interval."""
LABELS = {
    "loss": "all tokens",
    "domain_mean_loss": "mean over domains",
    "bits_per_byte": "all, bits per byte",
    "frequent": "tokens of frequent words",
    "medium": "tokens of medium words",
    "rare": "tokens of rare words",
}
BROKEN = (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, BadZipFile)
"""What a file that is none of tokens raises when it is read."""
SIGNALS = {"loss", "entropy", "target_prob", "error_norm", "ref_loss", "domain_ids", "segment_ids"}


def main(arguments: list[str] | None = None) -> int:
    """Train, or print the table; status 2 for what a user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    does = run
    if arguments[:1] == ["table"]:
        does = show
        parser.add_argument("table")
        parser.add_argument("folder", type=Path)
    else:
        offer(parser)
    try:
        does(parser.parse_args(arguments))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def offer(parser: argparse.ArgumentParser) -> None:
    """Add what a run may be told."""
    parser.add_argument("method", help="a spec: file, shipped name or arrow text; or: table FOLDER")
    parser.add_argument("--tokens", type=Path, required=True, help="what pack.py wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reference", type=Path, help="a finished run, for specs that read one")
    parser.add_argument("--no-compile", action="store_true", help="on CUDA; a CPU never does")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then save, and stop")


def run(args: argparse.Namespace) -> None:
    """Begin a run or go on with it.

    Raises:
        ValueError: What is asked for cannot be done, or is not what the run was begun with.
    """
    began = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        msg = "--device cuda: torch finds no GPU here; use --device cpu, with --model tiny"
        raise ValueError(msg)
    data = Data.read(args.tokens)
    spec = resolve(args.method)
    fn = wt.build(spec, domains=data.about["domains"]).to(device)
    refuse(fn, args)
    reference, of_reference = None, None
    if args.reference:
        reference, of_reference = finished(args.reference, data, device)
    name = spec.hash if spec.name == "unnamed" else spec.name
    folder = args.out / f"{name}-seed{args.seed}"
    given = {
        "spec": spec.hash,
        "tokens": data.hash,
        "steps": args.steps,
        "seed": args.seed,
        "model": args.model,
        "reference": of_reference,
        "device": device.type,
        "compile": device.type == "cuda" and not args.no_compile,
    }
    fix(folder, given)
    if (folder / "result.json").exists():
        print(f"{folder} is finished")
        return
    repeatable(device)
    torch.manual_seed(args.seed)
    model = Model(SIZES[args.model], data.about["vocabulary"]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    now = Run(folder, model, fn, optimizer)
    now.restore()
    if not train(now, data.to(device), reference, args, began + 60 * args.minutes):
        return
    write_tensors(folder / "model.pt", model.state_dict())
    result = {
        "name": " ".join(args.method.split()) if spec.name == "unnamed" else name,
        "spec": str(spec),
        "arguments": given,
        "evaluation": read_lines(folder / "evaluation.jsonl")[-1],
        "parameters": sum(x.numel() for x in model.parameters()),
        "passes": args.steps * BATCH / len(data.train),
        "seconds": now.seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "weighting": wt.__version__,
        },
        "tokens": data.about,
    }
    write_whole(folder / "result.json", json_text(result, indent=1))
    (folder / "checkpoint.pt").unlink()
    print(f"{folder}: {result['evaluation']['domain_mean_loss']:.4f} nats, mean over domains")


def refuse(fn: wt.Weighting, args: argparse.Namespace) -> None:
    """Refuse a spec that reads, or does, what there is not here.

    Raises:
        ValueError: Says what.
    """
    name = fn.spec.name
    missing = sorted(x for x in fn.needs - SIGNALS if not x.startswith(TOPK))
    if missing:
        msg = f"{name} reads {', '.join(missing)}, which this script does not have"
    elif fn.plan.sampling or fn.plan.listens_to:
        msg = (
            f"{name} draws data or waits for news, and rows come in one order here; use torchtitan"
        )
    elif "ref_loss" in fn.needs and not args.reference:
        msg = f"{name} reads the losses of a reference; train one, and give --reference RUN"
    elif "ref_loss" not in fn.needs and args.reference:
        msg = f"{name} reads no ref_loss; leave out --reference"
    elif args.steps < 1:
        msg = "--steps: at least 1"
    else:
        return
    raise ValueError(msg)


def finished(folder: Path, data: Data, device: torch.device) -> tuple[Model, str]:
    """Return the model of a finished run, frozen, and a hash that tells it from others.

    Raises:
        ValueError: There is none, or its tokens are not those of the data.
    """
    path = folder / "result.json"
    if not path.exists():
        msg = f"--reference {folder}: no finished run is there; finish it first"
        raise ValueError(msg)
    text = path.read_bytes()
    result = json.loads(text)
    if result["tokens"]["tokenizer"] != data.about["tokenizer"]:
        msg = f"--reference {folder}: it was trained with another tokenizer; train one with this"
        raise ValueError(msg)
    model = Model(SIZES[result["arguments"]["model"]], data.about["vocabulary"])
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    told = hashlib.sha256(text).hexdigest()[:16]
    return model.to(device).requires_grad_(requires_grad=False), told


def fix(folder: Path, given: dict[str, object]) -> None:
    """Write down what a run is begun with, or compare.

    Raises:
        ValueError: It was begun with something else.
    """
    path = folder / "arguments.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(given, indent=1))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{x} {before.get(x)}, not {given[x]}" for x in given if given[x] != before.get(x)]
    if changed:
        msg = f"{folder} was begun with {', '.join(changed)}; give the same, or another --out"
        raise ValueError(msg)


def repeatable(device: torch.device) -> None:
    """Have kernels of a GPU add up in one order, where torch has such."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only takes time


class Data(NamedTuple):
    """Tokens in rows, and what is known of each row.

    Attributes:
        train: [R, L + 1] int32.
        train_domain: [R].
        valid: [Rv, L + 1] int32.
        valid_domain: [Rv].
        valid_bytes: [Rv], of text that a row predicts.
        part: [V], place in `PARTS` of each token.
        about: What the packing says of itself.
        hash: Of the file.
    """

    train: Tensor
    train_domain: Tensor
    valid: Tensor
    valid_domain: Tensor
    valid_bytes: Tensor
    part: Tensor
    about: dict
    hash: str

    @classmethod
    def read(cls, path: Path) -> Data:
        """Read what `pack.py` wrote.

        Raises:
            ValueError: It is no such file.
        """
        try:
            content = path.read_bytes()
            with np.load(io.BytesIO(content)) as found:
                arrays = dict(found)
            rows = [torch.from_numpy(arrays[x].astype(np.int32)) for x in ("train", "valid")]
            ids = [torch.from_numpy(arrays[f"{x}_domain"].astype(int)) for x in ("train", "valid")]
            sizes, counts = torch.from_numpy(arrays["valid_bytes"]), arrays["counts"]
            about = json.loads(str(arrays["about"]))
        except BROKEN as error:
            msg = f"{path}: not a file of tokens ({error}); write it with benchmarks/pack.py"
            raise ValueError(msg) from None
        part = torch.from_numpy(part_of(counts))
        train, valid = zip(rows, ids, strict=True)
        return cls(*train, *valid, sizes, part, about, hashlib.sha256(content).hexdigest()[:16])

    def to(self, device: torch.device) -> Data:
        """Return the same with rows on a device."""
        moved = {x: getattr(self, x).to(device) for x in ("train", "train_domain", "valid")}
        return self._replace(**moved)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a step, [B, L + 1] int64, and their domains, [B]."""
        count = len(self.train)
        places = range((step - 1) * BATCH, step * BATCH)
        rows = [order(seed, place // count, count)[place % count] for place in places]
        chosen = torch.tensor(rows).to(self.train.device, non_blocking=True)
        return self.train[chosen].long(), self.train_domain[chosen]


@lru_cache(maxsize=2)
def order(seed: int, through: int, count: int) -> np.ndarray:
    """Return the order of the rows in one pass through them."""
    return np.random.default_rng((seed, through)).permutation(count)


def part_of(counts: np.ndarray) -> np.ndarray:
    """Return for each token its place in `PARTS`, by how often each is in the training text."""
    falling = np.argsort(-counts, kind="stable")
    before = (np.cumsum(counts[falling]) - counts[falling]) / counts.sum()
    part = np.empty(len(counts), int)
    part[falling] = np.searchsorted([*PARTS.values()][:-1], before, side="right")
    return part


class Model(nn.Module):
    """A GPT: rotary positions, RMS norm before each part, gated feed-forward, no biases.

    Takes tokens [B, L] to hidden states [B, L, D]; the embedding is the output layer as well.
    """

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.blocks = nn.ModuleList([Block(size) for _ in range(size.layers)])
        self.norm = nn.RMSNorm(size.width)
        self.turn_width = size.width // size.heads
        for name, x in self.named_parameters():
            if x.dim() > 1:
                into_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(x, std=0.02 / math.sqrt(2 * size.layers) if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the input of the output layer."""
        half = torch.arange(0, self.turn_width, 2, device=tokens.device) / self.turn_width
        angle = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * 10_000**-half
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return self.norm(x)


class Block(nn.Module):
    """Attention to the row so far, and a feed-forward part."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x with both parts added."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys [B, H, L, E] turned by their positions."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def narrow(device: torch.device) -> torch.autocast:
    """Return a context in which matrix products of a GPU are bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def losses(model: Model, tokens: Tensor) -> Tensor:
    """Return a model's loss of each token but the first, [B, L] float32, nats."""
    with narrow(tokens.device):
        hidden = model(tokens[:, :-1])
        rows = zip(hidden.split(8), tokens[:, 1:].split(8), strict=True)  # few logits at a time
        weight = model.embedding.weight
        return torch.cat([token_loss(F.linear(x, weight), labels) for x, labels in rows])


def evaluate(model: Model, data: Data) -> dict[str, float]:
    """Return what a model makes of the rows it never trained on.

    Returns:
        `loss`, nats a token; `domain_mean_loss`, the mean over domains of log-perplexity;
        `bits_per_byte`; the loss of each of `PARTS`; loss and bits per byte of each domain.
    """
    found = torch.cat([losses(model, x.long()) for x in data.valid.split(BATCH)])
    found, part = found.double().cpu(), data.part[data.valid[:, 1:].cpu()]

    def bits(rows: Tensor) -> float:
        return float(found[rows].sum() / data.valid_bytes[rows].sum() / math.log(2))

    by_domain = {x: data.valid_domain == i for i, x in enumerate(data.about["domains"])}
    each = {x: float(found[rows].mean()) for x, rows in by_domain.items()}
    return {
        "loss": float(found.mean()),
        "domain_mean_loss": sum(each.values()) / len(each),
        "bits_per_byte": bits(torch.ones_like(data.valid_domain, dtype=torch.bool)),
        **{x: float(found[part == i].mean()) for i, x in enumerate(PARTS)},
        **{f"domain/{x}/loss": loss for x, loss in each.items()},
        **{f"domain/{x}/bits_per_byte": bits(rows) for x, rows in by_domain.items()},
    }


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: a line up, then half a cosine down."""
    up = max(1, steps // WARMUP)
    if step <= up:
        return LR * step / up
    return LR_END + (LR - LR_END) * (1 + math.cos(math.pi * (step - up) / (steps - up))) / 2


@dataclass
class Run:
    """A run in progress: what a checkpoint holds, and where it is."""

    folder: Path
    model: Model
    fn: wt.Weighting
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self) -> None:
        """Write a checkpoint over the one before."""
        rng = [torch.get_rng_state()]
        if torch.cuda.is_available():
            rng.append(torch.cuda.get_rng_state())
        parts = {name: getattr(self, name).state_dict() for name in ("model", "fn", "optimizer")}
        state = {**parts, "step": self.step, "seconds": self.seconds, "rng": rng}
        write_tensors(self.folder / "checkpoint.pt", state)

    def restore(self) -> None:
        """Go back to the last checkpoint, or to the start, and drop lines of later steps."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name in ("model", "fn", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
            torch.set_rng_state(state["rng"][0])
            for x in state["rng"][1:]:
                torch.cuda.set_rng_state(x)
        for path in (self.folder / "metrics.jsonl", self.folder / "evaluation.jsonl"):
            lines = read_lines(path) if path.exists() else []
            kept = [json_text(line) + "\n" for line in lines if line["step"] <= self.step]
            write_whole(path, "".join(kept))

    def append(self, kind: str, line: dict[str, float]) -> None:
        """Add a line of this step to a file."""
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text({"step": self.step, **line}) + "\n")


def train(
    now: Run, data: Data, reference: Model | None, args: argparse.Namespace, until: float
) -> bool:
    """Train to the end, or to a moment of the monotonic clock; return whether it is the end."""
    device, began = data.train.device, time.monotonic()
    hidden_of, score = now.model, reference
    if device.type == "cuda" and not args.no_compile:
        hidden_of = torch.compile(hidden_of)
        score = torch.compile(score) if score else None
    at = torch.zeros((), dtype=torch.int64, device=device)
    seen: list[Tensor] = []  # losses of the step, before weights
    now.fn.register_forward_hook(lambda _, signals, __: seen.append(signals[0].loss))
    clock, counted, shown = began, now.step, -math.inf
    while now.step < args.steps:
        now.step += 1
        tokens, domains = data.batch(now.step, args.seed)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        ends = (inputs == data.about["end"]).cumsum(1)
        for group in now.optimizer.param_groups:
            group["lr"] = learning_rate(now.step, args.steps)
        with narrow(device):
            loss, weights = wt.linear_weighted_cross_entropy(
                hidden_of(inputs),
                now.model.embedding.weight,
                labels,
                now.fn,
                step=at.fill_(now.step),
                domain_ids=domains[:, None].expand_as(labels),
                segment_ids=ends - ends[:, :1],
                ref_loss=losses(score, tokens) if score else None,
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(now.model.parameters(), 1.0)
        now.optimizer.step()
        now.optimizer.zero_grad()
        unweighted = seen.pop()
        over, last = time.monotonic() > until, now.step == args.steps
        if now.step == 1 or now.step % LOG == 0 or last:
            now.fn.check(weights)
            line = {
                "unweighted_loss": float(unweighted.mean()),
                "weighted_loss": float(loss.detach()),
                "ess_frac": float(weights.metrics["weight/ess_frac"]),
                "max_weight": float(weights.metrics["weight/max"]),
                "gradient_norm": float(norm),
                "memory_gib": memory(device),
            }
            rate = (now.step - counted) / (time.monotonic() - clock)
            now.append("metrics", {**line, "tokens_per_second": rate * labels.numel()})
            if last or time.monotonic() - shown > SHOW:
                shown = time.monotonic()
                left = (args.steps - now.step) / rate / 60
                print(
                    f"step {now.step} of {args.steps}, loss {line['unweighted_loss']:.3f}, "
                    f"{rate * labels.numel():,.0f} tokens/s, {left:.1f} minutes left",
                    flush=True,
                )
            clock, counted = time.monotonic(), now.step
        evaluates = now.step * EVALUATIONS % args.steps < EVALUATIONS
        saves = last or over or now.step % SAVE == 0
        if evaluates:
            now.append("evaluation", evaluate(now.model, data))
        if saves:
            now.seconds, began = now.seconds + time.monotonic() - began, time.monotonic()
            now.save()
        if evaluates or saves:
            clock, counted = time.monotonic(), now.step
        if over and not last:
            print(f"stopped after step {now.step} of {args.steps}; the same command goes on")
            return False
    return True


def memory(device: torch.device) -> float:
    """Return the most memory used so far, GiB: a GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_tensors(path: Path, state: object) -> None:
    """Write tensors to a file that is there whole or not at all."""
    with writing_whole(path) as file:
        torch.save(state, file)


def show(args: argparse.Namespace) -> None:
    """Print the table of a folder.

    Raises:
        ValueError: No run in it is finished.
    """
    files = sorted(args.folder.glob("*/result.json"))
    if not files:
        msg = f"{args.folder}: no finished run is there"
        raise ValueError(msg)
    print(table([json.loads(x.read_text(encoding="utf-8")) for x in files]))


def table(results: list[dict]) -> str:
    """Return what finished runs found, in Markdown.

    A table for each setting, a column for each method: means over seeds, and behind them how far
    they are from `uniform`'s, seed by seed.
    """
    settings: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for result in sorted(results, key=lambda x: (x["name"] != "uniform", x["name"])):
        told = result["arguments"]
        setting = (
            f"Model {told['model']} ({result['parameters']:,} parameters), {told['steps']:,} steps "
            f"({result['passes']:.1f} passes), tokens {told['tokens']}, {result['device']}, "
            f"torch {result['versions']['torch']}."
        )
        by_seed = settings.setdefault(setting, {}).setdefault(result["name"], {})
        by_seed[told["seed"]] = result["evaluation"]
    lines: list[str] = []
    for setting, methods in sorted(settings.items()):
        lines += [setting, "", f"| nats | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
        seeds = [", ".join(map(str, sorted(by_seed))) for by_seed in methods.values()]
        lines.append(f"| seeds | {' | '.join(seeds)} |")
        base = methods.get("uniform", {})
        for name in next(iter(next(iter(methods.values())).values())):
            if name == "step" or (name.startswith("domain/") and name.endswith("bits_per_byte")):
                continue
            cells = [cell(by_seed, base, name) for by_seed in methods.values()]
            lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def cell(by_seed: dict[int, dict[str, float]], base: dict[int, dict[str, float]], name: str) -> str:
    """Return the mean of a number, and its differences to the base's of the same seeds.

    From three seeds on: their mean, and a 95 % interval of it by drawing seeds with replacement.
    """
    text = f"{np.mean([found[name] for found in by_seed.values()]):.4f}"
    pairs = np.array([by_seed[x][name] - base[x][name] for x in sorted(by_seed) if x in base])
    if by_seed is base or not len(pairs):
        return text
    if len(pairs) < ENOUGH:
        return f"{text} ({', '.join(f'{x:+.4f}' for x in pairs)})"
    drawn = np.random.default_rng(0).choice(pairs, (10_000, len(pairs))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{text} ({pairs.mean():+.4f}, {low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    sys.exit(main())

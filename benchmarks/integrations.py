"""What weights cost in other trainers: seconds and memory of a step, against the plain trainer.

    python benchmarks/integrations.py [--steps 3] [--rounds 3] [--rows 4] [--length 128] [--out X]

A small Llama with a vocabulary of 8,192 trains on random tokens in Hugging Face's Trainer and in
TRL's SFTTrainer: plain, weighted, weighted without full logits, with Liger's fused loss, and with
TRL's own flag for DFT.  First the gradient of each way is compared with float64; one that is wrong
ends the program.  Then every run is a process of its own, forked after the imports; they take
turns, and each round has its ratios.  Seconds are of the processor, all of one core; memory is what
the process grew by at most.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import weighting as wt
from weighting.integrations import versions
from weighting.integrations.transformers import weigh

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

VOCABULARY, WIDTH = 8192, 256
_FAR = 1e-4
"""A gradient that is off by more is wrong; float32 is off by some 1e-6."""
WAYS = {
    "Trainer": ("Trainer", None, {}),
    "Trainer, uniform": ("Trainer", "uniform", {}),
    "Trainer, linupper": ("Trainer", "linupper", {}),
    "Trainer, linupper-x-mile": ("Trainer", "linupper-x-mile", {}),
    "Trainer, mile, fused=True": ("Trainer", "mile", {"fused": True}),
    "Trainer, linupper-x-mile, fused=True": ("Trainer", "linupper-x-mile", {"fused": True}),
    "Trainer, use_liger_kernel=True": ("Trainer", None, {"use_liger_kernel": True}),
    "SFTTrainer": ("SFTTrainer", None, {}),
    'SFTTrainer, loss_type="dft"': ("SFTTrainer", None, {"loss_type": "dft"}),
    "SFTTrainer, dft": ("SFTTrainer", "dft", {}),
    "SFTTrainer, linupper-x-mile": ("SFTTrainer", "linupper-x-mile", {}),
}
"""Of each way to train: the trainer, the spec, and further settings of `weigh` or the trainer."""


class Clock(TrainerCallback):
    """Notes the processor's seconds at the beginning of each step."""

    def __init__(self) -> None:
        """Begin without a note."""
        self.at: list[float] = []

    def on_step_begin(self, *_args: object, **_options: object) -> None:
        """Note the time."""
        self.at.append(time.process_time())

    def on_train_end(self, *_args: object, **_options: object) -> None:
        """Note the end of the last step."""
        self.at.append(time.process_time())


def main(arguments: list[str] | None = None) -> int:
    """Print a table of ratios, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, help="a file for the table too")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    gc.freeze()  # a trainer collects garbage, which would copy the pages of all that was imported
    errors = {name: in_a_process(error_of, name, args) for name in WAYS}
    for name, error in errors.items():
        if isinstance(error, float) and not error < _FAR:
            print(f"{name}: the gradient is {error:.1e} off, so nothing is measured")
            return 1
    works = [name for name, error in errors.items() if isinstance(error, float)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name in works:
            found[name].append(in_a_process(cost_of, name, args))
        text = page(args, errors, found)
        if args.out:  # after each round, as the next may be cut off
            args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def page(
    args: argparse.Namespace,
    errors: dict[str, float | str],
    found: dict[str, list[tuple[float, float]]],
) -> str:
    """Return the table and what it was measured on."""
    try:
        liger = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        liger = "not installed"
    found_versions = {**versions.found(), "liger-kernel": liger}
    tested = ", ".join(f"{package} {version}" for package, version in found_versions.items())
    gpu = "a GPU" if torch.accelerator.is_available() else "no GPU"
    lines = []
    for name, (kind, *_) in WAYS.items():
        error = errors[name]
        if isinstance(error, str):
            lines.append(f"| {name} | no number: {error} | | |")
        else:
            times, memories = ratios(found[name], found[kind])
            time = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            lines.append(f"| {name} | {time} | {statistics.median(memories):.2f} | {error:.0e} |")
    times, memories = ratios(found["SFTTrainer"], found["Trainer"])
    memory = statistics.median(x for _, x in found["Trainer"])
    table = "\n".join(lines)
    return f"""# Weights in other trainers: what a step costs

Made by `python benchmarks/integrations.py --out benchmarks/integrations.md`.

{args.rows} x {args.length} tokens, a vocabulary of {VOCABULARY:,}, a Llama of 2 layers of width \
{WIDTH}, float32.
{os.cpu_count()} cores, {gpu}; process-CPU time on one core, with other work on the machine, load \
{os.getloadavg()[0]:.1f}.
A round has one run of each way, and a run's time is the median of {args.steps} steps; here are \
the medians of the ratios of {len(times)} rounds, with the least and the most.
{tested}.

| way | time of a step | memory | gradient is off float64 by |
|---|---|---|---|
{table}

1.00 is the plain trainer of the same name.
SFTTrainer takes {statistics.median(times):.2f} of Trainer's time and \
{statistics.median(memories):.2f} of its memory, which is {memory / 2**20:.0f} MiB."""


def ratios(
    found: list[tuple[float, float]], base: list[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Return the ratios of the times of each round, and of its memories."""
    pairs = zip(found, base, strict=True)
    times, memories = zip(*((a / c, b / d) for (a, b), (c, d) in pairs), strict=True)
    return [*times], [*memories]


def in_a_process(function: Callable[..., Any], *given: object) -> Any:  # noqa: ANN401 - whatever
    """Return what a function returns in a process of its own; what it raises, in a line."""

    def run() -> None:
        try:
            found = function(*given)
        except Exception as error:  # noqa: BLE001 - a way that cannot run here is said so
            first = str(error).strip().partition("\n")[0]
            found = f"{type(error).__name__}: {first}".replace("|", "/")
        theirs.send(found)

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=run)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def cost_of(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return seconds of a step and bytes of a way to train, the median of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        host, before = trainer(name, args, folder), peak()
        clock = Clock()
        host.add_callback(clock)
        host.train()
    taken = [b - a for a, b in zip(clock.at[1:], clock.at[2:], strict=False)]
    return statistics.median(taken), peak() - before


def error_of(name: str, args: argparse.Namespace) -> float:
    """Return how far the first gradient is off that of float64, relative to its norm."""
    with tempfile.TemporaryDirectory() as folder:
        host = trainer(name, args, folder, steps=1)
        exact = model().double()
        ids = torch.tensor([row["input_ids"] for row in rows_of(args, 1)])
        spec = WAYS[name][1] or ("dft" if WAYS[name][2].get("loss_type") else "uniform")
        fn = wt.build(wt.load(spec))
        logits, labels = exact(input_ids=ids).logits[:, :-1], ids[:, 1:]
        loss, _ = wt.weighted_cross_entropy(logits, labels, fn, step=1)
        loss.backward()
        seen = Gradient()
        host.add_callback(seen)
        host.train()
    assert seen.found is not None
    of = torch.cat([x.grad.flatten() for x in exact.parameters()])
    return float((seen.found - of).norm() / of.norm())


class Gradient(TrainerCallback):
    """Keeps the gradient of a step."""

    found: Tensor | None = None

    def on_pre_optimizer_step(self, *_args: object, **given: Any) -> None:  # noqa: ANN401 - a model
        """Keep it."""
        self.found = torch.cat([x.grad.flatten().double() for x in given["model"].parameters()])


def trainer(name: str, args: argparse.Namespace, folder: str, steps: int | None = None) -> Trainer:
    """Return the trainer of a way, ready to train a step more than are measured."""
    kind, spec, more = WAYS[name]
    steps = args.steps + 1 if steps is None else steps
    options = {"max_steps": steps, "per_device_train_batch_size": args.rows}
    options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False}
    options |= {"disable_tqdm": True, "activation_checkpointing": False, "max_grad_norm": 0.0}
    options |= {"dataloader_pin_memory": False, "train_sampling_strategy": "sequential"}
    options |= {"logging_strategy": "no"}
    of_weigh = more if spec else {}
    options |= {} if spec else more
    rows = rows_of(args, steps)
    if kind == "SFTTrainer":
        settings = SFTConfig(folder, max_length=args.length, **options)
        data, given = Dataset.from_list(rows), {"processing_class": tokenizer()}
        host = SFTTrainer(model(), settings, train_dataset=data, **given)
    else:
        settings = TrainingArguments(folder, **options)
        host = Trainer(model(), settings, train_dataset=rows, data_collator=collated)
    return weigh(host, spec, **of_weigh) if spec else host


def model() -> LlamaForCausalLM:
    """Return the model, always the same one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, use_cache=False, **sizes)
    return LlamaForCausalLM(config)


def rows_of(args: argparse.Namespace, steps: int) -> list[dict[str, list[int]]]:
    """Return the rows of some steps, which are all alike."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (args.rows, args.length), generator=draw).tolist()
    return [{"input_ids": x, "labels": x} for x in ids] * steps


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return rows of equal length as a batch."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of words that are numbers; the rows have tokens already."""
    words = {str(i): i for i in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="0"))  # noqa: S106 - no password
    names = {"pad_token": "0", "eos_token": "2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    raise SystemExit(main())

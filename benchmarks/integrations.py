"""What weights cost in other trainers: seconds and memory of a step, against the plain trainer.

    python benchmarks/integrations.py [--steps 6] [--rounds 3] [--rows 8] [--length 256]

A small Llama with a vocabulary of 16,384 trains on random tokens in Hugging Face's Trainer and in
TRL's SFTTrainer: plain, weighted, weighted without full logits, and with TRL's own flag for DFT.
Every run is a process of its own, forked after the imports; they take turns, and the least of the
rounds counts.  Seconds are of the processor, all of one core; memory is what the process grew by at
most.  Liger's fused loss needs a GPU, so it has no number here.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import tempfile
import time
from typing import TYPE_CHECKING

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from weighting.integrations.transformers import weigh

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import Any

    from torch import Tensor

VOCABULARY = 16384
WAYS = {
    "Trainer": ("Trainer", None, {}),
    "Trainer, uniform": ("Trainer", "uniform", {}),
    "Trainer, linupper": ("Trainer", "linupper", {}),
    "Trainer, linupper-x-mile": ("Trainer", "linupper-x-mile", {}),
    "Trainer, mile, fused=True": ("Trainer", "mile", {"fused": True}),
    "Trainer, linupper-x-mile, fused=True": ("Trainer", "linupper-x-mile", {"fused": True}),
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
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name in WAYS:
            found[name].append(measured(name, args))
    print("| trainer | seconds of a step | memory |\n|---|---|---|")
    for name, (kind, *_) in WAYS.items():
        (seconds, memory), (base, base_memory) = (least(found[x]) for x in (name, kind))
        print(f"| {name} | {seconds / base:.2f} | {memory / base_memory:.2f} |")
    seconds, memory = least(found["Trainer"])
    print(
        f"\n1.00 of Trainer: {seconds:.2f} s and {memory / 2**20:.0f} MiB for {args.rows} x "
        f"{args.length} tokens on one core; load {os.getloadavg()[0]:.1f}"
    )
    return 0


def least(found: list[tuple[float, float]]) -> tuple[float, ...]:
    """Return the least seconds, and the least memory."""
    return tuple(min(values) for values in zip(*found, strict=True))


def measured(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return seconds of a step and bytes of a way to train, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=train, args=(name, args, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def train(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Train, and send what it took."""
    kind, spec, more = WAYS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, use_cache=False, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, VOCABULARY, (args.rows, args.length)).tolist()
    rows = [{"input_ids": x, "labels": x} for x in ids] * (args.steps + 1)
    clock, before = Clock(), peak()
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": args.steps + 1, "per_device_train_batch_size": args.rows}
        options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False}
        options |= {"disable_tqdm": True, "activation_checkpointing": False}
        options |= {"dataloader_pin_memory": False}
        if kind == "SFTTrainer":
            settings = SFTConfig(folder, max_length=args.length, **options, **more)
            data, given = Dataset.from_list(rows), {"processing_class": tokenizer()}
            host = SFTTrainer(model, settings, train_dataset=data, **given)
        else:
            settings = TrainingArguments(folder, **options)
            host = Trainer(model, settings, train_dataset=rows, data_collator=collated)
        host.add_callback(clock)
        if spec:
            weigh(host, spec, **more)
        host.train()
    taken = sorted(b - a for a, b in zip(clock.at[1:], clock.at[2:], strict=False))
    pipe.send((taken[len(taken) // 2], peak() - before))


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

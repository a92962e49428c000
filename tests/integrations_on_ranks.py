"""Trains weighted models of Hugging Face's on this rank, by the Trainer and by plain loops.

    accelerate launch ... integrations_on_ranks.py OUT

OUT gets a file for each run and rank: the parameters, and the losses as they were logged.
"""

import os
import sys
from pathlib import Path

import tiny_models as tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import GradientState, PartialState
from accelerate.utils import DistributedType
from tiny_trainer import ACCUMULATED, BATCH, STEPS, trainer
from torch.distributed.tensor import DTensor

from weighting.integrations.transformers import weigh, weigh_model

RANKS = 2
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def main():
    """Train in every way."""
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if SHARDED:
        # Accelerate shards over accelerators alone: here it takes ranks on CPUs for such.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    runs = {
        "loop": lambda: looped("linupper-x-mile"),
        "loop, fused": lambda: looped("linupper-x-mile", fused=True),
        "loop, padding-free": lambda: looped("linupper-x-mile", made=tiny.flattened),
        "linupper-x-mile": lambda: trained(out / "twice", "linupper-x-mile"),
        "uniform": lambda: trained(out / "once", "uniform"),
        "plain": lambda: trained(out / "plain", None),
        "group-dro": lambda: trained(out / "whole", "group-dro", saved=True),
        "resumed": lambda: trained(out / "whole", "group-dro", saved=True, resumed=True),
    }
    for name, run in runs.items():
        parameters, losses = run()
        torch.save({"parameters": whole(parameters), "losses": losses}, out / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def whole(parameters):
    """Return parameters by name, those that are sharded in one piece."""
    plain = {name.removeprefix("module."): x.detach() for name, x in parameters}
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in plain.items()}


def trained(folder, spec, *, saved=False, resumed=False):
    """Train with the Trainer, two microbatches of unequal length a step; save and record."""
    options = {"save_strategy": "steps", "save_steps": 1} if saved else {}
    rows = tiny.rows(RANKS * STEPS * ACCUMULATED * BATCH)
    host = trainer(folder, rows=rows, use_cpu=not SHARDED, **options)
    if spec is not None:
        weigh(host, spec, domains=tiny.DOMAINS, record=int(saved))
    host.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
    losses = [line["loss"] for line in host.state.log_history if "loss" in line]
    return host.model.named_parameters(), losses


def looped(spec, *, fused=False, made=tiny.padded):
    """Train in a loop that knows nothing of how many labels, or tokens, other ranks have."""
    GradientState._reset_state()
    accelerator = Accelerator(cpu=not SHARDED)
    inner = tiny.model()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    given = {"domains": tiny.DOMAINS, "fused": fused}
    if fused:  # the output layer is looked at, and so before it is sharded
        weights = weigh_model(inner, spec, optimizer, **given)
        model, optimizer = accelerator.prepare(inner, optimizer)
    else:
        model, optimizer = accelerator.prepare(inner, optimizer)
        weights = weigh_model(accelerator.unwrap_model(model), spec, optimizer, **given)
    losses = []
    for step in range(STEPS):
        at = (RANKS * step + accelerator.process_index) * BATCH
        batch = made(tiny.rows(RANKS * STEPS * BATCH)[at : at + BATCH])
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(weights.read()["weighted_loss"])
    return model.named_parameters(), losses


if __name__ == "__main__":
    main()

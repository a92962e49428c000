"""Trains weighted models of Hugging Face's on this rank, by the Trainer and by plain loops.

    torchrun ... integrations_on_ranks.py OUT

OUT gets a file for each way and rank: the parameters, and the losses as they were logged.
"""

import os
import sys
from pathlib import Path

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from weighting.integrations.transformers import weigh, weigh_model

STEPS, BATCH = 2, 3
SPECS = ("linupper-x-mile", "group-dro")


def main():
    """Train in every way; the first starts the process group, which the others find."""
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for train in (by_the_trainer, by_ddp, by_fsdp, by_ddp_fused, by_fsdp_fused):
        for spec in SPECS:
            parameters, losses = train(spec, out)
            name = f"{train.__name__}-{spec}-{rank}.pt"
            torch.save({"parameters": whole(parameters), "losses": losses}, out / name)
    dist.destroy_process_group()


def whole(parameters):
    """Return parameters by name, those that are sharded in one piece."""
    plain = {name.removeprefix("module."): x.detach() for name, x in parameters}
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in plain.items()}


def by_the_trainer(spec, out):
    """Train with the Trainer, which wraps the model in DDP."""
    args = TrainingArguments(
        str(out / spec),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=STEPS,
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        remove_unused_columns=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    rows = tiny.rows(2 * STEPS * BATCH)
    host = Trainer(tiny.model(), args, train_dataset=rows, data_collator=collated)
    weigh(host, spec, domains=tiny.DOMAINS, record=1).train()
    losses = [line["loss"] for line in host.state.log_history if "loss" in line]
    return host.model.named_parameters(), losses


def collated(rows):
    """Pad rows to a batch."""
    batch = tiny.padded([{**row, "domain": "code"} for row in rows])
    return {name: x for name, x in batch.items() if name != "domain"}


def by_ddp(spec, _out):
    """Train in a loop, with DDP."""
    return looped(spec, DistributedDataParallel)


def by_fsdp(spec, _out):
    """Train in a loop, with sharded parameters."""
    return looped(spec, fully_shard)


def by_ddp_fused(spec, _out):
    """Train in a loop, with DDP and without full logits."""
    return looped(spec, DistributedDataParallel, fused=True)


def by_fsdp_fused(spec, _out):
    """Train in a loop, with sharded parameters and without full logits."""
    return looped(spec, fully_shard, fused=True)


def looped(spec, wrap, *, fused=False):
    """Train in a loop that knows nothing of how many labels other ranks have."""
    inner = tiny.model()
    weights = weigh_model(inner, spec, domains=tiny.DOMAINS, fused=fused)
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        weights.begin_step(step + 1)
        at = (2 * step + dist.get_rank()) * BATCH
        rows = tiny.rows(2 * STEPS * BATCH)[at : at + BATCH]
        optimizer.zero_grad()
        model(**tiny.padded(rows)).loss.backward()
        weights.end_step()
        optimizer.step()
        losses.append(weights.read()["weighted_loss"])
    return model.named_parameters(), losses


if __name__ == "__main__":
    main()

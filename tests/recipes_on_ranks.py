"""Trains by each recipe of docs/other-trainers.md on this rank, and writes down what came of it.

    torchrun ... recipes_on_ranks.py OUT

OUT gets one file per recipe and rank, `<recipe><rank>.pt`: the model's state, the weighting's
included, its last gradients if the recipe leaves any, and how many labels the rank had each step.
"""

import os
import sys
from pathlib import Path

import recipes
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from titan_integration.collectives import OverRanks

STEPS = 4
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


def main():
    """Train four steps of the same batches, cut over however many ranks there are."""
    for train in (ranks, sharded, trainer, lightning):  # the first starts the process group
        names = recipes.started("doremi-x-linupper-x-mile")
        names["rows"] = names["rows"][: recipes.BATCH * STEPS]
        counts = []
        models = watched(names, counts)
        train(names, Path(sys.argv[1]))
        (model,) = models
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        found = {"state": whole(model.state_dict()), "gradients": whole(gradients)}
        name = f"{train.__name__}{os.environ['RANK']}.pt"
        torch.save({**found, "counts": counts}, Path(sys.argv[1]) / name)
    dist.destroy_process_group()


def whole(tensors):
    """Return tensors by name, those that are sharded in one piece."""
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in tensors.items()}


def watched(names, counts):
    """Have new models start alike, return the list they go to, and count the labels they meet."""
    new_model, models = names["new_model"], []

    def note(_module, _args, kwargs):
        counts.append(int((kwargs["labels"][:, 1:] != -100).sum()))

    def new(collectives):
        torch.manual_seed(0)
        models.append(new_model(collectives))
        models[-1].register_forward_pre_hook(note, with_kwargs=True)
        return models[-1]

    names["new_model"] = new
    return models


def ranks(names, _out):
    """Run the recipe as it stands; it starts the process group, which the others find."""
    recipes.define("loop", names)
    recipes.run("ranks", names)


def sharded(names, _out):
    """Train with sharded parameters and Adam, as the recipe does with DDP."""
    recipes.define("loop", names)
    recipes.define("ranks", names)
    model = fully_shard(names["new_model"](OverRanks(dist.group.WORLD)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine = names["DistributedSampler"](names["rows"])
    batches = names["DataLoader"](names["rows"], batch_size=recipes.BATCH // RANKS, sampler=mine)
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        model(**batch, step=step)["loss"].backward()
        optimizer.step()


def trainer(names, out):
    """Train with the Trainer for an epoch."""
    recipes.define("trainer", names)
    options = {"per_device_train_batch_size": recipes.BATCH // RANKS, "save_strategy": "no"}
    recipes.hosted_by_trainer(names, out, names["rows"], **options).train()


def lightning(names, out):
    """Train with Lightning for an epoch."""
    recipes.define("loop", names)
    recipes.define("lightning", names)
    options = {"max_epochs": 1, "strategy": "ddp", "enable_checkpointing": False}
    host, module = recipes.hosted_by_lightning(names, out, devices=RANKS, **options)
    host.fit(module, names["DataLoader"](names["rows"], batch_size=recipes.BATCH // RANKS))


if __name__ == "__main__":
    main()

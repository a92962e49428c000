"""Trains one small model on one source of data after the other, in one process.

    torchrun ... train_data.py OUT CASES [torchtitan flags]

Each trains the steps that the flags say, and then goes on from the checkpoint of step 2. CASES is
a JSON map from a name to fields of the loader's config, and OUT gets one from it to what came of
it, or to the status and the words that the run ended with. `MEMORY` names a folder to be copied to
`memory://data`.
"""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger

import weighting as wt
from titan_integration.host import user_errors
from weighting.build import plan_of

STOP = 2


def main() -> None:
    """Train on all, and write down what happened."""
    out, cases, *flags = sys.argv[1:]
    init_logger()
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem("memory").put(f"{os.environ['MEMORY']}/", "/data", recursive=True)
    trainer = ConfigManager().parse_args(flags).build()
    begin, save = beginning(trainer), trainer.checkpointer.save
    trainer.checkpointer.save = lambda step, last_step: save(step)  # noqa: ARG005 -- none needs it
    found, said = {}, []
    user_errors._write = said.append
    for number, (name, data) in enumerate(json.loads(Path(cases).read_text()).items()):
        folder = Path(trainer.config.dump_folder).parent / str(number)
        said.clear()
        try:
            found[name] = [trained(trainer, begin, folder, data, at) for at in (-1, STOP)]
        except SystemExit as end:
            found[name] = [end.code, "".join(said)]
    Path(out).write_text(json.dumps(found))
    trainer.close()


def beginning(trainer):
    """Return a function that makes a trainer what it was."""
    parameters = [p for part in trainer.model_parts for p in part.parameters()]
    first = [p.detach().clone() for p in parameters]
    rules = copy.deepcopy([x.state_dict() for x in trainer.optimizers])
    schedule = copy.deepcopy(trainer.lr_schedulers.state_dict())

    @torch.no_grad()
    def begin():
        for p, values in zip(parameters, first, strict=True):
            p.copy_(values)
        for optimizer, state in zip(trainer.optimizers, rules, strict=True):
            optimizer.zero_grad()  # else torch takes no state of it
            optimizer.load_state_dict(state)
        trainer.lr_schedulers.load_state_dict(schedule)
        trainer.step, trainer.begun = 0, False

    return begin


def trained(trainer, begin, folder, data, load_step):
    """Train on a source of data, and return tokens, labels and the loss of each step."""
    begin()
    config = trainer.config
    config.dump_folder = str(folder)
    config.checkpoint.load_step = load_step
    trainer.checkpointer.folder = f"{folder}/checkpoint"
    with user_errors.exit_on_user_error():
        trainer.dataloader = replace(config.dataloader, **data).build(
            dp_world_size=1,
            dp_rank=0,
            tokenizer=trainer.tokenizer,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
        )
    trainer.checkpointer.states["dataloader"] = trainer.dataloader
    trainer._join(config, plan_of(wt.load("linupper")))
    batches, losses = [], []
    take, log = type(trainer).post_dataloading_process, trainer.metrics_processor.log

    def note_batch(given, labels):
        batches.append([given["input"].tolist(), given["domain_ids"].tolist(), labels.tolist()])
        return take(trainer, given, labels)

    def note_loss(step, loss, *args, **kwargs):
        losses.append([step, loss])
        log(step, loss, *args, **kwargs)

    trainer.post_dataloading_process, trainer.metrics_processor.log = note_batch, note_loss
    try:
        trainer.train()
    finally:
        trainer.metrics_processor.log = log
    return {"batches": batches, "losses": losses}


if __name__ == "__main__":
    main()

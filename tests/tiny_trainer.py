"""Hugging Face's Trainer of a tiny model, as tests of weights in it set it up."""

import tiny_models as tiny
from transformers import Trainer, TrainingArguments

STEPS, BATCH, ACCUMULATED = 2, 3, 2
USUAL = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
"""Plain gradient descent over rows in their order."""


def pad(rows):
    """Pad rows to a batch, as collators do: what is no column of theirs is not theirs."""
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    batch = tiny.padded([{**row, "domain": "code"} for row in rows])
    return {name: x for name, x in batch.items() if name != "domain"}


def trainer(
    folder,
    kind=Trainer,
    model="llama",
    collator=pad,
    rows=None,
    arguments=TrainingArguments,
    callbacks=(),
    **options,
):
    """Return a trainer of a tiny model in the usual way, but for its options."""
    rows = tiny.rows(STEPS * BATCH * ACCUMULATED) if rows is None else rows
    return kind(
        tiny.model(model),
        arguments(str(folder), **{**USUAL, **options}),
        train_dataset=rows,
        eval_dataset=tiny.rows(4),
        data_collator=collator,
        callbacks=[*callbacks],
    )

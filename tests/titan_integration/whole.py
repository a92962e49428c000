"""A model as the trainer builds it, whole and without any parallelism, to compare with."""

import torch

from titan_integration.host import cpu
from titan_integration.loss.reference_model import find_checkpoint, load_model


def whole_model(config, seq_len, checkpoint=None):
    """Return a config's model for rows of a length, with a checkpoint's parameters if given one."""
    cpu.prepare_config(config)
    config.training.seq_len = seq_len
    config.model_spec.model.update_from_config(config=config)
    model = config.model_spec.model.build()
    with torch.no_grad():
        model.init_weights()
    if checkpoint is not None:
        load_model(model, find_checkpoint(str(checkpoint)), "the config's model")
    return model

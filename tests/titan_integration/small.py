"""The debug model with two layers of width 64, nothing of it computed twice: `--module=small`."""

from titan_integration import config_registry
from titan_integration.paper import resized
from titan_integration.trainer.trainer import WeightedTrainer


def debugmodel() -> WeightedTrainer.Config:
    """Return its config."""
    return shrunk(config_registry.llama3_debugmodel())


def shrunk(config):
    """Make the model of a config small, the host's or ours; return the config."""
    config.model_spec = resized(config.model_spec, layers=2, heads=4, width=64)
    config.activation_checkpoint = None
    return config

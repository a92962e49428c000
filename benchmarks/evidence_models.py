"""The model of `evidence_long.py`, and the recipe of Sow et al., ICLR 2025, at its size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

from titan_integration import config_registry
from titan_integration.paper import resized

if TYPE_CHECKING:
    from titan_integration.trainer.trainer import WeightedTrainer


def llama3_1m() -> WeightedTrainer.Config:
    """Two layers of width 128, 1.05 million parameters with a vocabulary of 2,048.

    Table 7's schedule: 500 steps up, a cosine down to a fifth, weight decay 0.01.  The rate is
    higher than its 5e-4, as the model is six times narrower than theirs.
    """
    config = config_registry.llama3_debugmodel()
    assert config.model_spec is not None
    small = resized(config.model_spec, layers=2, heads=4, width=128)
    config.model_spec = replace(small, flavor="1M")
    config.optimizer = default_adamw(lr=2e-3, weight_decay=0.01)
    config.lr_scheduler = LRSchedulersContainer.Config(
        warmup_steps=500, decay_type="cosine", min_lr_factor=0.2
    )
    config.activation_checkpoint = None  # the same numbers, in less time
    return config

"""Any config of the host's trainer, with a weighting plugged in."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.config import Configurable
from torchtitan.trainer import Trainer

from titan_integration.host import cpu
from titan_integration.loss.configs import weighted_loss_config
from titan_integration.observe.metrics import WeightedMetricsProcessor
from titan_integration.observe.validation import DomainValidator
from titan_integration.state.checkpoint import ResumingCheckpointManager
from titan_integration.trainer.config import WeightingConfig
from titan_integration.trainer.trainer import WeightedTrainer

if TYPE_CHECKING:
    from pathlib import Path

    import weighting as wt

C = TypeVar("C", bound=Configurable.Config)


def with_weighting(
    config: Trainer.Config, spec: str | Path | wt.Spec = ""
) -> WeightedTrainer.Config:
    """Return a trainer config with a weighting plugged in; nothing else changes.

    Args:
        config: Any config of the host's own `Trainer` that trains a language model with its cross
            entropy; or one that has a weighting, also a subclass of yours, which keeps its class
            and its other settings.
        spec: A spec file, the name of a shipped spec, arrow text, or a spec;
            `--weighting.spec` on the command line takes its place.

    Raises:
        ValueError: The config builds another trainer, or its loss or metrics cannot be weighted.
    """
    if isinstance(config, WeightedTrainer.Config):
        weighted = replace(config)
        weighted.weighting = replace(config.weighting, spec=str(spec) or config.weighting.spec)
    else:
        _refuse_other_trainer(config)
        weighted = _recast(config, WeightedTrainer.Config)
        weighted.weighting = WeightingConfig(spec=str(spec))
    weighted.loss = weighted_loss_config(config.loss)
    if type(config.metrics) is MetricsProcessor.Config:
        weighted.metrics = _recast(config.metrics, WeightedMetricsProcessor.Config)
    elif not isinstance(config.metrics, WeightedMetricsProcessor.Config):
        msg = (
            f"cannot add the weighting's numbers to {_full_name(type(config.metrics))}; use "
            "MetricsProcessor.Config, or make yours a subclass of "
            "titan_integration.observe.metrics.WeightedMetricsProcessor"
        )
        raise ValueError(msg)
    if type(config.checkpoint) is CheckpointManager.Config:
        weighted.checkpoint = _recast(config.checkpoint, ResumingCheckpointManager.Config)
    if type(config.validator) is Validator.Config:
        weighted.validator = _recast(config.validator, DomainValidator.Config)
    if cpu.use_cpu():
        cpu.prepare_config(weighted)
    return weighted


def _refuse_other_trainer(config: object) -> None:
    """Refuse a config of another trainer than the host's own, which the weighted one would replace.

    Raises:
        ValueError: Names the config and what to do.
    """
    if type(config) is Trainer.Config:
        return
    found = _full_name(type(config))
    mend = "start from a config of torchtitan.trainer.Trainer, as llama3_8b() returns"
    if not isinstance(config, Trainer.Config):
        why = "it is no config of a torchtitan trainer"
        if callable(config):
            found = getattr(config, "__qualname__", found)
            why, mend = "it is not a config yet", "call the function, as in with_weighting(f())"
    elif (owner := config._owner or Trainer) is Trainer:  # noqa: SLF001 - build() reads it too
        why = "it has fields or checks of its own, which would be lost"
        mend += ", and set its fields to these"
    else:
        why = f"it builds {_full_name(owner)}, which a weighting would replace"
        mend += f", or make a trainer of yours inherit from WeightedTrainer, not {owner.__name__}"
    msg = f"cannot weight {found}: {why}; {mend}"
    raise ValueError(msg)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _recast(config: Configurable.Config, cls: type[C]) -> C:
    """Return a config of a subclass with the same values."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})

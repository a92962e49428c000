"""What a weighted run is told: the host's config, and which weighting to train with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtitan.trainer import Trainer


@dataclass(kw_only=True, slots=True)
class WeightingConfig:
    """Which weighting to train with."""

    spec: str = ""
    """A spec file, the name of a shipped spec, or arrow text."""

    mixture: str = ""
    """A spec with `apply: sampling`, a file or a name: training data is drawn in its proportions
    of the domains, whatever the other spec weighs."""

    reference: str = ""
    """Checkpoint whose loss is ref_loss: a folder step-N, or one of them, of which the latest is
    taken. `ema:0.999`: a moving average of the model itself, saved with it. Several have names, as
    in `old=runs/a/checkpoint,base=runs/b/checkpoint`, for specs that read ref_loss(old). Empty:
    ref_loss comes from a column of that name in the data, if a spec reads it."""

    allow_plugins: bool = False
    """Import the modules the spec names under plugins:, which runs their code."""

    allow_changed_spec: bool = False
    """Resume a checkpoint of another spec, starting the weighting's state afresh."""

    record: str = ""
    """What to write down of single sequences, below the dump folder in weighting/record.
    `every=10`: of each sequence of every tenth step its domain, valid tokens, and the means of its
    losses, of the other signals that the spec reads, and of its weights. `every=10,documents=8`:
    of the first 8 documents of each sequence as well. `every=10,tokens=64`: of 64 tokens drawn
    from each of these steps as well. `weighting replay` reads it."""

    agree_every: int = 0
    """Check every so many steps that all ranks weigh as one, and end the run if they do not: the
    same spec, step, state and data, each its own sequences, weights of mean one. 0: at the start
    only."""


@dataclass(kw_only=True, slots=True)
class WeightedConfig(Trainer.Config):
    """The host's fields, and `weighting`."""

    weighting: WeightingConfig = field(default_factory=WeightingConfig)

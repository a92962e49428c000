"""The host's own configs of text models, with a weighting plugged in and data that is there."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.hf_datasets.text_datasets import ChatDataLoader, HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.trainer.plug_in import with_weighting

if TYPE_CHECKING:
    from titan_integration.trainer.trainer import WeightedTrainer

_OWN_FILES = "tests/assets/"
"""Where the host's debug configs look for files that only its repository has."""


def stock_config(family: str, name: str) -> WeightedTrainer.Config:
    """Return the config that a model of the host's has under this name, weighted.

    Text is read by the loader that knows domains: the built-in text where the host has files of its
    tests, and C4 as the host does otherwise.  Other loaders, as those for chats, stay.

    Raises:
        ValueError: It cannot be built on this machine, or it cannot be weighted.
    """
    try:
        config = getattr(import_module(f"torchtitan.models.{family}.config_registry"), name)()
    except (ImportError, ValueError) as error:
        msg = f"--config {name}: the host cannot build it here: {error}"
        raise ValueError(msg) from error
    try:
        return weighted(on_data_that_is_there(config))
    except ValueError as error:
        msg = f"--config {name}: {error}"
        raise ValueError(msg) from error


def weighted(config: object) -> WeightedTrainer.Config:
    """Return a config with a weighting plugged in, unless it has one.

    Raises:
        ValueError: It cannot be weighted.
    """
    from titan_integration.trainer.trainer import WeightedTrainer  # noqa: PLC0415 - imports us

    if isinstance(config, WeightedTrainer.Config):
        return config
    return with_weighting(config)  # pyrefly: ignore[bad-argument-type]


def on_data_that_is_there(config: Trainer.Config) -> Trainer.Config:
    """Read text through the loader that knows domains; a debug model reads the built-in text."""
    if not isinstance(config, Trainer.Config):
        return config
    if _is_missing(config.hf_assets_path):
        config.hf_assets_path = str(ensure_tokenizer())
    c4 = DomainTextDataLoader.Config(
        dataset="allenai/c4", hf_name="en", domain_column="", streaming=True
    )
    stock = config.dataloader
    if isinstance(stock, ChatDataLoader.Config):
        _refuse_missing_chats(stock)
    validation = replace(c4, split="validation", infinite=False)
    if isinstance(stock, HuggingFaceTextDataLoader.Config):
        config.dataloader = c4
        if stock.dataset == "c4_test":
            config.dataloader = DomainTextDataLoader.Config()
            validation = DomainTextDataLoader.Config(split="validation", infinite=False)
    if isinstance(config.validator.dataloader, HuggingFaceTextDataLoader.Config):
        config.validator.dataloader = validation
    return config


def _is_missing(file: object) -> bool:
    """Tell whether this is a file of the host's tests, outside of the host's repository."""
    name = str(file).removeprefix("./")
    return name.startswith(_OWN_FILES) and not Path(name).exists()


def _refuse_missing_chats(loader: ChatDataLoader.Config) -> None:
    """Refuse chats that are nowhere.

    Raises:
        ValueError: They are those of the host's tests.
    """
    files = loader.load_dataset_kwargs.get("data_files")
    if _is_missing(files):
        msg = (
            f"it has chats of the host's own tests, {files}, which only its repository has; take "
            "another config, such as llama3_debugmodel, and --data FILE with 'messages', or make "
            "a config of your own with the host's ChatDataLoader and --module"
        )
        raise ValueError(msg)

r"""Every config of the host's text models, with a weighting plugged in, and a paper's own.

    torchrun ... -m torchtitan.train --module titan_integration --config llama3_debugmodel \
        --weighting.spec specs/linupper.yaml

Debug models and the proxy train on text that every Python has; the others read C4, as the host's
do.  Below are those that differ from the host's; what else it has is found by name.  `paper_*` are
those of Sow et al., ICLR 2025, `mile_*` those of Su et al., 2024: what they need, and what differs
from the authors' runs, is in `paper.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3 import config_registry as stock
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import logger

from titan_integration.commands.configs import family_of
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.paper import on_fineweb, on_pile, on_slimpajama, resized
from titan_integration.trainer.plug_in import with_weighting
from titan_integration.trainer.stock import on_data_that_is_there, stock_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchtitan.trainer import Trainer

    from titan_integration.trainer.trainer import WeightedTrainer


def llama3_debugmodel() -> WeightedTrainer.Config:
    """Six layers of width 256, vocabulary 2,048, on the built-in text."""
    config = stock.llama3_debugmodel()
    config.hf_assets_path = str(ensure_tokenizer())
    config.dataloader = DomainTextDataLoader.Config()
    config.validator.dataloader = DomainTextDataLoader.Config(split="validation", infinite=False)
    return with_weighting(config)


def llama3_proxy() -> WeightedTrainer.Config:
    """Four layers of width 128, otherwise the debug model: to find a data mixture on a CPU."""
    config = llama3_debugmodel()
    assert config.model_spec is not None
    config.model_spec = replace(
        resized(config.model_spec, layers=4, heads=4, width=128), flavor="proxy"
    )
    return config


def llama3_1b() -> WeightedTrainer.Config:
    """Llama 3.2 1B: the host's 8B settings with its 1B model."""
    return _on_c4(_resized("1B", "Llama-3.2-1B"))


def llama3_3b() -> WeightedTrainer.Config:
    """Llama 3.2 3B: the host's 8B settings with its 3B model."""
    return _on_c4(_resized("3B", "Llama-3.2-3B"))


def llama3_8b() -> WeightedTrainer.Config:
    """Llama 3.1 8B, the host's settings."""
    return _on_c4(stock.llama3_8b())


def llama3_70b() -> WeightedTrainer.Config:
    """Llama 3.1 70B, the host's settings."""
    return _on_c4(stock.llama3_70b())


def llama3_405b() -> WeightedTrainer.Config:
    """Llama 3.1 405B, the host's settings; without float8 where torchao or the GPU cannot."""
    try:
        return _on_c4(stock.llama3_405b())
    except (ImportError, ValueError) as error:
        logger.warning(f"llama3_405b without float8 layers: {error}")
    config = stock.llama3_70b()
    config.model_spec = model_registry("405B")
    config.hf_assets_path = "./assets/hf/Llama-3.1-405B"
    config.optimizer = default_adamw(lr=8e-5)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=600)
    config.training = TrainingConfig(local_batch_size=2, seq_len=8192, steps=3000)
    config.compile = CompileConfig(enable=True, enable_async_tensor_parallel=True)
    return _on_c4(config)


def paper_124m() -> WeightedTrainer.Config:
    """Table 7, Mini: GPT-2's 12 layers, 12 heads; 20,000 steps of 32 rows of 512 tokens.

    Differs: Llama's blocks; the text that validates (`paper.py` has all of it).
    """
    return on_slimpajama("124M")


def paper_210m() -> WeightedTrainer.Config:
    """Table 7, Small: 24 layers, 16 heads; 20,000 steps of 48 rows of 512 tokens.

    Differs: as `paper_124m`.
    """
    return on_slimpajama("210M")


def paper_300m() -> WeightedTrainer.Config:
    """Table 7, Medium: 36 layers, 24 heads; 20,000 steps of 48 rows of 512 tokens.

    Differs: as `paper_124m`.
    """
    return on_slimpajama("300M")


def paper_1p4b() -> WeightedTrainer.Config:
    """Table 7, Llama 1.4B: 24 layers, 16 heads; 100,000 steps of 128 rows of 8,192 tokens.

    Differs: the order in which FineWeb is read, and what of it (`paper.py` has all of it).
    """
    return on_fineweb("1.4B")


def paper_7b() -> WeightedTrainer.Config:
    """Table 7, Llama 7B: 32 layers, 32 heads; 170,000 steps of 128 rows of 8,192 tokens.

    Differs: as `paper_1p4b`.
    """
    return on_fineweb("7B")


def mile_468m() -> WeightedTrainer.Config:
    """MiLe's 468M: 24 layers, 16 heads; 100,000 steps of 1,024 rows of 1,024 tokens of the Pile.

    Differs: what of the Pile, and in which mixture (`paper.py` has all of it).
    """
    return on_pile("468M")


def mile_1p2b() -> WeightedTrainer.Config:
    """MiLe's 1.2B: 16 layers, 8 heads; 100,000 steps of 1,024 rows of 1,024 tokens of the Pile.

    Differs: as `mile_468m`.
    """
    return on_pile("1.2B")


def mile_6p7b() -> WeightedTrainer.Config:
    """MiLe's 6.7B: 32 layers, 32 heads; 25,000 steps of 2,048 rows of 2,048 tokens of the Pile.

    Differs: as `mile_468m`.
    """
    return on_pile("6.7B")


def _resized(flavor: str, assets: str) -> Trainer.Config:
    config = stock.llama3_8b()
    config.model_spec = model_registry(flavor)
    config.hf_assets_path = f"./assets/hf/{assets}"
    vocab = decoder_vocab_size(config.model_spec)
    config.loss.loss_fn.global_vocab_size = vocab  # pyrefly: ignore[missing-attribute]
    return config


def _on_c4(config: Trainer.Config) -> WeightedTrainer.Config:
    return with_weighting(on_data_that_is_there(config))


def __getattr__(name: str) -> Callable[[], WeightedTrainer.Config]:
    """Return the host's own config function of this name, its config weighted."""
    if family := family_of(name):
        return partial(stock_config, family, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

"""torchtitan's own trainer and loss on our data: what a weighted run is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass

from small import shrunk
from torch import Tensor
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.llama3 import config_registry as stock
from torchtitan.trainer import Trainer

from titan_integration import config_registry
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.host import cpu
from titan_integration.trainer.plug_in import with_weighting
from titan_integration.trainer.trainer import WeightedTrainer


class PlainTextDataLoader(DomainTextDataLoader):
    """The same rows without domains, which the host's trainer would hand to the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(DomainTextDataLoader.Config):
        """The same fields."""

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the rows without their domains."""
        for inputs, labels in super().__iter__():
            yield {name: value for name, value in inputs.items() if name != "domain_ids"}, labels


class CpuTrainer(Trainer):
    """The host's trainer, made to run on CPU."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """The same fields."""

    def __init__(self, config: Config) -> None:
        """Build it between the two halves of what a CPU needs."""
        cpu.use_cpu()
        cpu.prepare_config(config)
        super().__init__(config)
        cpu.fix_fsdp(self.model_parts)


def debugmodel() -> Trainer.Config:
    """The host's debug model, small, with its trainer and loss, on our data."""
    config = shrunk(stock.llama3_debugmodel())
    config.hf_assets_path = str(ensure_tokenizer())
    config.dataloader = PlainTextDataLoader.Config()
    cpu.use_cpu()
    cpu.prepare_config(config)
    config.validator.dataloader = PlainTextDataLoader.Config(split="validation")
    values = {name: getattr(config, name) for name in Trainer.Config.__slots__}
    return CpuTrainer.Config(**values)


def full_logits() -> WeightedTrainer.Config:
    """The weighted debug model with the loss over full logits instead of chunks."""
    config = shrunk(stock.llama3_debugmodel())
    chunked = config_registry.llama3_debugmodel()
    config.hf_assets_path = chunked.hf_assets_path
    config.dataloader = chunked.dataloader
    config.loss = CrossEntropyLoss.Config(global_vocab_size=2048)
    return with_weighting(config)

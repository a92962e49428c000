"""A Llama of 45,000 parameters over bytes, so that its checkpoints are small and last.

Its tokenizer has no merges, so it is the same in every version of Python.
"""

from dataclasses import replace

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from titan_integration import config_registry
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.paper import resized
from titan_integration.trainer.plug_in import with_weighting
from titan_integration.trainer.trainer import WeightedTrainer

BYTES = 258
"""256 bytes, begin and end of text."""


def byte_llama() -> WeightedTrainer.Config:
    """Return the debug model's config with one layer of width 32 and a vocabulary of bytes."""
    config = config_registry.llama3_debugmodel()
    model = replace(
        config.model_spec.model,
        vocab_size=BYTES,
        tok_embeddings=replace(config.model_spec.model.tok_embeddings, num_embeddings=BYTES),
        lm_head=replace(config.model_spec.model.lm_head, out_features=BYTES),
    )
    config.model_spec = resized(
        replace(config.model_spec, model=model), layers=1, heads=2, width=32
    )
    config.hf_assets_path = str(ensure_tokenizer(BYTES))
    plain = CrossEntropyLoss.Config(global_vocab_size=BYTES)
    config.loss = ChunkedLossWrapper.Config(loss_fn=plain)
    return with_weighting(config)

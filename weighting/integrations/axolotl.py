"""Weights in axolotl.

In its YAML:

    plugins: [weighting.integrations.axolotl.WeightingPlugin]
    weighting: linupper
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin  # pyrefly: ignore[missing-import]
from pydantic import BaseModel, field_validator

from weighting.integrations.hook import read_spec
from weighting.integrations.transformers import weigh
from weighting.integrations.versions import need

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["WeightingArgs", "WeightingPlugin"]


class WeightingArgs(BaseModel):
    """What the plugin adds to axolotl's YAML.

    Attributes:
        weighting: A spec file, the name of a spec that comes with the package, or text.
        weighting_domains: Names of the domains.
        weighting_domain_column: The column that holds them.
        weighting_record: Every so many steps means of each sequence are recorded; 0 for never.
        weighting_fused: Whether the loss is made from hidden states, for memory.
    """

    weighting: str
    weighting_domains: list[str] | None = None
    weighting_domain_column: str = "domain"
    weighting_record: int = 0
    weighting_fused: bool = False

    @field_validator("weighting")
    @classmethod
    def _is_a_spec(cls, text: str) -> str:
        read_spec(text)  # says what is wrong before a model is loaded
        return text


class WeightingPlugin(BasePlugin):
    """Weighs the trainer that axolotl has made."""

    def get_input_args(self) -> str:
        """Return where axolotl finds what the YAML may hold."""
        return "weighting.integrations.axolotl.WeightingArgs"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:  # noqa: ANN401
        """Weigh the trainer.

        Raises:
            ValueError: The trainer would not use the weighted loss: as `weigh`.
            ImportError: axolotl is too old.
        """
        need("axolotl")
        weigh(
            trainer,
            cfg.weighting,
            domains=cfg.weighting_domains,
            domain_column=cfg.weighting_domain_column or "domain",
            record=cfg.weighting_record or 0,
            fused=bool(cfg.weighting_fused),
        )

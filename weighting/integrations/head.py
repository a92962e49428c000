"""The output layer of a Transformers model, which in training hands on hidden states, not logits.

The layer's `forward` is replaced on the layer itself.  In a pass that is weighed it keeps its input
and returns a stand-in of the logits' shape, which takes no memory.  The loss gets the stand-in and
takes the kept input for it.  A stand-in that arrives is the proof that the model did nothing to its
logits on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_AFTER_THE_LAYER = {
    "final_logit_softcapping": "a soft cap",
    "logits_soft_cap": "a soft cap",
    "logit_scale": "a scale",
    "logits_scaling": "a scale",
    "lm_head_multiplier": "a scale",
}
"""Settings of models that change the logits after the output layer, and what they are."""


class KeptHead:
    """Keeps the hidden states that an output layer is given, in place of its logits.

    Attributes:
        layer: The layer.
    """

    def __init__(self, owner: Any, active: Callable[[], bool]) -> None:  # noqa: ANN401 - any model
        """Replace the layer's forward.

        Args:
            owner: The model whose layer it is.
            active: Says whether the pass at hand is weighed; otherwise the layer makes logits.

        Raises:
            ValueError: The logits are more than a plain linear layer of the hidden states.
        """
        self.layer = _plain_layer(owner)
        self._name = type(owner).__name__
        self._active = active
        self._kept: tuple[Tensor, Tensor] | None = None
        vars(self.layer)["forward"] = self._forward

    def close(self) -> None:
        """Give the layer its forward back."""
        del vars(self.layer)["forward"]

    def forget(self) -> None:
        """Drop what is kept of a pass."""
        self._kept = None

    def hidden_of(self, logits: Tensor) -> Tensor:
        """Return the hidden states [B, L, D] whose stand-in the loss was given.

        Raises:
            ValueError: What the loss was given is not the stand-in, or the layer is not whole.
        """
        kept, self._kept = self._kept, None
        if kept is None or kept[0] is not logits:
            raise refusal(
                self._name, "its loss is not of what its output layer returns", self.layer
            )
        if isinstance(self.layer.weight, DTensor):
            why = "its output layer is cut over ranks where the loss is made"
            raise refusal(self._name, why, self.layer)
        return kept[1]

    @torch.compiler.disable
    def _forward(self, hidden: Tensor) -> Tensor:
        if not self._active():
            return type(self.layer).forward(self.layer, hidden)
        # Not a number, so that whoever reads it notices.  In float32, as hosts turn outputs into
        # that, which would fill it.
        one = torch.full((), torch.nan, device=hidden.device)
        stand_in = one.expand(*hidden.shape[:-1], self.layer.out_features)
        self._kept = stand_in, hidden
        return stand_in


def refusal(model: str, why: str, layer: nn.Module | None = None) -> ValueError:
    """Return the error that says why a model has no fused loss, and what full logits cost."""
    vocabulary = getattr(layer, "out_features", None)
    cost = "tokens x vocabulary x 4 bytes, two to three times"
    if vocabulary is not None:
        least, most = (times * 1024 * vocabulary * 4 / 2**30 for times in (2, 3))
        cost = (
            f"tokens x {vocabulary:,} (its vocabulary) x 4 bytes, two to three times: "
            f"{least:.2g} to {most:.2g} GiB for each 1,024 tokens of a microbatch"
        )
    return ValueError(
        f"fused=True needs logits that are a plain linear layer of the hidden states, and of "
        f"{model} {why}. Leave fused out; full logits then take {cost}"
    )


def _plain_layer(owner: Any) -> nn.Linear:  # noqa: ANN401 - any model
    """Return the output layer of a model whose logits are that layer's.

    Raises:
        ValueError: They are not.
    """
    name = type(owner).__name__
    layer = getattr(owner, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise refusal(name, "get_output_embeddings() tells no output layer")
    if type(layer) is not nn.Linear:
        within = getattr(layer, "base_layer", getattr(layer, "original_module", layer))
        kind = f"{type(layer).__module__.partition('.')[0]}'s {type(layer).__name__}"
        why = f"the output layer is {kind}, not torch.nn.Linear"
        if within is not layer:
            why = f"the output layer has an adapter ({kind}); leave it out of the adapted modules"
        raise refusal(name, why, within)
    if "forward" in vars(layer):
        why = "the forward of the output layer is replaced already, as device_map does"
        raise refusal(name, why, layer)
    if layer.weight.dtype == torch.float16:
        why = "the output layer is float16, in which a gradient made in the forward pass is lost"
        raise refusal(name, why, layer)
    config = owner.config.get_text_config()
    for setting, what in _AFTER_THE_LAYER.items():
        value = getattr(config, setting, None)
        if value is not None:
            raise refusal(name, f"{what} changes the logits (config.{setting}={value})", layer)
    return layer

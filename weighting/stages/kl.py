"""How far the model's prediction is from that of a reference."""

from __future__ import annotations

from typing import ClassVar

from weighting.registry import stage
from weighting.stages.ref_loss import OfReference


@stage("kl")
class KL(OfReference):
    """Divergence of the model's prediction from that of a reference, in nats, float32.

    score_t = KL(p_t || r_t) = sum_v p_tv (log p_tv - log r_tv)
    p: what the model predicts, r: what the reference does, v: the vocabulary

    The references are those of `ref_loss`, by name where there are several: kl(old).  It takes a
    reference that runs beside the model, and one more forward pass of the model itself: both are
    compared chunk by chunk, before the loss.  It is a score without gradient, and no term of the
    loss.
    """

    tells: ClassVar[str] = "kl"
    takes_model: ClassVar[bool] = True

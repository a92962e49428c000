"""The entropy of a reference model's prediction."""

from __future__ import annotations

from typing import ClassVar

from weighting.registry import stage
from weighting.stages.ref_loss import OfReference


@stage("ref_entropy")
class RefEntropy(OfReference):
    """Entropy of a reference model's prediction, in nats, float32: how sure it is.

    score_t = H(r_t) = -sum_v r_tv log r_tv      r: what the reference predicts, v: the vocabulary

    The references are those of `ref_loss`, by name where there are several: ref_entropy(old).  A
    reference that runs beside the model tells it at no further cost; `weighting score` stores none.
    """

    tells: ClassVar[str] = "ref_entropy"

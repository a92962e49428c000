"""What the forward pass knows about each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """What the forward pass knows about each token, as tensors of one shape, [B, L] or [T].

    Only what a built pipeline `needs` has to be given.  Values at invalid tokens are never read.

    A sequence is what `sequence_ids` tell.  Without them it is a row of [B, L], whatever documents
    are packed into the row; [T] has no rows, and there a sequence is a document.  So a
    padding-free batch, whose samples follow each other in [1, T] or [T], needs `sequence_ids`:
    `weighting.documents(position_ids)` makes them where positions restart.

    Attributes:
        loss: Negative log-likelihood, nats.
        valid: True where the label counts; all tokens when None.
        entropy: Entropy of the prediction, nats.
        target_prob: Probability given to the label; exp(-loss) when None.
        error_norm: Euclidean norm of prediction minus one-hot label.
        ref_loss: Loss of a reference model, nats.
        domain_ids: Index of each token's domain in the names given to `build`.
        segment_ids: Document of each token: from 0, below L in each row of [B, L] (below T
            for [T]); equal ids in one row are one document.
        sequence_ids: Sequence of each token, if it is not the row: from 0, below the number of
            tokens; equal ids in one row are one sequence, which does not go on in another row.
            They may begin at 0 in each row, or count on from row to row.
        columns: Columns of the dataset, by name.
        hidden: What the output layer is given, [..., D]; only where a source reads it.
    """

    loss: Tensor
    valid: Tensor | None = None
    entropy: Tensor | None = None
    target_prob: Tensor | None = None
    error_norm: Tensor | None = None
    ref_loss: Tensor | None = None
    domain_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    sequence_ids: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

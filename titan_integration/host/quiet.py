"""The host's log, held back where its notes are not about what a user asked for."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def hide_noise() -> None:
    """Hide what the host says of its own affairs, which no user can change."""
    from torchtitan.tools.logging import logger  # noqa: PLC0415 - imports torch

    logger.addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    """Tell whether a record is to be shown; takes the doubt out of the host's version."""
    message = record.getMessage()
    if _UNSURE in message:
        record.msg, record.args = message.replace(_UNSURE, ""), ()
    return not any(part in message for part in _NOISE)


_UNSURE = " (0.0.0 means __version__ is not defined correctly)"
_NOISE = (
    "initial_load_model_only=True has no effect without an initial_load_path",
    "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = ",
    "Defaulting to saving a single safetensors file if checkpoint is saved in HF format",
)
"""What such records say; nothing of it changes a run."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log errors alone in what is done within."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

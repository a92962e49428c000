"""What every rank needs, imported once in the process that ranks are forked from."""

import torchtitan.train  # noqa: F401

import titan_integration.paper
import titan_integration.trainer.trainer  # noqa: F401
from titan_integration.data.builtin_text import stdlib_text

stdlib_text()  # read once, too

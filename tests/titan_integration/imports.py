"""What ranks and commands need, imported once in the process that they are forked from."""
# ruff: noqa: F401

import gc
import sys
from types import SimpleNamespace

import torch.distributed.elastic.rendezvous.dynamic_rendezvous
import torchtitan.train
import torchtitan.trainer
from torchtitan.config import ConfigManager

import titan_integration.commands.compare
import titan_integration.commands.mix
import titan_integration.commands.score
import titan_integration.commands.train
import titan_integration.config_registry
import titan_integration.paper
import titan_integration.trainer.trainer
import weighting.cli
from titan_integration.data.builtin_text import stdlib_text

stdlib_text()  # read once, too
ConfigManager().parse_args(["--module=llama3", "--config=llama3_debugmodel"])  # it keeps a lot

# The host's first rank sleeps two seconds after the last step, "for other ranks to complete".
clock = torchtitan.trainer.time
torchtitan.trainer.time = SimpleNamespace(perf_counter=clock.perf_counter, sleep=lambda _: None)

# torchrun's agent looks through all modules for the name of a function, eighteen times a run.
agent = torch.distributed.elastic.rendezvous.dynamic_rendezvous
agent.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name

# What a collection needs not look at, it does not copy either.
gc.collect()
gc.freeze()

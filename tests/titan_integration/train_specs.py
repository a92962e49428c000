"""Trains one small model with one spec after the other, five steps each, in one process.

    torchrun ... train_specs.py OUT SPEC [SPEC ...] -- [torchtitan flags]

OUT becomes a JSON map from spec to its weighted losses and its largest and smallest weight.
"""

import json
import sys
from pathlib import Path

from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger

import weighting as wt
from titan_integration.trainer.preflight import ask_for_columns
from weighting.build import plan_of

STEPS = 5


def main() -> None:
    """Train with every spec, and write down what happened."""
    out, *arguments = sys.argv[1:]
    at = arguments.index("--")
    names, flags = arguments[:at], arguments[at + 1 :]
    init_logger()
    config = ConfigManager().parse_args(flags)
    for name in names:
        ask_for_columns(config, plan_of(wt.load(name)).needs)
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    found = {}
    losses = []
    log = trainer.metrics_processor.log

    def note(step, loss, *args, **kwargs):
        losses.append(loss)
        log(step, loss, *args, **kwargs)

    trainer.metrics_processor.log = note
    step = 0
    for name in names:
        trainer._join(config, plan_of(wt.load(name)))
        losses.clear()
        largest, smallest = [], []
        for _ in range(STEPS):
            step += 1
            trainer.step = step
            trainer.train_step(batches)
            weights = trainer.run.read_statistics()
            largest.append(weights["weight/max"])
            smallest.append(weights["weight/min"])
        found[name] = {"losses": [*losses], "max": max(largest), "min": min(smallest)}
    Path(out).write_text(json.dumps(found))
    trainer.close()


if __name__ == "__main__":
    main()

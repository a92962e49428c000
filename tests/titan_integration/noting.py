"""A trainer that writes down what it is given and what it makes of it, for the tests.

Below the dump folder each rank leaves `notes<rank>.pt`, a list of a dict for each batch.
"""

from dataclasses import dataclass, fields

import small
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from titan_integration.state.run import Run
from titan_integration.trainer.trainer import WeightedTrainer


class NotingTrainer(WeightedTrainer):
    """Writes down its batches with their signals, and what comes of the gradients of domains."""

    @dataclass(kw_only=True, slots=True)
    class Config(WeightedTrainer.Config):
        """The same fields."""

    def __init__(self, config: Config) -> None:
        """Build it, and put a note-taker before the weighting."""
        super().__init__(config)
        weigh, self.notes = Run.weigh, []

        def note(run, found):
            out = weigh(run, found)
            self.notes[-1] |= {key: x.clone() for key, x in found.items()}
            self.notes[-1]["weights"] = out.token.clone()
            return out

        Run.weigh = note
        if self.gradients:
            self.weigh, self.gradients.weigh = self.gradients.weigh, self.note_products

    def post_dataloading_process(self, input_dict, labels):
        """Write down the batch that goes to the model."""
        found = super().post_dataloading_process(input_dict, labels)
        inputs, labels, kwargs = found
        batch = {"input": inputs, "labels": labels, "positions": kwargs["positions"]}
        self.notes.append({key: x.clone() for key, x in batch.items()})
        return found

    def note_products(self, products):
        """Write down the inner products."""
        self.notes[-1]["products"] = products.clone()
        return self.weigh(products)

    def forward_backward_step(self, **batch):
        """Write down the gradient that a step ends with."""
        loss = super().forward_backward_step(**batch)
        if self.gradients and "products" in self.notes[-1]:
            self.notes[-1]["gradients"] = {
                name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
                for name, p in self.model_parts[0].named_parameters()
            }
        return loss

    def train(self):
        """Train, then save the notes."""
        super().train()
        torch.save(self.notes, f"{self.config.dump_folder}/notes{dist.get_rank()}.pt")


def debugmodel() -> WeightedTrainer.Config:
    """Return the small model's config, with the note-taker."""
    config = small.debugmodel()
    return NotingTrainer.Config(**{f.name: getattr(config, f.name) for f in fields(config)})

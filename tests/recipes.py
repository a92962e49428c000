"""The recipes of docs/other-trainers.md, part by part, for their tests."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

import weighting as wt
from titan_integration.collectives import OverRanks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "other-trainers.md"
PARTS = ("model", "data", "loop", "trainer", "lightning", "ranks")
BATCH = 16
REFERENCE = (4.0, 4.6)
"""Loss of a made-up reference for each domain, nats."""


def recipes():
    """Return the page's `py` blocks by part; each part is one."""
    missing = [name for name in ("accelerate", "lightning", "transformers") if not find_spec(name)]
    if missing:
        msg = f"the recipes need {', '.join(missing)}: pip install -e '.[dev]'"
        raise ModuleNotFoundError(msg)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return dict(zip(PARTS, blocks, strict=True))


def run(part, names):
    """Run a recipe in a namespace."""
    exec(compile(recipes()[part], f"{PAGE.name}, {part}", "exec"), names)


def define(part, names):
    """Run no more of a recipe than its imports and classes."""
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef)
    tree = ast.parse(recipes()[part])
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    exec(compile(tree, f"{PAGE.name}, {part}", "exec"), names)


def started(spec=None):
    """Return a namespace with the recipes' model and data, for the page's spec or another.

    The domains alternate, so that every batch has both, and each row has a reference loss.
    """
    names = {}
    run("model", names)
    run("data", names)
    if spec:
        names["spec"] = wt.load(spec)
    rows = names["rows"]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    names["rows"] = [row for pair in zip(first, second, strict=True) for row in pair]
    for row in names["rows"]:
        row["ref_loss"] = torch.tensor(REFERENCE)[row["domain_ids"]]
    return names


def hosted_by_trainer(names, folder, rows, **options):
    """Return the recipe's Trainer with plain gradient descent, rows in order."""
    given = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, **options}
    args = names["TrainingArguments"](
        str(folder),
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    model = names["new_model"](OverRanks(dist.group.WORLD))  # alone if there is no such group
    return names["WeightedTrainer"](model, args, train_dataset=rows)


def hosted_by_lightning(names, folder, **options):
    """Return a Lightning trainer, and the recipe's module with plain gradient descent."""

    class Descending(names["Weighted"]):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    host = names["lightning"].Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return host, Descending(names["new_model"](OverRanks(dist.group.WORLD)))

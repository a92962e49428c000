"""A run whose last checkpoint is exported for Hugging Face: `weighting train --hf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from titan_integration.commands import export, train
from titan_integration.host.flags import parse
from titan_integration.host.nodes import Nodes, resolved
from titan_integration.host.quiet import quiet
from weighting.runs.layout import CHECKPOINTS

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

# The last checkpoint stays one to go on from, which the host's own export is not.
_KEEP = ["--checkpoint.enable", "--checkpoint.no-last-save-model-only"]


def main(**options: Any) -> int:  # noqa: ANN401 - those of `train.Options`
    """Train, then write the folder `hf` beside the checkpoints; return the status of the run.

    Raises:
        ValueError: As of both; what the run cannot mend is said before it.
    """
    given = train.Options(**options | {"flags": [*_KEEP, *options["flags"]]})
    train.check_config(given.module, given.config)
    flags = train.run_flags(given)
    folder = Path(train.value_of(flags, "--dump_folder") or ".")
    out = folder / "hf"
    if out.exists():
        msg = f"--hf: {out} exists already; move it away, or take another --dump_folder"
        raise ValueError(msg)
    nodes, _ = resolved(Nodes(**given.nodes))
    if (nodes.nnodes or 1) > 1 and nodes.node_rank is None:
        msg = "--hf: the first of several nodes exports; say which this is: --node-rank N"
        raise ValueError(msg)
    with quiet():
        config = cast("Trainer.Config", parse(flags))
        export.refuse(config)
    if not config.checkpoint.enable or config.checkpoint.load_only:
        msg = (
            "--hf exports the last checkpoint, and none would be saved; leave out "
            "--checkpoint.no-enable and --checkpoint.load_only"
        )
        raise ValueError(msg)
    if status := train.main(**vars(given)):
        return status
    if nodes.node_rank:
        return 0
    checkpoint = folder / (train.value_of(flags, "--checkpoint.folder") or CHECKPOINTS)
    what = {"module": given.module, "config": given.config, "flags": given.flags}
    return export.main(checkpoint=str(checkpoint), out=str(out), **what)

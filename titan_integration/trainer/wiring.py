"""Joins a weighting and the host's trainer: its ranks, when it weighs, who observes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchtitan.distributed.context_parallel import cp_shard
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

import weighting as wt
from titan_integration.observe.recorder import Layout, Recorder, asked
from titan_integration.state.microbatches import When
from titan_integration.state.run import Pipeline, Run, start
from weighting.ranks import OverRanks
from weighting.runs import layout

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

    from weighting.build import Plan
    from weighting.contract import Collectives


def when_of(plan: Plan, calls: int, *, pipelined: bool) -> When:
    """Return when the weights of a run are made.

    Args:
        plan: Of the weighting.
        calls: How many batches of the loader make up an optimizer step.
        pipelined: Whether a pipeline makes several calls of the loss of a batch.
    """
    scope = plan.spec.scope
    if scope == "step" and not plan.identity and calls > 1:
        return When.LOOKAHEAD
    if pipelined and scope != "running" and plan.uses_batch_statistics:
        return When.DEFERRED
    return When.NOW


def start_run(trainer: Trainer, plan: Plan, when: When) -> Run:
    """Return the run of a planned weighting on a trainer's ranks, domains and device."""
    config, dims = trainer.config, trainer.parallel_dims
    ranks = ranks_of(dims)
    fn = wt.build(plan, domains=getattr(trainer.dataloader, "domains", None), collectives=ranks)
    compiled = config.compile.enable and "loss" in config.compile.components
    return start(
        fn,
        trainer.device,
        when=when,
        calls=trainer.num_pipeline_parallel_microbatches,
        observer=recorder_of(trainer, fn, ranks, when),
        ranks=ranks,
        pipeline=pipeline_of(dims, last=trainer.pp_has_last_stage) if dims.pp_enabled else None,
        backend=config.compile.backend if compiled else None,
        row_domains=getattr(trainer.dataloader, "row_domains", 0),
    )


def recorder_of(
    trainer: Trainer, fn: wt.Weighting, ranks: Collectives | None, when: When
) -> Recorder | None:
    """Return what records the run; None where nothing is asked for, or its rank has no losses.

    Args:
        trainer: The host's, built.
        fn: The built spec.
        ranks: Reaches the ranks with other sequences, and with other parts of these.
        when: When weights are made.
    """
    config: Any = trainer.config
    dims, record = trainer.parallel_dims, config.weighting.record
    if not record or (dims.pp_enabled and not trainer.pp_has_last_stage):
        return None
    parts = trainer.num_pipeline_parallel_microbatches
    rows, length = config.training.local_batch_size // parts, config.training.seq_len
    meshes = (dims.get_optional_mesh(name) for name in ("batch", "cp", "tp"))
    first = all(mesh is None or mesh.get_local_rank() == 0 for mesh in meshes)
    if fn.plan.identity and first and getattr(config.loss, "memory", "auto") == "auto":
        logger.warning(
            f"{fn.spec.name} trains on the host's own loss, which tells no losses of "
            "sequences: they are recorded as NaN, and the weights as 1; --loss.memory late "
            "records losses"
        )
    places = torch.arange(length, device=trainer.device).repeat(rows, 1)
    return Recorder(
        asked(record),
        fn,
        Layout(
            calls=trainer.gradient_accumulation_steps * parts,
            rows=rows,
            length=length,
            together=parts if when is When.DEFERRED else 1,
        ),
        Path(config.dump_folder) / layout.RECORD if first else None,
        device=trainer.device,
        ranks=ranks,
        places=sharded({"places": places}, trainer)["places"][0],
    )


def sharded(given: dict[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """Return this rank's part of each row, [B, L], where rows are cut over ranks as labels are."""
    if not (trainer.parallel_dims.cp_enabled and given):
        return given
    mesh = trainer.parallel_dims.get_mesh("cp")
    balancer = trainer.config.parallelism.context_parallel_load_balancer
    parts, _ = cp_shard(mesh, tuple(given.values()), None, balancer)
    return dict(zip(given, parts, strict=True))


def ranks_of(dims: ParallelDims) -> OverRanks | None:
    """Return how statistics reach the ranks that hold other tokens; None if there are none."""
    rows = dims.get_mesh("batch").get_group() if dims.dp_enabled else None
    if not dims.cp_enabled:
        return OverRanks(rows) if rows else None
    return OverRanks(dims.get_mesh("loss").get_group(), rows, dims.get_mesh("cp").get_group())


def pipeline_of(dims: ParallelDims, *, last: bool) -> Pipeline:
    """Return how what is known on the last stage of a pipeline reaches the other stages."""
    stages = OverRanks(dims.get_mesh("pp").get_group())
    holder = stages.gather(torch.tensor(int(last), device=utils.device_type)).argmax()
    return Pipeline(stages, int(holder))

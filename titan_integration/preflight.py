"""What is checked of a run, and asked of its loader, before anything is built."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.tools.logging import logger

from titan_integration.data import DomainTextDataLoader
from titan_integration.records import REF_LOSS
from titan_integration.reference import average_decay, find_checkpoint
from titan_integration.state import data_columns, short_contexts
from weighting.errors import printable
from weighting.mixture import with_mixture
from weighting.spec import imported, resolve

if TYPE_CHECKING:
    import weighting as wt
    from titan_integration.trainer import WeightedTrainer, WeightingConfig

SIGNALS = frozenset(
    {"loss", "entropy", "target_prob", "error_norm", "ref_loss", "domain_ids", "segment_ids"}
)
"""What the trainer can give a weighting, beside columns."""
ALL_LOSSES_FIRST = ("GPipe", "LoopedBFS")
"""Pipeline schedules that run every forward pass before the first backward pass."""


def read_spec(config: WeightingConfig) -> wt.Spec:
    """Return the spec a config names, and say which modules were imported for it.

    Raises:
        ValueError: None is named, or it is wrong.
    """
    if not config.spec:
        msg = "no weighting spec; pass --weighting.spec, as in --weighting.spec specs/linupper.yaml"
        raise ValueError(msg)
    spec = resolve(config.spec, allow_plugins=config.allow_plugins)
    if config.mixture:
        spec = with_mixture(spec, resolve(config.mixture, allow_plugins=config.allow_plugins))
    if spec.plugins:
        logger.info(printable(f"Plugins: {imported(spec)}"))
    return spec


def refuse_unsupported(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Refuse what would train with wrong weights, before anything is built.

    Raises:
        ValueError: Says what, why, and what to do instead.
    """
    missing = sorted(x for x in fn.needs - SIGNALS if not x.startswith("columns."))
    if missing:
        msg = f"{fn.spec.name} reads {', '.join(missing)}, which this trainer does not provide yet"
        raise ValueError(msg)
    _refuse_reference(config, fn)
    if fn.spec.scope == "rank" and fn.state_dict():
        msg = (
            "scope: rank would have every rank remember something else, and a checkpoint holds one "
            "memory; leave scope out"
        )
        raise ValueError(msg)
    if "gradients" in fn.hears:
        _refuse_gradients(config, fn)
    if config.parallelism.context_parallel_degree > 1:
        _refuse_uneven_rows(config)
    if "validation" in fn.hears and not config.validator.enable:
        logger.warning(f"{fn.spec.name} waits for validations; without --validator.enable it stays")
    if fn.identity:
        return
    if config.parallelism.pipeline_parallel_degree > 1:
        _refuse_pipeline(config, fn)
    if config.parallelism.context_parallel_degree > 1:
        _refuse_context(config, fn)


def ask_for_columns(config: WeightedTrainer.Config, needs: frozenset[str]) -> None:
    """Have the loader read the columns that a spec needs, so that nobody has to name them twice."""
    columns = data_columns(needs)
    if "ref_loss" in needs and not config.weighting.reference:
        columns.append(REF_LOSS)
    loader = config.dataloader
    if columns and isinstance(loader, DomainTextDataLoader.Config):
        # A copy, as the same config may serve the validator, which needs no columns.
        config.dataloader = replace(loader, columns=[*dict.fromkeys([*loader.columns, *columns])])


def ask_for_rows(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Have the loader yield rows of one domain each where a spec draws them, or compares them.

    Raises:
        ValueError: The loader cannot.
    """
    wanted = "turns" if "gradients" in fn.hears else "drawn" if fn.sampling else ""
    loader = config.dataloader
    if wanted and isinstance(loader, DomainTextDataLoader.Config):
        config.dataloader = replace(loader, rows=wanted)
    elif wanted:
        msg = (
            f"{fn.spec.name} says which domains data is drawn from, and the loader is "
            f"{type(loader).__qualname__}; use titan_integration.data.DomainTextDataLoader, or "
            "apply: loss"
        )
        raise ValueError(msg)


def _refuse_pipeline(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Refuse what a pipeline's last stage cannot know, or cannot know in time."""
    if config.weighting.reference or short_contexts(fn.needs):
        msg = (
            f"{fn.spec.name} needs a forward pass of its own, which is not sent through the "
            "pipeline; give ref_loss as a column of the data, or set "
            "--parallelism.pipeline_parallel_degree 1"
        )
        raise ValueError(msg)
    if not fn.looks_around or fn.spec.scope in {"running", "step"}:
        return
    schedule = config.parallelism.pipeline_parallel_schedule
    if config.parallelism.pipeline_parallel_schedule_csv or schedule not in ALL_LOSSES_FIRST:
        msg = (
            f"{fn.spec.name} needs all losses of a batch before the first backward pass, and the "
            f"pipeline schedule {schedule} runs some backward passes earlier; set "
            f"--parallelism.pipeline_parallel_schedule {ALL_LOSSES_FIRST[0]}, or write scope: step "
            "into the spec (exact, at the cost of one more forward pass) or scope: running"
        )
        raise ValueError(msg)
    if getattr(config.loss, "memory", "full") == "full":
        msg = (
            "weights of a pipeline's microbatches are known after their losses; use the chunked "
            "loss with --loss.memory auto, or write scope: step into the spec"
        )
        raise ValueError(msg)


def _refuse_gradients(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Refuse what would mix the gradients of domains, or weigh them twice."""
    name = fn.spec.name
    if fn.sampling:
        msg = f"{name} compares the gradients of domains that take turns; leave out the mixture"
        raise ValueError(msg)
    if config.parallelism.pipeline_parallel_degree > 1:
        msg = (
            f"{name} takes the gradient of one microbatch after the other, which a pipeline mixes; "
            "set --parallelism.pipeline_parallel_degree 1"
        )
        raise ValueError(msg)
    if fn.spec.scope != "microbatch" or fn.spec.normalize != "mean_one":
        msg = (
            f"{name} weighs the gradients of microbatches of one domain each, whose own weights "
            "must be mean one; leave out scope and normalize"
        )
        raise ValueError(msg)


def _refuse_context(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Refuse what a rank with a part of each sequence cannot do."""
    whole = "set --parallelism.context_parallel_degree 1"
    if config.parallelism.context_parallel_load_balancer == "ptrr":
        msg = (
            "the ptrr load balancer orders tokens by their attention mask, which signals cannot "
            "follow; set --parallelism.context_parallel_load_balancer headtail"
        )
        raise ValueError(msg)
    if short_contexts(fn.needs):
        msg = f"{fn.spec.name} reads losses on short contexts, which take whole sequences; {whole}"
        raise ValueError(msg)
    if fn.spec.scope == "rank":
        msg = f"scope: rank takes whole sequences on each rank; leave scope out, or {whole}"
        raise ValueError(msg)


def _refuse_uneven_rows(config: WeightedTrainer.Config) -> None:
    """Refuse rows that attention cannot cut over the ranks of context parallelism."""
    ranks, length = config.parallelism.context_parallel_degree, config.training.seq_len
    if any(config.traverse(VarlenAttention.Config)):
        msg = (
            "variable-length attention takes whole sequences; choose a config with FlexAttention, "
            "or set --parallelism.context_parallel_degree 1"
        )
        raise ValueError(msg)
    for _, attention, _, _ in config.traverse(FlexAttention.Config):
        assert isinstance(attention, FlexAttention.Config)
        size = attention.block_size
        block = size if isinstance(size, int) else size[0]
        if length % (unit := ranks * block):
            msg = (
                f"--training.seq_len {length} cannot be cut over {ranks} ranks: attention takes "
                f"whole blocks of {block} tokens on each; use a multiple of {unit}, as in "
                f"--training.seq_len {-(-length // unit) * unit}"
            )
            raise ValueError(msg)


def _refuse_reference(config: WeightedTrainer.Config, fn: wt.Weighting) -> None:
    """Refuse a reference that is not there, is of no use, or competes with a column."""
    path = config.weighting.reference
    if not path:
        return
    if "ref_loss" not in fn.needs:
        msg = f"{fn.spec.name} reads no ref_loss; leave out --weighting.reference {path}"
        raise ValueError(msg)
    columns = getattr(config.dataloader, "columns", ())
    if REF_LOSS in columns and f"columns.{REF_LOSS}" not in fn.needs:
        msg = (
            f"ref_loss comes from --weighting.reference {path}, or from the column {REF_LOSS!r} of "
            "--dataloader.columns; leave out one of them"
        )
        raise ValueError(msg)
    if average_decay(path) is None:
        find_checkpoint(path)

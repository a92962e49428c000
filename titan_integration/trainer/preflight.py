"""What is checked of a run, and asked of its loader, before anything is built."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torchtitan.components.validate import Validator
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.tools.logging import logger

import weighting as wt
from titan_integration.data.label_counts import vocabulary
from titan_integration.data.loader import DomainTextDataLoader, keep_open
from titan_integration.data.records import REF_LOSS
from titan_integration.data.signals import (
    comes_with_batch,
    data_columns,
    references_of,
    short_contexts,
    told_by,
)
from titan_integration.loss.reference_model import average_decay, find_checkpoint
from titan_integration.observe.validation import (
    DomainValidator,
    refuse_other_domains,
    tells_domains,
)
from titan_integration.state.checkpoint import ResumingCheckpointManager
from weighting.build.compared import domains_compared
from weighting.columns import HIDDEN, column_of, plain_name, signal_of
from weighting.contract import Source
from weighting.errors import printable
from weighting.language.plugins import imported
from weighting.language.read import resolve
from weighting.mixture import with_mixture
from weighting.stages.ref_loss import OfReference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.trainer import Trainer

    from titan_integration.trainer.config import WeightedConfig, WeightingConfig
    from weighting.build import Plan

_OF_TOKENS = {"loss", "entropy", "target_prob", "error_norm", "ref_loss", HIDDEN}
SIGNALS = frozenset(_OF_TOKENS | {"domain_ids", "segment_ids"})
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


def refuse_unsupported(config: WeightedConfig, plan: Plan) -> None:
    """Refuse what would train with wrong weights, before anything is built.

    Raises:
        ValueError: Says what, why, and what to do instead.
    """
    _refuse_unread_checkpoint(config)
    missing = sorted(x for x in plan.needs - SIGNALS if column_of(x) is None)
    if missing:
        msg = (
            f"{plan.spec.name} reads {', '.join(missing)}, which this trainer does not provide yet"
        )
        raise ValueError(msg)
    if HIDDEN in plan.needs and not hasattr(config.loss, "memory"):
        msg = (
            f"{plan.spec.name} reads hidden states, and the loss {type(config.loss).__qualname__} "
            "is given logits; use the chunked loss (ChunkedLossWrapper), or another spec"
        )
        raise ValueError(msg)
    _refuse_reference(config, plan)
    if plan.spec.scope == "rank" and plan.has_state:
        msg = (
            "scope: rank would have every rank remember something else, and a checkpoint holds one "
            "memory; leave scope out"
        )
        raise ValueError(msg)
    if "gradients" in plan.listens_to:
        _refuse_gradients(config, plan)
    own = isinstance(config.checkpoint, ResumingCheckpointManager.Config)
    if config.weighting.record and config.checkpoint.enable and not own:
        msg = (
            f"--weighting.record writes what a checkpoint is past when that is saved, which "
            f"{type(config.checkpoint).__qualname__} does not tell it; make yours a subclass of "
            "titan_integration.state.checkpoint.ResumingCheckpointManager, or leave record out"
        )
        raise ValueError(msg)
    if config.parallelism.context_parallel_degree > 1:
        _refuse_uneven_rows(config)
    if "validation" in plan.listens_to:
        _refuse_no_validation(config, plan)
    if plan.identity:
        return
    if hasattr(config.loss, "mtp_scale"):
        _refuse_further_heads(config, plan)
    if config.parallelism.pipeline_parallel_degree > 1:
        _refuse_pipeline(config, plan)
    if config.parallelism.context_parallel_degree > 1:
        _refuse_context(config, plan)


def _refuse_unread_checkpoint(config: WeightedConfig) -> None:
    """Refuse a checkpoint to start from that the host would not look at.

    Raises:
        ValueError: Checkpoints are not enabled.
    """
    given = config.checkpoint
    if given.enable or not (given.initial_load_path or given.load_step != -1):
        return
    flag = "initial_load_path" if given.initial_load_path else "load_step"
    msg = (
        f"--checkpoint.{flag} does nothing without --checkpoint.enable: the run would start from "
        "random weights; add --checkpoint.enable"
    )
    raise ValueError(msg)


def refuse_one_domain(plan: Plan, domains: Sequence[str] | None) -> None:
    """Refuse a spec that weighs or draws domains where the data has one.

    Args:
        plan: The spec's.
        domains: Names of the data's domains; None where the loader tells none.

    Raises:
        ValueError: Every domain weight would be 1.
    """
    compared = domains_compared(plan)
    if compared and domains is not None and len(domains) == 1:
        msg = (
            f"{plan.spec.name} weighs or draws domains ({', '.join(compared)}), and the data has "
            f"one, {domains[0]!r}, so that every weight would be 1; name the column that tells "
            "domains (--dataloader.domain_column), or take a spec without domain weights"
        )
        raise ValueError(msg)


def refuse_tokenizer(config: WeightedConfig, tokenizer: BaseTokenizer) -> None:
    """Refuse a tokenizer with tokens for which the model has no place.

    Raises:
        ValueError: It has more than the model.
    """
    size, places = vocabulary(tokenizer), vocabulary_of(config)
    if size > places:
        assert config.model_spec is not None
        msg = (
            f"--hf_assets_path {config.hf_assets_path}: its tokenizer has {size} tokens, and the "
            f"model {config.model_spec.flavor} has {places}; give the tokenizer that belongs to "
            f"the model, or a model with a vocabulary of {size} or more"
        )
        raise ValueError(msg)


def vocabulary_of(config: Trainer.Config) -> int:
    """Return how many tokens the model of a config knows."""
    assert config.model_spec is not None, "the host needs one too"
    return cast("Decoder.Config", config.model_spec.model).vocab_size


def ask_for_columns(config: WeightedConfig, needs: frozenset[str]) -> None:
    """Have the loader read the columns that a spec needs, so that nobody has to name them twice."""
    told = {x for name in references_of(config.weighting.reference) for x in told_by(name).values()}
    columns = data_columns(needs - told)
    if "ref_loss" in needs - told:
        columns.append(REF_LOSS)
    loader = config.dataloader
    if columns and isinstance(loader, DomainTextDataLoader.Config):
        # A copy, as the same config may serve the validator, which needs no columns.
        config.dataloader = replace(loader, columns=[*dict.fromkeys([*loader.columns, *columns])])


def ask_for_rows(config: WeightedConfig, plan: Plan) -> None:
    """Have the loader yield rows of one domain each where a spec draws them, or compares them.

    Raises:
        ValueError: The loader cannot.
    """
    wanted = "turns" if "gradients" in plan.listens_to else "drawn" if plan.sampling else ""
    loader = config.dataloader
    if wanted and isinstance(loader, DomainTextDataLoader.Config):
        config.dataloader = replace(loader, rows=wanted)
    elif wanted:
        msg = (
            f"{plan.spec.name} says which domains data is drawn from, and the loader is "
            f"{type(loader).__qualname__}; use titan_integration.data.DomainTextDataLoader, or "
            "apply: loss"
        )
        raise ValueError(msg)


def open_data(config: WeightedConfig, plan: Plan) -> dict[str, Any]:
    """Open all data, check it against the spec, and keep it for the loaders that read it.

    Returns:
        What each loader of ours tells as its `identity`: of `training` and of `validation`.

    Raises:
        ValueError: For anything wrong with the tokenizer or the data; names the place and the fix.
    """
    tokenizer = build_tokenizer(config)
    refuse_tokenizer(config, tokenizer)
    dims = ParallelDims.from_config(config.parallelism, _number_of_ranks(config))
    rows = config.training.local_batch_size
    if dims.pp > 1:
        rows = config.parallelism.pipeline_parallel_microbatch_size
    loaders = {"training": config.dataloader}
    validator = config.validator
    if validator.enable and isinstance(validator, Validator.Config):
        loaders["validation"] = validator.dataloader
    found: dict[str, Any] = {}
    domains: dict[str, tuple[str, ...]] = {}
    for name, loader in loaders.items():
        if not isinstance(loader, DomainTextDataLoader.Config):
            continue
        if name == "validation":  # as the host does
            loader = replace(loader, infinite=validator.steps != -1)  # noqa: PLW2901
        built = loader.build(
            dp_world_size=dims.dp_replicate * dims.dp_shard,
            dp_rank=0,
            tokenizer=tokenizer,
            seq_len=config.training.seq_len,
            local_batch_size=rows,
        )
        if plan.sampling and built.has_weights:
            msg = (
                f"{plan.spec.name} draws domains, and so do the weights of the sources in "
                f"{loader.dataset_path or loader.dataset}; leave out one of them"
            )
            raise ValueError(msg)
        keep_open(loader, built)
        found[name], domains[name] = built.identity, built.domains
        if name == "training":
            refuse_one_domain(plan, built.domains)
            fn = wt.build(plan, domains=built.domains)
            if "gradients" in fn.plan.listens_to:
                _refuse_global_batch(config, fn, dims)
    if "validation" in plan.listens_to and len(domains) > 1:
        refuse_other_domains(plan.spec.name, domains["validation"], domains["training"])
    return found


def build_tokenizer(config: Trainer.Config) -> BaseTokenizer:
    """Build the tokenizer a config names.

    Raises:
        ValueError: It is not there, or damaged.
    """
    try:
        return config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        msg = f"--hf_assets_path {config.hf_assets_path}: no tokenizer there: {error}"
        raise ValueError(msg) from error


def _refuse_global_batch(config: Trainer.Config, fn: wt.Weighting, dims: ParallelDims) -> None:
    """Refuse a global batch that is not a microbatch of every domain."""
    count, asked = len(fn.domains), config.training.global_batch_size
    rows = config.training.local_batch_size * dims.dp_replicate * dims.dp_shard
    if asked > 0 and asked != count * rows:
        msg = (
            f"{fn.spec.name} takes a microbatch of each of the {count} domains a step, "
            f"{count} x {rows} sequences, and the global batch is {asked}; leave out "
            f"--training.global_batch_size, or set it to {count * rows}"
        )
        raise ValueError(msg)


def _number_of_ranks(config: Trainer.Config) -> int:
    """Return the number of ranks that the process group will have."""
    fake = config.comm.mode in {"fake_backend", "local_tensor"}
    return int(os.environ.get("NGPU" if fake else "WORLD_SIZE", "1"))


def _refuse_pipeline(config: WeightedConfig, plan: Plan) -> None:
    """Refuse what a pipeline's last stage cannot know, or cannot know in time."""
    if config.weighting.reference or short_contexts(plan.needs):
        msg = (
            f"{plan.spec.name} needs a forward pass of its own, which is not sent through the "
            "pipeline; give ref_loss as a column of the data, or set "
            "--parallelism.pipeline_parallel_degree 1"
        )
        raise ValueError(msg)
    if not plan.uses_batch_statistics or plan.spec.scope in {"running", "step"}:
        return
    schedule = config.parallelism.pipeline_parallel_schedule
    if config.parallelism.pipeline_parallel_schedule_csv or schedule not in ALL_LOSSES_FIRST:
        msg = (
            f"{plan.spec.name} needs all losses of a batch before the first backward pass, and the "
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


def _refuse_further_heads(config: WeightedConfig, plan: Plan) -> None:
    """Refuse what the losses of several heads cannot be weighed by."""
    name = plan.spec.name
    why = ""
    first = sorted(x for x in plan.needs - {"domain_ids", "segment_ids"} if comes_with_batch(x))
    if first:
        why = f"{name} reads {', '.join(first)}, given for the labels of the first head alone"
    elif plan.has_state:
        why = f"{name} remembers batches, and each would come once for every head"
    elif plan.spec.scope not in {"microbatch", "rank"}:
        why = f"scope: {plan.spec.scope} weighs the calls of a step at once, of the first head"
    elif config.parallelism.tensor_parallel_degree > 1:
        why = "under tensor parallelism labels of further heads have not been checked"
    if why:
        msg = (
            f"the model predicts several tokens ahead, and {why}; take the model's config without "
            "multi-token prediction, or a spec of losses and probabilities such as linupper"
        )
        raise ValueError(msg)


def _refuse_gradients(config: WeightedConfig, plan: Plan) -> None:
    """Refuse what would mix the gradients of domains, or weigh them twice."""
    name = plan.spec.name
    if plan.sampling:
        msg = f"{name} compares the gradients of domains that take turns; leave out the mixture"
        raise ValueError(msg)
    if config.parallelism.pipeline_parallel_degree > 1:
        msg = (
            f"{name} takes the gradient of one microbatch after the other, which a pipeline mixes; "
            "set --parallelism.pipeline_parallel_degree 1"
        )
        raise ValueError(msg)
    if plan.spec.scope != "microbatch" or plan.spec.normalize != "mean_one":
        msg = (
            f"{name} weighs the gradients of microbatches of one domain each, whose own weights "
            "must be mean one; leave out scope and normalize"
        )
        raise ValueError(msg)


def _refuse_no_validation(config: WeightedConfig, plan: Plan) -> None:
    """Refuse a spec that validations move where none tells the losses of domains."""
    validator, why = config.validator, ""
    if not validator.enable:
        why = "there is none; set --validator.enable"
    elif not isinstance(validator, DomainValidator.Config):
        why = (
            f"{type(validator).__qualname__} tells none; make yours a subclass of "
            "titan_integration.observe.validation.DomainValidator"
        )
    elif not tells_domains(config.parallelism):
        why = (
            "under full_dtensor and context parallelism none is told; "
            "set --parallelism.context_parallel_degree 1"
        )
    if why:
        msg = f"{plan.spec.name} is moved by the validation loss of every domain, and {why}"
        raise ValueError(msg)


def _refuse_context(config: WeightedConfig, plan: Plan) -> None:
    """Refuse what a rank with a part of each sequence cannot do."""
    whole = "set --parallelism.context_parallel_degree 1"
    if config.parallelism.context_parallel_load_balancer == "ptrr":
        msg = (
            "the ptrr load balancer orders tokens by their attention mask, which signals cannot "
            "follow; set --parallelism.context_parallel_load_balancer headtail"
        )
        raise ValueError(msg)
    if short_contexts(plan.needs):
        msg = (
            f"{plan.spec.name} reads losses on short contexts, which take whole sequences; {whole}"
        )
        raise ValueError(msg)
    if plan.spec.scope == "rank":
        msg = f"scope: rank takes whole sequences on each rank; leave scope out, or {whole}"
        raise ValueError(msg)


def _refuse_uneven_rows(config: WeightedConfig) -> None:
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


def _refuse_reference(config: WeightedConfig, plan: Plan) -> None:
    """Refuse references that are not there, are of no use, or compete with a column."""
    columns = getattr(config.dataloader, "columns", ())
    stages = [step.stage for steps in plan.factors.values() for step in steps]
    others = (x for x in stages if isinstance(x, Source) and not isinstance(x, OfReference))
    by_name = frozenset[str]().union(*(stage.reads() for stage in others))
    for name, path in references_of(config.weighting.reference).items():
        told = told_by(name)
        given = f"--weighting.reference {f'{name}={path}' if name else path}"
        if not plan.needs.intersection(told.values()):
            msg = f"{plan.spec.name} reads no {plain_name(told['ref_loss'])}; leave out {given}"
            raise ValueError(msg)
        for signal in sorted(plan.needs.intersection(told.values())):
            column = plain_name(signal)
            where = ""
            if signal in by_name:
                where = f"column({column})"
            elif column in columns and signal_of(column) not in by_name:
                where = f"the column {column!r} of --dataloader.columns"
            if where:
                msg = f"{column} comes from {given}, or from {where}; leave out one of them"
                raise ValueError(msg)
        if average_decay(path) is None:
            find_checkpoint(path)

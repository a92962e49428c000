"""torchtitan's trainer with a weighting plugged in."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.config import Configurable
from torchtitan.distributed.context_parallel import cp_shard
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer
from typing_extensions import override

import weighting as wt
from titan_integration.collectives import OverRanks
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.host import cpu, versions
from titan_integration.host.run_dir import claim, writing
from titan_integration.host.together import fail_together, refuse_other_data
from titan_integration.loss.domain_gradients import DomainGradients
from titan_integration.loss.loss import (
    WeightedChunkedLoss,
    WeightedCrossEntropyLoss,
    weighted_loss_config,
)
from titan_integration.loss.reference_model import (
    average_decay,
    build_reference,
    find_checkpoint,
    follow,
    short_context,
    token_losses,
)
from titan_integration.observe.agreement import check_agreement
from titan_integration.observe.metrics import ABOUT, FOLDER, WeightedMetricsProcessor, about
from titan_integration.observe.mixture import FILE as MIXTURE
from titan_integration.observe.mixture import write_mixture
from titan_integration.observe.recorder import Layout, Recorder, asked
from titan_integration.observe.validation import DomainValidator
from titan_integration.state.checkpoint import REFERENCE, WEIGHTING, ResumingCheckpointManager
from titan_integration.state.run_state import Pipeline, RunState, short_contexts
from titan_integration.trainer.config import WeightedConfig, WeightingConfig
from titan_integration.trainer.preflight import (
    ask_for_columns,
    ask_for_rows,
    open_data,
    read_spec,
    refuse_one_domain,
    refuse_unsupported,
    vocabulary_of,
)
from weighting.build import plan_of
from weighting.build.domains import proportions
from weighting.contract import Alone
from weighting.contract.levels import documents
from weighting.errors import printable
from weighting.loss.logits import IGNORE_INDEX, check_labels
from weighting.runs.files import write_whole
from weighting.runs.replay import FOLDER as RECORD_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.decoder import Decoder

    from weighting.build import Plan
    from weighting.contract import Collectives

C = TypeVar("C", bound=Configurable.Config)


class WeightedTrainer(Trainer):
    """The host's trainer: weighs the training loss, logs what it did, saves the state it keeps.

    Everything is the host's own but the loss; validation stays unweighted.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(WeightedConfig):
        """The host's fields, and `weighting`."""

    state: RunState
    looks_ahead: bool
    """Whether a forward pass over the whole step comes before it."""
    reference: Decoder | None
    """Gives ref_loss; without gradient, and in no checkpoint unless it is an average."""
    decay: float | None
    """Of the average the reference is; None when it is fixed."""
    gradients: DomainGradients | None = None
    """Of the domains, where the weighting compares them."""
    begun: bool = False
    """Whether a step was taken since this start."""
    _claim: IO[str]
    """Keeps the dump folder to this run while it is open; the first rank's."""
    _read: str
    """What rows are made from."""

    @override
    # A Config builds the trainer it belongs to, so this one never gets the parent's.
    def __init__(self, config: Config) -> None:  # pyrefly: ignore[bad-override]
        """Check the spec, build the host's trainer, then join the two.

        Raises:
            SystemExit: Spec, data or settings are wrong; status 2, said once, on the first rank.
        """
        with exit_on_user_error():
            on_cpu = cpu.use_cpu()
            patience = config.comm.init_timeout_seconds
            with fail_together(patience):
                versions.check()
                if on_cpu:
                    cpu.prepare_config(config)
                plan = plan_of(read_spec(config.weighting))
                if config.weighting.record:
                    asked(config.weighting.record)  # what is wrong with it is said first
                refuse_unsupported(config, plan)
                ask_for_columns(config, plan.needs)
                ask_for_rows(config, plan)
                if os.environ.get("RANK", "0") == "0":
                    self._claim = claim(Path(config.dump_folder))
                data = open_data(config, plan)
            refuse_other_data(data, patience)
            self._read = json.dumps(data, sort_keys=True)
            # The host logs events to the dump folder: were that full, each would be a traceback.
            logging.raiseExceptions = False
            super().__init__(config)
            self.reference = None
            self.decay = average_decay(config.weighting.reference)
            if path := config.weighting.reference:
                folder = find_checkpoint(path) if self.decay is None else None
                self.reference = build_reference(config, self.parallel_dims, folder)
                logger.info(printable(f"Reference: {folder or path}"))
            if on_cpu:
                cpu.fix_fsdp(self.model_parts)
                cpu.fix_initial_weights(self.model_config, self.model_parts)
                cpu.hide_mfu(self.metrics_processor)
            self._join(config, plan)

    def _join(self, config: Config, plan: Plan) -> None:
        """Build the weighting for this run's ranks and domains and hand it to who needs it."""
        assert isinstance(self.loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
        assert isinstance(self.metrics_processor, WeightedMetricsProcessor)
        ranks = ranks_of(self.parallel_dims)
        domains = getattr(self.dataloader, "domains", None)
        refuse_one_domain(plan, domains)
        fn = wt.build(plan, domains=domains, collectives=ranks)
        allow = config.weighting.allow_changed_spec
        self.state = RunState(fn, self.device, allow_changed_spec=allow)
        self.state.calls = self.num_pipeline_parallel_microbatches
        spec, pipelined = plan.spec, self.parallel_dims.pp_enabled
        in_step = spec.scope == "step" and not plan.identity
        self.looks_ahead = in_step and self._calls_in_a_step > 1
        together = pipelined and spec.scope != "running" and plan.uses_batch_statistics
        self.state.together = together and not self.looks_ahead
        if pipelined:
            self.state.pipeline = pipeline_of(self.parallel_dims, last=self.pp_has_last_stage)
        if config.compile.enable and "loss" in config.compile.components:
            self.state.compile(config.compile.backend)
        self._agree_every = config.weighting.agree_every
        self._draws = bool(plan.sampling)
        if "gradients" in plan.listens_to:
            self._take_turns(config, fn)
        validator = getattr(self, "validator", None)
        if isinstance(validator, DomainValidator):
            validator.state = self.state
        self.loss_fn.state = self.state
        self.metrics_processor.state = self.state
        self.metrics_processor.collectives = ranks
        self.metrics_processor.dump_folder = config.dump_folder
        self.state.recorder = self._recorder(config, ranks)
        if config.checkpoint.enable:
            # pyrefly: ignore[missing-attribute]
            states = self.checkpointer.states
            states[WEIGHTING] = self.state
            if self.reference is not None and self.decay is not None:
                states[REFERENCE] = ModelWrapper(self.reference)
        logger.info(printable(f"Weighting: {spec.name} ({spec.hash})\n{spec}", keep="\n"))
        if domains:
            logger.info(printable(f"Domains: {', '.join(domains)}"))

    def _recorder(self, config: Config, ranks: Collectives | None) -> Recorder | None:
        """Return what records the run; None where nothing is asked for, or its rank has no losses.

        Args:
            config: The run's.
            ranks: Reaches the ranks with other sequences, and with other parts of these.
        """
        dims, record = self.parallel_dims, config.weighting.record
        if not record or (dims.pp_enabled and not self.pp_has_last_stage):
            return None
        fn, parts = self.state.fn, self.num_pipeline_parallel_microbatches
        rows, length = config.training.local_batch_size // parts, config.training.seq_len
        calls, together = self.gradient_accumulation_steps * parts, self.state.together
        meshes = (dims.get_optional_mesh(name) for name in ("batch", "cp", "tp"))
        first = all(mesh is None or mesh.get_local_rank() == 0 for mesh in meshes)
        if fn.plan.identity and first and getattr(config.loss, "memory", "auto") == "auto":
            logger.warning(
                f"{fn.spec.name} trains on the host's own loss, which tells no losses of "
                "sequences: they are recorded as NaN, and the weights as 1; --loss.memory late "
                "records losses"
            )
        return Recorder(
            asked(record),
            fn,
            Layout(calls, rows, length, parts if together else 1),
            Path(config.dump_folder) / RECORD_FOLDER if first else None,
            device=self.device,
            ranks=ranks,
            places=self.places(rows, length),
        )

    def _take_turns(self, config: Config, fn: wt.Weighting) -> None:
        """Make a step of one microbatch of every domain, whose gradients are kept apart."""
        count = len(fn.domains)
        self.gradient_accumulation_steps = count
        parameters = (p for part in self.model_parts for p in part.parameters())
        self.gradients = DomainGradients(
            parameters,
            count,
            config.training.max_norm,
            weigh=self.state.weigh_gradients,
            over_ranks=self._over_rows,
        )
        logger.info(f"A step takes {count} microbatches, one of every domain")

    @override
    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, Tensor] | list[dict[str, Tensor]],
        labels: Tensor | list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        """Run the host's; where domains take turns, keep the gradient, and combine the last."""
        given = {"input_dict": input_dict, "labels": labels}
        loss = super().forward_backward_step(**given, global_valid_tokens=global_valid_tokens)
        if self.gradients is not None:
            assert isinstance(labels, Tensor), "refused under pipeline parallelism"
            self.gradients.take((labels != IGNORE_INDEX).sum(), global_valid_tokens)
        return loss

    def _over_rows(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that hold other rows."""
        dims = self.parallel_dims
        return OverRanks(dims.get_mesh("batch").get_group()).sum(x) if dims.dp_enabled else x

    def _draw(self) -> None:
        """Tell the loader in which proportions to draw the step that begins; alike on all ranks."""
        fn, state = self.state.fn, self.state
        if not self._draws:
            return
        shares = proportions(fn, state.step)
        if state.pipeline:
            shares = state.pipeline.from_last(shares)
        dist.broadcast(shares, src=0)
        loader = cast("DomainTextDataLoader", self.dataloader)
        loader.proportions = shares.tolist()
        if "both" in fn.plan.targets.values():
            fn.get_buffer("drawn").copy_(shares)
        self._draws = fn.plan.draws_live

    @override
    def batch_generator(
        self, data_iterable: Iterable[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the host's batches; a label outside the vocabulary ends the run before the step."""
        for given, labels in super().batch_generator(data_iterable):
            check_labels(labels, vocabulary_of(self.config))
            yield given, labels

    @override
    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Keep what is for the loss, which the host would hand to the model, and add to it."""
        inputs = {key: x for key, x in input_dict.items() if not _is_signal(key)}
        given = {key: x for key, x in input_dict.items() if _is_signal(key)}
        if self.state.reads_documents:
            positions = inputs.get("positions")
            given["segment_ids"] = (
                torch.zeros_like(labels) if positions is None else documents(positions)
            )
        tokens, labels, kwargs = super().post_dataloading_process(inputs, labels)
        given = self._sharded(given)
        given |= self._further_losses(tokens, labels, kwargs)
        if "columns.ref_loss" in given:
            given.setdefault("ref_loss", given["columns.ref_loss"])
        self.state.set_batch(given, labels if self.parallel_dims.pp_enabled else None)
        return tokens, labels, kwargs

    def _sharded(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of each row, where rows are cut over ranks, as labels are."""
        if not (self.parallel_dims.cp_enabled and given):
            return given
        mesh = self.parallel_dims.get_mesh("cp")
        balancer = self.config.parallelism.context_parallel_load_balancer
        parts, _ = cp_shard(mesh, tuple(given.values()), None, balancer)
        return dict(zip(given, parts, strict=True))

    def places(self, rows: int, length: int) -> Tensor:
        """Return where in its sequence each token of a row is that is on this rank, [L]."""
        places = torch.arange(length, device=self.device).repeat(rows, 1)
        return self._sharded({"places": places})["places"][0]

    def _further_losses(
        self, inputs: Tensor, labels: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the losses of this batch that take a forward pass of their own, by signal."""
        short = short_contexts(self.state.fn.needs)
        found: dict[str, Tensor] = {}
        if not short and self.reference is None:
            return found
        assert isinstance(self.loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
        with self.train_context():
            if self.reference is not None:
                found["ref_loss"] = token_losses(
                    self.reference, self.loss_fn, inputs, labels, kwargs
                )
            for name, window in short.items():
                model = cast("Decoder", self.model_parts[0])
                changed = kwargs | short_context(model, kwargs, window)
                found[name] = token_losses(model, self.loss_fn, inputs, labels, changed)
        return found

    @override
    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Run one optimizer step of the host at the weighting's own step."""
        if not self.begun:
            self._check_agreement()
            self._say_what_runs()
        self.state.begin_step(self.step)
        self._draw()
        if self.gradients is not None:
            data_iterator = self.gradients.noting_turns(data_iterator)
        average, (model, *_) = self.reference, self.model_parts
        if average is not None and self.decay is not None and self.step == 1:
            follow(average, model, 0)  # a fresh run starts from its own first weights
        if self.looks_ahead:
            batches = [next(data_iterator) for _ in range(self._calls_in_a_step)]
            self._look_ahead(batches)
            data_iterator = iter(batches)
        super().train_step(data_iterator)
        if self._agree_every and self.step % self._agree_every == 0:
            self._check_agreement(self.state.moments)
        if self.state.recorder is not None:
            self.state.recorder.end_step()
        if average is not None and self.decay is not None:
            follow(average, model, self.decay)

    def _check_agreement(self, moments: Tensor | None = None) -> None:
        assert isinstance(self.metrics_processor, WeightedMetricsProcessor)
        ranks = self.metrics_processor.collectives or Alone()
        step = torch.tensor(self.step, device=self.device)
        check_agreement(self.state.fn, step, ranks, moments, self._read)

    def _say_what_runs(self) -> None:
        """Leave beside the metrics what the run is and that it starts; the first rank writes."""
        self.begun = True
        if dist.get_rank() != 0:
            return
        spec = self.state.fn.spec
        facts = {
            "spec": {"name": spec.name, "hash": spec.hash, "text": str(spec)},
            "domains": list(self.state.fn.domains),
            "config": self.config.to_dict(),
        }
        ours = {"python": platform.python_version(), "weighting-dsl": wt.__version__}
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": self.step,
            "spec": spec.hash,
            "ranks": dist.get_world_size(),
            "data": self._data(),
            "device": self.metrics_processor.device_memory_monitor.device_name,
            "versions": {**ours, **versions.found()},
        }
        path = Path(self.config.dump_folder) / FOLDER / ABOUT
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, about(path, facts, start))

    def _data(self) -> dict[str, Any] | None:
        """Return what rows are made from and which is next; None of another loader than ours."""
        if not isinstance(self.dataloader, DomainTextDataLoader):
            return None
        state = self.dataloader.state_dict()
        return {"made_from": json.loads(state["made_from"]), "next_row": state["row"]}

    @override
    def pp_forward_backward_step(self, **batch: Any) -> Tensor:
        """Run the pipeline over its microbatches; the loss is known when they have been weighed."""
        self.state.forget_parts()
        before = self.state.weighted_share
        loss = super().pp_forward_backward_step(**batch)
        if self.state.together and self.pp_has_last_stage:
            return self.state.weighted_share - before
        return loss

    @property
    def _calls_in_a_step(self) -> int:
        """How many batches of the loader make up an optimizer step."""
        return self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches

    @torch.no_grad()
    def _look_ahead(self, batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Weigh all batches of a step, by a forward pass over each, before any is trained on."""
        seen, state = self.ntokens_seen, self.state
        state.ahead = True
        size = self.num_pipeline_parallel_microbatches
        for start in range(0, len(batches), size):
            state.forget_parts(noted=start == 0)
            prepared: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
            for given, given_labels in batches[start : start + size]:
                moved = {
                    key: x.to(self.device) if isinstance(x, Tensor) else x
                    for key, x in given.items()
                }
                labels = given_labels.to(self.device)
                prepared.append(self.post_dataloading_process(moved, labels))
                if not self.parallel_dims.pp_enabled:
                    self._forward_only(prepared.pop())
            if prepared:
                self._forward_only(*prepared)
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            state.weigh_noted()
        state.forget_parts()
        self.ntokens_seen, state.ahead = seen, False

    def _forward_only(self, *prepared: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
        """Run model and loss on prepared batches, through the pipeline if there is one."""
        inputs, labels, kwargs = zip(*prepared, strict=True)
        with self.train_context():
            if not self.parallel_dims.pp_enabled:
                self.loss_fn(self.model_parts[0](inputs[0], **kwargs[0]), labels[0])
                return
            self.pp_schedule.eval(
                arg_mbs=[(x,) for x in inputs] if self.pp_has_first_stage else None,
                kwarg_mbs=list(kwargs),
                target_mbs=list(labels) if self.pp_has_last_stage else None,
                losses=[] if self.pp_has_last_stage else None,
            )

    @override
    def train(self) -> None:
        """Train; errors of the user's making end the run with one message and status 2."""
        with exit_on_user_error():
            super().train()
            if self.state.recorder is not None:
                self.state.recorder.flush()
            self._write_mixture()

    def _write_mixture(self) -> None:
        """Leave the proportions that domain weights found, if they move; the first rank writes."""
        found = self.state.mixtures()  # every rank of a pipeline must ask
        if "mixture" not in found or dist.get_rank() != 0:
            return
        config: Any = self.config
        loader = config.dataloader
        made = json.loads(self.dataloader.state_dict().get("made_from", "{}"))
        provenance = {
            "reference": config.weighting.reference or "none",
            "data": f"{loader.dataset_path or loader.dataset}, split {loader.split}, text "
            f"{made.get('text', 'streamed')}",
            "tokens": f"{self.ntokens_seen:,} on each rank, {config.training.seq_len} a sequence",
            "seeds": f"data {loader.seed}, model {config.debug.seed}",
            "model": f"{config.model_spec.name} {config.model_spec.flavor}",
            "versions": ", ".join(f"{x} {version(x)}" for x in ("torch", "torchtitan")),
        }
        path = Path(config.dump_folder) / FOLDER / MIXTURE
        write_mixture(path, self.state.fn.spec, found, self.step, provenance)


def with_weighting(
    config: Trainer.Config, spec: str | Path | wt.Spec = ""
) -> WeightedTrainer.Config:
    """Return a trainer config with a weighting plugged in; nothing else changes.

    Args:
        config: Any config of the host's own `Trainer` that trains a language model with its cross
            entropy; or one that has a weighting, also a subclass of yours, which keeps its class
            and its other settings.
        spec: A spec file, the name of a shipped spec, arrow text, or a spec;
            `--weighting.spec` on the command line takes its place.

    Raises:
        ValueError: The config builds another trainer, or its loss or metrics cannot be weighted.
    """
    if isinstance(config, WeightedTrainer.Config):
        weighted = replace(config)
        weighted.weighting = replace(config.weighting, spec=str(spec) or config.weighting.spec)
    else:
        _refuse_other_trainer(config)
        weighted = _recast(config, WeightedTrainer.Config)
        weighted.weighting = WeightingConfig(spec=str(spec))
    weighted.loss = weighted_loss_config(config.loss)
    if type(config.metrics) is MetricsProcessor.Config:
        weighted.metrics = _recast(config.metrics, WeightedMetricsProcessor.Config)
    elif not isinstance(config.metrics, WeightedMetricsProcessor.Config):
        msg = (
            f"cannot add the weighting's numbers to {_full_name(type(config.metrics))}; use "
            "MetricsProcessor.Config, or make yours a subclass of "
            "titan_integration.observe.metrics.WeightedMetricsProcessor"
        )
        raise ValueError(msg)
    if type(config.checkpoint) is CheckpointManager.Config:
        weighted.checkpoint = _recast(config.checkpoint, ResumingCheckpointManager.Config)
    if type(config.validator) is Validator.Config:
        weighted.validator = _recast(config.validator, DomainValidator.Config)
    if cpu.use_cpu():
        cpu.prepare_config(weighted)
    return weighted


def _refuse_other_trainer(config: object) -> None:
    """Refuse a config of another trainer than the host's own, which the weighted one would replace.

    Raises:
        ValueError: Names the config and what to do.
    """
    if type(config) is Trainer.Config:
        return
    found = _full_name(type(config))
    mend = "start from a config of torchtitan.trainer.Trainer, as llama3_8b() returns"
    if not isinstance(config, Trainer.Config):
        why = "it is no config of a torchtitan trainer"
        if callable(config):
            found = getattr(config, "__qualname__", found)
            why, mend = "it is not a config yet", "call the function, as in with_weighting(f())"
    elif (owner := config._owner or Trainer) is Trainer:  # noqa: SLF001 - build() reads it too
        why = "it has fields or checks of its own, which would be lost"
        mend += ", and set its fields to these"
    else:
        why = f"it builds {_full_name(owner)}, which a weighting would replace"
        mend += f", or make a trainer of yours inherit from WeightedTrainer, not {owner.__name__}"
    msg = f"cannot weight {found}: {why}; {mend}"
    raise ValueError(msg)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError into one message on each node's first rank, and exit status 2 on all."""
    try:
        yield
    except ValueError as error:
        _let_the_first_speak()
        sys.stderr.write(printable(f"\nerror: {error}\n", keep="\n"))
        sys.stderr.flush()
        raise SystemExit(2) from None
    except (Exception, CheckpointException):  # as where the first has ended, and is missed
        _let_the_first_speak()
        raise


def _let_the_first_speak() -> None:
    """Wait on other ranks than a node's first, as torchrun stops all as soon as one ends.

    If the first has nothing to say, the error is this rank's alone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEAD_START)


_HEAD_START = 10.0
"""Seconds the other ranks wait for the first to report an error."""


def _is_signal(key: str) -> bool:
    """Tell whether an entry of a batch is for the weighting and not for the model."""
    return key == "domain_ids" or key.startswith("columns.")


def _recast(config: Configurable.Config, cls: type[C]) -> C:
    """Return a config of a subclass with the same values."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})

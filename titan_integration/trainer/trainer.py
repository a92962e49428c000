"""torchtitan's trainer with a weighting plugged in."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer
from typing_extensions import override

from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.records import REF_LOSS
from titan_integration.data.signals import (
    is_signal,
    of_the_text,
    references_of,
    short_contexts,
)
from titan_integration.host import cpu, versions
from titan_integration.host.run_dir import claim, writing
from titan_integration.host.together import fail_together, refuse_other_data
from titan_integration.host.user_errors import exit_on_user_error
from titan_integration.loss.domain_gradients import DomainGradients, weigh_gradients
from titan_integration.loss.loss import (
    WeightedChunkedLoss,
    WeightedCrossEntropyLoss,
)
from titan_integration.loss.reference_model import (
    average_decay,
    build_reference,
    find_checkpoint,
    follow,
    short_context,
    token_losses,
    told_by_references,
)
from titan_integration.observe.agreement import check_agreement
from titan_integration.observe.metrics import WeightedMetricsProcessor
from titan_integration.observe.mixture import mixtures, write_mixture
from titan_integration.observe.recorder import asked
from titan_integration.observe.validation import DomainValidator
from titan_integration.state.checkpoint import REFERENCE, WEIGHTING, ResumingCheckpointManager
from titan_integration.state.microbatches import When
from titan_integration.state.saved_weighting import SavedWeighting
from titan_integration.trainer.config import WeightedConfig
from titan_integration.trainer.lookahead import look_ahead
from titan_integration.trainer.preflight import (
    ask_for_columns,
    ask_for_rows,
    open_data,
    read_spec,
    refuse_one_domain,
    refuse_unsupported,
    vocabulary_of,
)
from titan_integration.trainer.wiring import sharded, start_run, when_of
from weighting.build import plan_of
from weighting.build.domains import proportions
from weighting.columns import signal_of
from weighting.contract.levels import documents
from weighting.errors import printable
from weighting.loss.logits import IGNORE_INDEX, check_labels
from weighting.ranks import OverRanks
from weighting.runs import layout
from weighting.runs.run_json import describe_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torchtitan.models.common.decoder import Decoder

    from titan_integration.state.run import Run
    from weighting.build import Plan


class WeightedTrainer(Trainer):
    """The host's trainer: weighs the training loss, logs what it did, saves the state it keeps.

    Everything is the host's own but the loss; validation stays unweighted.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(WeightedConfig):
        """The host's fields, and `weighting`."""

    run: Run
    """The weighting at work."""
    references: dict[str, Decoder]
    """By name, "" for an only one; without gradient, and in no checkpoint unless an average."""
    decays: dict[str, float]
    """Of the references that are averages of the model."""
    gradients: DomainGradients | None = None
    """Of the domains, where the weighting compares them."""
    begun: bool = False
    """Whether a step was taken since this start."""
    _drawing: bool
    """Whether the loader knows the proportions to draw in, where they never move."""
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
                plan = plan_of(read_spec(config.weighting), steps=config.training.steps)
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
            self.references = dict[str, "Decoder"]()
            self.decays = dict[str, float]()
            for name, path in references_of(config.weighting.reference).items():
                folder = None
                if (decay := average_decay(path)) is None:
                    folder = find_checkpoint(path)
                else:
                    self.decays[name] = decay
                self.references[name] = build_reference(config, self.parallel_dims, folder)
                logger.info(printable(f"Reference{f' {name}' if name else ''}: {folder or path}"))
            if on_cpu:
                cpu.fix_fsdp(self.model_parts)
                cpu.fix_initial_weights(self.model_config, self.model_parts)
                cpu.hide_mfu(self.metrics_processor)
            self._join(config, plan)

    def _join(self, config: Config, plan: Plan) -> None:
        """Build the weighting for this run's ranks and domains and bind it to who needs it."""
        assert isinstance(self.loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
        assert isinstance(self.metrics_processor, WeightedMetricsProcessor)
        domains = getattr(self.dataloader, "domains", None)
        refuse_one_domain(plan, domains)
        pipelined = self.parallel_dims.pp_enabled
        when = when_of(plan, self._calls_in_a_step, pipelined=pipelined)
        takes_turns = "gradients" in plan.listens_to
        if takes_turns:  # one microbatch of every domain, whose gradients are kept apart
            self.gradient_accumulation_steps = len(domains or ())
            logger.info(f"A step takes {len(domains or ())} microbatches, one of every domain")
        self.run = run = start_run(self, plan, when)
        self._drawing = False
        self.gradients = self._domain_gradients(config) if takes_turns else None
        self._agree_every = config.weighting.agree_every
        loader = cast("DomainTextDataLoader", self.dataloader)
        if run.draws is not None:
            loader.draw_step_by_step(self._calls_in_a_step)
        self.loss_fn.bind(run)
        skips = getattr(config.dataloader, "on_bad_record", "refuse") == "skip"
        bad = (lambda: loader.bad_records) if skips else None
        self.metrics_processor.bind(run, config.dump_folder, bad)
        validator = getattr(self, "validator", None)
        if isinstance(validator, DomainValidator):
            validator.bind(run)
        if isinstance(self.checkpointer, ResumingCheckpointManager):
            self.checkpointer.bind(run)
        if config.checkpoint.enable:
            # pyrefly: ignore[missing-attribute]
            states = self.checkpointer.states
            allow = config.weighting.allow_changed_spec
            states[WEIGHTING] = SavedWeighting(run, allow_changed_spec=allow)
            for name in self.decays:
                key = f"{REFERENCE}_{name}" if name else REFERENCE
                states[key] = ModelWrapper(self.references[name])
        spec = plan.spec
        logger.info(printable(f"Weighting: {spec.name} ({spec.hash})\n{spec}", keep="\n"))
        if domains:
            logger.info(printable(f"Domains: {', '.join(domains)}"))

    def _domain_gradients(self, config: Config) -> DomainGradients:
        fn, step = self.run.fn, self.run.step
        parameters = (p for part in self.model_parts for p in part.parameters())
        return DomainGradients(
            parameters,
            len(fn.domains),
            config.training.max_norm,
            weigh=partial(weigh_gradients, fn, step),
            over_ranks=self._over_rows,
        )

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
        """Tell the loader in which proportions to draw; alike on all ranks."""
        fn, draws = self.run.fn, self.run.draws
        loader = cast("DomainTextDataLoader", self.dataloader)
        if draws is not None:
            draws.begin_step(self.run.step, self._agreed, loader.tell)
            shares = draws.used
        elif fn.plan.sampling and not self._drawing:  # they never move
            shares = self._agreed(proportions(fn, self.run.step))
            loader.proportions = shares.tolist()
            self._drawing = True
        else:
            return
        if "both" in fn.plan.targets.values():
            fn.get_buffer("drawn").copy_(shares)

    def _agreed(self, shares: Tensor) -> Tensor:
        """Return proportions of domains as the first rank has them, on every rank."""
        shares = self.run.from_last(shares)
        dist.broadcast(shares, src=0)
        return shares

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
        inputs = {key: x for key, x in input_dict.items() if not is_signal(key)}
        given = {key: x for key, x in input_dict.items() if is_signal(key)}
        if self.run.reads_documents:
            positions = inputs.get("positions")
            given["segment_ids"] = (
                torch.zeros_like(labels) if positions is None else documents(positions)
            )
        given |= of_the_text(self.run.fn.needs, inputs.get("positions"), labels)
        tokens, labels, kwargs = super().post_dataloading_process(inputs, labels)
        given = sharded(given, self)
        given |= self._further_losses(tokens, labels, kwargs)
        if (from_data := signal_of(REF_LOSS)) in given:
            given.setdefault(REF_LOSS, given[from_data])
        self.run.microbatches.set_batch(given, labels if self.parallel_dims.pp_enabled else None)
        return tokens, labels, kwargs

    def _further_losses(
        self, inputs: Tensor, labels: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the losses of this batch that take a forward pass of their own, by signal."""
        short = short_contexts(self.run.fn.needs)
        if not short and not self.references:
            return {}
        assert isinstance(self.loss_fn, WeightedChunkedLoss | WeightedCrossEntropyLoss)
        model, batch = cast("Decoder", self.model_parts[0]), (inputs, labels, kwargs)
        with self.train_context():
            found = told_by_references(
                self.references, model, self.loss_fn, batch, self.run.fn.needs
            )
            for name, window in short.items():
                changed = kwargs | short_context(model, kwargs, window)
                found[name] = token_losses(model, self.loss_fn, inputs, labels, changed)
        return found

    @override
    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Run one optimizer step of the host at the weighting's own step."""
        if not self.begun:
            self.begun = True
            self._check_agreement()
            self._describe_start()
        self.run.begin_step(self.step)
        self._draw()
        if self.gradients is not None:
            data_iterator = self.gradients.noting_turns(data_iterator)
        if self.step == 1:
            self._follow(dict.fromkeys(self.decays, 0.0))  # from its own first weights
        if self.run.microbatches.when is When.LOOKAHEAD:
            batches = [next(data_iterator) for _ in range(self._calls_in_a_step)]
            look_ahead(self, self.run, batches)
            data_iterator = iter(batches)
        super().train_step(data_iterator)
        if self.run.draws is not None:
            self.run.draws.end_step(cast("DomainTextDataLoader", self.dataloader).tell)
        if self._agree_every and self.step % self._agree_every == 0:
            self._check_agreement(self.run.statistics.moments)
        self.run.end_step()
        self._follow(self.decays)

    def _follow(self, decays: dict[str, float]) -> None:
        """Move the references that are averages of the model."""
        for name, decay in decays.items():
            follow(self.references[name], self.model_parts[0], decay)

    def _check_agreement(self, moments: Tensor | None = None) -> None:
        step = torch.tensor(self.step, device=self.device)
        check_agreement(self.run.fn, step, self.run.ranks, moments, self._read)

    def _describe_start(self) -> None:
        """Leave beside the metrics what the run is and that it starts; the first rank writes."""
        data = self._data()
        if dist.get_rank() != 0:
            return
        folder = Path(self.config.dump_folder)
        with writing(folder / layout.FOLDER / layout.RUN):
            describe_start(
                folder,
                self.run.fn,
                self.config.to_dict(),
                versions.found(),
                step=self.step,
                ranks=dist.get_world_size(),
                data=data,
                device=self.metrics_processor.device_memory_monitor.device_name,
            )

    def _data(self) -> dict[str, Any] | None:
        """Return what rows are made from and which is next; None of another loader than ours."""
        if not isinstance(self.dataloader, DomainTextDataLoader):
            return None
        state = self.dataloader.state_dict()
        return {"made_from": json.loads(state["made_from"]), "next_row": state["row"]}

    @override
    def pp_forward_backward_step(self, **batch: Any) -> Tensor:
        """Run the pipeline over its microbatches; the loss is known when they have been weighed."""
        run = self.run
        run.microbatches.forget()
        before = run.statistics.weighted_share
        loss = super().pp_forward_backward_step(**batch)
        if run.microbatches.when is When.DEFERRED and self.pp_has_last_stage:
            return run.statistics.weighted_share - before
        return loss

    @property
    def _calls_in_a_step(self) -> int:
        """How many batches of the loader make up an optimizer step."""
        return self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches

    @override
    def train(self) -> None:
        """Train; errors of the user's making end the run with one message and status 2."""
        with exit_on_user_error():
            super().train()
            self.run.flush()
            self._write_mixture()
            if bad := getattr(self.dataloader, "bad_records", 0):
                logger.warning(f"{bad:,} bad records of the data were passed over in this run")

    def _write_mixture(self) -> None:
        """Leave the proportions that domain weights found, if they move; the first rank writes."""
        found = mixtures(self.run)  # every rank of a pipeline must ask
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
        path = Path(config.dump_folder) / layout.FOLDER / layout.MIXTURE
        write_mixture(path, self.run.fn.spec, found, self.step, provenance)

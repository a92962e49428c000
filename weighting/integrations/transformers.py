"""Weights in Hugging Face's `Trainer` and what is built on it, and in loops over its models."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from weighting.integrations.collate import ColumnsCollator
from weighting.integrations.files import RunFiles
from weighting.integrations.hook import Hook, UnweightedError, always, read_spec
from weighting.integrations.versions import need

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from weighting.integrations.hook import AnySpec
    from weighting.spec import Spec

__all__ = ["UnweightedError", "WeightingCallback", "weigh", "weigh_model"]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
_PREFIX = "weighting/"
_COLLATED = frozenset({"label", "label_ids", "seq_lengths"})
"""Columns that collators read and models do not take; the last is TRL's."""


def weigh(
    trainer: AnyTrainer,
    spec: AnySpec,
    *,
    domains: Sequence[str] | None = None,
    domain_column: str = "domain",
    columns: Sequence[str] = (),
    record: int = 0,
    fused: bool = False,
) -> AnyTrainer:
    """Have a `Trainer`, or a subclass such as TRL's `SFTTrainer`, train by a weighted loss.

        loss = sum_t u_t * nll_t / num_items_in_batch

    Evaluation is not weighted, nor is the model when training has ended, by an error too.
    Statistics run over all ranks.  What the stages remember is in `trainer_state.json` of each
    checkpoint.  `weighting/*` numbers are in the trainer's logs; below `output_dir` it leaves what
    `weighting report` and `weighting replay` read.

    Columns that the spec reads are taken from the data: a number for each row, or a list with one
    for each token, where the token stands in `input_ids`.

    Args:
        trainer: Before it trains; it is changed and returned.
        spec: A spec, a file, the name of one that comes with the package, or text.
        domains: Names of the domains.  Then each row of the training data must say its own.
        domain_column: The column that does: a name, or an id in the order of `domains`; of the
            row, or a list for its tokens.
        columns: Further columns of the data, which are recorded for specs that are tried later.
        record: Every so many steps means of each sequence are recorded; 0 for never.
        fused: Make the loss from hidden states, a chunk of logits at a time, for memory.  The
            model's output layer must be a plain one: no soft cap, no scale, no adapter on it.  Of
            a training pass `logits` are then a stand-in, all NaN; evaluation has the real ones.
            The loss rounds otherwise than without.  A spec whose weights are one by construction,
            such as `uniform`, keeps the model's own loss, and with it full logits.

    Raises:
        SpecError: The spec is wrong, or does not fit the domains.
        ValueError: The trainer would not use the weighted loss, or cannot tell what it asks for;
            or `fused` is asked of a model or a trainer that cannot serve it.
        ImportError: The library is too old.
    """
    callback = WeightingCallback(
        spec,
        domains=domains,
        domain_column=domain_column,
        columns=columns,
        record=record,
        fused=fused,
    )
    _check_trainer(trainer, fused=fused)
    assert trainer.model is not None
    hook = callback.attach(trainer.model)
    wanted = [*hook.columns, *([domain_column] if hook.reads_domains else [])]
    _check_columns(trainer.train_dataset, wanted, hook)
    trainer.add_callback(callback)
    handlers = trainer.callback_handler.callbacks
    handlers.insert(0, handlers.pop())  # before those that report what is logged
    if wanted:
        keep = None
        if trainer.args.remove_unused_columns:  # as the trainer does, but for the spec's own
            taken = inspect.signature(hook.owner.forward).parameters
            keep = frozenset(taken) | _COLLATED | frozenset(trainer.label_names)
            trainer.args.remove_unused_columns = False
        column = domain_column if hook.reads_domains else None
        trainer.data_collator = ColumnsCollator(
            trainer.data_collator, hook.columns, column, hook.domains, keep
        )
    return trainer


def weigh_model(
    model: nn.Module,
    spec: AnySpec,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    domains: Sequence[str] | None = None,
    domain_column: str = "domain",
    fused: bool = False,
) -> Hook:
    """Have a model's own loss be weighted in training: for Accelerate, and loops of your own.

        loss = sum_t u_t * nll_t / N

    N is `num_items_in_batch` if the model is given it; otherwise the labels on all ranks over the
    number of ranks, as DDP and FSDP average gradients.

    Columns that the spec reads, and the domains' ids, are given to the model with its inputs, as
    tensors [B] or [B, L].  The state is in `state_dict()` of what is returned; Accelerate keeps it
    after `accelerator.register_for_checkpointing(weights)`.

    Args:
        model: Of transformers, peft's around it included, before it is wrapped.
        spec: A spec, a file, the name of one that comes with the package, or text.
        optimizer: Counts the steps.  Without it say `weights.begin_step(step)` before each.
        domains: Names of the domains, in the order of their ids.
        domain_column: The input that holds ids.
        fused: Make the loss from hidden states; see `weigh`.

    Returns:
        What weighs: `read()` returns the numbers of the step, `begin_step`, `state_dict`.

    Raises:
        SpecError: The spec is wrong, or does not fit the domains.
        ValueError: The model has no loss to set, or the spec asks for more than batches tell; or
            `fused` is asked of a model that cannot serve it.
        ImportError: The library is too old.
    """
    need("transformers")
    hook = Hook(model, spec, domains=domains, domain_column=domain_column, fused=fused)
    if optimizer is not None:
        inner = getattr(optimizer, "optimizer", optimizer)  # beneath Accelerate's
        hook.begin_step(1)

        def before(*_: object) -> None:
            hook.end_step()

        def after(*_: object) -> None:
            hook.begin_step((hook.step or 0) + 1)

        inner.register_step_pre_hook(before)
        inner.register_step_post_hook(after)
    return hook


class WeightingCallback(TrainerCallback, ExportableState):
    """Weighs the model of a `Trainer`, for frameworks that take callbacks alone.

    The passes of a call of `train` are weighted; when it has ended, by an error or an interrupt
    too, the model has its own loss.

    Columns of the data pass only where the framework's collator lets them: see `weigh`, which sees
    to that.  Loggers that were added before this callback do not get its numbers.
    """

    def __init__(
        self,
        spec: AnySpec,
        *,
        domains: Sequence[str] | None = None,
        domain_column: str = "domain",
        columns: Sequence[str] = (),
        record: int = 0,
        fused: bool = False,
    ) -> None:
        """Take what `weigh` takes.

        Raises:
            SpecError: The spec is wrong.
            ImportError: The library is too old.
        """
        need("transformers")
        self._spec = read_spec(spec)
        self._options: dict[str, Any] = {
            "domains": domains,
            "domain_column": domain_column,
            "columns": [*columns],
            "fused": fused,
        }
        self._record = record
        self._hook: Hook | None = None
        self._files: RunFiles | None = None

    def attach(self, model: nn.Module) -> Hook:
        """Set the loss of a model."""
        self._hook = Hook(model, self._spec, **self._options)
        return self._hook

    @property
    def spec(self) -> Spec:
        """What it weighs by."""
        return self._spec

    @property
    def hook(self) -> Hook:
        """What weighs the model."""
        assert self._hook is not None, "a run attaches it"
        return self._hook

    @override
    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps: how to make it again, and what is remembered."""
        args = {"spec": str(self._spec), "record": self._record, **self._options}
        saved = {"weighting": _as_json(self._hook.state_dict())} if self._hook else {}
        return {"args": args, "attributes": {}, **saved}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, go on from a checkpoint, and say that the run starts."""
        check_arguments(args, fused=self._options["fused"])
        model = kwargs["model"]
        known = self._hook is not None and any(x is self._hook.model for x in model.modules())
        if not known or not self.hook.attached:
            self.attach(model)  # a model_init makes another one; another trainer may have taken it
        name, hook = type(self).__name__, self.hook
        states: Any = state.stateful_callbacks
        saved = states.setdefault(name, {})
        hook.reset()
        hook.active, run = True, _run_at_hand()
        if run is not None:  # no event tells of a run that fails: the passes of others are not its
            _check_kind(type(run.f_locals["self"]))
            hook.within = lambda: _run_at_hand() is run
        if state.global_step and "weighting" in saved:
            hook.load_state_dict(_from_json(saved["weighting"], hook))
        elif state.global_step and hook.fn.plan.has_state:
            text = (
                f"the checkpoint of step {state.global_step} holds no weighting: what "
                f"{hook.fn.spec.name} remembers starts afresh"
            )
            warnings.warn(text, stacklevel=2)
        self._files = RunFiles(Path(str(args.output_dir)), record=self._record)
        hook.observers = [self._files.add_batch]
        self._files.start(hook, state.global_step + 1, args.to_dict())

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which step it is."""
        self.hook.begin_step(state.global_step + 1)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a step that was not weighed."""
        self.hook.end_step()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is to be recorded."""
        assert self._files is not None
        self._files.end_step(self.hook)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of the step to what is logged of training."""
        if logs is None or "loss" not in logs:
            return
        found = self.hook.read()
        named = {_PREFIX + key: value for key, value in found.items()}
        logs.update(named)
        state.log_history[-1].update(named)
        assert self._files is not None
        more = {k: float(logs[k]) for k in ("grad_norm", "learning_rate") if k in logs}
        self._files.add_metrics(self.hook, {"step": state.global_step, **found, **more})

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model its own loss back; raise if a signal was not finite since the last log."""
        self.hook.active, self.hook.within = False, always
        self.hook.read()


def check_arguments(args: TrainingArguments, *, fused: bool = False) -> None:
    """Refuse settings by which a trainer would take its loss from elsewhere.

    Raises:
        ValueError: Says which, and what to do.
    """
    if args.label_smoothing_factor:
        msg = (
            f"label_smoothing_factor={args.label_smoothing_factor} takes the loss out of the model,"
            " and weights with it; set it to 0"
        )
        raise ValueError(msg)
    of_liger = "fused_linear_cross_entropy"
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get(of_liger, True):
        msg = (
            "use_liger_kernel puts a fused loss in the place of the model's, without weights; keep "
            f"Liger's other kernels with liger_kernel_config={{'{of_liger}': False}}"
        )
        raise ValueError(msg)
    if getattr(args, "loss_type", "nll") == "dft":
        msg = (
            "loss_type='dft' would weigh the weighted loss again; leave it, and write the spec dft"
        )
        raise ValueError(msg)
    if fused and args.fp16:
        msg = (
            "fused=True makes the gradient before fp16=True scales the loss, so that it would be "
            "lost; take bf16=True, or leave fused out"
        )
        raise ValueError(msg)
    if args.n_gpu > 1:
        msg = "DataParallel weighs each device alone; start one process for each, with torchrun"
        raise ValueError(msg)


def _run_at_hand() -> FrameType | None:
    """Return the innermost call of `Trainer.train` that is under way here; None without one."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame


def _is_sft(kind: type[Trainer]) -> bool:
    return any(x.__name__ == "SFTTrainer" for x in kind.__mro__)


def _check_kind(kind: type[Trainer]) -> None:
    """Refuse TRL's trainers whose loss is none of next tokens, such as `DPOTrainer`.

    They take log-probabilities from the same head as `SFTTrainer`, for ratios and differences.

    Raises:
        ValueError: It is one.
    """
    of_trl = [x.__name__ for x in kind.__mro__ if x.__module__.startswith("trl.")]
    if of_trl and not _is_sft(kind):
        msg = (
            f"the loss of {of_trl[0]} is made of ratios of probabilities, which weights of tokens "
            "would falsify; weigh an SFTTrainer or a Trainer"
        )
        raise ValueError(msg)


def _check_trainer(trainer: Trainer, *, fused: bool) -> None:
    """Refuse a trainer that takes its loss from elsewhere, or cuts sequences over ranks.

    Raises:
        ValueError: Says why, and what to do.
    """
    _check_kind(type(trainer))
    if _is_sft(type(trainer)):
        need("trl")
        if fused:
            msg = (
                "SFTTrainer makes its loss from a fused head of its own, without full logits, and "
                "that is weighed; leave fused out"
            )
            raise ValueError(msg)
    earlier = next(
        (x for x in trainer.callback_handler.callbacks if isinstance(x, WeightingCallback)), None
    )
    if earlier is not None:
        msg = (
            f"this trainer is weighed by {earlier.spec.name} already; make a new Trainer for "
            "another spec, or give one spec both factors"
        )
        raise ValueError(msg)
    if trainer.compute_loss_func is not None:
        msg = "compute_loss_func takes the loss out of the model, and weights with it; leave it out"
        raise ValueError(msg)
    check_arguments(trainer.args, fused=fused)
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        size = getattr(layout, f"{name}_size", 1) or 1
        if size > 1:
            msg = (
                f"{name}_size={size} cuts batches over ranks, which is weighed in torchtitan alone"
            )
            raise ValueError(msg)


def _check_columns(data: Any, wanted: Sequence[str], hook: Hook) -> None:  # noqa: ANN401
    """Refuse training data that lacks a column, where it tells its columns.

    Raises:
        ValueError: Says which, and what there is.
    """
    names = getattr(data, "column_names", None)
    if names is None and isinstance(data, list) and data and isinstance(data[0], dict):
        names = [*data[0]]
    for column in wanted:
        if names and column not in names:
            msg = (
                f"{hook.fn.spec.name} reads the column {column!r} and the training data has "
                f"{', '.join(map(str, names))}: add it, with a value for each row or a list for "
                "its tokens. TRL's packing=True drops columns, padding_free=True keeps them"
            )
            raise ValueError(msg)


def _as_json(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a hook's state without tensors; float32 numbers come back as they were."""
    return {**saved, "state": {name: x.tolist() for name, x in saved["state"].items()}}


def _from_json(saved: Mapping[str, Any], hook: Hook) -> dict[str, Any]:
    types = {name: x.dtype for name, x in hook.fn.state_dict().items()}
    state = {n: torch.tensor(x, dtype=types.get(n)) for n, x in saved["state"].items()}
    return {**saved, "state": state}

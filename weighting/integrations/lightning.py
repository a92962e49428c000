"""Weights in Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from typing_extensions import override

from weighting.integrations.files import RunFiles
from weighting.integrations.hook import Hook, read_spec
from weighting.integrations.versions import need

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.optim import Optimizer

    from weighting.integrations.hook import AnySpec

__all__ = ["WeightingCallback"]


class WeightingCallback(Callback):
    """Weighs the loss of the Transformers model in a `LightningModule` in training.

    The model gets the domains' ids and other columns that the spec reads with its inputs, as
    tensors [B] or [B, L].  Its state is in Lightning's checkpoints, `weighting/*` in its logs, and
    below `default_root_dir` is what `weighting report` and `weighting replay` read.
    """

    def __init__(
        self,
        spec: AnySpec,
        *,
        domains: Sequence[str] | None = None,
        domain_column: str = "domain",
        record: int = 0,
        fused: bool = False,
    ) -> None:
        """Take what `weighting.integrations.transformers.weigh` takes.

        Raises:
            SpecError: The spec is wrong.
            ImportError: Lightning or transformers are too old.
        """
        need("lightning")
        need("transformers")
        self._spec = read_spec(spec)
        self._options: dict[str, Any] = {
            "domains": domains,
            "domain_column": domain_column,
            "fused": fused,
        }
        self._record = record
        self._hook: Hook | None = None
        self._files: RunFiles | None = None
        self._seen = 0

    @property
    def hook(self) -> Hook:
        """What weighs the model."""
        assert self._hook is not None, "a run attaches it"
        return self._hook

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the model and set its loss.

        Raises:
            ValueError: There is no such model in the module, or more than one; or `fused` is asked
                of a model or a precision that cannot serve it.
        """
        if self._options["fused"] and str(trainer.precision).startswith("16"):
            msg = (
                f"fused=True makes the gradient before precision={trainer.precision!r} scales the "
                "loss, so that it would be lost; take 'bf16-mixed', or leave fused out"
            )
            raise ValueError(msg)
        if stage != "fit":
            return
        model = _model_in(pl_module)
        if self._hook is None or self._hook.model is not model or not self._hook.attached:
            self._hook = Hook(model, self._spec, **self._options)
        self._hook.reset()  # a checkpoint is loaded after this

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run starts."""
        self._files = RunFiles(Path(trainer.default_root_dir), record=self._record)
        self._seen = trainer.global_step
        self.hook.active = True
        self.hook.observers = [self._files.add_batch]
        self._files.start(self.hook, trainer.global_step + 1, {"max_steps": trainer.max_steps})

    @override
    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say which step it is."""
        self.hook.begin_step(trainer.global_step + 1)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Refuse a step that was not weighed."""
        self.hook.end_step()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the numbers of a step, and record it."""
        if trainer.global_step == self._seen:  # gradients are accumulated
            return
        self._seen = trainer.global_step
        assert self._files is not None
        self._files.end_step(self.hook)
        every: Any = vars(trainer)["log_every_n_steps"]
        if self._seen % every == 0:
            found = self.hook.read()
            pl_module.log_dict({f"weighting/{name}": value for name, value in found.items()})
            self._files.add_metrics(self.hook, {"step": self._seen, **found})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its own loss back; raise if a signal was not finite since the last log."""
        self.hook.active = False
        self.hook.read()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the model its own loss back."""
        if self._hook is not None:  # it may be the setup that failed
            self._hook.active = False

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, for Lightning's checkpoint."""
        return self.hook.state_dict()

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is of another spec, of other domains, or damaged.
        """
        self.hook.load_state_dict(state_dict)


def _model_in(module: LightningModule) -> nn.Module:
    """Return the outermost module that hands its loss to a `loss_function`."""
    found: list[nn.Module] = []
    names: list[str] = []
    for name, one in module.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in names)
        owner = getattr(one, "get_base_model", lambda one=one: one)()
        if not within and hasattr(type(owner), "loss_function"):
            found.append(one)
            names.append(name)
    if len(found) != 1:
        what = f"has {len(found)} models of Hugging Face's: {', '.join(names) or 'none'}"
        msg = f"{type(module).__name__} {what}; one is weighed, so give it one, made in __init__"
        raise ValueError(msg)
    return found[0]

"""Validation per domain: the host's own pass, with the loss of every token noted on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import Validator
from torchtitan.tools.logging import logger, warn_once
from typing_extensions import override

from titan_integration.loss.vocab_parallel import plain
from titan_integration.observe.metrics import WeightedMetricsProcessor
from weighting.build.domains import send_feedback
from weighting.columns import column_of
from weighting.errors import printable
from weighting.ranks import OverRanks
from weighting.runs import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.config import ParallelismConfig
    from torchtitan.models.common.decoder import Decoder

    from titan_integration.loss.loss import WeightedChunkedLoss, WeightedCrossEntropyLoss
    from titan_integration.state.run import Run

FILE = layout.VALIDATION
"""The lines of the validations, beside those of the training steps."""


class DomainValidator(Validator):
    """The host's validator, which also reports the unweighted loss of every domain.

    It needs a loader with `domains`, names in the order of their ids, whose batches carry
    `domain_ids`, [B, L]; with another loader it is the host's.  What is reported: `summarize`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """The host's fields."""

    @override
    # The host calls it by keyword, with what its own takes.
    def __init__(self, config: Config, **kwargs: Any) -> None:  # pyrefly: ignore[bad-override]
        super().__init__(config, **kwargs)
        loss = cast("WeightedChunkedLoss | WeightedCrossEntropyLoss", self.loss_fn)
        self._token_losses = loss.token_losses
        self.loss_fn = self._noting(self.loss_fn)
        if self.pp_schedule is not None:  # calls the loss itself; a training batch has no ids here
            schedule = cast("Any", self.pp_schedule)
            schedule._loss_fn = self._noting(schedule._loss_fn)  # noqa: SLF001
        self._loader = _KeepsLoader(self.dl_config)
        self.dl_config = cast("Any", self._loader)
        self._run: Run | None = None
        self._lm_head: nn.Module | None = None
        self._sums: Tensor | None = None
        self._ids: dict[Tensor, Tensor] = {}
        """The domains of the batches whose loss is yet to come, by their labels."""

    def bind(self, run: Run) -> None:
        """Send a run's weighting what validations find, if it listens."""
        self._run = run

    @override
    def post_dataloading_process(
        self,
        input_dict: dict[str, Tensor],
        labels: Tensor,
        model_parts: list[nn.Module],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Keep the domains, which the host would hand to the model, for the loss of this batch."""
        inputs = {name: x for name, x in input_dict.items() if column_of(name) is None}
        ids = inputs.pop("domain_ids", None)
        domains = getattr(self._loader.built, "domains", None)
        if not tells_domains(self.parallelism):
            warn_once(logger, "no validation per domain under full_dtensor and context parallelism")
            domains = None
        if ids is None or domains is None:
            return super().post_dataloading_process(inputs, labels, model_parts)
        # Context-parallel ranks get a part of every row each: domains take the way of the labels.
        both = torch.stack([labels, ids], dim=-1)
        tokens, both, kwargs = super().post_dataloading_process(inputs, both, model_parts)
        labels, ids = (x.contiguous() for x in both.unbind(-1))
        if self._sums is None:
            self._sums = torch.zeros(2, len(domains), dtype=torch.float64, device=labels.device)
        if self.pp_has_last_stage is not False:
            self._ids[labels] = ids
        return tokens, labels, kwargs

    @override
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate as the host does, then report every domain; called on all ranks."""
        self._sums = None
        self._lm_head = cast("Decoder", model_parts[-1]).lm_head
        super().validate(model_parts, step)
        if self._sums is not None:
            self._report(self._over_ranks(self._sums), step)

    def _noting(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loss that, for a batch of ours, first adds its tokens' losses to the sums."""

        def noted(pred: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            ids = self._ids.pop(labels, None)
            if ids is not None:
                assert self._sums is not None
                assert self._lm_head is not None
                # First: the host's loss leaves the output layer as training expects it.
                losses = self._token_losses(pred, labels, self._lm_head)
                add_tokens(self._sums, losses, plain(labels), plain(ids))
            return loss_fn(pred, labels, *args, **kwargs)

        return noted

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Return the sums over all data- and context-parallel ranks, on every rank."""
        dims = self.parallel_dims
        if dims.dp_cp_enabled:
            sums = OverRanks(dims.get_mesh("loss").get_group()).sum(sums)
        if dims.pp_enabled:  # Only the last stage knows losses; the others have zeros.
            sums = OverRanks(dims.get_mesh("pp").get_group()).sum(sums)
        return sums

    def _report(self, sums: Tensor, step: int) -> None:
        """Write what was found: to the console, the host's loggers, and as a JSON line."""
        processor = self.metrics_processor
        assert isinstance(processor, WeightedMetricsProcessor)
        domains = cast("Any", self._loader.built).domains
        found = summarize(domains, sums)
        logger.info(f"validate step: {step:2}  by domain\n{table(domains, found)}")
        self._send(sums, step)
        processor.logger.log({f"validation_metrics/{k}": v for k, v in found.items()}, step)
        losses, tokens = sums.sum(1).tolist()
        processor.keep(FILE, {"step": step, "loss": losses / tokens, **found})

    def _send(self, sums: Tensor, step: int) -> None:
        """Send a weighting that listens the loss of every domain of the training data.

        Raises:
            ValueError: The validation text has other domains.
        """
        fn = None if self._run is None else self._run.fn
        if fn is None or "validation" not in fn.plan.listens_to:
            return
        refuse_other_domains(fn.spec.name, cast("Any", self._loader.built).domains, fn.domains)
        send_feedback(fn, "validation", (sums[0] / sums[1]).float(), step)


def tells_domains(parallelism: ParallelismConfig) -> bool:
    """Tell whether domains can go with the labels, whose way one layout hides."""
    cut = parallelism.context_parallel_degree > 1
    return not (cut and parallelism.spmd_backend == "full_dtensor")


def refuse_other_domains(name: str, there: Sequence[str], here: Sequence[str]) -> None:
    """Refuse validation text of other domains than the training text, for a spec that follows them.

    Args:
        name: The spec's.
        there: Domains of the validation text.
        here: Of the training text.

    Raises:
        ValueError: They differ.
    """
    if tuple(there) != tuple(here):
        msg = (
            f"{name} is moved by the validation loss of every domain; the validation text has "
            f"{', '.join(there)}, the training text {', '.join(here)}. "
            "Name them alike: --dataloader.domains and --validator.dataloader.domains"
        )
        raise ValueError(msg)


def add_tokens(sums: Tensor, losses: Tensor, labels: Tensor, domain_ids: Tensor) -> None:
    """Add the losses and the number of valid tokens of each domain to `sums`.

    Args:
        sums: Float64 [2, domains]; float32 could not count beyond 2^24 tokens.
        losses: Nats, [B, L].
        labels: [B, L]; where they are ignored, nothing is added.
        domain_ids: [B, L].
    """
    valid = (labels != IGNORE_INDEX).flatten()
    both = torch.stack([torch.where(valid, losses.flatten(), 0), valid]).to(sums.dtype)
    sums.index_add_(1, domain_ids.flatten(), both)


def summarize(domains: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Return the numbers of a validation.

    `<domain>/tokens`, and where there are any `<domain>/loss`, the mean over them in nats, and
    `<domain>/perplexity`, its exponential; `domain_mean_loss` and `domain_mean_perplexity` are
    means over those domains, each counting alike.  As a loss is a log-perplexity, the first is
    the mean log-perplexity.

    Args:
        domains: Names.
        sums: Losses in nats and tokens of each domain, [2, domains].
    """
    found: dict[str, float] = {}
    means: list[Tensor] = []
    for name, (loss, tokens) in zip(domains, sums.double().T, strict=True):
        found[f"{name}/tokens"] = int(tokens)
        if tokens > 0:
            means.append(loss / tokens)
            found[f"{name}/loss"] = means[-1].item()
            found[f"{name}/perplexity"] = means[-1].exp().item()
    assert means, "the host has divided by the number of tokens"
    found["domain_mean_loss"] = torch.stack(means).mean().item()
    found["domain_mean_perplexity"] = torch.stack(means).exp().mean().item()
    return found


def table(domains: Sequence[str], found: dict[str, float]) -> str:
    """Return what `summarize` found as a table of a line per domain, and one of the means."""
    width = max(map(len, ("domain", *domains)))  # a name is as long when it is made printable
    lines = [f"  {'domain':{width}}      tokens     loss  perplexity"]
    for name in domains:
        tokens = f"  {printable(name):{width}}  {found[f'{name}/tokens']:10,}"
        if f"{name}/loss" in found:
            loss, perplexity = found[f"{name}/loss"], found[f"{name}/perplexity"]
            lines.append(f"{tokens}  {loss:7.4f}  {perplexity:10.3f}")
        else:
            lines.append(f"{tokens}   absent      absent")
    loss, perplexity = found["domain_mean_loss"], found["domain_mean_perplexity"]
    return "\n".join([*lines, f"  {'mean':{width}}  {'':10}  {loss:7.4f}  {perplexity:10.3f}"])


@dataclass
class _KeepsLoader:
    """A loader's config that keeps the loader it builds: the host uses it and tells nobody."""

    config: BaseDataLoader.Config
    built: BaseDataLoader | None = None

    def build(self, **kwargs: Any) -> BaseDataLoader:  # noqa: ANN401 - what the host passes
        self.built = self.config.build(**kwargs)
        return self.built

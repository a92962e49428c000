"""Between a Transformers model and its loss: the weights of a batch, and the proof that they count.

Models of the library hand logits and labels to `model.loss_function`, which has a setter.  What is
set there returns the weighted loss, so the logits count as the model made them.

    loss = sum_t u_t * nll_t / N

N is the host's `num_items_in_batch`.  Where the host gives none it is the number of labels on all
ranks over the number of ranks, since hosts average gradients over ranks.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name

from weighting.build import build
from weighting.build.plan import plan_of
from weighting.build.step import StepStatistics
from weighting.columns import HIDDEN, column_of, plain_name, signal_of
from weighting.contract import Signals
from weighting.errors import OneUnitWarning
from weighting.integrations.head import KeptHead
from weighting.language.read import load, resolve
from weighting.loss.cross_entropy import signals_from, signals_of, token_loss, weighted_sum
from weighting.loss.late_bound import Batch, late_bound
from weighting.loss.linear import as_autocast
from weighting.loss.logits import IGNORE_INDEX, OF_LOGITS, check_labels
from weighting.loss.path import Sizes, path_of
from weighting.loss.sums import Head
from weighting.ranks import UnevenRanks
from weighting.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from weighting.build import Plan, Weights
    from weighting.contract import Collectives

AnySpec = Spec | str | Path
_POSITIONS = ("position_ids", "seq_idx", "cu_seq_lens_q")
"""Inputs of a model that tell where samples begin, the first found counts."""
_NEXT_TOKENS = "ForCausalLMLoss"
"""The library's loss that weights stand in for; others do not shift their labels."""
_OWN = "weighting_hook"
"""Attribute of a model that is weighed."""


class UnweightedError(RuntimeError):
    """A model that is to be weighed would have been trained by a loss without weights."""


def read_spec(spec: AnySpec) -> Spec:
    """Return a spec from itself, a file, a shipped name, or text.

    Raises:
        SpecError: It is none of them, or wrong.
    """
    if isinstance(spec, Spec):
        return spec
    return load(spec) if isinstance(spec, Path) else resolve(spec)


class Hook:
    """Weighs the loss of a model in training, and keeps what that takes.

    Attributes:
        fn: The built spec.
        domains: Names of the domains, in the order of their ids.
        reads: Signals: those that the spec needs, and further columns of the data.
        step: The optimizer step at hand, from 1; None until it is known.
        model: What was called to be weighed, as the host calls it.
        active: Whether training passes are weighed; otherwise the model's own loss is all there is.
        within: Says whether the pass at hand is one of the run's; those of others are not weighed.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AnySpec,
        *,
        domains: Sequence[str] | None = None,
        domain_column: str = "domain",
        columns: Sequence[str] = (),
        fused: bool = False,
    ) -> None:
        """Build the spec and set the model's loss.

        Raises:
            SpecError: The spec is wrong, or does not fit the domains.
            ValueError: The model has no `loss_function` to set, or no plain output layer where
                `fused` needs one, or the spec asks for more than a batch can tell.
        """
        plan = plan_of(read_spec(spec))
        _check(plan, fused=fused)
        self.fn = build(plan, domains=domains)
        self.domains = self.fn.domains
        more = {name if name == "ref_loss" else signal_of(name) for name in columns}
        self.reads = self.fn.needs | more
        self.step: int | None = None
        self.model, self.active = model, True
        self.within: Callable[[], bool] = always
        self.observers: list[Callable[[Hook, Signals, Weights], None]] = []
        self._domain_column = domain_column
        self._initial = {name: x.clone() for name, x in self.fn.state_dict().items()}
        self._statistics: StepStatistics | None = None
        self._tokens = torch.zeros(())
        self._batch: dict[str, Any] | None = None
        self._weighed, self._backward = 0, 0
        self._returned = False
        self._cast: set[str] = set()
        self._head: KeptHead | None = None
        self._stock = self._attach(fused=fused)

    @property
    def attached(self) -> bool:
        """Whether the model's loss is still this one's, and not that of another spec set since."""
        return getattr(self.model, _OWN, None) is self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that it reads, beside that of the domains."""
        told = {name for name in self.reads if name in _TOLD or name.startswith(OF_LOGITS)}
        found = {column_of(name) or name for name in self.reads - told}
        return tuple(sorted(found))

    @property
    def reads_domains(self) -> bool:
        """Whether batches must say of which domain their tokens are."""
        return bool(self.domains)

    @property
    def domain_column(self) -> str:
        """The column that holds the domains."""
        return self._domain_column

    def detach(self) -> None:
        """Give the model its own loss back."""
        for handle in self._handles:
            handle.remove()
        if self._head is not None:
            self._head.close()
        self.owner.loss_function = self._stock
        delattr(self.model, _OWN)

    def begin_step(self, step: int) -> None:
        """Take the batches that follow for those of an optimizer step; may be said again."""
        if step == self.step:
            return
        self.step = step
        self._weighed = self._backward = 0

    def end_step(self) -> None:
        """Check, before an optimizer steps, that the gradient came of weighted losses.

        Raises:
            UnweightedError: It did not.
        """
        if self._backward:
            return
        what = "another loss was used" if self._weighed else "the model was not called"
        msg = (
            f"step {self.step} would be trained unweighted: {what} than the one that "
            f"{type(self.model).__name__} returns. Leave the loss to the model: no label "
            "smoothing, compute_loss_func, or loss of a trainer's own"
            if self._weighed
            else f"step {self.step} would be trained unweighted: {what} by way of the object that "
            "is weighed. Weigh the object that the loop calls"
        )
        raise UnweightedError(msg)

    def read(self) -> dict[str, float]:
        """Return the statistics of the step over all ranks; every rank must call it.

        The step is that of the last batch.  Losses are in nats.  Empty before the first batch.

        Raises:
            NonFiniteSignalError: A signal was not finite and the spec says `on_nonfinite: error`.
        """
        if self._statistics is None:
            return {}
        ranks = self.ranks()
        found = self._statistics.read(ranks)
        if self._statistics.warnings and not self.fn.told_of_one_unit:
            self.fn.told_of_one_unit = True
            if ranks.rank == 0:
                warnings.warn(self._statistics.warnings[0], OneUnitWarning, stacklevel=2)
        tokens = max(float(ranks.sum(self._tokens)), 1.0)
        for name in ("unweighted_loss", "weighted_loss"):  # sums until here
            found[name] /= tokens
        return found

    def reset(self) -> None:
        """Forget everything, as a new run does."""
        self.fn.load_state_dict(self._initial)
        self.step = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step, what the stages remember, and what it belongs to."""
        state = {name: x.detach().cpu().clone() for name, x in self.fn.state_dict().items()}
        about = {"spec_hash": self.fn.spec.hash, "spec": str(self.fn.spec)}
        return {**about, "domains": [*self.domains], "step": self.step, "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: It is of another spec, of other domains, or damaged.
        """
        if saved["spec_hash"] != self.fn.spec.hash:
            msg = (
                f"the checkpoint was weighed by another spec:\n{saved['spec']}\nand this run is "
                f"weighed by:\n{self.fn.spec}\nGo on with the old one, or start anew from the "
                "model alone"
            )
            raise ValueError(msg)
        if self._initial and saved["domains"] != [*self.domains]:
            msg = (
                f"the checkpoint remembers the domains {', '.join(saved['domains'])}, and this run "
                f"has {', '.join(self.domains)}; give the same ones in the same order"
            )
            raise ValueError(msg)
        self.fn.load_state_dict(saved["state"])
        self.step = saved["step"]

    def ranks(self) -> Collectives:
        """Return what reaches the ranks that hold other batches."""
        started = dist.is_available() and dist.is_initialized()
        return UnevenRanks(dist.group.WORLD if started else None)

    def _attach(self, *, fused: bool) -> Callable[..., Tensor]:
        """Set the loss and watch the model's calls; return the loss it had."""
        earlier = getattr(self.model, _OWN, None)
        if earlier is not None:
            earlier.detach()
        owner = getattr(self.model, "get_base_model", lambda: self.model)()  # beneath adapters
        if not hasattr(type(owner), "loss_function"):
            msg = (
                f"{type(owner).__name__} has no loss_function to set; weigh a model of Hugging "
                "Face's transformers, before it is wrapped, or call "
                "weighting.weighted_cross_entropy in a loop of your own"
            )
            raise ValueError(msg)
        stock: Any = owner.loss_function
        if getattr(stock, "__name__", None) != _NEXT_TOKENS:
            msg = (
                f"the loss of {type(owner).__name__} is {getattr(stock, '__name__', stock)!s}, and "
                f"weights are of the loss of next tokens ({_NEXT_TOKENS}): weigh a causal model "
                "whose loss_function was not replaced"
            )
            raise ValueError(msg)
        if fused:
            self._head = KeptHead(owner, self._takes_hidden_states)
        self.owner: Any = owner
        owner.loss_function = self._loss
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        object.__setattr__(self.model, _OWN, self)
        return stock

    @torch.compiler.disable
    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep what a batch says beside the model's inputs, which alone go on."""
        own = {self._domain_column, *self.columns}
        told = {name for name in (*own, *_POSITIONS, "labels", "shift_labels") if name in kwargs}
        self._batch = {name: kwargs[name] for name in told}
        self._returned = False
        if self._head is not None:
            self._head.forget()
        return args, {name: value for name, value in kwargs.items() if name not in own}

    @torch.compiler.disable
    def _after(
        self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: object
    ) -> object:
        """Weigh what TRL's fused head returns; refuse a training pass without a weighted loss.

        Raises:
            UnweightedError: There was no weighted loss.
        """
        if self._training:
            if hasattr(output, "log_probs") and hasattr(output, "label_mask"):
                self._weigh_log_probs(output)
            elif not self._returned:
                no_labels = self._batch is not None and self._batch.get("labels") is None
                why = "got no labels" if no_labels else "did not call its loss_function"
                msg = (
                    f"{type(self.owner).__name__} is to be weighed and {why}, so that it would be "
                    "trained unweighted: no label smoothing, compute_loss_func, or fused loss "
                    "(Liger: liger_kernel_config={'fused_linear_cross_entropy': False}); pass "
                    "labels to the model, or call it in eval mode or under torch.no_grad()"
                )
                raise UnweightedError(msg)
        self._batch = None
        return output

    @property
    def _training(self) -> bool:
        return self.model.training and torch.is_grad_enabled() and self.active and self.within()

    def _takes_hidden_states(self) -> bool:
        """Return whether the output layer is to make no logits in the pass at hand."""
        return self._training and self._batch is not None and not self.fn.plan.identity

    @torch.compiler.disable
    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401 - the host's own
    ) -> Tensor:
        """Be the model's loss function: weighted in training, the model's own otherwise."""

        def stock() -> Tensor:
            return self._stock(
                logits,
                labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )

        if not self._training:
            loss = stock()
            if loss.requires_grad and self.active and self.within():
                loss.register_hook(_refuse_evaluation)
            return loss
        targets = _next(labels, ignore_index) if shift_labels is None else shift_labels
        targets = targets.to(logits.device).view(logits.shape[:-1])
        targets = torch.where(targets == ignore_index, IGNORE_INDEX, targets)
        valid = targets != IGNORE_INDEX
        if self.fn.plan.identity:
            loss = stock()
            count = valid.sum() if num_items_in_batch is None else num_items_in_batch
            told = self._told(valid)
            self._weigh({"loss": torch.zeros_like(valid, dtype=torch.float32)}, told)
            self._note(valid, loss.detach() * count, loss.detach() * count)
        elif self._head is not None:
            hidden = self._head.hidden_of(logits)
            loss = self._fused(hidden, self._head.layer, targets, num_items_in_batch)
        else:
            check_labels(targets, logits.shape[-1])
            told = self._told(valid)
            nll = token_loss(logits, targets)
            found = signals_from(logits, targets, self.fn.needs)
            out = self._weigh({"loss": nll.detach(), **found}, told)
            total = weighted_sum(nll, out.token)
            self._note(valid, torch.where(valid, nll, 0).sum(), total)
            loss = total / self._divisor(valid, num_items_in_batch)
        self._returned = True
        return self._watched(loss)

    def _fused(
        self,
        hidden: Tensor,
        layer: nn.Linear,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Return the weighted loss from hidden states [B, L, D]; logits are there in chunks."""
        fn, valid = self.fn, targets != IGNORE_INDEX
        hidden, weight, bias = as_autocast(hidden, layer.weight, layer.bias)
        check_labels(targets, len(weight))
        told = self._told(valid)
        step = torch.as_tensor(self.step, device=targets.device)  # one graph for all steps
        sizes = Sizes.of(targets, weight)
        if "sequence_ids" in told:
            sizes = sizes._replace(rows=0)

        def weigh(found: dict[str, Tensor]) -> tuple[Tensor, ...]:
            out = self._weigh(found, told)
            unweighted = torch.where(valid, found["loss"], 0).sum()
            self._note(valid, unweighted, weighted_sum(found["loss"], out.token))
            return (out.token,)

        def local(found: dict[str, Tensor]) -> Tensor:
            return fn.local_part(signals_of(found), step)

        batch = Batch(
            targets,
            Head(weight, bias),
            path_of(fn.plan, sizes, collectives=fn.collectives),
            fn.needs,
            local,
            told,
            1 / self._divisor(valid, num_items_in_batch),
        )
        return late_bound(hidden, batch, weigh)[0]

    def _weigh_log_probs(self, output: Any) -> None:  # noqa: ANN401 - TRL's, which is not imported
        """Weigh the log-probabilities of the labels, of which TRL makes its loss."""
        log_probs, valid = output.log_probs, output.label_mask.bool()
        found = {"loss": -log_probs.detach().float()}
        if output.entropy is not None:
            found["entropy"] = output.entropy.detach().float()
        out = self._weigh(found, self._told(valid))
        weighted = torch.where(out.token != 0, log_probs * out.token, 0)
        if self.fn.plan.identity:
            weighted = log_probs.view_as(log_probs)  # the same numbers, and a place to watch
        self._note(valid, found["loss"].sum(), -weighted.sum())
        output.log_probs = self._watched(weighted)

    def _told(self, valid: Tensor) -> dict[str, Tensor]:
        """Return the signals that a batch tells without its loss, and be ready to weigh it.

        Raises:
            ValueError: The batch lacks something that the spec reads.
            UnweightedError: The model is called by way of another object.
        """
        if self._batch is None:
            msg = (
                f"{type(self.owner).__name__} was wrapped after it was weighed, so that batches "
                "pass by; weigh the outermost model, as the loop calls it"
            )
            raise UnweightedError(msg)
        if self.step is None:
            msg = (
                "the optimizer step is not known; give weigh_model the optimizer, or say "
                "weights.begin_step(step), from 1, before each step"
            )
            raise ValueError(msg)
        if self._weighed and self.fn.spec.scope == "step":
            msg = (
                f"{self.fn.spec.name} has scope: step, and here a step has several microbatches, "
                "each weighed when it comes; write scope: microbatch or scope: running, or do not "
                "accumulate gradients"
            )
            raise ValueError(msg)
        if self._statistics is None:
            self.fn.to(valid.device)
            self._statistics = StepStatistics(self.fn, valid.device)
            self._tokens = self._tokens.to(valid.device)
            if self.fn.spec.scope != "rank":
                self.fn.collectives = self.ranks()
        if not self._weighed:  # until now the last step's numbers could be read
            self._statistics.begin_step()
            self._tokens.zero_()
        sequences = self._sequences(valid)
        told = {"valid": valid}
        if sequences is None:
            told["segment_ids"] = torch.zeros_like(valid, dtype=torch.int64)
        else:
            told["segment_ids"] = told["sequence_ids"] = sequences
        if self.reads_domains:
            told["domain_ids"] = self._of_labels(self._domain_column, valid).long()
        for name in self.columns:
            key = name if name in Signals.__dataclass_fields__ else signal_of(name)
            told[key] = self._of_labels(name, valid).float()
        return told

    def _weigh(self, found: dict[str, Tensor], told: dict[str, Tensor]) -> Weights:
        """Return the weights of a batch, given the signals of its logits and all others.

        Raises:
            ValueError: A signal is not among them.
        """
        assert self.step is not None
        assert self._statistics is not None
        of_logits = {x for x in self.fn.needs if x in _OF_LOGITS or x.startswith(OF_LOGITS)}
        if lacking := sorted(of_logits - found.keys()):
            name = plain_name(lacking[0])
            msg = (
                f"{self.fn.spec.name} reads {name}, which TRL's fused head does not tell; take "
                "Hugging Face's Trainer, which has the logits"
            )
            raise ValueError(msg)
        signals = signals_of({**found, **told})
        out = self.fn(signals, self.step)
        self.fn.warn_of_one_unit(out, rows_are_sequences="sequence_ids" not in told)
        self._statistics.add(out)
        losses = None if self.fn.plan.identity and "entropy" not in found else found["loss"]
        if self.reads_domains:
            self._statistics.add_by_domain(losses, out.token, told)
        for observer in self.observers:
            observer(self, signals, out)
        self._weighed += 1
        return out

    def _note(self, valid: Tensor, unweighted: Tensor, weighted: Tensor) -> None:
        """Add sums of losses over a batch, nats."""
        assert self._statistics is not None
        self._statistics.add_losses(unweighted.float(), weighted.detach().float())
        self._tokens += valid.sum()

    def _divisor(self, valid: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return what a sum over the labels of a batch is divided by, 0-D."""
        if num_items_in_batch is not None:  # none where all labels of a step are masked
            return torch.as_tensor(num_items_in_batch, device=valid.device).clamp(min=1)
        over = self.ranks()
        return over.sum(valid.sum().float()).clamp(min=1) / over.size

    def _watched(self, loss: Tensor) -> Tensor:
        """Return a tensor that says when a gradient comes through it."""

        def note(_gradient: Tensor) -> None:
            self._backward += 1

        loss.register_hook(note)
        return loss

    def _of_labels(self, name: str, valid: Tensor) -> Tensor:
        """Return a column's values where the labels stand that they are of, in their shape.

        Raises:
            ValueError: It is missing, or of a shape that fits no batch.
        """
        assert self._batch is not None
        x = self._batch.get(name)
        if x is None:
            msg = (
                f"{self.fn.spec.name} reads {name!r}, and the batch has no such column; TRL's "
                "packing=True drops columns (padding_free=True keeps them), and a host that is "
                "given a callback alone drops those that the model does not take"
            )
            raise ValueError(msg)
        x = torch.as_tensor(x, device=valid.device)
        if x.is_floating_point() and x.element_size() < 4 and name not in self._cast:  # noqa: PLR2004
            self._cast.add(name)
            text = (
                f"the column {name!r} arrives as {x.dtype}, which has three digits: what wraps the "
                "model casts its inputs; with FSDP2 set cast_forward_inputs=False in its "
                "MixedPrecisionPolicy"
            )
            warnings.warn(text, stacklevel=2)
        return self._placed(name, x, valid)

    def _placed(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        """Return [B] or [B, L] of tokens as values of the labels that tokens predict."""
        assert self._batch is not None
        rows, length = valid.shape
        if x.shape == (rows,):
            return x[:, None].expand(rows, length)
        if len(x) == 1 and x[0].dim() == 1:
            x = x.expand(rows, -1)
        if x.shape in {(rows, length), (rows, length + 1)}:
            return torch.cat([x[:, 1:], x[:, -1:]], 1)[:, :length]
        msg = (
            f"{name!r} is {[*x.shape]} and the labels are {[rows, length]}; give one value for "
            "each row, [B], or for each token, [B, L], where the token stands in input_ids"
        )
        raise ValueError(msg)

    def _sequences(self, valid: Tensor) -> Tensor | None:
        """Return the sample of each label where positions tell them; None where rows are samples.

        Raises:
            ValueError: Positions have a form in which that is not known.
        """
        assert self._batch is not None
        found = next((n for n in _POSITIONS if self._batch.get(n) is not None), None)
        if found is None:
            return None
        x = self._batch[found].to(valid.device)
        if found == "cu_seq_lens_q":  # where each sample begins in the only row, and its end
            x = torch.bucketize(torch.arange(int(x[-1]), device=x.device), x[1:], right=True)[None]
        if found == "position_ids" and x[0].dim() == 1:
            starts = x[:, 1:] <= x[:, :-1]
            x = F.pad(starts, (1, 0)).cumsum(1)
        return self._placed(found, x, valid).long()


_OF_LOGITS = frozenset({"loss", "entropy", "error_norm"})
_TOLD = _OF_LOGITS | {"target_prob", "domain_ids", "segment_ids", "sequence_ids", HIDDEN}
"""Signals that hidden states, logits and the model's inputs tell; all others are columns."""


def always() -> bool:
    """Return True: whoever calls the model in training calls it for the run."""
    return True


def _check(plan: Plan, *, fused: bool) -> None:
    """Refuse what a host's batches cannot tell, or a weight that acts on the draw of data.

    Raises:
        ValueError: Says what.
    """
    spec = plan.spec
    if plan.sampling or "both" in plan.targets.values():
        name = next(name for name, target in plan.targets.items() if target != "loss")
        msg = (
            f"{spec.name}: {name} says how data is drawn (apply: {plan.targets[name]}), and this "
            "trainer draws its own; write apply: loss, or train with torchtitan"
        )
        raise ValueError(msg)
    if HIDDEN in plan.needs and not fused:
        msg = (
            f"{spec.name} reads hidden states, and the loss here is given logits; set fused=True, "
            "which a plain torch.nn.Linear as output layer takes, or train with torchtitan"
        )
        raise ValueError(msg)
    if plan.listens_to:
        msg = (
            f"{spec.name} waits for {min(plan.listens_to)} between batches, which this trainer "
            "does not measure; train with torchtitan, or weigh by a table of its result"
        )
        raise ValueError(msg)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if spec.scope == "rank" and plan.has_state and ranks > 1:
        msg = (
            f"{spec.name} has scope: rank and remembers something, so each rank would have a state "
            "of its own, and checkpoints here hold one; write scope: microbatch"
        )
        raise ValueError(msg)


def _refuse_evaluation(_gradient: Tensor) -> None:
    msg = (
        "a loss of evaluation mode, which is not weighted, was trained on; call model.train() "
        "before training steps"
    )
    raise UnweightedError(msg)


def _next(labels: Tensor, ignore_index: int) -> Tensor:
    """Return what each token is to predict."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)

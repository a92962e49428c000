"""Lightning with weights: exact under accumulation, resumed from its checkpoints."""

import lightning
import pytest
import tiny_models as tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close

from weighting.integrations.hook import UnweightedError
from weighting.integrations.lightning import WeightingCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:Checkpoint directory", "ignore:.*LeafSpec"
)
BATCH = 3


class Module(lightning.LightningModule):
    """A module as users write it, with plain gradient descent."""

    def __init__(self, further=False):
        super().__init__()
        self.model = tiny.model()
        if further:
            self.other = tiny.model()

    def training_step(self, batch, _index):
        """Return the model's loss."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """Return plain gradient descent."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class Logger(lightning.pytorch.loggers.CSVLogger):
    """Keeps what is logged."""

    def log_metrics(self, metrics, step=None):
        """Keep it."""
        self.lines = [*getattr(self, "lines", []), {**metrics, "step": step}]


def fitted(
    folder, steps, ckpt_path=None, spec="group-dro", seeds=(1, 1), *, fused=False, **options
):
    """Return a trainer and a module that have trained steps, each epoch on a batch a seed."""
    batches = [tiny.padded(tiny.rows(BATCH, seed)) for seed in seeds]
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    host = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=1,
        logger=Logger(folder),
        callbacks=[WeightingCallback(spec, domains=tiny.DOMAINS, record=1, fused=fused), keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Module()
    host.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return host, module


def test_a_run_is_the_formulas_and_a_resumed_one_ends_alike(tmp_path):
    """Parameters are those of float64; cut in two, those of the whole, bit for bit."""
    steps = [[tiny.padded(tiny.rows(BATCH, 1))]] * 4
    losses, parameters = tiny.descended("llama", "group-dro", steps)
    host, module = fitted(tmp_path, 4)
    for name, value in module.model.named_parameters():
        assert_close(value.double(), parameters[name], rtol=1e-4, atol=2e-6)
    logged = [x for x in host.logger.lines if "weighting/weighted_loss" in x]
    for line, loss in zip(logged, losses, strict=True):
        assert_close(line["weighting/weighted_loss"], loss, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "weighting" / "metrics.jsonl").read_text().count("\n") == 4
    assert len([*(tmp_path / "weighting" / "record").iterdir()]) == 4

    _, second = fitted(tmp_path, 4, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    for name, value in module.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    with pytest.raises(ValueError, match="another spec"):
        fitted(tmp_path, 4, ckpt_path=str(tmp_path / "epoch=0.ckpt"), spec="linupper")


def test_accumulated_batches_are_weighed_each_by_itself(tmp_path):
    """The step is the mean of the batches' own weighted means, as Lightning has it."""
    options = {"seeds": (1, 2), "accumulate_grad_batches": 2}
    _, module = fitted(tmp_path, 1, spec="linupper", **options)
    grads = []
    for seed in (1, 2):
        model = tiny.model("llama", torch.float64)
        method = tiny.reference("linupper", tiny.DOMAINS)
        total, count = tiny.weighted_sum(model, tiny.padded(tiny.rows(BATCH, seed)), method)
        (total / count / 2).backward()
        grads.append({name: x.grad for name, x in model.named_parameters()})
    for name, value in tiny.model("llama", torch.float64).named_parameters():
        expected = value - 0.1 * (grads[0][name] + grads[1][name])
        found = module.model.get_parameter(name).double()
        assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_without_full_logits_it_trains_the_same_parameters(tmp_path):
    """With fused=True steps are those of full logits; half precision, which loses them, is not."""
    (_, one), (_, other) = (
        fitted(tmp_path / str(fused), 2, spec="linupper", fused=fused) for fused in (False, True)
    )
    for name, value in one.state_dict().items():
        assert_close(other.state_dict()[name], value, rtol=1e-4, atol=2e-6)
    host = lightning.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    host.strategy.precision_plugin.precision = "16-mixed"  # which no CPU takes
    with pytest.raises(ValueError, match="precision='16-mixed'"):
        WeightingCallback("linupper", fused=True).setup(host, Module(), "fit")


class Fails(Module):
    """A module whose second step fails."""

    def training_step(self, batch, index):
        """Return the model's loss, once."""
        if self.global_step:
            raise RuntimeError(index)
        return super().training_step(batch, index)


def test_a_model_is_not_weighted_after_a_run_that_failed(tmp_path):
    """Whatever trains it next has the plain loss."""
    callback = WeightingCallback("linupper")
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 3}
    host = lightning.Trainer(
        default_root_dir=tmp_path,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module, batch = Fails(), tiny.padded(tiny.rows(BATCH))
    del batch["domain"]
    with pytest.raises(RuntimeError, match="1"):
        host.fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))
    logits = module.model.train()(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:].flatten()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    assert_close(module.model(**batch).loss, plain)


class OwnLoss(Module):
    """A module that does not take the model's loss."""

    def training_step(self, batch, _index):
        """Return the mean square of the logits."""
        return self.model(**batch).logits.square().mean()


def test_a_module_with_a_loss_of_its_own_is_stopped_and_none_is_weighed_afterwards(tmp_path):
    """The first step raises; a model that has been trained has its own loss in training mode."""
    options = {"accelerator": "cpu", "logger": False, "max_steps": 1, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False}
    batch = tiny.padded(tiny.rows())
    del batch["domain"]
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    for module in (OwnLoss(), Module()):
        host = lightning.Trainer(
            default_root_dir=tmp_path, callbacks=[WeightingCallback("linupper")], **options
        )
        if isinstance(module, OwnLoss):
            with pytest.raises(UnweightedError, match="another loss was used"):
                host.fit(module, loader)
        else:
            host.fit(module, loader)
            plain = tiny.model()
            plain.load_state_dict(module.model.state_dict())
            assert torch.equal(module.model.train()(**batch).loss, plain(**batch).loss)


def test_a_second_fit_forgets_the_first(tmp_path):
    """With the same module or another one, the callback trains what a new one would."""
    _, alone = fitted(tmp_path / "alone", 2)
    callback = WeightingCallback("group-dro", domains=tiny.DOMAINS)
    batches = [tiny.padded(tiny.rows(BATCH, 1))] * 2
    for module in (Module(), Module()):
        for _ in range(2):
            module.model.load_state_dict(tiny.model().state_dict())
            host = lightning.Trainer(
                default_root_dir=tmp_path,
                accelerator="cpu",
                max_steps=2,
                logger=False,
                callbacks=[callback],
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            host.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
            for name, value in module.model.named_parameters():
                assert torch.equal(value, alone.model.get_parameter(name))


def test_a_module_with_two_models_is_refused(tmp_path):
    """It is not known which one is meant."""
    host = lightning.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    with pytest.raises(ValueError, match="2 models of Hugging Face's: model, other"):
        WeightingCallback("linupper").setup(host, Module(further=True), "fit")

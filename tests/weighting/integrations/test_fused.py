"""A weighted model of Hugging Face's without full logits: the same step, or a refusal."""

import math

import hidden_states
import peft
import pytest
import tiny_models as tiny
import torch
from looping import for_each
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

import weighting as wt
from weighting.integrations.transformers import weigh, weigh_model

MODELS = ("llama", "qwen2, tied", "gpt2")
SPECS = ("linupper", "mile", "linupper-x-mile", "dft")
LAYOUTS = {"rows": tiny.padded, "packed": lambda samples: tiny.flattened(samples, per_row=3)}
CASES = [(name, spec, "rows") for name in MODELS for spec in (*SPECS, "group-dro")]
CASES += [("llama", spec, "packed") for spec in SPECS]


def stepped(model, spec, batch, *, fused, autocast=False, **more):
    """Return a model after a step of plain gradient descent, its output and the step's numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = weigh_model(model, spec, optimizer, domains=tiny.DOMAINS, fused=fused)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch, **more)
    output.loss.backward()
    found = weights.read()
    optimizer.step()
    return model, output, found


@pytest.mark.slow
@for_each("name, spec, layout", CASES, ids=", ".join)
def test_a_step_without_logits_is_the_step_with_them(name, spec, layout):
    """Loss, statistics and parameters, tied ones too, are those of full logits."""
    batch = LAYOUTS[layout](tiny.rows(6, 1))
    more = {}
    if layout == "packed":
        more["num_items_in_batch"] = torch.tensor(29)
    plain, expected, numbers = stepped(tiny.model(name), spec, batch, fused=False, **more)
    model, output, found = stepped(tiny.model(name), spec, batch, fused=True, **more)
    assert output.logits.isnan().all()
    assert output.logits.shape == expected.logits.shape
    assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == numbers.keys()
    for key, value in numbers.items():
        assert math.isclose(found[key], value, rel_tol=1e-4, abs_tol=1e-5), key
    moved = 0
    start = tiny.model(name)
    for key, value in model.named_parameters():
        assert_close(value, plain.get_parameter(key), rtol=1e-4, atol=2e-6)
        moved += not torch.equal(value, start.get_parameter(key))
    assert moved > 5


def test_a_bias_of_the_output_layer_and_bfloat16_are_trained_too():
    """The bias takes the step of full logits; autocast's loss is the one of float32 in 8 bits."""
    batch = tiny.padded(tiny.rows(6, 1))

    def with_bias():
        model = tiny.model()
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, tiny.VOCABULARY))
        return model

    plain, expected, _ = stepped(with_bias(), "linupper-x-mile", batch, fused=False)
    model, output, _ = stepped(with_bias(), "linupper-x-mile", batch, fused=True)
    assert_close(output.loss, expected.loss)
    assert_close(model.lm_head.bias, plain.lm_head.bias, rtol=1e-4, atol=2e-6)
    _, output, _ = stepped(with_bias(), "linupper-x-mile", batch, fused=True, autocast=True)
    assert_close(output.loss, expected.loss, rtol=0.02, atol=0.0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_beneath_the_output_layer_are_trained_without_logits():
    """The loss of LoRA around attention is that of full logits, and reaches the adapters alone."""
    batch = tiny.padded(tiny.rows())
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny.model(), config)
        weigh_model(model, "linupper", fused=fused).begin_step(1)
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert model.get_output_embeddings().weight.grad is None
    assert len(found[0]) == 3
    assert_close(*found, rtol=1e-4, atol=1e-6)


def test_uniform_weights_keep_the_models_own_loss():
    """Its loss is bitwise the model's, of logits that are there."""
    batch = tiny.padded(tiny.rows())
    _, output, _ = stepped(tiny.model(), "uniform", batch, fused=True)
    inputs = {name: x for name, x in batch.items() if name != "domain"}
    expected = tiny.model()(**inputs)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)


def trainer(folder):
    """Return a trainer of two steps, each of two microbatches of unequal length."""
    args = TrainingArguments(
        str(folder),
        optim="sgd",
        learning_rate=0.1,
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = tiny.rows(12)
    data = {"train_dataset": rows, "eval_dataset": rows[:4]}
    return Trainer(tiny.model(), args, data_collator=pad, **data)


def pad(rows):
    """Pad rows to a batch without domains."""
    batch = tiny.padded([{**row, "domain": "code"} for row in rows])
    return {name: x for name, x in batch.items() if name != "domain"}


@pytest.mark.slow
def test_a_trainer_accumulates_and_evaluates_as_with_logits(tmp_path):
    """Microbatches of unequal length give the same parameters; evaluation has its logits."""
    hosts = []
    for fused in (False, True):
        host = trainer(tmp_path / str(fused))
        unweighted = host.evaluate()["eval_loss"]
        weigh(host, "linupper-x-mile", domains=tiny.DOMAINS, fused=fused)
        assert host.evaluate()["eval_loss"] == unweighted
        host.train()
        hosts.append(host)
    for (name, value), other in zip(
        hosts[1].model.named_parameters(), hosts[0].model.parameters(), strict=True
    ):
        assert_close(value, other, rtol=1e-4, atol=2e-6, msg=name)
    logged = [[line["loss"] for line in x.state.log_history if "loss" in line] for x in hosts]
    assert len(logged[0]) == 2
    assert_close(*logged, rtol=1e-5, atol=1e-5)
    assert math.isclose(*(x.evaluate()["eval_loss"] for x in hosts), rel_tol=1e-5)
    inputs = {k: v for k, v in tiny.padded(tiny.rows()).items() if k != "domain"}
    host = hosts[1]
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            logits = host.model.eval()(**inputs).logits
            assert_close(logits, hosts[0].model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest storage that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.bytes = max(self.bytes, *sizes, 0)
        return out


@for_each("spec", ("mile", "linupper-x-mile"))
def test_no_tensor_is_as_large_as_the_logits(spec):
    """A chunk of them is an eighth; with the model's own loss they are there whole."""
    length, rows = 64, 4  # rows longer than the model is wide
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=draw)
    batch = {"input_ids": ids, "labels": ids, "domain": torch.zeros(rows, dtype=torch.int64)}
    found = {}
    for fused in (False, True):
        model = tiny.model()
        weigh_model(model, spec, fused=fused).begin_step(1)
        with Largest() as largest:
            model(**batch).loss.backward()
        found[fused] = largest.bytes
    logits = ids.numel() * tiny.VOCABULARY * 4
    assert found[False] >= logits
    assert found[True] < logits


# What has no fused loss ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_models_whose_logits_are_more_than_the_output_layers_are_refused():
    """The message says why, and what full logits cost; the model stays as it was."""
    lora = {"task_type": "CAUSAL_LM"}

    def adapted(**options):
        return peft.get_peft_model(tiny.model(), peft.LoraConfig(**lora, **options))

    def in_float16():
        return tiny.model(dtype=torch.float16)

    cases = {
        r"soft cap .*final_logit_softcapping=0\.3": lambda: tiny.model("gemma 2, soft cap"),
        r"a scale .*logit_scale=3\.0": lambda: tiny.model("cohere, logit scale"),
        "has an adapter": lambda: adapted(target_modules=["q_proj", "lm_head"]),
        "has an adapter.*ModulesToSave": lambda: adapted(
            target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        "float16": in_float16,
    }
    for why, make in cases.items():
        model = make()
        stock = getattr(model, "get_base_model", lambda model=model: model)().loss_function
        with pytest.raises(ValueError, match=why) as error:
            weigh_model(model, "linupper", fused=True)
        assert "tokens x 40 (its vocabulary) x 4 bytes, two to three times" in str(error.value)
        base = getattr(model, "get_base_model", lambda model=model: model)()
        assert base.loss_function == stock
        weigh_model(model, "linupper")


def test_logits_that_change_on_their_way_to_the_loss_are_refused_at_the_first_pass():
    """Whatever a forward does to them, it is noticed, as is a layer that is not used."""
    batch = tiny.padded(tiny.rows())

    for change in (lambda x: x * 2, lambda x: x + 0, lambda x: x[:, :]):
        model = tiny.model()
        weigh_model(model, "linupper", fused=True).begin_step(1)
        model.lm_head.register_forward_hook(lambda _m, _i, out, change=change: change(out))
        with pytest.raises(ValueError, match="not of what its output layer returns"):
            model(**batch)


def test_settings_and_trainers_without_a_fused_loss_are_refused(tmp_path):
    """Scaled gradients of float16, and TRL's trainer, whose head is fused already."""
    host = trainer(tmp_path)
    host.args.fp16 = True  # which no CPU takes
    with pytest.raises(ValueError, match="fp16=True"):
        weigh(host, "linupper", fused=True)
    with pytest.raises(ValueError, match="fused head of its own"):
        weigh(SFTTrainer.__new__(SFTTrainer), "linupper", fused=True)


def test_a_layer_has_its_forward_back_when_the_model_is_no_longer_weighed():
    """Nothing of the hook is left on it, and another spec may be fused after."""
    model = tiny.model()
    weigh_model(model, "linupper", fused=True)
    weights = weigh_model(model, "mile", fused=True)
    assert "forward" in vars(model.lm_head)
    weights.detach()
    assert "forward" not in vars(model.lm_head)


def test_a_source_of_hidden_states_has_what_the_output_layer_is_given(monkeypatch):
    """Without fused=True it is refused; with it, weights are those of the model's own states."""
    hidden_states.length_of_hidden(monkeypatch)
    spec = wt.loads("version: 1\npipeline: length_of_hidden -> mean_one\n")
    model, batch = tiny.model(), tiny.padded(tiny.rows(6, 1))
    with pytest.raises(ValueError, match="reads hidden states, and the loss here is given logits"):
        weigh_model(model, spec, fused=False)

    given = {name: x for name, x in batch.items() if name != "domain"}
    hidden = model.model(**{n: x for n, x in given.items() if n != "labels"}).last_hidden_state
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model.lm_head(hidden)
    expected, out = wt.weighted_cross_entropy(logits, labels, wt.build(spec), hidden=hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = weigh_model(model, spec, optimizer, fused=True)
    loss = model(**given).loss
    loss.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # sums of float32
    assert weights.read()["weight/max"] == pytest.approx(out.token.max().item(), rel=1e-5)

"""A weighted model of Hugging Face's: its loss and its step against float64, the long way."""

import copy

import peft
import pytest
import tiny_models as tiny
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.integrations.transformers import UnweightedError, weigh_model

WAYS = ("plain", "accumulated", "padding-free", "packed", "LoRA", "bfloat16")
CASES = [(name, way) for name in tiny.MAKE for way in WAYS]
ADAPTED = {"gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}}


def labels_of(batch):
    """Return how many labels count: the first of a row is predicted by nothing."""
    return (batch["labels"][:, 1:] != -100).sum()


def weighed(spec, name="llama", optimizer=torch.optim.SGD, **options):
    """Return a model whose loss is weighted, its optimizer and what weighs."""
    model = tiny.model(name)
    optimizer = optimizer(model.parameters(), lr=0.1)
    weights = weigh_model(model, spec, optimizer, domains=tiny.DOMAINS, **options)
    return model, optimizer, weights


def batches_of(way):
    """Return the microbatches of a step; those that are accumulated are of unequal length."""
    samples = tiny.rows(5, 1)
    if way == "accumulated":
        return [tiny.padded(samples[:3]), tiny.padded(samples[3:])]
    if way in {"padding-free", "packed"}:
        return [tiny.flattened(samples, per_row=3 if way == "packed" else None)]
    return [tiny.padded(samples)]


def made(name, way):
    """Return a model, with adapters that do something where the way has them."""
    model = tiny.model(name)
    if way != "LoRA":
        return model
    lora = ADAPTED.get(name, {"target_modules": ["q_proj", "v_proj"]})
    return peft.get_peft_model(
        model, peft.LoraConfig(**lora, task_type="CAUSAL_LM", init_lora_weights=False)
    )


def stepped(model, batches, spec=None):
    """Return the loss of a step of plain gradient descent and the parameters after it.

    The model has its parameters back afterwards.

    Args:
        model: A model.
        batches: Of which gradients are accumulated.
        spec: What weighs its loss; its own loss when None.
    """
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    before = {name: x.detach().clone() for name, x in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    weights = weigh_model(model, spec, optimizer, domains=tiny.DOMAINS) if spec else None
    number = sum(labels_of(batch) for batch in batches)
    losses = []
    for batch in batches:
        own = () if spec else ("domain",)
        inputs = {name: x for name, x in batch.items() if name not in own}
        loss = model(**inputs, num_items_in_batch=number).loss
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    after = {name: x.detach().clone() for name, x in trained.items()}
    with torch.no_grad():
        for name, x in trained.items():
            x.copy_(before[name])
    if weights is not None:
        weights.detach()
    return sum(losses), after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
@for_each("name, way", CASES, ids=", ".join)
def test_a_step_of_every_model_with_every_spec_is_the_step_of_the_formula(name, way):
    """Loss and parameters are those of float64; uniform's are the model's own bit for bit.

    All of six models, six specs and six ways to train; none is left out.  Under bfloat16 the
    formula is given the very logits that the model makes, so that it may not differ by their bits.
    """
    model, batches = made(name, way), batches_of(way)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16")
    exact = copy.deepcopy(model)
    with autocast:
        own = stepped(model, batches)
        found = {spec: stepped(model, batches, spec) for spec in tiny.SPECS}
        if way != "bfloat16":
            exact = exact.double()
        signals = [tiny.measured(exact, batch) for batch in batches]
    parameters = {key: x for key, x in exact.named_parameters() if x.requires_grad}
    far = {"rtol": 1e-5, "atol": 1e-6} if way != "bfloat16" else {"rtol": 1e-3, "atol": 1e-4}
    for spec, (loss, after) in found.items():
        method = tiny.reference(spec, tiny.DOMAINS)
        sums = [tiny.weighted(x, method) for x in signals]
        expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
        assert_close(loss.double(), expected.detach(), **far, msg=f"the loss of {spec}")
        grads = torch.autograd.grad(
            expected, [*parameters.values()], retain_graph=True, allow_unused=True
        )
        for (key, x), grad in zip(parameters.items(), grads, strict=True):
            step = torch.zeros_like(x) if grad is None else 0.1 * grad
            ours = x.detach() - after[key]
            missed = (ours - step).norm()
            bits = 1e-6 * len(step.flatten()) ** 0.5  # in which float32 keeps a parameter
            most = bits + (0.02 if way == "bfloat16" else 1e-3) * step.norm()
            assert missed < most, f"{spec}: {key} is {missed:.1e} off, of {step.norm():.1e}"
    loss, after = found["uniform"]
    assert torch.equal(loss, own[0])
    assert all(torch.equal(x, own[1][key]) for key, x in after.items())
    changed = [any(not torch.equal(x, own[1][k]) for k, x in y[1].items()) for y in found.values()]
    assert sum(changed) == len(tiny.SPECS) - 1


def test_low_precision_trains_as_float32_does():
    """Under autocast the loss is that of float64, within the 8 bits of bfloat16 or 11 of half."""
    batch = tiny.padded(tiny.rows())
    for spec in tiny.SPECS:
        (expected,), _ = tiny.descended("llama", spec, [[batch]])
        for dtype, far in ((torch.bfloat16, 0.02), (torch.float16, 0.005)):
            model, _, _ = weighed(spec)
            with torch.autocast("cpu", dtype):
                loss = model(**batch).loss
            assert_close(loss.item(), expected, rtol=far, atol=0.0)


def test_uniform_weights_are_the_models_own_loss_bit_for_bit():
    """With and without num_items_in_batch, and the numbers of the step are right nevertheless."""
    batch = tiny.padded(tiny.rows())
    plain = tiny.model()
    model, _, weights = weighed("uniform")
    inputs = {name: x for name, x in batch.items() if name != "domain"}
    for more in ({}, {"num_items_in_batch": torch.tensor(77)}):
        assert torch.equal(model(**batch, **more).loss, plain(**inputs, **more).loss)
        found = weights.read()
        for name in ("unweighted_loss", "weighted_loss"):
            assert_close(found[name], plain(**inputs).loss.item())
        weights.begin_step(weights.step + 1)


def test_evaluation_is_never_weighted():
    """In evaluation mode the loss is the model's own, columns or not, and remembers nothing."""
    batch = tiny.padded(tiny.rows())
    inputs = {name: x for name, x in batch.items() if name != "domain"}
    model, _, weights = weighed("group-dro")
    before = weights.state_dict()["state"]
    model.eval()
    with torch.no_grad():
        expected = tiny.model().eval()(**inputs).loss
        assert torch.equal(model(**batch).loss, expected)
        assert torch.equal(model(**inputs).loss, expected)
    for name, value in weights.state_dict()["state"].items():
        assert torch.equal(value, before[name])


def test_a_column_weighs_rows_or_single_tokens():
    """A number for each row, or for each token, is the weight of the labels it belongs to.

    One below zero is none.
    """
    batch = tiny.padded(tiny.rows())
    spec = wt.loads("version: 1\nnormalize: none\npipeline: column(quality) -> as_is\n")
    by_row = torch.tensor([-1.0, 0, 1, 2, 3, 4, 5, 6])
    by_token = torch.arange(batch["labels"].numel()).view_as(batch["labels"]) - 5.0
    for column in (by_row, by_token):
        model = tiny.model()
        weigh_model(model, spec).begin_step(1)
        inputs = {name: x for name, x in batch.items() if name != "domain"}
        logits = model(**inputs, quality=column).logits.detach()[:, :-1].log_softmax(-1)
        loss = model(**inputs, quality=column).loss
        labels = batch["labels"][:, 1:]
        own = column[:, None].expand_as(labels) if column.dim() == 1 else column[:, 1:]
        nll = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        valid = labels != -100
        assert_close(loss, (own.clamp(min=0) * nll)[valid].sum() / valid.sum())


def test_a_column_in_sixteen_bits_is_told_of(recwarn):
    """As wrappers cast it that cast all inputs; once, by its name."""
    model, _, weights = weighed("version: 1\nnormalize: none\npipeline: column(quality) -> as_is\n")
    batch = tiny.padded(tiny.rows())
    quality = torch.ones(len(batch["labels"]))
    model(**batch, quality=quality)
    assert not [x for x in recwarn if "quality" in str(x.message)]
    for _ in range(2):
        model(**batch, quality=quality.bfloat16())
    (told,) = [str(x.message) for x in recwarn if "quality" in str(x.message)]
    assert "arrives as torch.bfloat16" in told
    assert "cast_forward_inputs=False" in told
    assert weights.step == 1


def test_the_numbers_of_a_step_are_there_until_the_next_batch():
    """After the optimizer's step too, where loops read them."""
    model, optimizer, weights = weighed("linupper")
    for seed in (1, 2):
        loss = model(**tiny.padded(tiny.rows(seed=seed))).loss
        loss.backward()
        optimizer.step()
        assert_close(weights.read()["weighted_loss"], loss.item())
        assert weights.step == seed + 1


def test_a_batch_of_one_unit_is_told_of_when_numbers_are_read(monkeypatch):
    """Where counting units at once would wait for a device."""
    model, _, weights = weighed("linupper")
    monkeypatch.setattr(type(weights.fn), "warn_of_one_unit", lambda *_, **__: None)
    model(**tiny.padded(tiny.rows(1)))
    with pytest.warns(
        wt.OneUnitWarning, match="compares sequences with each other, and every batch so far"
    ):
        weights.read()
    weights.read()  # once


class Another:
    """Another rank, whose batch has eleven labels."""

    size, rank = 2, 0

    def sum(self, x):
        """Return the sum over both."""
        return x + 11


def test_a_loss_without_a_given_divisor_is_over_the_labels_of_all_ranks(monkeypatch):
    """So it is where statistics are of each rank alone: hosts take the mean of ranks' gradients."""
    batch = tiny.padded(tiny.rows())
    spec = wt.loads("version: 1\nscope: rank\npipeline: linupper(alpha=1) -> temperature(1)\n")
    own, _, _ = weighed(spec)
    model, _, weights = weighed(spec)
    monkeypatch.setattr(weights, "ranks", Another)
    count = labels_of(batch)
    assert_close(model(**batch).loss, own(**batch).loss * count / ((count + 11) / 2))


OF_LOGITS = ("eaft", "error-norm", "focal", "beyond-ll", "eslm", "rho-1", "cvar", "term")


@for_each("spec", OF_LOGITS)
def test_every_signal_of_the_logits_is_had(spec):
    """The loss is that of the function for logits, and of a column of reference losses."""
    batch = tiny.padded(tiny.rows())
    inputs = {name: x for name, x in batch.items() if name != "domain"}
    ref_loss = torch.linspace(0, 5, batch["labels"].numel()).view_as(batch["labels"])
    more = {"ref_loss": ref_loss} if spec == "rho-1" else {}
    model, _, _ = weighed(spec)
    loss = model(**inputs, **more, domain=batch["domain"]).loss
    logits = tiny.model()(**inputs).logits[:, :-1]
    expected, _ = wt.weighted_cross_entropy(
        logits,
        batch["labels"][:, 1:],
        wt.build(wt.load(spec)),
        step=1,
        ref_loss=ref_loss[:, 1:],
        segment_ids=torch.zeros_like(batch["labels"][:, 1:]),
    )
    assert_close(loss, expected)


def test_samples_are_told_by_whatever_the_collator_gives():
    """Positions, sample numbers and bounds of samples all say which tokens are one sequence."""
    batch = tiny.flattened(tiny.rows())
    lengths = [len(x["input_ids"]) for x in tiny.rows()]
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    losses = []
    for extra in ({}, {"seq_idx": numbers}, {"cu_seq_lens_q": bounds}):
        model, _, weights = weighed("linupper")
        inputs = {name: x for name, x in batch.items() if extra == {} or name != "position_ids"}
        weights._before(model, (), {**inputs, **extra})
        losses.append(weights._sequences(torch.ones_like(batch["labels"][:, 1:])))
    assert losses[0].unique().numel() == len(lengths)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


# What would train unweighted ----------------------------------------------------------------------


def test_a_loss_that_is_not_the_models_stops_the_optimizer():
    """The logits of a weighted model make no step, since their loss has no weights."""
    batch = tiny.padded(tiny.rows())
    model, optimizer, _ = weighed("linupper")
    model(**batch).logits.sum().backward()
    with pytest.raises(UnweightedError, match="another loss was used"):
        optimizer.step()


def test_a_pass_without_labels_is_refused_in_training():
    """The model says so at once, and not where no gradient is wanted."""
    batch = tiny.padded(tiny.rows())
    del batch["labels"]
    model, _, _ = weighed("linupper")
    with pytest.raises(UnweightedError, match="got no labels"):
        model(**batch)
    with torch.no_grad():
        model(**batch)


def test_a_forward_that_makes_its_own_loss_is_refused():
    """Liger replaces the forward so."""
    batch = tiny.padded(tiny.rows())
    model, _, _ = weighed("linupper")

    def fused(**kwargs):
        return {"loss": model.lm_head.weight.sum() + len(kwargs)}

    model.forward = fused
    with pytest.raises(UnweightedError, match="did not call its loss_function"):
        model(**batch)


def test_a_model_in_evaluation_mode_is_not_trained():
    """Its loss is unweighted, so that no gradient may come of it."""
    batch = tiny.padded(tiny.rows())
    model, _, _ = weighed("linupper")
    model.eval()
    loss = model(**batch).loss
    with pytest.raises(UnweightedError, match=r"call model\.train\(\)"):
        loss.backward()


def test_what_a_batch_cannot_tell_is_refused():
    """Draws of data, missing columns, and statistics over a whole step."""
    batch = tiny.padded(tiny.rows())
    inputs = {name: x for name, x in batch.items() if name != "domain"}
    with pytest.raises(ValueError, match="draws its own"):
        weighed("uniform-domains")
    for spec in ("group-dro", "iwsi-column"):
        model, _, _ = weighed(spec)
        with pytest.raises(ValueError, match="no such column"):
            model(**inputs)
    model, _, _ = weighed(wt.loads("version: 1\nscope: step\npipeline: temperature(1)\n"))
    model(**batch)
    with pytest.raises(ValueError, match="several microbatches"):
        model(**batch)
    with pytest.raises(ValueError, match="no loss_function"):
        weigh_model(torch.nn.Linear(2, 2), "linupper")
    model = tiny.model()
    weigh_model(model, "linupper")
    with pytest.raises(ValueError, match="step is not known"):
        model(**batch)


def test_state_goes_on_in_another_model_and_is_of_its_spec():
    """Two steps are one step, saved, and another; a state of another spec is refused."""
    first, second = (tiny.padded(tiny.rows(seed=seed)) for seed in (1, 2))

    def trained(batches, state=None):
        model, optimizer, weights = weighed("group-dro")
        if state is not None:
            model.load_state_dict(state[0])
            weights.load_state_dict(state[1])
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        return copy.deepcopy(model.state_dict()), weights.state_dict()

    whole, parts = trained([first, second]), trained([second], trained([first]))
    assert whole[1]["step"] == parts[1]["step"] == 3
    for one, other in ((whole[0], parts[0]), (whole[1]["state"], parts[1]["state"])):
        assert all(torch.equal(one[name], other[name]) for name in one)
    _, _, others = weighed("doremi-x-linupper-x-mile")
    with pytest.raises(ValueError, match="another spec"):
        others.load_state_dict(whole[1])


def test_accelerate_keeps_what_is_remembered(tmp_path):
    """Its checkpoint has the state of weights that are registered, and brings it back."""
    batch = tiny.padded(tiny.rows())
    GradientState._reset_state()  # that of trainers of other tests
    accelerator = Accelerator(cpu=True)
    model, optimizer, weights = weighed("group-dro")
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(weights)
    states = []
    for _ in range(2):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        states.append(weights.state_dict())
        if len(states) == 1:
            accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)
    back = weights.state_dict()
    assert back["step"] == states[0]["step"] == states[1]["step"] - 1
    for name, value in back["state"].items():
        assert torch.equal(value, states[0]["state"][name])
    assert any(not torch.equal(x, states[1]["state"][name]) for name, x in back["state"].items())

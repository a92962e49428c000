"""A weighted model of Hugging Face's: its loss and its step against float64, the long way."""

import copy

import peft
import pytest
import tiny_models as tiny
import torch
from looping import for_each
from torch.testing import assert_close

import weighting as wt
from weighting.integrations.transformers import UnweightedError, weigh_model

LAYOUTS = {
    "rows": tiny.padded,
    "padding-free": tiny.flattened,
    "packed": lambda samples: tiny.flattened(samples, per_row=3),
}
CASES = [(name, spec, "rows") for name in tiny.MAKE for spec in tiny.SPECS]
CASES += [("llama", spec, x) for spec in tiny.SPECS for x in ("padding-free", "packed")]
CASES += [(name, "linupper-x-mile", "packed") for name in tiny.MAKE if name != "llama"]


def labels_of(batch):
    """Return how many labels count: the first of a row is predicted by nothing."""
    return (batch["labels"][:, 1:] != -100).sum()


def weighed(spec, name="llama", optimizer=torch.optim.SGD, **options):
    """Return a model whose loss is weighted, its optimizer and what weighs."""
    model = tiny.model(name)
    optimizer = optimizer(model.parameters(), lr=0.1)
    weights = weigh_model(model, spec, optimizer, domains=tiny.DOMAINS, **options)
    return model, optimizer, weights


@pytest.mark.slow
@for_each("name, spec, layout", CASES, ids=", ".join)
def test_a_step_of_every_model_is_the_step_of_the_formula(name, spec, layout):
    """Loss and parameters are those of float64, whatever the logits go through."""
    seeds = (1, 2) if spec == "group-dro" else (1,)  # which remembers
    batches = [LAYOUTS[layout](tiny.rows(5, seed)) for seed in seeds]
    expected, parameters = tiny.descended(name, spec, [[batch] for batch in batches])
    model, optimizer, _ = weighed(spec, name)
    for batch, loss in zip(batches, expected, strict=True):
        found = model(**batch, num_items_in_batch=labels_of(batch)).loss
        assert_close(found.item(), loss, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    for key, value in model.named_parameters():
        assert_close(value.double(), parameters[key], rtol=1e-4, atol=2e-6)


def test_low_precision_trains_as_float32_does():
    """Under bfloat16 autocast the loss is that of float64, within its 8 bits."""
    batch = tiny.padded(tiny.rows())
    for spec in tiny.SPECS:
        (expected,), _ = tiny.descended("llama", spec, [[batch]])
        model, _, _ = weighed(spec)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert_close(loss.item(), expected, rtol=0.02, atol=0.0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_of_peft_are_trained_by_the_weighted_loss():
    """With LoRA around the model its loss is that of the model alone, which adapters begin as."""
    batch = tiny.padded(tiny.rows())
    for spec in tiny.SPECS:
        (expected,), _ = tiny.descended("llama", spec, [[batch]])
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny.model(), config)
        weigh_model(model, spec, domains=tiny.DOMAINS).begin_step(1)
        loss = model(**batch).loss
        loss.backward()
        assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)


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
    """A number for each row, or for each token, is the weight of the labels it belongs to."""
    batch = tiny.padded(tiny.rows())
    spec = wt.loads("version: 1\nnormalize: none\npipeline: column(quality) -> as_is\n")
    by_row = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
    by_token = torch.arange(batch["labels"].numel()).view_as(batch["labels"]).float()
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
        assert_close(loss, (own * nll)[valid].sum() / valid.sum())


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


class Toy(torch.nn.Module):
    """What the hook asks of a model, and little more, so that it compiles in no time."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(tiny.VOCABULARY, tiny.VOCABULARY))
        self.own = None

    @property
    def loss_function(self):
        """The loss, which can be set."""
        return self.own

    @loss_function.setter
    def loss_function(self, value):
        self.own = value

    def forward(self, input_ids, labels):
        """Return the loss of the labels after each token."""
        return self.loss_function(logits=self.table[input_ids], labels=labels)


def test_a_compiled_model_has_the_same_loss():
    """The graph breaks at the loss, which is weighted as in eager mode."""
    batch = tiny.padded(tiny.rows())
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Toy().train()
        weigh_model(model, "linupper-x-mile").begin_step(1)
        call = torch.compile(model, backend="eager") if compiled else model
        loss = call(input_ids=batch["input_ids"], labels=batch["labels"])
        loss.backward()
        found.append((loss.detach(), model.table.grad))
    assert_close(found[0], found[1])

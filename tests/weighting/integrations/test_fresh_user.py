"""What users of the Trainer do on their first day: trained rightly, or told what to do."""

import pickle

import peft
import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from looping import for_each
from tiny_trainer import pad, trainer
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

import weighting as wt
from weighting.errors import OneUnitWarning
from weighting.integrations.collate import ColumnsCollator
from weighting.integrations.transformers import (
    UnweightedError,
    WeightingCallback,
    weigh,
    weigh_model,
)

ROWS = 6
SPEC = "linupper-x-mile"


def one_step(folder, rows=None, *, spec=SPEC, domains=tiny.DOMAINS, **options):
    """Return a weighted trainer that has taken one step on all rows."""
    rows = tiny.rows(ROWS) if rows is None else rows
    given = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": 1}
    host = trainer(folder, rows=rows, **{**given, **options})
    weigh(host, spec, domains=domains).train()
    return host


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Return the trainer of the usual way."""
    return one_step(tmp_path_factory.mktemp("usual"))


def left(rows):
    """Pad rows on the left, with a mask; a first label, which padding would predict, is none."""
    batch = pad(rows)
    batch["labels"][:, 0] = -100
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        for row, line in zip(rows, batch[name], strict=True):
            n = len(row["input_ids"])
            line.copy_(torch.cat([torch.full_like(line[n:], fill), line[:n].clone()]))
    return batch


def more(rows):
    """Return rows with columns that no model takes."""
    return Dataset.from_list([{**row, "text": "ab", "id": i} for i, row in enumerate(rows)])


def masked(rows):
    """Return rows, and one whose labels are all masked."""
    ids = [5, 6, 7, 8]
    return [*rows, {"input_ids": ids, "labels": [-100] * 4, "domain": "code"}]


WAYS = {
    "activations made again": {"activation_checkpointing": True},
    "rows grouped by their length": {"train_sampling_strategy": "group_by_length"},
    "padded on the left": {"collator": left},
    "evaluated in between": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "read by a worker process": {"dataloader_num_workers": 1},
    "compiled, but for the loss": {"torch_compile": True, "torch_compile_backend": "eager"},
    "columns that the trainer leaves to the collator": {"remove_unused_columns": False},
    "a table with further columns": {"rows": more(tiny.rows(ROWS))},
    "rows that come as a stream": {
        "rows": Dataset.from_list(tiny.rows(ROWS)).to_iterable_dataset()
    },
    "a row without labels": {
        "rows": masked(tiny.rows(ROWS)),
        "per_device_train_batch_size": ROWS + 1,
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
@for_each("way", list(WAYS))
def test_the_step_is_the_same_however_the_batch_came_about(usual, tmp_path_factory, way):
    """The parameters are those of rows in their order, padded on the right."""
    host = one_step(tmp_path_factory.mktemp("way"), **WAYS[way])
    for name, value in usual.model.named_parameters():
        assert_close(host.model.get_parameter(name), value, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_step_whose_labels_are_all_masked_changes_nothing(tmp_path):
    """The parameters stay; without weights they would be no numbers."""
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in tiny.rows(ROWS)]
    host = one_step(tmp_path, rows)
    for name, value in tiny.model().named_parameters():
        assert torch.equal(host.model.get_parameter(name), value)


@pytest.mark.slow
def test_a_batch_of_one_row_is_said_to_compare_nothing(tmp_path):
    """A warning names the factor, and what to do."""
    with pytest.warns(OneUnitWarning, match="compares sequences"):
        one_step(tmp_path, per_device_train_batch_size=1)


@pytest.mark.slow
def test_predictions_are_the_models_own_before_and_after_training(usual, tmp_path):
    """Their loss has no weights, and their logits are there."""
    rows = [{k: x for k, x in row.items() if k != "domain"} for row in tiny.rows(4)]
    plain = trainer(tmp_path)
    plain.model.load_state_dict(usual.model.state_dict())
    ours, theirs = usual.predict(rows), plain.predict(rows)
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert (ours.predictions == theirs.predictions).all()


@pytest.mark.slow
def test_a_model_that_was_trained_has_its_own_loss_again(tmp_path):
    """A plain trainer of the same model trains without weights, to the bit."""
    model = weigh(trainer(tmp_path / "first"), SPEC)
    model.train()
    plain = trainer(tmp_path / "plain")
    plain.model.load_state_dict(model.model.state_dict())
    again = trainer(tmp_path / "again")
    again.model = again.model_wrapped = model.model
    for host in (plain, again):
        host.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


@pytest.mark.slow
def test_a_framework_that_makes_its_callbacks_by_name_weighs_too(tmp_path):
    """A Seq2SeqTrainer with a callback made of arguments and trainer trains as `weigh` does."""
    made = {"weighting": lambda _args, _trainer: WeightingCallback(SPEC)}
    one = weigh(trainer(tmp_path / "one"), SPEC)
    other = trainer(
        tmp_path / "other",
        Seq2SeqTrainer,
        arguments=Seq2SeqTrainingArguments,
        callbacks=[made["weighting"](None, None)],
    )
    for host in (one, other):
        host.train()
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)


@pytest.mark.slow
def test_a_model_that_is_made_for_each_run_is_weighed(usual, tmp_path):
    """With model_init the trainer drops the model that `weigh` saw."""
    given = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": 1}
    host = weigh(trainer(tmp_path, rows=tiny.rows(ROWS), **given), SPEC, domains=tiny.DOMAINS)
    dropped = host.model

    def make():
        return tiny.model()

    host.model_init = make
    host.train()
    assert host.model is not dropped
    for name, value in usual.model.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)


def test_two_trainers_of_one_model_weigh_each_by_its_own_spec(usual, tmp_path):
    """The one that was weighed first trains as if there were no other, and so does the second."""
    given = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": 1}
    first, second = (trainer(tmp_path, rows=tiny.rows(ROWS), **given) for _ in "ab")
    second.model = second.model_wrapped = first.model
    start = {name: value.clone() for name, value in first.model.state_dict().items()}
    weigh(first, SPEC, domains=tiny.DOMAINS)
    weigh(second, "mile")
    for host, spec in ((first, SPEC), (second, "mile"), (first, SPEC)):
        host.model.load_state_dict(start)
        host.train()
        assert host.callback_handler.callbacks[0].spec.name == spec
        same = [
            torch.equal(usual.model.state_dict()[n], x) for n, x in host.model.state_dict().items()
        ]
        assert all(same) == (spec == SPEC)


def test_a_second_run_of_a_trainer_forgets_the_first(tmp_path):
    """What group-dro learned of the domains is gone, as are the optimizer's moments."""
    start = tiny.model().state_dict()
    host = weigh(trainer(tmp_path), "group-dro", domains=tiny.DOMAINS)
    found = []
    for _ in range(2):
        host.model.load_state_dict(start)
        host.train()
        found.append({name: value.clone() for name, value in host.model.state_dict().items()})
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_virtual_tokens_before_a_sample_weigh_nothing():
    """With peft's prompt tuning the labels move along, and weights of rows with them."""
    batch = tiny.padded(tiny.rows())
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny.model(), config).train()
    quality = torch.linspace(0, 2, len(batch["labels"]))
    spec = wt.loads("version: 1\nnormalize: none\npipeline: column(quality) -> as_is\n")
    weigh_model(model, spec).begin_step(1)
    del batch["domain"]
    output = model(**batch, quality=quality)
    nll = torch.nn.functional.cross_entropy(
        output.logits[:, 2:-1].transpose(1, 2), batch["labels"], reduction="none"
    )
    valid = batch["labels"] != -100
    assert_close(output.loss, (quality[:, None] * nll).sum() / valid.sum())
    with pytest.raises(ValueError, match="give one value for each row"):
        model(**batch, quality=torch.ones(batch["labels"].shape))


def test_parameters_in_bfloat16_have_a_loss_in_float32():
    """The loss is that of the very logits, weighed in float64."""
    batch = tiny.padded(tiny.rows())
    model = tiny.model(dtype=torch.bfloat16)
    weigh_model(model, SPEC, domains=tiny.DOMAINS).begin_step(1)
    method = tiny.reference(SPEC, tiny.DOMAINS)
    total, count = tiny.weighted_sum(tiny.model(dtype=torch.bfloat16), batch, method)
    loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert_close(loss.double(), total / count, rtol=1e-5, atol=1e-6)


def test_the_auxiliary_loss_of_experts_is_added_as_it_is():
    """The weighted loss of a model that balances its experts is larger by that loss."""
    batch = tiny.padded(tiny.rows())
    model = tiny.model("mixtral, experts")
    weigh_model(model, SPEC).begin_step(1)
    alone = model(**batch).loss
    output = model(**batch, output_router_logits=True)
    assert output.aux_loss > 0
    assert_close(output.loss, alone + model.router_aux_loss_coef * output.aux_loss)


# Told what to do ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_columns_that_the_data_lacks_are_named_before_training(tmp_path):
    """The message has those that there are; so is a domain that nobody knows."""
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "source": "code"} for _ in range(ROWS)]
    for data in (rows, Dataset.from_list(rows)):
        with pytest.raises(ValueError, match=r"'domain' and .* has input_ids, labels, source"):
            weigh(trainer(tmp_path, rows=data), "group-dro", domains=tiny.DOMAINS)
    with pytest.raises(ValueError, match="reads the column 'quality'"):
        weigh(trainer(tmp_path, rows=rows), "column(quality) -> as_is")
    stream = (
        Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)
    )  # of unknown columns
    with pytest.raises(ValueError, match=r"group-dro reads 'domain', and the batch has no such"):
        weigh(trainer(tmp_path, rows=stream), "group-dro", domains=tiny.DOMAINS).train()
    host = trainer(tmp_path, rows=[{**row, "domain": "prosa"} for row in rows])
    with pytest.raises(ValueError, match="did you mean 'prose'"):
        weigh(host, "group-dro", domains=tiny.DOMAINS).train()
    with pytest.raises(ValueError, match="domain"):
        weigh(trainer(tmp_path), "group-dro")


def test_columns_hold_numbers_of_any_kind_and_nothing_else():
    """A whole number in the first row does not cut the halves of the next; words are refused."""
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "q": 1}]
    rows += [{"input_ids": [7, 8], "labels": [7, 8], "q": [0.5, 0.25]}]
    collator = ColumnsCollator(pad, ["q"], None, (), frozenset({"input_ids", "labels"}))
    assert collator(rows)["q"].tolist() == [[1, 1], [0.5, 0.25]]
    with pytest.raises(ValueError, match="'q' holds 'high'; give a number"):
        collator([{**row, "q": "high"} for row in rows])


def test_the_collator_goes_to_workers_that_are_spawned(tmp_path):
    """It is pickled with the domains and columns that it places."""
    host = weigh(trainer(tmp_path), "group-dro", domains=tiny.DOMAINS)
    again = pickle.loads(pickle.dumps(host.data_collator))
    assert again(tiny.rows(2))["domain"].tolist() == [0, 1]


def test_a_trainer_is_weighed_once(tmp_path):
    """A second spec is refused, whether the first came by `weigh` or as a callback."""
    host = weigh(trainer(tmp_path), "linupper")
    with pytest.raises(ValueError, match="weighed by linupper already"):
        weigh(host, "mile")
    host = trainer(tmp_path)
    host.add_callback(WeightingCallback("dft"))
    with pytest.raises(ValueError, match="weighed by dft already"):
        weigh(host, "mile")


def test_models_with_another_loss_than_that_of_next_tokens_are_refused():
    """Classifiers, and models whose loss somebody else has set."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=8, num_attention_heads=2, **sizes)
    with pytest.raises(ValueError, match="is ForSequenceClassificationLoss"):
        weigh_model(LlamaForSequenceClassification(config), "linupper")
    model = tiny.model()
    model.loss_function = pad
    with pytest.raises(ValueError, match="is pad"):
        weigh_model(model, "linupper")


class Smoothed(Trainer):
    """A trainer that takes the labels away from the model."""

    def compute_loss(self, model, inputs, *_args, **_options):
        """Return a loss of its own."""
        labels = inputs.pop("labels")
        return model(**inputs).logits.float().mean() * labels.numel()


@pytest.mark.slow
@for_each(
    "setting, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "fused_linear_cross_entropy"),
        ({"compute_loss_func": lambda *_given, **_more: torch.zeros(())}, "got no labels"),
        ({"kind": Smoothed}, "got no labels"),
    ],
    ids=lambda case: case[1],
)
def test_a_callback_alone_notices_what_takes_the_loss_away(
    tmp_path_factory, monkeypatch, setting, message
):
    """No parameter has moved when it stops the run."""
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: None)  # not here
    kind = setting.pop("kind", Trainer)
    later = {k: setting.pop(k) for k in ("use_liger_kernel", "compute_loss_func") if k in setting}
    host = trainer(tmp_path_factory.mktemp("out"), kind, **setting)
    host.add_callback(WeightingCallback("linupper"))
    for name, value in later.items():
        setattr(host.args if name == "use_liger_kernel" else host, name, value)
    with pytest.raises((ValueError, UnweightedError), match=message):
        host.train()
    for name, value in tiny.model().named_parameters():
        assert torch.equal(host.model.get_parameter(name), value)

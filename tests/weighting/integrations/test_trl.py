"""TRL's SFTTrainer with weights: its fused head's log-probabilities are what is weighed."""

from functools import partial

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from looping import for_each
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import weighting as wt
from weighting.integrations.transformers import WeightingCallback, weigh

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:trl")
BATCH = 3


def tokenizer():
    """Return a tokenizer of words that are numbers."""
    words = {str(i): i for i in range(tiny.VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="0"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2")


def trainer(folder, rows, model="llama", chat_template=None, **options):
    """Return TRL's trainer with plain gradient descent over rows in their order, one step."""
    args = SFTConfig(
        str(folder),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    data = Dataset.from_list(rows)
    words = tokenizer()
    words.chat_template = chat_template
    return SFTTrainer(tiny.model(model), args, train_dataset=data, processing_class=words)


def descended(host):
    """Train, and return the loss that was logged and the parameters."""
    host.train()
    return host.state.log_history[0], dict(host.model.named_parameters())


@pytest.mark.slow
@for_each(
    "model, spec",
    [("llama", spec) for spec in ("linupper-x-mile", "group-dro")]
    + [(model, "mile") for model in ("gemma 2, soft cap", "cohere, logit scale")],
    ids=", ".join,
)
def test_a_step_of_tokenized_rows_is_the_step_of_the_formula(tmp_path_factory, model, spec):
    """Loss and parameters are those of float64, with prompts masked and two domains."""
    rows = tiny.rows(BATCH)
    for row in rows:  # of some models the Trainer counts the first label, which nothing predicts
        row["labels"][0] = -100
    (loss,), parameters = tiny.descended(model, spec, [[tiny.padded(rows)]])
    host = trainer(tmp_path_factory.mktemp("out"), rows, model)
    found, after = descended(weigh(host, spec, domains=tiny.DOMAINS))
    assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
    assert_close(found["weighting/weighted_loss"], loss, rtol=1e-5, atol=1e-6)
    for name, value in after.items():
        assert_close(value.double(), parameters[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_loss_of_negative_weights_is_climbed(tmp_path):
    """Where every weight is -1 a step goes as far up as the plain one goes down."""
    rows = tiny.rows(BATCH)
    start = {name: x.detach().clone() for name, x in tiny.model("llama").named_parameters()}
    line, plain = descended(trainer(tmp_path / "plain", rows))
    host = trainer(tmp_path / "ours", rows)
    found, ours = descended(weigh(host, "loss -> clip(min=-1, max=-1) -> signed"))
    assert_close(found["loss"], -line["loss"])
    for name, value in ours.items():
        assert_close(value - start[name], start[name] - plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_samples_laid_end_to_end_are_sequences(tmp_path):
    """Padding-free with domains, and packed rows without, weigh each sample by itself."""
    rows = tiny.rows(BATCH)
    (loss,), _ = tiny.descended("llama", "linupper-x-mile", [[tiny.flattened(rows)]])
    free = trainer(tmp_path / "free", rows, padding_free=True, max_length=None)
    found, _ = descended(weigh(free, "linupper-x-mile", domains=tiny.DOMAINS))
    assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)

    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    packed = trainer(tmp_path / "packed", bare, packing=True, max_length=32, shuffle_dataset=False)
    found, _ = descended(weigh(packed, "linupper-x-mile"))
    assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dft_is_trls_own(tmp_path):
    """The spec trains the parameters of loss_type="dft", on completions alone, with a column."""
    rows = [
        {"prompt": "3 4 5 6", "completion": f" {7 + i} 9 11 {20 - i} 8", "domain": "code"}
        for i in range(BATCH)
    ]
    host = weigh(trainer(tmp_path / "ours", rows), "dft", domains=tiny.DOMAINS)
    line, ours = descended(host)
    assert line["weighting/domain/code/share"] == 1
    _, theirs = descended(trainer(tmp_path / "theirs", rows, loss_type="dft"))
    for name, value in theirs.items():
        assert_close(ours[name], value)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %} {% else %}{{ m.content }} {% endif %}{% endfor %}"
)


@pytest.mark.slow
def test_chats_of_several_turns_count_where_trl_has_labels(tmp_path):
    """With assistant_only_loss the loss is that of the labels that TRL makes, in float64."""
    said = ["3 4 5", "6 7", "8 9", "10 11 12"]
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    host = trainer(tmp_path, rows, assistant_only_loss=True, chat_template=TEMPLATE)
    chats = [{**row, "domain": "code"} for row in host.train_dataset]
    for chat in chats:
        assert 0 < sum(x != -100 for x in chat["labels"]) < len(chat["labels"])
    (loss,), _ = tiny.descended("llama", "linupper-x-mile", [[tiny.padded(chats)]])
    found, _ = descended(weigh(host, "linupper-x-mile"))
    assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)


@for_each("how", ["weigh", "callback"])
def test_a_trainer_of_preferences_is_refused(tmp_path_factory, how):
    """Its log-probabilities come from the same head, and its loss is of their differences."""
    rows = [{"prompt": "3 4", "chosen": " 5 6 7", "rejected": " 8 9"}] * BATCH
    args = DPOConfig(str(tmp_path_factory.mktemp("out")), use_cpu=True, bf16=False, max_steps=1)
    host = DPOTrainer(
        tiny.model(),
        tiny.model(),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[WeightingCallback("dft")] if how == "callback" else None,
    )
    begin = host.train if how == "callback" else partial(weigh, host, "dft")
    with pytest.raises(ValueError, match="loss of DPOTrainer is made of ratios"):
        begin()


def test_settings_of_trl_that_take_the_loss_away_are_refused(tmp_path):
    """Each of them makes a loss of its own, which the fused head knows nothing of."""
    rows = tiny.rows(BATCH)
    host = trainer(tmp_path, rows)
    for name, value in {"label_smoothing_factor": 0.1, "use_liger_kernel": True}.items():
        before = getattr(host.args, name)
        setattr(host.args, name, value)
        with pytest.raises(ValueError, match=name):
            weigh(host, "linupper")
        setattr(host.args, name, before)
    host.compute_loss_func = lambda *_given, **_more: torch.zeros(())
    with pytest.raises(ValueError, match="compute_loss_func"):
        weigh(host, "linupper")


@pytest.mark.slow
def test_what_the_fused_head_does_not_tell_is_refused(tmp_path):
    """Columns that packing dropped, signals it lacks, and a loss that would be weighed twice."""
    rows = tiny.rows(BATCH)
    packed = trainer(tmp_path / "packed", rows, packing=True, max_length=32)
    with pytest.raises(ValueError, match=r"'domain'.*packing"):
        weigh(packed, "group-dro", domains=tiny.DOMAINS).train()
    with pytest.raises(ValueError, match="error_norm"):
        weigh(trainer(tmp_path / "norm", rows), "error-norm").train()
    with pytest.raises(ValueError, match="topk_entropy_20"):
        weigh(trainer(tmp_path / "topk", rows), "eaft").train()
    with pytest.raises(ValueError, match="loss_type"):
        weigh(trainer(tmp_path / "dft", rows, loss_type="dft"), "linupper")


@pytest.mark.slow
def test_uniform_and_evaluation_are_trls_own(tmp_path):
    """Parameters agree bit for bit, and what is evaluated is not weighted."""
    rows = tiny.rows(BATCH)
    plain, ours = trainer(tmp_path / "plain", rows), trainer(tmp_path / "ours", rows)
    spec = wt.loads("version: 1\npipeline: uniform\n")
    _, expected = descended(plain)
    _, found = descended(weigh(ours, spec))
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    heavy = weigh(trainer(tmp_path / "heavy", rows), "linupper")
    heavy.eval_dataset = heavy.train_dataset
    alone = trainer(tmp_path / "alone", rows)
    alone.eval_dataset = alone.train_dataset
    assert heavy.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]

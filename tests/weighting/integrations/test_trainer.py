"""Hugging Face's Trainer with weights: exact, resumed, reported on, and never unweighted."""

import json
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from click.testing import CliRunner
from looping import for_each
from tiny_trainer import ACCUMULATED, BATCH, STEPS, pad, trainer
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from weighting.cli import main
from weighting.integrations.collate import ColumnsCollator
from weighting.integrations.transformers import UnweightedError, WeightingCallback, weigh

ROWS = STEPS * BATCH * ACCUMULATED + BATCH
"""Of an epoch whose last step has one microbatch alone."""


def batches(layout):
    """Return for each step the microbatches of an epoch."""
    rows = tiny.rows(ROWS)
    every = [layout(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
    return [every[at : at + ACCUMULATED] for at in range(0, len(every), ACCUMULATED)]


LAYOUTS = {
    "rows": (pad, tiny.padded),
    "padding-free": (DataCollatorWithFlattening(), tiny.flattened),
}


CASES = [(spec, "rows") for spec in ("dro-kl", "dft", "linupper-x-mile", "group-dro")]
CASES += [("linupper-x-mile", "padding-free")]


@pytest.mark.slow
@for_each("spec, layout", CASES, ids=", ".join)
def test_accumulated_microbatches_of_unequal_length_are_one_step(tmp_path_factory, spec, layout):
    """Losses as logged and parameters are those of float64, for rows and for padding-free ones.

    So are those of an epoch's last step, which has fewer microbatches.
    """
    collator, collated = LAYOUTS[layout]
    losses, parameters = tiny.descended("llama", spec, batches(collated))
    options = {"rows": tiny.rows(ROWS), "max_steps": -1, "num_train_epochs": 1}
    host = trainer(tmp_path_factory.mktemp("out"), collator=collator, **options)
    weigh(host, spec, domains=tiny.DOMAINS).train()
    logged = [line for line in host.state.log_history if "loss" in line]
    for line, loss in zip(logged, losses, strict=True):
        assert_close(line["loss"], loss, rtol=1e-5, atol=1e-6)
        assert_close(line["weighting/weighted_loss"], loss, rtol=1e-5, atol=1e-6)
        shares = [line[f"weighting/domain/{name}/share"] for name in tiny.DOMAINS]
        assert min(shares) > 0
        assert_close(sum(shares), 1.0)
    for name, value in host.model.named_parameters():
        assert_close(value.double(), parameters[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_uniform_trains_the_parameters_of_the_plain_trainer_bit_for_bit(tmp_path):
    """A weight of one by construction changes nothing, and is reported as one."""
    plain = trainer(tmp_path / "plain")
    host = weigh(trainer(tmp_path / "ours"), "uniform", domains=tiny.DOMAINS)
    plain.train()
    host.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)
    for ours, theirs in zip(host.state.log_history, plain.state.log_history, strict=True):
        assert ours.get("loss") == theirs.get("loss")
    assert host.state.log_history[0]["weighting/weight/max"] == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a trainer that has trained with group-dro, which remembers, saved and recorded."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    host = trainer(folder, **options)
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, *_args, logs, **_options):
            seen.append(dict(logs))

    host.add_callback(Reporter)
    weigh(host, "group-dro", domains=tiny.DOMAINS, record=1)
    host.train()
    host.seen = seen
    return host


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_one_that_was_not_interrupted(whole):
    """Parameters and what the stages remember agree bit for bit; the state is in checkpoint-N."""
    folder = whole.args.output_dir
    host = trainer(folder, save_strategy="steps", save_steps=1)
    weigh(host, "group-dro", domains=tiny.DOMAINS)
    fresh = host.callback_handler.callbacks[0].hook.state_dict()["state"]
    saved = json.loads(
        Path(f"{folder}/checkpoint-1/trainer_state.json").read_text(encoding="utf-8")
    )
    assert saved["stateful_callbacks"]["WeightingCallback"]["weighting"]["state"]
    host.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)
    first, second = (
        x.callback_handler.callbacks[0].hook.state_dict()["state"] for x in (whole, host)
    )
    for name, value in first.items():
        assert torch.equal(second[name], value)
    assert any(not torch.equal(first[name], fresh[name]) for name in first)


def test_every_logger_gets_the_numbers_and_evaluation_has_none(whole):
    """`weighting/*` stands beside the loss in what reporters see; eval_loss is the model's own."""
    logged = [line for line in whole.seen if "loss" in line]
    assert len(logged) == STEPS
    assert all("weighting/weight/max" in line for line in logged)
    evaluated = [line for line in whole.seen if "eval_loss" in line]
    assert len(evaluated) == STEPS
    assert not any(name.startswith("weighting/") for line in evaluated for name in line)
    labels = tiny.padded(tiny.rows(12)[:4])
    model = whole.model.eval()
    with torch.no_grad():
        del labels["domain"]
        assert_close(evaluated[-1]["eval_loss"], model(**labels).loss.item())


def test_report_and_replay_read_such_a_run(whole, tmp_path):
    """run.json, metrics and record are those of a run of torchtitan."""
    folder = whole.args.output_dir
    page = tmp_path / "page.html"
    run = CliRunner().invoke(main, ["report", folder, "--out", str(page)])
    assert run.exit_code == 0, run.output
    assert "group-dro" in page.read_text(encoding="utf-8")
    run = CliRunner().invoke(main, ["replay", folder, "linupper"])
    assert run.exit_code == 0, run.output
    assert "2 steps from 1 to 2, 6 sequences each" in run.output
    about = json.loads(Path(f"{folder}/weighting/run.json").read_text(encoding="utf-8"))
    assert about["spec"]["name"] == "group-dro"
    assert about["starts"][0]["versions"]["transformers"]


def test_further_columns_are_recorded_for_specs_that_are_tried_later(tmp_path):
    """Training is as without them, and a replay weighs by them."""
    rows = [{**row, "difficulty": i / 4} for i, row in enumerate(tiny.rows(ROWS))]
    plain = weigh(trainer(tmp_path / "plain"), "linupper")
    host = trainer(tmp_path / "more", rows=rows)
    weigh(host, "linupper", columns=["difficulty"], record=1)
    plain.train()
    host.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)
    spec = "column(difficulty) -> mean(sequence) -> pow(1) -> mean_one"
    run = CliRunner().invoke(main, ["replay", str(tmp_path / "more"), spec])
    assert run.exit_code == 0, run.output
    refused = CliRunner().invoke(
        main, ["replay", host.args.output_dir, "column(other) -> mean_one"]
    )
    assert refused.exit_code == 2


@pytest.mark.slow
def test_a_callback_alone_weighs_as_well(tmp_path):
    """A framework that takes callbacks trains the same parameters."""
    one = weigh(trainer(tmp_path / "one"), "linupper-x-mile")
    other = trainer(tmp_path / "other")
    other.add_callback(WeightingCallback("linupper-x-mile"))
    for host in (one, other):
        host.train()
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
    assert "weighting/weight/max" in other.state.log_history[0]


@pytest.mark.slow
def test_a_callback_that_the_trainer_makes_again_goes_on(whole):
    """With restore_callback_states_from_checkpoint the callback is a new one, of the old state."""
    folder = whole.args.output_dir
    host = trainer(folder, restore_callback_states_from_checkpoint=True, max_steps=STEPS)
    weigh(host, "group-dro", domains=tiny.DOMAINS)
    host.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)


# Never unweighted ---------------------------------------------------------------------------------


def test_settings_that_take_the_loss_away_are_refused_before_training(tmp_path):
    """Label smoothing, Liger's fused loss and a loss function of the user's."""
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        weigh(trainer(tmp_path, label_smoothing_factor=0.1), "linupper")
    host = trainer(tmp_path)
    host.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        weigh(host, "linupper")
    host = trainer(tmp_path)
    host.compute_loss_func = lambda outputs, _labels, **_options: outputs.logits.sum()
    with pytest.raises(ValueError, match="compute_loss_func"):
        weigh(host, "linupper")


class OwnLoss(Trainer):
    """A trainer that does not take the model's loss."""

    def compute_loss(self, model, inputs, *_args, **_options):
        """Return the mean square of the logits."""
        return model(**inputs).logits.square().mean()


@pytest.mark.slow
def test_a_trainer_with_a_loss_of_its_own_is_stopped_at_the_first_step(tmp_path):
    """Though it calls the model with labels, the gradient does not come of the weighted loss."""
    host = weigh(trainer(tmp_path, OwnLoss), "linupper")
    before = {name: x.clone() for name, x in host.model.state_dict().items()}
    with pytest.raises(UnweightedError, match="step 1 would be trained unweighted"):
        host.train()
    for name, value in host.model.state_dict().items():
        assert torch.equal(before[name], value)


class Interrupts(TrainerCallback):
    """Ends the run at its second step, as Ctrl-C in a notebook does."""

    def on_step_begin(self, _args, state, _control, **_options):
        """Raise."""
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@for_each("alone", (False, True), ids=lambda alone: "callback" if alone else "weigh")
def test_a_model_is_not_weighted_after_a_run_that_was_interrupted(tmp_path_factory, alone):
    """A plain Trainer or loop that goes on with it has the plain loss, and the run itself not."""
    host = trainer(tmp_path_factory.mktemp("out"))
    callback = WeightingCallback("linupper")
    if alone:
        host.add_callback(callback)
    else:
        weigh(host, "linupper")
    host.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        host.train()
    batch = tiny.padded(tiny.rows(BATCH))
    del batch["domain"]
    own = tiny.model()
    own.load_state_dict(host.model.state_dict())
    assert torch.equal(host.model.train()(**batch).loss, own(**batch).loss)

    hosts = []
    for model in (host.model, own):
        other = trainer(tmp_path_factory.mktemp("other"), max_steps=1)
        other.model = other.model_wrapped = model
        other.train()
        hosts.append(other)
    for name, value in hosts[1].model.state_dict().items():
        assert torch.equal(hosts[0].model.state_dict()[name], value)


@pytest.mark.slow
def test_a_checkpoint_of_another_spec_or_of_none_is_not_gone_on_from_in_silence(tmp_path):
    """Another spec's state is refused; a run that had none starts afresh, and says so."""
    plain = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    host = weigh(trainer(tmp_path), "group-dro", domains=tiny.DOMAINS)
    with pytest.warns(UserWarning, match="holds no weighting"):
        host.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    host = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    weigh(host, "linupper").train()
    host = weigh(trainer(tmp_path), "group-dro", domains=tiny.DOMAINS)
    with pytest.raises(ValueError, match="another spec"):
        host.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")


# Columns ------------------------------------------------------------------------------------------


def left(rows):
    """Pad rows on the left."""
    length = max(len(row["input_ids"]) for row in rows)
    lines = [[0] * (length - len(row["input_ids"])) + row["input_ids"] for row in rows]
    return {"input_ids": torch.tensor(lines), "labels": torch.tensor(lines)}


def test_columns_stand_where_a_collator_put_their_tokens():
    """Padded right or left, or end to end, a list has its numbers at its tokens."""
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "q": [1.0, 2.0, 3.0], "d": "prose"}]
    rows += [{"input_ids": [8, 9], "labels": [8, 9], "q": [4.0, 5.0], "d": 0}]

    def collated(collator):
        keep = frozenset({"input_ids", "labels"})
        return ColumnsCollator(collator, ["q"], "d", tiny.DOMAINS, keep)([dict(x) for x in rows])

    assert collated(pad)["q"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert collated(pad)["d"].tolist() == [1, 0]
    assert collated(left)["q"].tolist() == [[1, 2, 3], [0, 4, 5]]
    assert collated(DataCollatorWithFlattening())["q"].tolist() == [[1, 2, 3, 4, 5]]
    assert collated(DataCollatorWithFlattening())["d"].tolist() == [[1, 1, 1, 0, 0]]


@for_each(
    "wrong, message",
    [
        ({"d": "pros"}, "did you mean 'prose'"),
        ({"d": 2}, "ids run from 0 to 1"),
        ({"q": None}, "1 of 2 rows of a batch have no 'q'"),
        ({"q": [1.0]}, "1 values for 2 tokens"),
    ],
    ids=lambda case: case[1],
)
def test_columns_that_do_not_fit_are_refused(wrong, message):
    """The message names the column and what is wrong with it."""
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "q": [1.0, 2.0], "d": "code"} for _ in "ab"]
    rows[1] |= wrong
    collator = ColumnsCollator(pad, ["q"], "d", tiny.DOMAINS, frozenset({"input_ids", "labels"}))
    with pytest.raises(ValueError, match=message):
        collator(rows)

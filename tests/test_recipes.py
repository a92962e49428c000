"""The recipes of docs/other-trainers.md train, resume and count as they say."""

import ast
import copy
import math
import types

import pytest
import recipes
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from runs import torchrun
from torch.testing import assert_close

import weighting as wt
from weighting.contract import Alone

pytestmark = pytest.mark.filterwarnings(
    # What the hosts warn of on their own account.
    "ignore:'pin_memory' argument:UserWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
)
HOSTS = {
    "loop": lambda names: names["model"],
    "trainer": lambda names: names["trainer"].model,
    "lightning": lambda names: names["trainer"].lightning_module.model,
}
ON_RANKS = ("ranks", "sharded", "trainer", "lightning")
STEPS = 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder: the recipes write beside themselves."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def collated(rows):
    """Return rows as one batch."""
    return torch.utils.data.default_collate(rows)


def cross_entropy(model, batch):
    """Return the unweighted mean cross entropy of a batch, by torch's own function."""
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(batch["input_ids"], batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def state(model):
    """Return the state of a model's weighting."""
    return {name: value.clone() for name, value in model.fn.state_dict().items()}


# Each recipe as it stands -------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_a_recipe_trains(host, folder, capsys):
    """The loss falls, steps count from 1, weights vary, and the state moves in training alone."""
    names = recipes.started()
    new_model, steps = names["new_model"], []

    def note(model, _args, kwargs):
        if model.training:
            steps.append(int(kwargs["step"]))

    def watched():
        model = new_model()
        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    names["new_model"] = watched
    if host == "lightning":
        recipes.define("loop", names)
    recipes.run(host, names)
    model, batch = HOSTS[host](names), collated(names["rows"])

    before, after = (cross_entropy(x, batch) for x in (new_model(), model))
    assert before == pytest.approx(math.log(128), abs=0.2)  # an untrained model knows nothing
    assert after < before - 0.2
    assert steps == [*range(1, STEPS + 1)]
    batches = model.fn.get_buffer("pipeline__2_exponentiated__batches")
    assert batches == STEPS + 1  # the initial weights count as one
    shown = {
        "loop": lambda: ast.literal_eval(capsys.readouterr().out.splitlines()[-1].split(" ", 1)[1]),
        "trainer": lambda: [x for x in names["trainer"].state.log_history if "loss" in x][-1],
        "lightning": lambda: names["trainer"].logged_metrics,
    }
    metrics = shown[host]()
    assert metrics["weight/min"] < 0.99
    assert metrics["weight/max"] > 1.01
    assert folder.joinpath("checkpoint.pt").exists() == (host == "loop")


@pytest.mark.parametrize("host", ["trainer", "lightning"])
@pytest.mark.usefixtures("folder")
def test_evaluation_is_not_weighted(host):
    """What a host reports for its evaluation is the mean of its batches' plain cross entropy."""
    names = recipes.started()
    if host == "lightning":
        recipes.define("loop", names)
    recipes.run(host, names)
    trainer, rows = names["trainer"], names["rows"][::4]
    if host == "trainer":
        size, found = 8, trainer.evaluate()["eval_loss"]
    else:
        batches = names["DataLoader"](rows, batch_size=16)
        (metrics,) = trainer.validate(trainer.lightning_module, batches, verbose=False)
        size, found = 16, metrics["val_loss"]

    batches = [collated(rows[i : i + size]) for i in range(0, len(rows), size)]
    losses = [cross_entropy(HOSTS[host](names), batch) for batch in batches]
    assert found == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)  # float32


# The model ----------------------------------------------------------------------------------------


def pair(names):
    """Return a model of the recipe and Hugging Face's own with the same parameters."""
    model = names["new_model"]()
    stock = names["LlamaForCausalLM"](model.config).train()
    stock.load_state_dict(model.state_dict(), strict=False)
    return model, stock


@pytest.mark.parametrize("items", [None, 1000])
def test_uniform_weights_give_the_models_own_loss(items):
    """Shifted, padded, divided: loss and gradients are those of Hugging Face's own model."""
    names = recipes.started("uniform")
    model, stock = pair(names)
    batch = collated(names["rows"][:12])
    found = model(**batch, num_items_in_batch=items)["loss"]
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = stock(**own, num_items_in_batch=items).loss
    found.backward()
    expected.backward()

    assert_close(found, expected)
    for (name, x), y in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert_close(x.grad, y.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_every_signal_stands_with_its_target():
    """The weights are those of the full logits with labels moved up by one."""
    names = recipes.started("doremi-x-linupper-x-mile")
    model, stock = pair(names)
    batch = collated(names["rows"][:12])
    batch["domain_ids"] = torch.randint(2, batch["labels"].shape)  # as in packed rows
    batch["ref_loss"] = 4 + torch.rand(batch["labels"].shape)
    fn = wt.build(names["spec"], domains=names["domains"])
    logits = stock(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    signals = {name: batch[name][:, :-1] for name in ("domain_ids", "ref_loss")}
    expected, out = wt.weighted_cross_entropy(logits, batch["labels"][:, 1:], fn, step=3, **signals)
    found = model(**batch, step=3)

    assert_close(found["loss"], expected)
    assert_close(found["weights"].token[:, :-1], out.token)
    assert_close(state(model), dict(fn.state_dict()))


@pytest.mark.parametrize("told", [True, False], ids=["sequence_ids", "position_ids"])
def test_a_padding_free_batch_weighs_its_samples_like_rows(told):
    """What Hugging Face's flattening collator makes of rows gives the weights of those rows."""
    from transformers import DataCollatorWithFlattening  # noqa: PLC0415 - no test extra

    names = recipes.started("linupper")
    model, _ = pair(names)
    batch = collated(names["rows"][:6])
    lengths = batch["attention_mask"].sum(1).tolist()
    samples = [{"input_ids": x[:n]} for x, n in zip(batch["input_ids"], lengths, strict=True)]
    flat = dict(DataCollatorWithFlattening()(samples))
    if told:
        flat["sequence_ids"] = torch.arange(6).repeat_interleave(torch.tensor(lengths))[None]
    assert flat["input_ids"].shape == (1, sum(lengths))
    with torch.no_grad():
        expected, found = model(**batch), model(**flat)

    here = batch["attention_mask"].bool()
    assert expected["weights"].token.max() > 1.05
    assert_close(found["weights"].token[0], expected["weights"].token[here], rtol=1e-4, atol=1e-4)
    assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["microbatch", "rank"])
def test_the_loss_counts_the_labels_of_other_ranks(scope):
    """The mean over all ranks' labels takes a factor; with scope: rank there are no others."""
    names = recipes.started()
    names["spec"] = wt.loads(f"version: 1\nscope: {scope}\npipeline: uniform\n")
    model, stock = pair(names)
    batch = collated(names["rows"][:12])
    n = int((batch["labels"][:, 1:] != -100).sum())
    others = types.SimpleNamespace(size=2, sum=lambda x: x + 100, parts=Alone())
    model.fn = wt.build(names["spec"], domains=names["domains"], collectives=others)

    factor = 2 * n / (n + 100) if scope == "microbatch" else 1
    assert_close(model(**batch)["loss"], factor * cross_entropy(stock, batch))


def test_autocast_trains_as_float32_does():
    """Under bfloat16 autocast the loss is that of float32, within its 8 bits."""
    names = recipes.started("doremi-x-linupper-x-mile")
    model, _ = pair(names)
    batch = collated(names["rows"][:12])
    with torch.autocast("cpu", torch.bfloat16):
        low = copy.deepcopy(model)(**batch)["loss"]
    low.backward()
    assert_close(low, model(**batch)["loss"], rtol=0.01, atol=0.0)


def test_a_checkpoint_is_a_llama(folder):
    """Hugging Face reads what was saved as its own model, and generates with either."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - no test extra, no collection

    names = recipes.started()
    model, stock = pair(names)
    model.save_pretrained(folder)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is names["LlamaForCausalLM"]
    prompt = names["rows"][0]["input_ids"][None, :4]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = [x.eval().generate(prompt, **options).tolist() for x in (model, stock, found)]
    assert tokens[0] == tokens[1] == tokens[2]


# What the hosts do with it ------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_the_trainer_accumulates_over_labels():
    """Uniform weights over two microbatches train as the plain Trainer does, label by label."""
    names = recipes.started("uniform")
    recipes.define("trainer", names)
    torch.manual_seed(0)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    host = recipes.hosted_by_trainer(names, "weighted", names["rows"][:32], **options)
    stock = names["LlamaForCausalLM"](host.model.config)
    stock.load_state_dict(host.model.state_dict(), strict=False)
    plain = [
        {name: row[name] for name in ("input_ids", "attention_mask", "labels")}
        for row in names["rows"][:32]
    ]
    own = names["Trainer"](stock, copy.deepcopy(host.args), train_dataset=plain)
    before = copy.deepcopy(stock.state_dict())
    host.train()
    own.train()

    found = host.model.state_dict()
    for name, value in stock.state_dict().items():
        assert_close(found[name], value)
        assert not torch.equal(value, before[name])


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_trainer_compiles_the_recipe():
    """With torch_compile=True it trains to the parameters that it has without."""
    names = recipes.started("linupper")
    recipes.define("trainer", names)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        options = (
            {"torch_compile": compiled, "torch_compile_backend": "aot_eager"} if compiled else {}
        )
        host = recipes.hosted_by_trainer(names, "out", names["rows"][:32], **options)
        host.train()
        assert host.weights.metrics["weight/max"] > 1.001
        found.append(host.model.state_dict())
    for name, value in found[0].items():
        assert_close(found[1][name], value)


def trained_by_trainer(names, *, resumed):
    """Train two epochs, or the second of them from the checkpoint after the first."""
    torch.manual_seed(0)
    rows = names["rows"][:64]
    host = recipes.hosted_by_trainer(names, "out", rows, num_train_epochs=2, save_strategy="epoch")
    fresh = state(host.model)
    host.train(resume_from_checkpoint="out/checkpoint-4" if resumed else None)
    return fresh, host.model


def trained_by_lightning(names, *, resumed):
    """Train two epochs, or the second of them from the checkpoint after the first."""
    torch.manual_seed(0)
    batches = names["DataLoader"](names["rows"][:64], batch_size=16)
    keep = names["lightning"].pytorch.callbacks.ModelCheckpoint
    every = keep("out", filename="{epoch}", save_top_k=-1)
    host, module = recipes.hosted_by_lightning(names, "out", max_epochs=2, callbacks=[every])
    fresh = state(module.model)
    host.fit(module, batches, ckpt_path="out/epoch=0.ckpt" if resumed else None)
    return fresh, module.model


def trained_by_hand(names, *, resumed):
    """Train four batches and four more, in one go or from the recipe's checkpoint."""
    torch.manual_seed(0)
    rows, model = names["rows"][:64], names["new_model"]()
    fresh = state(model)
    batches = [*names["DataLoader"](rows, batch_size=16)] * 2
    if resumed:
        model.load_state_dict(torch.load("first.pt"))
    for step, batch in enumerate(batches, 1):
        if resumed and step <= 4:
            continue
        model.zero_grad()
        model(**batch, step=step)["loss"].backward()
        with torch.no_grad():
            for x in model.parameters():
                x.sub_(0.1 * x.grad)
        if step == 4:
            torch.save(model.state_dict(), "first.pt")
    return fresh, model


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("host", "train"),
    [
        ("loop", trained_by_hand),
        ("trainer", trained_by_trainer),
        ("lightning", trained_by_lightning),
    ],
)
def test_doremi_goes_on_from_a_checkpoint(host, train):
    """A run cut in two ends with the domain weights and parameters of the whole, bit for bit."""
    names = recipes.started("doremi-proxy")
    recipes.define("loop", names)
    recipes.define(host, names)
    fresh, whole = train(names, resumed=False)
    _, second = train(names, resumed=True)

    moved = state(whole)
    assert moved["domain__3_exponentiated__batches"] == 9  # eight steps, and the initial weights
    assert any(not torch.equal(moved[name], fresh[name]) for name in fresh)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


# Ranks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Return what each rank of one, and of two, wrote down."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        driver = str(recipes.PAGE.parent.parent / "tests" / "recipes_on_ranks.py")
        done = torchrun(ranks, driver, str(out))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found[ranks] = [
            {host: torch.load(out / f"{host}{rank}.pt") for host in ON_RANKS}
            for rank in range(ranks)
        ]
    return found


@pytest.mark.processes
@pytest.mark.parametrize("host", ON_RANKS)
def test_two_ranks_train_as_one_with_the_whole_batch(host, on_ranks):
    """Parameters, state and gradients agree, though the ranks' counts of labels differ."""
    (alone,), both = ([rank[host] for rank in on_ranks[ranks]] for ranks in (1, 2))
    assert [sum(counts) for counts in zip(*(x["counts"] for x in both), strict=True)] == (
        alone["counts"]
    )
    assert all(x != y for x, y in zip(both[0]["counts"], both[1]["counts"], strict=True))
    assert bool(alone["gradients"]) == (host != "trainer")  # which clears them after a step
    for rank in both:
        # Adam divides by the gradient's size: its rounding, 1e-7 of it, may reach 1e-5 of lr.
        for kind in ("state", "gradients"):
            assert_close(rank[kind], alone[kind], rtol=1e-4, atol=1e-5)

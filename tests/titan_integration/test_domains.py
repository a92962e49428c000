"""Domains in the real trainer: drawn, weighed, compared by gradient, reported; on 1 and 2 ranks."""

import json
import shutil

import pytest
import small
import torch
import torch.distributed.checkpoint as dcp
from runs import drive, seed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import functional
from torchtitan.components.validate import Validator
from whole import whole_model

import weighting as wt
from titan_integration import config_registry
from titan_integration.trainer.preflight import (
    ask_for_rows,
    open_data,
    refuse_one_domain,
    refuse_unsupported,
)
from weighting.build import plan_of
from weighting.build.domains import proportions
from weighting.runs.layout import MIXTURE as FILE

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
DOMAINS = ("code", "data", "docs", "tables", "tests")
SAVING = ("--checkpoint.enable", "--checkpoint.interval=3", "--metrics.log_freq=1")


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of step 0, where all runs start."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), "--training.seq_len=64")


@pytest.fixture(scope="module")
def train(seed, tmp_path_factory):
    """Return a function that trains from the seed: runs, lines of metrics, notes, all by rank."""

    def train(ranks, spec, *flags, start=None):
        out = tmp_path_factory.mktemp("run")
        shutil.copytree(start or seed, out / "dump" / "checkpoint")
        flags = (f"--weighting.spec={spec}", *SAVING, *flags)
        drive(out, ranks, "noting", "debugmodel", *flags)
        text = (out / "dump" / "weighting" / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        notes = [torch.load(out / "dump" / f"notes{rank}.pt") for rank in range(ranks)]
        return out / "dump", lines, notes

    return train


@pytest.fixture(scope="module")
def reference(train):
    """Return a checkpoint that has learnt a little: domains lag behind it unequally."""
    folder, _, _ = train(1, "uniform-domains", "--training.steps=9")
    return folder / "checkpoint" / "step-9"


def of_domains(line, kind):
    """Return what a line of metrics says of each domain."""
    return [line[f"domain/{name}/{kind}"] for name in DOMAINS]


def assert_same_mixtures(got, expected, tolerance):
    """Compare the proportions of two runs, step by step."""
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        assert mine["step"] == other["step"]
        for kind in ("mixture", "average"):
            if f"domain/code/{kind}" in other:
                expected_shares = pytest.approx(of_domains(other, kind), rel=tolerance)
                assert of_domains(mine, kind) == expected_shares


# DoReMi -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doremi(train, reference):
    """Return DoReMi's proxy on one rank."""
    return train(1, "doremi-proxy", f"--weighting.reference={reference}")


def test_doremi_on_two_sharded_ranks_is_doremi_on_one(train, reference, doremi):
    """Weights of domains and tokens are those of one rank, to 1e-4, whatever rank a row is on."""
    flags = (f"--weighting.reference={reference}", "--training.local_batch_size=4")
    _, lines, notes = train(2, "doremi-proxy", *flags)
    _, one_lines, (one,) = doremi
    assert_same_mixtures(lines, one_lines, 1e-4)
    for step, batch in enumerate(one):
        weights = torch.cat([notes[rank][step]["weights"] for rank in range(2)])
        torch.testing.assert_close(weights, batch["weights"], rtol=1e-4, atol=1e-6)


def test_doremi_moves_as_the_formula_says(doremi):
    """The mixture of every step follows from the losses of its batch and the step before."""
    _, lines, (notes,) = doremi
    share, last, average = [1 / len(DOMAINS)] * len(DOMAINS), [0.0] * len(DOMAINS), []
    average.append(share)
    for line, batch in zip(lines, notes, strict=True):
        excess = (batch["loss"] - batch["ref_loss"]).clamp(min=0).double()
        for d in range(len(DOMAINS)):
            mine = batch["valid"] & (batch["domain_ids"] == d)
            if mine.any():
                last[d] = excess[mine].mean().item()
        raised = torch.tensor(share).double().log() + torch.tensor(last).double()
        share = (0.999 * raised.softmax(0) + 0.001 / len(DOMAINS)).tolist()
        average.append(share)
        mean = torch.tensor(average).double().mean(0).tolist()
        # float32 against float64, over a few steps
        assert of_domains(line, "mixture") == pytest.approx(share, rel=1e-4)
        assert of_domains(line, "average") == pytest.approx(mean, rel=1e-4)
    assert max(share) > 1.05 * min(share), "it must have moved"


def test_a_run_leaves_its_mixture_as_a_spec(doremi):
    """The file is a spec that draws by the average, and says where it comes from."""
    folder, lines, _ = doremi
    text = (folder / "weighting" / FILE).read_text()
    fn = wt.build(wt.loads(text), domains=DOMAINS)
    shares = of_domains(lines[-1], "average")
    assert proportions(fn).tolist() == pytest.approx(shares, abs=1e-6)
    proxy = wt.load("doremi-proxy")
    for told in (f"# spec: doremi-proxy {proxy.hash}", "average of 5 steps", "# data: stdlib"):
        assert told in text


# What is drawn ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Return a spec that draws by weights that move from the first step on."""
    path = tmp_path_factory.mktemp("spec") / "live.yaml"
    pipeline = "mean(domain) -> exponentiated(0.5) -> floor(0.1)"
    path.write_text(f"version: 1\napply: sampling\npipeline: {pipeline}\n")
    return path


@pytest.fixture(scope="module")
def drawn(train, live):
    """Return six steps of live draws on one rank."""
    return train(1, live, "--training.steps=6", "--training.local_batch_size=16")


def test_live_draws_are_the_same_on_two_ranks(train, live, drawn):
    """Every rank draws by the same proportions: the rows are those of one rank, in order."""
    flags = ("--training.steps=6", "--training.local_batch_size=8")
    _, lines, notes = train(2, live, *flags)
    _, one_lines, (one,) = drawn
    for step, batch in enumerate(one):
        rows = torch.cat([notes[rank][step]["input"] for rank in range(2)])
        assert torch.equal(rows, batch["input"])
    assert_same_mixtures(lines, one_lines, 1e-5)  # sums in another order
    shares = [of_domains(line, "drawn") for line in one_lines]
    assert max(shares[-1]) > 1.1 * min(shares[-1]), "the proportions must have moved"


def test_live_draws_follow_a_step_late(drawn):
    """The first two steps draw by the state before the first, step t by that after step t - 2."""
    _, lines, _ = drawn
    assert of_domains(lines[0], "drawn") == of_domains(lines[1], "drawn") == [0.2] * 5
    for line, before in zip(lines[2:], lines, strict=False):
        assert of_domains(line, "drawn") == pytest.approx(of_domains(before, "mixture"), rel=1e-6)


def test_live_draws_of_0_1_0_go_on_as_they_were(train, live, drawn):
    """A checkpoint without proportions: step t draws by the state after step t - 1."""
    folder, lines, _ = drawn
    start, saved = folder / "old", folder / "saved.pt"
    dcp_to_torch_save(folder / "checkpoint" / "step-3", saved)
    state = torch.load(saved, weights_only=False)
    del state["weighting"]["proportions"]
    dcp.save(state, checkpoint_id=start / "step-3", no_dist=True)
    flags = ("--training.steps=5", "--training.local_batch_size=16")
    _, resumed, _ = train(1, live, *flags, start=start)
    for line, before in zip(resumed, [lines[2], resumed[0]], strict=True):
        assert of_domains(line, "drawn") == pytest.approx(of_domains(before, "mixture"), rel=1e-6)


def test_live_draws_go_on_after_a_resume(train, live, drawn):
    """From the checkpoint in the middle come the very rows of the run that was not cut off.

    Also if a worker process draws them.
    """
    folder, lines, (notes,) = drawn
    start = folder / "half"
    shutil.copytree(folder / "checkpoint" / "step-3", start / "step-3")
    flags = ("--training.steps=6", "--training.local_batch_size=16", "--dataloader.num_workers=1")
    _, resumed_lines, (resumed,) = train(1, live, *flags, start=start)
    assert len(resumed) == 3
    for batch, other in zip(resumed, notes[3:], strict=True):
        assert torch.equal(batch["input"], other["input"])
    assert_same_mixtures(resumed_lines, lines[3:], 1e-6)


def test_metrics_of_a_domain_are_those_of_its_tokens(drawn):
    """Share, unweighted loss and weight of a domain are those of its tokens; rows are of one."""
    _, lines, (notes,) = drawn
    for line, batch in zip(lines, notes, strict=True):
        ids, valid = batch["domain_ids"], batch["valid"]
        assert torch.equal(ids.amin(1), ids.amax(1))
        for d, name in enumerate(DOMAINS):
            mine = valid & (ids == d)
            assert line[f"domain/{name}/share"] == pytest.approx((mine.sum() / valid.sum()).item())
            if mine.any():
                loss, weight = batch["loss"][mine].mean(), batch["weights"][mine].mean()
                assert line[f"domain/{name}/loss"] == pytest.approx(loss.item(), rel=1e-5)
                assert line[f"domain/{name}/weight"] == pytest.approx(weight.item(), rel=1e-5)
            else:
                assert f"domain/{name}/loss" not in line


def test_validations_move_what_is_drawn(train):
    """Dynamic loading follows each domain's validation loss, by the formula, a step late."""
    validator = ("--validator.enable", "--validator.freq=2", "--validator.steps=2")
    folder, lines, _ = train(1, "dynamic-loading", "--training.steps=4", *validator)
    text = (folder / "weighting" / "validation.jsonl").read_text()
    told = {x["step"]: x for x in map(json.loads, text.splitlines())}
    start = torch.tensor([2.0, 1, 1, 1, 1]).double()
    targets = torch.tensor([2.5, 3, 2.8, 2, 2.6]).double()
    shares = [torch.full((5,), 0.2).double()] * 2  # after each step, two that never were before
    for line in lines:
        p = start * shares[-2]
        assert of_domains(line, "drawn") == pytest.approx((p / p.sum()).tolist(), rel=1e-5)
        shares.append(shares[-1])
        if (step := line["step"]) in told:
            losses = torch.tensor([told[step].get(f"{x}/loss", torch.nan) for x in DOMAINS])
            gains = torch.where(losses.isfinite(), losses.double() - targets, 0)
            shares[-1] = (1 - 1e-4) * (shares[-1].log() + gains).softmax(0) + 1e-4 / 5
    assert of_domains(lines[3], "drawn") != of_domains(lines[2], "drawn")
    assert 2 in told


# DoGE ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doge(train):
    """Return DoGE's proxy on one rank."""
    return train(1, "doge-proxy", "--training.steps=3", "--training.local_batch_size=4")


@pytest.fixture(scope="module")
def start(seed):
    """Return the model of the seed, whole and without a trainer."""
    return whole_model(small.debugmodel(), 64, seed)


def slow_gradient(model, batch):
    """Return the gradient of the mean loss of a batch, by name, with plain autograd."""
    masks = model.get_attention_masks(positions=batch["positions"])
    logits = model(batch["input"], positions=batch["positions"], attention_masks=masks)
    loss = functional.cross_entropy(logits.transpose(1, 2), batch["labels"])
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_doge_compares_and_combines_the_gradients_of_domains(doge, start):
    """Inner products, weights and the gradient of a step are those of plain autograd."""
    _, lines, (notes,) = doge
    assert len(notes) == 3 * len(DOMAINS), "a step takes a microbatch of every domain"
    first = notes[: len(DOMAINS)]
    for d, batch in enumerate(first):
        assert batch["domain_ids"].unique().tolist() == [d]
    gradients = [slow_gradient(start, batch) for batch in first]
    flat = torch.stack([torch.cat([x.flatten() for x in g.values()]) for g in gradients]).double()
    lengths = flat.norm(dim=1)
    flat = flat * (1 / (lengths + 1e-6)).clamp(max=1)[:, None]  # max_norm is 1
    products = flat @ flat.T
    torch.testing.assert_close(first[-1]["products"].double(), products, rtol=1e-4, atol=1e-6)
    helps = products.sum(1) / (products.diagonal().sqrt().mean() + 1e-6)
    weights = (0.05 * helps.clamp(0, 5)).softmax(0)
    assert of_domains(lines[0], "mixture") == pytest.approx(weights.tolist(), rel=1e-4)
    assert of_domains(lines[0], "average") == pytest.approx(weights.tolist(), rel=1e-4)
    combined = torch.cat([x.flatten() for x in first[-1]["gradients"].values()])
    torch.testing.assert_close(combined.double(), weights @ flat, rtol=1e-3, atol=1e-6)
    assert max(weights) - min(weights) > 1e-3


def test_doge_on_two_sharded_ranks_is_doge_on_one(train, doge):
    """Inner products are sums over shards: the mixture is that of one rank."""
    flags = ("--training.steps=3", "--training.local_batch_size=2")
    _, lines, notes = train(2, "doge-proxy", *flags)
    _, one_lines, (one,) = doge
    assert_same_mixtures(lines, one_lines, 1e-4)
    for rank in range(2):
        for mine, other in zip(notes[rank], one, strict=True):
            if "products" in other:
                torch.testing.assert_close(
                    mine["products"], other["products"], rtol=1e-3, atol=1e-6
                )


# What cannot be ----------------------------------------------------------------------------------


def refusal(spec, **changes):
    """Return what is said of a spec under changed settings, "section.field" by name."""
    config = config_registry.llama3_debugmodel()
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    try:
        refuse_unsupported(config, plan_of(wt.loads(f"version: 1\n{spec}")))
    except ValueError as error:
        return str(error)
    return ""


def test_doge_is_refused_where_it_would_be_wrong():
    """A pipeline mixes gradients, and another scope would weigh twice; each is said with why."""
    message = refusal("pipeline: doge", parallelism__pipeline_parallel_degree=2)
    assert message == (
        "unnamed takes the gradient of one microbatch after the other, which a pipeline mixes; "
        "set --parallelism.pipeline_parallel_degree 1"
    )
    for option in ("scope: step", "normalize: none"):
        assert "leave out scope and normalize" in refusal(f"{option}\npipeline: doge")
    drawn = "factors: {draw: uniform, domain: doge}\napply: {draw: sampling}"
    assert "leave out the mixture" in refusal(drawn)


def test_a_spec_moved_by_validations_is_refused_without_them():
    """Its weights would stay as they begin; each is said with what to do."""
    for spec in ("dynamic-loading", "odm-validation"):
        config = config_registry.llama3_debugmodel()
        plan = plan_of(wt.load(spec))
        with pytest.raises(ValueError, match=r"there is none; set --validator\.enable"):
            refuse_unsupported(config, plan)
        config.validator.enable = True
        refuse_unsupported(config, plan)
        config.parallelism.context_parallel_degree = 2
        config.parallelism.spmd_backend = "full_dtensor"
        with pytest.raises(ValueError, match=r"set --parallelism\.context_parallel_degree 1"):
            refuse_unsupported(config, plan)
        config.validator = Validator.Config(enable=True)
        with pytest.raises(ValueError, match="make yours a subclass of titan_integration"):
            refuse_unsupported(config, plan)


def test_validation_text_of_other_domains_is_refused_before_training(tmp_path):
    """A spec that follows each domain's validation loss asks for the same domains."""
    for split, domain in {"train": "web", "validation": "wiki"}.items():
        (tmp_path / split).mkdir()
        lines = [{"text": "x " * 99, "domain": d} for d in ("code", domain)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / split / "data.jsonl").write_text(text)
    config = small.debugmodel()
    for loader in (config.dataloader, config.validator.dataloader):
        loader.dataset_path = str(tmp_path)
    config.training.seq_len, config.validator.enable = 64, True
    plan = plan_of(wt.load("odm-validation"))
    message = "the validation text has code, wiki, the training text code, web"
    with pytest.raises(ValueError, match=message):
        open_data(config, plan)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("pipeline: mean(domain) -> exponentiated(0.1)", "pipeline"),
        ("factors: {a: normalize -> temperature(1), b: doremi}", "b"),
        ("pipeline: table(all=2) -> mean_one", "pipeline"),
        ("pipeline: doge", "pipeline"),
        ("apply: sampling\npipeline: table(all=1) -> mean_one", "pipeline"),
        ("reduction: domain_mean\npipeline: uniform", "reduction: domain_mean"),
    ],
)
def test_data_of_one_domain_is_refused_for_a_spec_that_weighs_domains(spec, names):
    """Every weight would be 1; the error names the factor, the one domain and the flag."""
    plan = plan_of(wt.loads(f"version: 1\n{spec}\n"))
    with pytest.raises(ValueError, match="name the column that tells domains") as caught:
        refuse_one_domain(plan, ("all",))
    assert f"domains ({names}), and the data has one, 'all'" in str(caught.value)
    assert "--dataloader.domain_column" in str(caught.value)
    refuse_one_domain(plan, ("web", "code"))
    refuse_one_domain(plan, None)


@pytest.mark.parametrize("name", ["uniform", "linupper-x-mile", "rho-1", "toremi-topics"])
def test_data_of_one_domain_is_taken_by_a_spec_that_weighs_none(name):
    """Sequences and tokens differ whatever the domains."""
    refuse_one_domain(plan_of(wt.load(name)), ("all",))


def test_a_loader_without_domains_cannot_draw():
    """A spec that draws needs the loader that can."""
    config = config_registry.stock.llama3_debugmodel()
    plan = plan_of(wt.load("uniform-domains"))
    with pytest.raises(ValueError, match=r"DomainTextDataLoader, or apply: loss"):
        ask_for_rows(config, plan)

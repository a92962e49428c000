"""Validation per domain: against a plain sum over tokens, the host's loss, and other layouts."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import drive, seed_checkpoint
from stock_configs import PlainTextDataLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig
from torchtitan.tools import utils

from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.host import cpu
from titan_integration.loss.loss import WeightedCrossEntropyLoss
from titan_integration.observe.metrics import append_line
from titan_integration.observe.validation import FILE, DomainValidator, add_tokens, summarize, table

DOMAINS = ["prose", "rare", "sums", "verse"]
"""Of the validation text, in the order of their ids."""


def lines_of(out: Path) -> list[dict[str, float]]:
    """Return the lines of a run's validations."""
    return [json.loads(x) for x in (out / "dump" / "weighting" / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of step 0, which every layout starts from."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed"))


def run(seed, out, ranks, rows, *flags):
    """Train two steps from the seed and return what every rank noted."""
    shutil.copytree(seed, out / "dump" / "checkpoint")
    # A row of context-parallel ranks takes two blocks of 128 tokens.
    flags = ["--training.steps=2", "--training.seq_len=256", "--weighting.spec=uniform", *flags]
    flags += ["--checkpoint.enable", "--checkpoint.interval=1000"]
    flags += [f"--training.local_batch_size={rows}", "--metrics.enable_tensorboard"]
    return drive(out, ranks, "small", "debugmodel", *flags)


@pytest.fixture(scope="module")
def validate(tmp_path_factory):
    """Return the flags that validate at steps 1 and 2, on documents much shorter than a row."""
    words = {"verse": "the rose is red and so", "prose": "It was late when he", "sums": "x = 1 + 2"}
    lines = [
        {"domain": name, "text": f"{i} {text} " * (1 + (i * 7 + len(name)) % 9)}
        for i in range(400)
        for name, text in words.items()
    ]
    lines.append({"domain": "rare", "text": "One document, which no validation comes to."})
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    text = f"--validator.dataloader.dataset_path={path}"
    return ["--validator.enable", "--validator.freq=2", "--validator.steps=2", text]


@pytest.fixture(scope="module")
def one(seed, validate, tmp_path_factory):
    """Return the folder and the notes of a run on one rank."""
    out = tmp_path_factory.mktemp("one")
    return out, run(seed, out, 1, 4, *validate)


def plain_sums(ranks):
    """Return losses and tokens by domain, summed one token at a time in Python."""
    sums = {name: [0.0, 0] for name in DOMAINS}
    for rank in ranks:
        for batch in rank["validated"]:
            for loss, label, domain in zip(*(x.flatten().tolist() for x in batch), strict=True):
                if label != IGNORE_INDEX:
                    sums[DOMAINS[domain]][0] += loss
                    sums[DOMAINS[domain]][1] += 1
    return sums


def check_against_plain_sums(line, ranks):
    """Compare a line with the plain sums of the final model's losses."""
    means = []
    for name, (loss, tokens) in plain_sums(ranks).items():
        assert line[f"{name}/tokens"] == tokens
        if tokens:
            means.append(loss / tokens)
            # The chunks' matrix products differ from the whole one's by a few units of float32.
            assert line[f"{name}/loss"] == pytest.approx(means[-1], abs=1e-5)
            assert line[f"{name}/perplexity"] == pytest.approx(math.exp(means[-1]), rel=1e-5)
        else:
            assert f"{name}/loss" not in line
    assert max(means) - min(means) > 1e-2, "alike, they could be mistaken for each other"
    assert line["domain_mean_loss"] == pytest.approx(sum(means) / len(means), abs=1e-5)
    mean = sum(map(math.exp, means)) / len(means)
    assert line["domain_mean_perplexity"] == pytest.approx(mean, rel=1e-5)


def average(line):
    """Return the mean loss of a line over tokens, from its domains."""
    tokens = {name: line[f"{name}/tokens"] for name in DOMAINS}
    total = sum(count * line[f"{name}/loss"] for name, count in tokens.items() if count)
    return total / sum(tokens.values())


@pytest.mark.processes
def test_domains_are_those_of_a_plain_sum(one):
    """Each validation is one line; the last is what the final model loses, token by token."""
    out, ranks = one
    lines = lines_of(out)

    assert [line["step"] for line in lines] == [1, 2]
    assert [name for name in DOMAINS if f"{name}/loss" in lines[-1]] == ["prose", "sums", "verse"]
    check_against_plain_sums(lines[-1], ranks)
    ids = ranks[0]["validated"][0][2]
    assert (ids[:, 1:] != ids[:, :-1]).any(1).all(), "a row of one domain tells nothing"
    for line, (step, loss) in zip(lines, ranks[0]["validations"], strict=True):
        assert line["step"] == step
        assert average(line) == pytest.approx(loss, abs=1e-5)  # the host sums in float32
        assert line["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.processes
def test_the_hosts_logger_gets_the_numbers_of_the_file(one):
    """TensorBoard has every number of the lines beside the host's own."""
    out, ranks = one
    (events,) = (out / "dump" / "tb").rglob("events.out.*")
    found = EventAccumulator(str(events)).Reload()
    lines = lines_of(out)

    for name in lines[-1].keys() - {"step", "loss"}:
        logged = [(x.step, x.value) for x in found.Scalars(f"validation_metrics/{name}")]
        written = [(x["step"], x[name]) for x in lines if name in x]
        assert [step for step, _ in logged] == [step for step, _ in written]
        for (_, a), (_, b) in zip(logged, written, strict=True):
            assert a == pytest.approx(b, rel=1e-6)  # TensorBoard keeps float32
    host = [x.value for x in found.Scalars("validation_metrics/loss")]
    assert host == pytest.approx([loss for _, loss in ranks[0]["validations"]], rel=1e-6)


LAYOUTS = {
    "fsdp": (2, []),
    "tensor": (4, ["--parallelism.tensor_parallel_degree=2"]),
    "context": (4, ["--parallelism.context_parallel_degree=2"]),
    "pipeline": (4, ["--parallelism.pipeline_parallel_degree=2"]),
}


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_find_what_one_does(layout, seed, validate, one, tmp_path):
    """However the same tokens are cut over two ranks, each counts once, in its own domain."""
    rows, flags = LAYOUTS[layout]
    ranks = run(seed, tmp_path, 2, rows, *validate, *flags)
    lines = lines_of(tmp_path)

    # Only the last pipeline stage, on the last rank, knows the host's loss.
    for line, (_, loss) in zip(lines, ranks[-1]["validations"], strict=True):
        assert average(line) == pytest.approx(loss, abs=1e-5)
    for ours, theirs in zip(lines, lines_of(one[0]), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.endswith("tokens"):
                assert ours[name] == value
            elif name.endswith("loss"):
                assert ours[name] == pytest.approx(value, abs=1e-4)  # two steps of other sums
    if layout == "fsdp":
        check_against_plain_sums(lines[-1], ranks)


@pytest.mark.processes
def test_validation_leaves_training_alone(seed, validate, tmp_path):
    """With a spec that remembers, a run weighs and learns the same bits with validation or not."""
    found = {}
    for name, more in {"with": validate, "without": []}.items():
        (found[name],) = run(seed, tmp_path / name, 1, 4, "--weighting.spec=group-dro", *more)
    a, b = found["with"], found["without"]

    assert len(lines_of(tmp_path / "with")) == 2
    assert not (tmp_path / "without" / "dump" / "weighting" / FILE).exists()
    check_against_plain_sums(lines_of(tmp_path / "with")[-1], [a])
    assert a["losses"] == b["losses"]
    assert len(a["weights"]) == len(b["weights"]) == 2
    assert all(map(torch.equal, a["weights"], b["weights"]))
    assert a["weights"][-1].max() > a["weights"][-1].min(), "the weights must say something"
    for name, value in b["parameters"].items():
        assert torch.equal(value, a["parameters"][name]), name


class Bigram(nn.Module):
    """The smallest model of the next token: one row of logits for each token."""

    def __init__(self):
        """Draw the logits."""
        super().__init__()
        self.lm_head = nn.Linear(2048, 2048, bias=False)

    def forward(self, inputs, positions):
        """Return logits, [B, L, V]."""
        del positions
        return self.lm_head.weight[inputs]


@pytest.mark.parametrize("loader", [PlainTextDataLoader, DomainTextDataLoader])
def test_a_loader_without_domains_is_validated_as_the_host_does(loader, monkeypatch):
    """Without domain ids, or without their names, there is the host's loss and nothing else."""
    if loader is DomainTextDataLoader:
        init = DomainTextDataLoader.__init__

        def forget(self, *args, **kwargs):
            init(self, *args, **kwargs)
            del self.domains

        monkeypatch.setattr(DomainTextDataLoader, "__init__", forget)
    losses = []
    processor = SimpleNamespace(
        ntokens_since_last_log=0, log_validation=lambda loss, step: losses.append((step, loss))
    )
    dims = SimpleNamespace(
        pp_enabled=False, dp_enabled=False, cp_enabled=False, dp_cp_enabled=False
    )
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(ensure_tokenizer()))
    cpu.use_cpu()
    model = Bigram().to(utils.device_type)
    for validator, source in ((DomainValidator, loader), (Validator, PlainTextDataLoader)):
        config = validator.Config(steps=2, dataloader=source.Config(split="validation"))
        config.build(
            parallelism=ParallelismConfig(),
            dp_world_size=1,
            dp_rank=0,
            tokenizer=tokenizer,
            parallel_dims=dims,
            loss_fn=WeightedCrossEntropyLoss.Config().build(),
            validation_context=nullcontext,
            metrics_processor=processor,
            seq_len=32,
            local_batch_size=2,
        ).validate([model], 5)

    ours, hosts = losses
    assert ours == hosts


def test_a_domain_without_tokens_is_absent():
    """It has a count of 0, no loss, no perplexity, and no part in the means."""
    sums = torch.tensor([[4 * math.log(2), 0, math.log(8)], [4, 0, 1]], dtype=torch.float64)
    found = summarize(["a", "b", "long name"], sums)

    assert {k: v for k, v in found.items() if k.endswith("tokens")} == {
        "a/tokens": 4,
        "b/tokens": 0,
        "long name/tokens": 1,
    }
    assert "b/loss" not in found
    assert "b/perplexity" not in found
    assert found["a/perplexity"] == pytest.approx(2)
    assert found["domain_mean_loss"] == pytest.approx(math.log(4))
    assert found["domain_mean_perplexity"] == pytest.approx((2 + 8) / 2)
    rows = [row.split() for row in table(["a", "b", "long name"], found).splitlines()]
    assert rows[1:] == [
        ["a", "4", "0.6931", "2.000"],
        ["b", "0", "absent", "absent"],
        ["long", "name", "1", "2.0794", "8.000"],
        ["mean", "1.3863", "5.000"],
    ]


def test_ignored_tokens_count_nowhere_and_many_tokens_do():
    """An ignored label adds nothing, whatever its loss; a count passes 2^24, float32's last."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 2], [-100, 4, 5]])
    losses = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 3.0, 4.0]])
    ids = torch.tensor([[0, 0, 2], [1, 2, 2]])
    sums[1, 2] = 2**24
    add_tokens(sums, losses, labels, ids)

    assert sums.tolist() == [[1, 0, 9], [1, 0, 2**24 + 3]]


def test_a_fresh_run_sets_an_earlier_file_aside_and_a_resumed_one_appends(tmp_path):
    """Step 1 begins a file; other steps go on with the one there is."""
    path = tmp_path / "weighting" / FILE
    for step in (1, 2, 1, 2, 3):  # a run of two steps, another of two, and the latter resumed
        append_line(path, {"step": step})

    def steps(name):
        return [json.loads(x)["step"] for x in path.with_name(name).read_text().splitlines()]

    assert steps(f"{FILE}.1") == [1, 2]
    assert steps(FILE) == [1, 2, 3]

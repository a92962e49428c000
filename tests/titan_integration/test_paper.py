"""The configs of Sow et al., ICLR 2025: the paper's numbers, and that every one of them trains."""

import json
import math
import random
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import HERE, SMALL, drive, torchrun
from tokenizers import Tokenizer, models
from torchtitan.models.qwen3 import model_registry as qwen3

import weighting as wt
from titan_integration import config_registry
from titan_integration.commands import train as launch
from titan_integration.commands.configs import refuse_unknown
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.paper import EndOfTextTokenizer, resized, shrunk
from weighting.stages import Table


class Published(NamedTuple):
    """What the paper says, Tables 6 and 7, and what follows from it."""

    layers: int
    heads: int
    width: int
    seq_len: int
    batch: int
    rates: tuple[float, float]
    warmup: int
    steps: int
    documents: int
    millions: float
    """Parameters: GPT-2's with tied embeddings and 512 positions, Llama's with both embeddings."""


GPT2 = {"width": 768, "seq_len": 512, "rates": (5e-4, 1e-4), "warmup": 500, "steps": 20_000}
LLAMA = {"seq_len": 8192, "batch": 128, "rates": (3e-4, 3e-5), "warmup": 2_000}
PUBLISHED = {
    "paper_124m": Published(
        layers=12, heads=12, batch=32, documents=640_000, millions=124.0, **GPT2
    ),
    "paper_210m": Published(
        layers=24, heads=16, batch=48, documents=960_000, millions=209.1, **GPT2
    ),
    "paper_300m": Published(
        layers=36, heads=24, batch=48, documents=960_000, millions=294.2, **GPT2
    ),
    "paper_1p4b": Published(
        layers=24,
        heads=16,
        width=2048,
        steps=100_000,
        documents=12_800_000,
        millions=1233 + 131,
        **LLAMA,
    ),
    "paper_7b": Published(
        layers=32,
        heads=32,
        width=4096,
        steps=170_000,
        documents=21_760_000,
        millions=6738.4,  # Llama 2's own number
        **LLAMA,
    ),
}
HIDDEN = {768: 2048, 2048: 5632, 4096: 11008}

each = pytest.mark.parametrize("name", PUBLISHED)


def config_of(name):
    """Return what a config function gives."""
    return getattr(config_registry, name)()


def parameters(config):
    """Return how many parameters a config's model has, tied ones once."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return sum(p.numel() for p in model.parameters())


@each
def test_a_model_has_the_papers_shape_and_size(name):
    """Layers, heads and width are Table 6's, and so is the number of parameters, to 0.4 %."""
    config, paper = config_of(name), PUBLISHED[name]
    model = config.model_spec.model
    heads = {layer.attention.n_heads for layer in model.layers}
    assert (len(model.layers), heads, model.dim) == (paper.layers, {paper.heads}, paper.width)
    assert {layer.attention.rope.dim for layer in model.layers} == {paper.width // paper.heads}

    tied = paper.seq_len == 512
    vocabulary = 50_257 if tied else 32_000
    assert (model.vocab_size, model.enable_weight_tying) == (vocabulary, tied)
    assert config.loss.loss_fn.global_vocab_size == vocabulary
    width = paper.width
    layer = 4 * width**2 + 3 * width * HIDDEN[width] + 2 * width
    expected = paper.layers * layer + width + (1 if tied else 2) * vocabulary * width
    assert parameters(config) == expected
    # The paper's GPT-2s have biases and learned positions instead of a gate.
    assert expected / 1e6 == pytest.approx(paper.millions, rel=0.004)


@each
def test_a_recipe_is_the_papers(name):
    """Table 7's numbers are where the host reads them."""
    config, paper = config_of(name), PUBLISHED[name]
    training = config.training
    assert (training.global_batch_size, training.seq_len) == (paper.batch, paper.seq_len)
    assert training.steps == paper.steps
    assert training.global_batch_size * training.steps == paper.documents
    assert training.max_norm == 1.0
    (group,) = config.optimizer.param_groups
    assert (group.pattern, group.optimizer_name) == (".*", "AdamW")
    assert group.optimizer_kwargs["lr"] == paper.rates[0]
    assert group.optimizer_kwargs["weight_decay"] == 0.01
    assert config.lr_scheduler.warmup_steps == paper.warmup
    assert config.lr_scheduler.decay_type == "cosine"
    assert config.checkpoint.enable
    # Every checkpoint that is evaluated is kept, and the last step is one of them.
    assert config.checkpoint.keep_latest_k == 0
    assert training.steps % config.checkpoint.interval == 0
    assert not config.checkpoint.last_save_model_only  # so that the same command goes on


@pytest.mark.filterwarnings("ignore:To get the last learning rate")  # the host's own call
@each
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(name):
    """The host's own schedule gives the paper's rates at the first, the last and middle steps."""
    config, paper = config_of(name), PUBLISHED[name]
    optimizers = config.optimizer.build(model_parts=[torch.nn.Linear(1, 1)])
    schedule = config.lr_scheduler.build(
        optimizers=optimizers, training_steps=config.training.steps
    )

    def rate(step):
        schedule.load_state_dict({"last_epoch": step - 1})
        return schedule.get_metrics()["lr/AdamW"]

    high, low = paper.rates
    assert rate(1) == pytest.approx(high / paper.warmup)
    assert rate(paper.warmup // 2) == pytest.approx(high / 2)
    assert rate(paper.warmup) == pytest.approx(high)
    middle = (paper.warmup + paper.steps) // 2
    # The host's cosine begins a step after the top: a step is 1e-4 of the way at most.
    assert rate(middle) == pytest.approx((high + low) / 2, rel=1e-3)
    assert rate(paper.steps) == pytest.approx(low, rel=1e-6)


@each
def test_the_minibatch_is_the_papers_on_any_number_of_ranks_that_divides_it(name, monkeypatch):
    """The host accepts the cut, and GPT-2's sizes are never cut over time, which changes n."""
    batch = PUBLISHED[name].batch
    for ranks in (d for d in range(1, batch + 1) if batch % d == 0):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        training = config_of(name).training
        assert training.global_batch_size % (training.local_batch_size * ranks) == 0
        if PUBLISHED[name].seq_len == 512:
            assert training.local_batch_size * ranks == batch


MILE = {
    "mile_468m": (24, 16, 1024, 4096, 1024, 1024, 468.2),
    "mile_1p2b": (16, 8, 2048, 8192, 1024, 1024, 1204.9),
    "mile_6p7b": (32, 32, 4096, 11008, 2048, 2048, 6738.4),
}
"""Layers, heads, width, feed-forward width, tokens of a row, rows of a step, million parameters."""


@pytest.mark.parametrize("name", MILE)
def test_mile_has_its_papers_sizes_and_tokens(name):
    """Shapes and batches are those of the released configurations, 105 billion tokens each."""
    layers, heads, width, hidden, seq_len, batch, millions = MILE[name]
    config = config_of(name)
    model, training = config.model_spec.model, config.training
    assert (len(model.layers), model.dim, model.vocab_size) == (layers, width, 32_000)
    assert {x.attention.n_heads for x in model.layers} == {heads}
    assert {x.feed_forward.w1.out_features for x in model.layers} == {hidden}
    assert parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)
    assert (training.seq_len, training.global_batch_size) == (seq_len, batch)
    assert seq_len * batch * training.steps == pytest.approx(105e9, rel=2e-3)
    (group,) = config.optimizer.param_groups
    assert group.optimizer_kwargs["lr"] == 3e-4
    assert group.optimizer_kwargs["weight_decay"] == 0.1
    assert config.lr_scheduler.min_lr_factor == 0


@pytest.mark.parametrize(("name", "rows"), [("paper_124m", 8), ("paper_300m", 12)])
def test_four_gpus_take_what_the_authors_took(name, rows, monkeypatch):
    """On the authors' four GPUs each takes as many rows as theirs."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert config_of(name).training.local_batch_size == rows


@pytest.mark.parametrize("name", ["paper_124m", "paper_210m", "paper_300m"])
def test_gpt2s_sizes_read_slimpajamas_domains(name):
    """Training and validation name the seven domains alike, as the shipped tables do."""
    config = config_of(name)
    (table,) = [
        stage
        for stage in wt.load("doremi-table-x-linupper").factors["domain"]
        if isinstance(stage, Table)
    ]
    # Training draws rows of all domains alike, as theirs; validation reads what there is.
    assert (config.dataloader.rows, config.validator.dataloader.rows) == ("drawn", "mixed")
    for loader, split in (
        (config.dataloader, "train"),
        (config.validator.dataloader, "validation"),
    ):
        assert (loader.dataset, loader.split, loader.streaming) == (
            "DKYoon/SlimPajama-6B",
            split,
            True,
        )
        assert loader.domain_column == "meta.redpajama_set_name"
        assert sorted(loader.domains) == sorted(table.weights)
    assert config.validator.enable
    assert config.training.steps % config.validator.freq == 0  # the last step is validated


@pytest.mark.parametrize("name", ["paper_1p4b", "paper_7b"])
def test_llamas_sizes_stream_fineweb_without_a_domain(name):
    """FineWeb is one domain, and validation, if asked for, is on other text."""
    config = config_of(name)
    assert config.dataloader.dataset == "HuggingFaceFW/fineweb"
    assert (config.dataloader.domain_column, config.dataloader.streaming) == ("", True)
    assert not config.validator.enable
    assert config.validator.dataloader.dataset != config.dataloader.dataset


def test_the_launcher_knows_every_config_function():
    """`weighting train --config` accepts what the registry defines, and nothing else."""
    public = {
        name
        for name, thing in vars(config_registry).items()
        if getattr(thing, "__module__", "") == config_registry.__name__ and name[0] != "_"
    }
    assert set(PUBLISHED) < public
    for name in public:
        refuse_unknown("titan_integration", name)
    with pytest.raises(ValueError, match="no config function 'paper_124'; did") as refused:
        refuse_unknown("titan_integration", "paper_124")
    _, _, rest = str(refused.value).partition("there are ")
    assert set(rest.partition(";")[0].split(", ")) == public


def test_the_proxy_is_a_small_debug_model_and_starts_as_one(monkeypatch):
    """It differs in its model alone, and gets a CPU's defaults as the debug model does."""
    proxy, debug = config_registry.llama3_proxy(), config_registry.llama3_debugmodel()
    assert (proxy.dataloader, proxy.training) == (debug.dataloader, debug.training)
    assert proxy.hf_assets_path == debug.hf_assets_path
    assert proxy.model_spec.model.vocab_size == debug.model_spec.model.vocab_size
    embedding = 2048 * 128
    assert parameters(proxy) - embedding == 4 * (4 * 128**2 + 3 * 128 * 512 + 256) + 128 + embedding

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, small in (("llama3_proxy", True), ("paper_124m", False)):
        given = launch.HostOptions(module="titan_integration", config=name)
        assert ("--training.seq_len" in launch.host_flags(given, "group-dro", "out")) == small


@pytest.mark.parametrize("files", [{"model_max_length": 1024}, {"eos_token": "b"}])
def test_documents_end_though_gpt2s_files_do_not_say_how(files, tmp_path):
    """The tokenizer appends GPT-2's own token, or the one that is named, and nothing in front."""
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    tokenizer = EndOfTextTokenizer.Config().build(tokenizer_path=str(tmp_path))
    ends = vocabulary[files.get("eos_token", "<|endoftext|>")]
    assert tokenizer.encode("aa", add_bos=True, add_eos=True) == [0, 0, ends]


@each
def test_a_tokenizer_that_is_not_there_is_the_users_error(name, tmp_path):
    """It is said in one line, with the folder and what to do."""
    with pytest.raises(ValueError, match=r"nowhere' does not exist; get it by `hf download`, or"):
        config_of(name).tokenizer.build(tokenizer_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", [*PUBLISHED, "llama3_8b"])
def test_a_shrunk_config_has_a_small_model_and_is_otherwise_the_same(name):
    """Vocabulary, tying, shared keys, the kind of positions and all settings stay."""
    config = config_of(name)
    small = shrunk(config)
    old, new = config.model_spec.model, small.model_spec.model
    assert parameters(small) < 0.04 * parameters(config)
    assert (new.vocab_size, new.enable_weight_tying) == (old.vocab_size, old.enable_weight_tying)
    attention, was = new.layers[0].attention, old.layers[0].attention
    assert attention.inner_attention == was.inner_attention
    assert (attention.rope.theta, attention.rope.scaling) == (was.rope.theta, was.rope.scaling)
    assert (attention.n_kv_heads is None) == (was.n_kv_heads is None)
    small.model_spec = config.model_spec
    assert small == config


def test_another_model_is_refused():
    """What is not a Llama is not made into one."""
    with pytest.raises(ValueError, match=r"cannot resize a Qwen3Model.Config; only torchtitan's"):
        resized(qwen3("debugmodel"), layers=2, heads=4, width=64)


MINE = """
from titan_integration import config_registry
from titan_integration.paper import shrunk

"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a module of shrunk configs, as a user would, and text of seven domains to train on."""
    functions = [f"def {name}(): return shrunk(config_registry.{name}())" for name in PUBLISHED]
    (tmp_path / "mine.py").write_text(MINE + "\n".join(functions) + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    domains = config_registry.paper_124m().dataloader.domains
    words = [f"word{i}" for i in range(300)]
    for split in ("train", "validation"):
        rng = random.Random(split)
        records = [
            {
                "text": " ".join(rng.choices(words, k=8 + 8 * (i % 5))),
                "meta": {"redpajama_set_name": domains[i % 7]},
            }
            for i in range(140)
        ]
        (tmp_path / split).mkdir()
        pq.write_table(pa.Table.from_pylist(records), tmp_path / split / "text.parquet")
    return [
        "--training.steps=2",
        "--training.seq_len=32",
        "--training.global_batch_size=8",
        f"--hf_assets_path={ensure_tokenizer()}",
        f"--dataloader.dataset_path={tmp_path}",
        f"--validator.dataloader.dataset_path={tmp_path}",
        "--validator.steps=4",
        "--metrics.log_freq=1",
    ]


WIDE = (0.1, 10)
"""How far weights are apart: they differ."""
PLAIN = (-1, 1e-6)
"""For 1,000 steps weights of the GPT-2 sizes are one."""
WARMING_UP = (1e-3, 0.0101)
"""Before step 2,000 the temperature of Llama's specs is 100: at most exp(0.01)."""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "spec", "ranks", "spread"),
    [
        ("paper_124m", "linupper", 2, WIDE),
        ("paper_210m", "doremi-table-x-linupper", 1, PLAIN),
        ("paper_300m", "quadratic", 1, WIDE),
        ("paper_1p4b", "linupper-1p4b", 1, WARMING_UP),
        ("paper_7b", "linupper-7b", 1, WARMING_UP),
    ],
)
def test_a_shrunk_config_trains(name, spec, ranks, spread, mine, tmp_path):
    """Two steps on local files in place of the hub's, weighted, validated and saved."""
    flags = [*mine, f"--training.local_batch_size={8 // ranks}", f"--weighting.spec={spec}"]
    found = drive(tmp_path / "out", ranks, "mine", name, *flags)

    config, first = config_of(name), found[0]
    steps, losses = zip(*first["losses"], strict=True)
    assert steps == (1, 2)
    # A fresh model knows nothing: the loss is about the logarithm of the whole vocabulary.
    vocabulary = config.model_spec.model.vocab_size
    assert losses == pytest.approx([math.log(vocabulary)] * 2, abs=0.5)
    assert len(first["parameters"]["tok_embeddings.weight"]) == vocabulary
    assert ("lm_head.weight" in first["parameters"]) == (vocabulary == 32_000)
    for weights in zip(*(rank["weights"] for rank in found), strict=True):
        flat = torch.cat(weights)
        least, most = spread
        assert least < (flat.max() - flat.min()).item() < most

    dump = tmp_path / "out" / "dump"
    assert (dump / "checkpoint" / "step-2").is_dir()
    validations = dump / "weighting" / "validation.jsonl"
    assert validations.exists() == config.validator.enable
    if config.validator.enable:
        line = json.loads(validations.read_text().splitlines()[-1])
        means = [line[f"{domain}/loss"] for domain in config.dataloader.domains]
        assert line["domain_mean_loss"] == pytest.approx(sum(means) / 7)


@pytest.mark.processes
def test_tied_embeddings_learn_as_in_the_hosts_loss(mine, tmp_path):
    """On two ranks, the gradient of a weight that both ends share is the one of the host's loss."""
    texts = {
        "host": "version: 1\npipeline: uniform\n",
        # Weights known after all losses, and one but for 1e-6.
        "ours": "version: 1\npipeline: normalize -> temperature(1e6)\n",
    }
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps(texts))
    flags = ["--module=mine", "--config=paper_124m", f"--dump_folder={tmp_path}/dump", *SMALL]
    flags += [*mine, "--training.local_batch_size=4", "--weighting.spec=uniform"]
    done = torchrun(
        2, str(HERE / "matrix.py"), str(tmp_path), str(specs), *flags, "--training.max_norm=1e9"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = torch.load(tmp_path / "rank0.pt")
    gradients = found["ours"]["gradients"]
    assert "tok_embeddings.weight" in gradients
    assert "lm_head.weight" not in gradients
    for name, expected in found["host"]["gradients"].items():
        assert expected.norm() > 0, name
        assert (gradients[name] - expected).norm() < 1e-5 * expected.norm(), name  # float32 sums

"""The same global batch under every layout: the same weights and the same gradients."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import HERE, seed_checkpoint, torchrun

SPECS = Path(__file__).resolve().parents[2] / "specs"
SHIPPED = ("uniform", "linupper", "mile", "linupper-x-mile")
DOMAINS = "version: 1\npipeline: doremi(step_size=1, smoothing=1e-3)\n"
DOCUMENTS = "version: 1\npipeline: mean(document) -> normalize -> temperature(1) -> clamp(2/n)\n"
DOMAIN, TOKEN = "doremi(step_size=1, smoothing=1e-3)", "entropy(gamma=1) -> token_scale"
TEXTS = {name: (SPECS / f"{name}.yaml").read_text() for name in SHIPPED}
REMEMBERED = "version: 1\npipeline: remembered(examples=7) -> mean(sequence) -> temperature(1)\n"
REFERENCES = (
    "version: 1\npipeline: excess_loss(a) -> minus(kl(b)) -> mean(sequence) -> temperature(1)\n"
)
TEXTS |= {"domains": DOMAINS, "documents": DOCUMENTS}
HIDDEN = "version: 1\npipeline: hidden_peak -> temperature(1)\n"
TEXTS |= {"remembered": REMEMBERED, "references": REFERENCES, "hidden": HIDDEN}
ROWS = 4
LARGEST = 1e-4
"""Losses differ by 1e-7 between layouts; a normalised spread of some 0.05 nats magnifies them."""
FURTHER = {"remembered", "references", "hidden"}
"""Specs of the layouts that cut a batch each in its own way, which others combine."""

PIPELINE = "--parallelism.pipeline_parallel_degree=2"
SCHEDULE = "--parallelism.pipeline_parallel_schedule="
CONTEXT = "--parallelism.context_parallel_degree=2"
TENSOR = "--parallelism.tensor_parallel_degree=2"
REPLICAS = "--parallelism.data_parallel_replicate_degree=2"
SHARDS = "--parallelism.data_parallel_shard_degree="
BACKEND = "--parallelism.spmd_backend="

LAYOUTS = {
    "FSDP2 x 2": (2, 2, []),
    "FSDP2 x 2, full_dtensor": (2, 2, [BACKEND + "full_dtensor"]),
    "DDP x 2": (2, 2, [REPLICAS, SHARDS + "1"]),
    "HSDP 2 x 2": (4, 1, [REPLICAS, SHARDS + "2"]),
    "TP x 2": (2, 4, [TENSOR]),
    "TP x 2, partial_dtensor": (2, 4, [TENSOR, BACKEND + "partial_dtensor"]),
    "TP x 2, full_dtensor": (2, 4, [TENSOR, BACKEND + "full_dtensor"]),
    "CP x 2, head-tail": (2, 4, [CONTEXT]),
    "CP x 2, contiguous": (
        2,
        4,
        [CONTEXT, "--parallelism.context_parallel_load_balancer=None"],
    ),
    "PP x 2, GPipe": (2, 4, [PIPELINE, SCHEDULE + "GPipe"]),
    "PP x 2, 1F1B": (2, 4, [PIPELINE, SCHEDULE + "1F1B"]),
    "PP x 2, 1F1B, scope: step": (2, 4, [PIPELINE, SCHEDULE + "1F1B"]),
    "accumulation x 2, scope: step": (1, 2, ["--training.global_batch_size=4"]),
    "FSDP2 x TP": (4, 2, [TENSOR]),
    "FSDP2 x CP": (4, 2, [CONTEXT]),
    "PP x FSDP2, GPipe": (4, 2, [PIPELINE, SCHEDULE + "GPipe"]),
    "compiled": (1, 4, ["--compile.enable", "--compile.backend=aot_eager"]),
    "full activation checkpointing": (1, 4, ["activation-checkpoint:full"]),
    "FSDP2 x 2, bfloat16": (2, 2, ["--training.dtype=bfloat16"]),
}
"""Layouts: ranks, sequences on a rank, flags."""
OF_FURTHER = {
    *("FSDP2 x 2", "TP x 2", "CP x 2, head-tail", "PP x 2, GPipe"),
    "accumulation x 2, scope: step",
}
LARGEST_OF_BFLOAT16 = 1e-3
"""Gradients of two ranks are rounded to bfloat16, to 4e-3 each, before they are added up."""


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of step 0, which every layout starts from."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed")) / "step-0"


@pytest.fixture(scope="module")
def one(seed, tmp_path_factory):
    """Return what one rank finds."""
    return weighed(seed, tmp_path_factory.mktemp("one"), 1, ROWS, [], TEXTS)


@pytest.fixture(scope="module")
def one_in_bfloat16(seed, tmp_path_factory):
    """Return what one rank finds in bfloat16."""
    flags = ["--training.dtype=bfloat16"]
    texts = {name: text for name, text in TEXTS.items() if name not in FURTHER}
    return weighed(seed, tmp_path_factory.mktemp("one16"), 1, ROWS, flags, texts)


def weighed(seed, out, ranks, rows, flags, texts):
    """Return for each spec the weights in the order of the data and the gradients, or a refusal."""
    found = noted(seed, out, ranks, rows, flags, texts)
    return {name: gathered([rank[name] for rank in found]) for name in texts}


def noted(seed, out, ranks, rows, flags, texts):
    """Return what each rank wrote down of each spec."""
    specs = out / "specs.json"
    out.mkdir(exist_ok=True)
    specs.write_text(json.dumps(texts))
    common = [
        "--module=small",
        "--config=debugmodel",
        "--weighting.spec=uniform",
        "--weighting.agree_every=1",
    ]
    common += ["--training.seq_len=256", "--training.steps=5", "--training.max_norm=1e9"]
    common += ["--checkpoint.enable", f"--checkpoint.initial_load_path={seed}"]
    common += [f"--dump_folder={out}/dump", f"--training.local_batch_size={rows}"]
    driver = str(HERE / "matrix.py")
    done = torchrun(ranks, driver, str(out), str(specs), *common, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = [torch.load(out / f"rank{rank}.pt") for rank in range(ranks)]
    shutil.rmtree(out)
    return found


def gathered(ranks):
    """Return what the ranks found of one spec, put together; ranks that hold the same agree."""
    if "refused" in ranks[0]:
        return ranks[0]["refused"]
    where, token = (torch.cat([rank[key] for rank in ranks]) for key in ("where", "token"))
    places, index = where.unique(return_inverse=True)
    weights = torch.zeros(len(places)).scatter_(0, index, token)
    torch.testing.assert_close(weights[index], token, rtol=1e-5, atol=1e-6)  # float32 sums
    gradients = {}
    for rank in ranks:
        gradients.update(rank["gradients"])
    return places, weights, gradients


def difference(got, expected):
    """Return the largest relative difference of weights, and of any parameter's gradient."""
    (places, weights, gradients), (where, others, reference) = got, expected
    assert torch.equal(places, where), "the layouts must see the same tokens"
    assert gradients.keys() == reference.keys()
    of_weights = (weights - others).abs().max() / others.abs().max()
    of_gradients = [(gradients[n] - g).norm() / g.norm() for n, g in reference.items()]
    return of_weights.item(), max(of_gradients).item()


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_weighs_and_learns_as_one_rank(layout, seed, request, tmp_path, record_property):
    """Weights and gradients are those of one rank, or the spec is refused."""
    narrow = layout.endswith("bfloat16")
    one = request.getfixturevalue("one_in_bfloat16" if narrow else "one")
    ranks, rows, flags = LAYOUTS[layout]
    texts = {name: x for name, x in TEXTS.items() if layout in OF_FURTHER or name not in FURTHER}
    if layout.endswith("scope: step"):
        texts = {name: f"scope: step\n{text}" for name, text in texts.items()}
    found = weighed(seed, tmp_path, ranks, rows, flags, texts)
    line = {}
    for name, got in found.items():
        if isinstance(got, str):
            line[name] = f"refused: {got}"
            continue
        line[name] = difference(got, one[name])
    record_property("matrix", (layout, line))
    for name, cell in line.items():
        if layout.startswith("PP") and name == "references":
            assert "a forward pass of its own, which is not sent through the pipeline" in cell
        elif layout == "PP x 2, 1F1B" and name != "uniform":
            assert "backward pass" in cell
            assert "scope: step" in cell
        else:
            largest = LARGEST_OF_BFLOAT16 if narrow else LARGEST
            assert max(cell) <= largest, f"{name}: weights and gradients differ by {cell}"


@pytest.mark.processes
def test_the_specs_of_the_matrix_weigh_tokens_apart(one):
    """All but uniform weigh tokens apart, so that agreement means something."""
    assert one["uniform"][1].eq(1).all()
    spreads = {name: weights.max() - weights.min() for name, (_, weights, _) in one.items()}
    assert all(spread > 0.01 for name, spread in spreads.items() if name != "uniform"), spreads


@pytest.mark.processes
def test_domains_of_drawn_rows_are_weighed_late_as_twice(seed, tmp_path):
    """A gradient of the layer for each domain gives those of logits computed twice, in float32."""
    texts = {
        "doremi": DOMAINS,
        "product": f"version: 1\nfactors:\n  domain: {DOMAIN}\n  token: {TOKEN}\n",
    }
    drawn = "--dataloader.rows=drawn"
    late, twice = (
        noted(seed, tmp_path / memory, 1, 8, [drawn, f"--loss.memory={memory}"], texts)[0]
        for memory in ("late", "recompute")
    )
    for name in texts:
        path = late[name]["path"]
        assert (path["memory"], path["units"], path["by_domain"]) == ("late", 5, 8)
        assert twice[name]["path"]["memory"] == "recompute"
        assert late[name]["token"].unique().numel() > 1
        assert max(difference(gathered([late[name]]), gathered([twice[name]]))) < 2e-6

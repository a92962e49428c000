"""The page on scale is what the script says now, and the script says what the code does."""

import importlib
import inspect
import re
from pathlib import Path

import generators as tables
import pytest
import test_collectives
import torch
from torchtitan.models.llama3 import model_registry

from weighting.loss.late_bound import Batch, begin
from weighting.loss.logits import Slice
from weighting.loss.path import CHUNKS
from weighting.loss.sums import Head

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def small_chunks(monkeypatch):
    """Cut small batches as large ones are."""
    monkeypatch.setattr("weighting.loss.path.MIN_CHUNK", 1)


@pytest.fixture(scope="module")
def scale():
    """Return the script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("scale")


@pytest.fixture
def loss_path(monkeypatch):
    """Return the benchmark that measures as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("loss_path")


@pytest.mark.slow
def test_the_page_is_current(scale):
    """What the script writes is what lies there."""
    assert scale.page() == (BENCHMARKS / "scale.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1B", "8B", "70B", "405B"])
def test_parameters_and_flops_are_torchtitans(scale, name):
    """They are those that torchtitan counts of the whole model, on a device without memory."""
    config = model_registry(name).model
    with torch.device("meta"):
        model = config.build()
    parameters, flops = config.get_nparams_and_flops(model, scale.LENGTH)
    assert scale.MODELS[name].parameters == parameters
    assert scale.MODELS[name].flops == flops


def test_layouts_that_are_said_to_be_the_hosts_are(scale):
    """Local batch and tensor parallelism of 70B come from torchtitan's config."""
    config = importlib.import_module("torchtitan.models.llama3.config_registry").llama3_70b()
    rows, tensor = config.training.local_batch_size, config.parallelism.tensor_parallel_degree
    assert scale.LAYOUTS["70B"] == scale.Layout(rows, tensor)
    assert config.training.seq_len == scale.LENGTH


def test_collectives_are_those_of_two_ranks(scale):
    """Kind and bytes of every call of every spec of the page, in order."""
    signals, domains = tables.batch(4, 6), len(tables.DOMAINS)
    for name in scale.SPECS:
        calls = test_collectives.heard(f"spec {name}", signals)
        found = [call for call in calls if "parts" not in call[0]]
        assert scale.heard(name, rows=2, ranks=2, domains=domains) == found, name


def test_collectives_grow_as_the_formula_says(scale):
    """On 64 ranks of 8 sequences LinUpper hands over 72 bytes, as 8 n + 8 says."""
    assert scale.bytes_formula("linupper") == "8 n + 8"
    calls = test_collectives.heard("spec linupper", tables.batch(16, 2))
    assert sum(size for kind, size in calls if "parts" not in kind) == 8 * 8 + 8
    assert scale.heard("linupper", rows=8, ranks=64) == [("gather", 64), ("sum", 8)]


def batch_of(fn, way, *, cut=None):
    """Return a batch of eight rows of sixteen tokens and its hidden states, V = 32, D = 8."""
    g = torch.Generator().manual_seed(0)
    words = 32 if cut is None else 16
    labels = torch.randint(32, (8, 16), generator=g)
    head = Head(torch.randn(words, 8, generator=g), None, cut)

    def local(found):
        return torch.ones_like(found["loss"])

    batch = Batch(labels, head, way, fn.needs, local, {}, torch.tensor(1.0))
    return batch, torch.randn(8, 16, 8, generator=g)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("spec", ["linupper", "mile"])
def test_a_cut_vocabulary_takes_the_collectives_of_the_page(scale, spec):
    """Two ranks hand over, for each chunk, what the page says of one."""
    layer = scale.Layer(128, 8, 16, 8, 4)
    way, fn = scale.way_of(spec, layer, "late"), scale.weighting_of(spec, on_ranks=True)

    def one(rank, ranks):
        calls = []
        cut = Slice(16 * rank, test_collectives.Heard(ranks, calls))
        begin(*batch_of(fn, way, cut=cut))
        return calls

    first, second = tables.Lockstep(2).run(one)
    assert first == second == CHUNKS * scale.heard_in_a_chunk(fn.needs, 128 // CHUNKS)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("memory", ["late", "keep", "recompute"])
@pytest.mark.parametrize("spec", ["linupper", "mile"])
def test_a_microbatch_that_waits_holds_what_the_page_says(scale, spec, memory):
    """Gradients and logits that live from the forward pass of a microbatch to its backward."""
    one, two = (scale.Layer(128, 8, 32, 8, 4, calls) for calls in (1, 2))
    way = scale.way_of(spec, one, memory)
    batch, hidden = batch_of(scale.weighting_of(spec, on_ranks=True), way)
    _, finish = begin(batch, hidden)
    held = inspect.getclosurevars(inspect.unwrap(finish)).nonlocals
    tensors = held["sums"]._d_weight if "sums" in held else []
    tensors += [held["room"]] if "room" in held else []
    grown = scale.peak(two, scale.way_of(spec, two, memory)) - scale.peak(one, way)
    assert grown == sum(x.nbytes for x in tensors)


def test_a_run_reports_no_more_than_the_page(scale):
    """`Path.extra` is the page's memory, but for the hidden states that `keep` copies."""
    for name, model in scale.MODELS.items():
        layer = scale.layer_of(model, scale.LAYOUTS[name])._replace(calls=1)
        for spec, memory in (("linupper", "late"), ("mile", "late"), ("mile", "recompute")):
            way = scale.way_of(spec, layer, memory)
            assert scale.peak(layer, way) - layer.plain == way.extra
        way = scale.way_of("linupper", layer, "keep")
        states = layer.tokens * layer.width * layer.itemsize  # times their weights
        assert scale.peak(layer, way) - layer.plain == way.extra + states


def test_what_was_measured_is_as_predicted(scale):
    """Products to a hundredth; memory within the tolerance that the page states."""
    found = scale.points(scale.MEASURED.read_text(encoding="utf-8"))
    assert len(found) == 23, "six specs in four ways, less the one that is refused"
    for point in found:
        said, counted = point.products
        assert abs(said - counted) < 0.011, point.name  # the file has two digits
        said, measured = point.mib
        assert abs(said / measured - 1) < scale.TOLERANCE, point.name


def test_a_prediction_that_is_off_is_explained_or_stops(scale):
    """A wrong memory in loss_path.md is seen, and no page is written without a reason."""
    text = scale.MEASURED.read_text(encoding="utf-8")
    wrong, count = re.subn(r"(\| linupper late .* )\d+( \| \S+ \|)", r"\g<1>400\2", text)
    assert count == 1
    assert [x.name for x in scale.points(wrong) if "memory" in x.off] == ["linupper late"]
    with pytest.raises(ValueError, match="memory of `late`: more than 15% off"):
        scale._misses(scale.points(wrong))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copies"), [("linupper late", 1), ("linupper keep", 1), ("rho-1 keep", 2)]
)
def test_memory_where_a_chunk_is_no_gradient_in_size(scale, loss_path, name, copies):
    """A chunk of 512 and D = 1,024: measured anew, a gradient of 32 MiB against a chunk of 16.

    On a CPU, hidden states of the tokens that count, 9 of 10, stand beside all of them; so do their
    gradients where a selection has no others.  6 MiB are room for what is small, and for pages the
    process had not touched before.
    """
    loss_ways = importlib.import_module("loss_ways")
    setting = loss_ways.Setting(2048, 4, 1024, 8192, "float32", "cpu", 1)
    batch = loss_ways.batch_of(setting)
    variant = next(x for x in loss_ways.variants(batch) if x.name == name)
    measured = loss_path.peak_on_device(variant, batch, setting)
    spec, _, memory = name.rpartition(" ")
    layer = scale.Layer(2048, 4, 8192, 1024, 4, on_ranks=False)
    said = scale.peak(layer, scale.way_of(spec, layer, memory))
    said += copies * batch.hidden.numel() * batch.hidden.element_size()
    assert measured, "peaks can be told on Linux only"
    assert said - 4 * 2**20 < measured < said + 6 * 2**20

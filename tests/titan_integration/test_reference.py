"""Losses of a reference model and on short contexts, against one model run without any trainer."""

import shutil
from collections.abc import Iterator

import pytest
import small
import torch
import torch.distributed.checkpoint as dcp
from runs import drive, seed_checkpoint, torchrun
from whole import whole_model

import weighting as wt
from titan_integration import config_registry
from titan_integration.data.signals import reference_flag, references_of, references_read
from titan_integration.loss.reference_model import find_checkpoint, load_model, short_context
from titan_integration.trainer.preflight import ask_for_columns, refuse_unsupported
from weighting.build import plan_of
from weighting.loss.cross_entropy import token_loss

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

WINDOW = 16
SPEC = f"""
version: 1
name: further-signals
factors:
  reference: excess_loss(old) -> temperature(1)
  context: column(short_loss_{WINDOW}) -> temperature(5)
  sure: ref_entropy(old) -> temperature(5)
  near: kl(old) -> minus(kl(start)) -> temperature(5)
"""
TOLD = ("ref_loss_old", "ref_entropy_old", "kl_old", "kl_start", f"short_loss_{WINDOW}")
"""Columns that the spec reads, all told by forward passes."""


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Return the folder of a checkpoint of step 0, where runs start."""
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), "--training.seq_len=64")


@pytest.fixture(scope="module")
def old(seed, model, tmp_path_factory):
    """Return the folder of a checkpoint of another model: the seed's, with parameters changed."""
    load_model(model, find_checkpoint(str(seed)), "the debug model")
    rng = torch.Generator().manual_seed(0)
    state = {
        name: x * (1 + 0.3 * torch.randn(x.shape, generator=rng)) if x.is_floating_point() else x
        for name, x in model.state_dict().items()
    }
    folder = tmp_path_factory.mktemp("old") / "step-1"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def model():
    """Build the debug model here, whole and without any parallelism."""
    return whole_model(small.debugmodel(), 64).eval()


@pytest.fixture(scope="module")
def run(seed, old, tmp_path_factory):
    """Train three steps from the seed with two references; return runs and notes by rank."""
    spec = tmp_path_factory.mktemp("spec") / "further-signals.yaml"
    spec.write_text(SPEC)

    def run(ranks, *flags):
        out = tmp_path_factory.mktemp("run")
        shutil.copytree(seed, out / "dump" / "checkpoint")
        flags += (f"--weighting.spec={spec}", f"--weighting.reference=old={old},start=ema:1")
        flags += ("--training.steps=3", "--checkpoint.enable", "--checkpoint.interval=1000")
        done = drive(out, ranks, "noting", "debugmodel", *flags)
        return done, [torch.load(out / "dump" / f"notes{rank}.pt") for rank in range(ranks)]

    return run


@pytest.fixture(scope="module")
def one_rank(run):
    """Return the run and the notes of one rank."""
    (done,), (notes,) = run(1, "--training.local_batch_size=4")
    return done, notes


def windows(positions, length) -> Iterator[tuple[int, int]]:
    """Yield where a row begins anew, slowly: at a document, and after so many tokens of one."""
    start = 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] == 0 or end - start == length:
            yield start, end
            start = end


def slow_losses(model, batch, length):
    """Return every token's loss with the model run on each window by itself."""
    logits = slow_logits(model, batch, length)
    return token_loss(logits, batch["labels"]).float()


@torch.no_grad()
def slow_logits(model, batch, length):
    """Return every token's logits with the model run on each window by itself, float64."""
    rows = []
    for row, tokens in enumerate(batch["input"]):
        parts = []
        for start, end in windows(batch["positions"][row].tolist(), length):
            positions = torch.arange(end - start)[None]
            masks = model.get_attention_masks(positions=positions)
            parts.append(model(tokens[None, start:end], positions, masks)[0].double())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.processes
def test_signals_are_those_of_models_run_window_by_window(one_rank, seed, old, model):
    """Loss and entropy of a reference at every step; at the first, all that the model is part of.

    There it is the seed, and so is the average that never moves.
    """
    _, notes = one_rank
    assert len(notes) == 3
    load_model(model, old, "the debug model")
    logs = [slow_logits(model, batch, 64).log_softmax(-1) for batch in notes]
    for batch, log in zip(notes, logs, strict=True):
        told = {name: batch[f"columns.{name}"] for name in TOLD}
        losses = token_loss(log, batch["labels"]).float()
        torch.testing.assert_close(told["ref_loss_old"], losses, rtol=0, atol=1e-5)
        entropy = -(log.exp() * log).sum(-1).float()
        torch.testing.assert_close(told["ref_entropy_old"], entropy, rtol=0, atol=1e-5)
    assert entropy.max() - entropy.min() > 1e-2
    load_model(model, find_checkpoint(str(seed)), "the debug model")
    batch, told = notes[0], {name: notes[0][f"columns.{name}"] for name in TOLD}
    torch.testing.assert_close(batch["loss"], slow_losses(model, batch, 64), rtol=0, atol=1e-5)
    short = slow_losses(model, batch, WINDOW)
    torch.testing.assert_close(told[f"short_loss_{WINDOW}"], short, rtol=0, atol=1e-5)
    assert (short - batch["loss"]).abs().max() > 1e-2
    own = slow_logits(model, batch, 64).log_softmax(-1)
    expected = (own.exp() * (own - logs[0])).sum(-1).float()
    torch.testing.assert_close(told["kl_old"], expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 1e-2
    assert told["kl_start"].max() < 1e-6
    assert notes[2]["columns.kl_start"].max() > 1e-4


@pytest.mark.processes
@pytest.mark.parametrize(
    "layout",
    [
        ["--training.local_batch_size=2"],
        ["--training.local_batch_size=4", "--parallelism.tensor_parallel_degree=2"],
    ],
    ids=["fsdp", "tp"],
)
def test_two_ranks_take_the_signals_of_one(layout, run, one_rank):
    """Sharded in two ways, the three models give the signals, weights and losses of one rank."""
    two, notes = run(2, *layout)
    one, noted = one_rank
    is_tp = len(layout) > 1
    for step in range(3):
        both = torch.cat([rank["weights"][step] for rank in two[: 1 if is_tp else 2]])
        torch.testing.assert_close(both, one["weights"][step], rtol=1e-5, atol=1e-5)
        for name in (f"columns.{name}" for name in TOLD):
            both = torch.cat([rank[step][name] for rank in notes[: 1 if is_tp else 2]])
            torch.testing.assert_close(both, noted[step][name], rtol=0, atol=1e-4)
    assert notes[0][0]["columns.kl_start"].max() < 1e-6
    for (_, a), (_, b) in zip(one["losses"], two[0]["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.processes
def test_further_forwards_leave_training_as_it_was(seed, old, tmp_path):
    """A run with a reference and short contexts whose weights are one is the run without them."""
    spec = tmp_path / "ones.yaml"
    spec.write_text(SPEC.replace("temperature(1)", "temperature(1) -> interpolate(1)"))
    spec.write_text(spec.read_text().replace("temperature(5)", "temperature(5) -> interpolate(1)"))
    plain = tmp_path / "plain.yaml"
    plain.write_text("version: 1\npipeline: loss -> temperature(1) -> interpolate(1)\n")
    runs = []
    references = f"--weighting.reference=old={old},start=ema:1"
    for name, flags in {spec: [references], plain: []}.items():
        out = tmp_path / name.stem
        shutil.copytree(seed, out / "dump" / "checkpoint")
        flags += [f"--weighting.spec={name}", "--training.steps=3", "--checkpoint.enable"]
        flags += ["--training.local_batch_size=2", "--training.global_batch_size=8"]
        runs.append(drive(out, 2, "small", "debugmodel", *flags)[0])
    for weights in runs[0]["weights"]:
        assert torch.equal(weights, torch.ones_like(weights))
    assert runs[0]["losses"] == runs[1]["losses"]
    for name, value in runs[0]["parameters"].items():
        assert torch.equal(value, runs[1]["parameters"][name]), name


@pytest.mark.processes
@pytest.mark.parametrize("what", ["missing", "another size"])
def test_a_wrong_checkpoint_ends_with_one_message_and_status_2(what, seed, tmp_path, model):
    """Before training, both ranks agree and the first one says what does not fit."""
    path, message = seed.parent / "checkpoints", "no such folder (did you mean checkpoint?)"
    if what != "missing":
        path, message = tmp_path / "step-7", "layers.0.attention_norm.weight is [32] there and"
        state = model.state_dict() | {"layers.0.attention_norm.weight": torch.ones(32)}
        dcp.save(state, checkpoint_id=path, no_dist=True)
    flags = ["--module=small", "--config=debugmodel", "--training.seq_len=64"]
    flags += [
        "--weighting.spec=rho-1",
        f"--weighting.reference={path}",
        f"--dump_folder={tmp_path}",
    ]
    done = torchrun(2, "-m", "torchtitan.train", *flags)
    assert done.returncode == 2
    assert done.stderr.count("error: --weighting.reference") == 1
    assert str(path) in done.stderr
    assert message in done.stderr
    assert "Training starts" not in done.stderr + done.stdout


def test_the_latest_checkpoint_of_a_folder_is_taken(tmp_path):
    """A step's own folder, or the one with the highest number that is complete."""
    for name in ("step-0", "step-9", "step-10", "step-11", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"neither \.metadata nor .*there is: other, step-0, step"):
        find_checkpoint(str(tmp_path))
    for name in ("step-0", "step-9", "step-10", "other"):
        (tmp_path / name / ".metadata").touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path / "step-10"
    assert find_checkpoint(str(tmp_path / "step-9")) == tmp_path / "step-9"
    with pytest.raises(ValueError, match=r"no such folder \(did you mean other"):
        find_checkpoint(str(tmp_path / "othr"))


def test_what_does_not_fit_is_named(tmp_path, model):
    """A missing parameter, a deeper model, and files that cannot be read."""
    state = model.state_dict()
    dcp.save(state | {"train_state": {"step": 3}}, checkpoint_id=tmp_path / "good", no_dist=True)
    load_model(model, tmp_path / "good", "it")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name

    less = {key: x for key, x in state.items() if not key.startswith("layers.1.")}
    dcp.save(less, checkpoint_id=tmp_path / "less", no_dist=True)
    with pytest.raises(
        ValueError, match=r"less is no checkpoint of it: it has no layers\.1\..*and"
    ):
        load_model(model, tmp_path / "less", "it")
    more = state | {"layers.2.attention_norm.weight": torch.ones(64)}
    dcp.save(more, checkpoint_id=tmp_path / "more", no_dist=True)
    with pytest.raises(
        ValueError, match=r"it has layers\.2\.attention_norm\.weight, the model has"
    ):
        load_model(model, tmp_path / "more", "it")

    for file in (tmp_path / "good").glob("*.distcp"):
        file.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*good: "):
        load_model(model, tmp_path / "good", "it")
    (tmp_path / "more" / ".metadata").write_text("nonsense")
    with pytest.raises(ValueError, match=r"cannot read .*more: "):
        load_model(model, tmp_path / "more", "it")


def test_reference_windows_equal_those_of_a_slow_loop(model):
    """Positions count from every window's start, whatever a row begins with."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3], [7, 8, 9, 10, 0, 1, 2, 3, 4, 5]])
    for length in (1, 2, 3, 4, 50):
        found = short_context(model, {"positions": positions}, length)
        for row, there in zip(positions.tolist(), found["positions"].tolist(), strict=True):
            expected = [i for a, b in windows(row, length) for i in range(b - a)]
            assert there == expected


def test_a_reference_that_is_of_no_use_is_refused(tmp_path):
    """One that the spec does not read, and one beside a column of the same meaning."""
    (tmp_path / ".metadata").touch()
    config = config_registry.llama3_debugmodel()
    config.weighting.reference = str(tmp_path)
    refuse_unsupported(config, plan_of(wt.loads("excess_loss -> select(0.6)")))
    with pytest.raises(ValueError, match=r"linupper reads no ref_loss; leave out --weighting\.ref"):
        refuse_unsupported(config, plan_of(wt.load("linupper")))
    config.dataloader.columns = ["ref_loss"]
    with pytest.raises(ValueError, match=r"or from the column 'ref_loss' of --dataloader.columns"):
        refuse_unsupported(config, plan_of(wt.loads("excess_loss -> select(0.6)")))


def test_named_references_are_those_that_the_spec_names(tmp_path):
    """One that is not read, one without its name, and one beside its column are told apart."""
    (tmp_path / ".metadata").touch()
    config = config_registry.llama3_debugmodel()
    plan = plan_of(wt.loads("excess_loss(a) -> minus(kl(b)) -> select(0.6)"))
    config.weighting.reference = f"a={tmp_path},b={tmp_path}"
    refuse_unsupported(config, plan)
    ask_for_columns(config, plan.needs)
    assert config.dataloader.columns == []
    config.weighting.reference = f"a={tmp_path}"
    ask_for_columns(config, plan.needs)
    assert config.dataloader.columns == ["kl_b"]
    for given, said in {
        f"a={tmp_path},c={tmp_path}": "reads no ref_loss_c; leave out --weighting.reference c=",
        f"{tmp_path}": "reads no ref_loss; leave out --weighting.reference /",
        f"b={tmp_path}": "kl_b comes from --weighting.reference b=.* or from the column 'kl_b'",
        "a=nowhere": "nowhere: no such folder",
    }.items():
        config.weighting.reference = given
        with pytest.raises(ValueError, match=said):
            refuse_unsupported(config, plan)


def test_a_column_that_is_called_as_what_a_reference_tells_is_not_taken_for_it(tmp_path):
    """Whoever reads a column by its name means the data's, which the reference would hide."""
    (tmp_path / ".metadata").touch()
    config = config_registry.llama3_debugmodel()
    config.weighting.reference = str(tmp_path)
    plan = plan_of(wt.loads("excess_loss -> plus(column(kl)) -> select(0.6)"))
    with pytest.raises(ValueError, match=r"kl comes from --weighting\.reference .* column\(kl\)"):
        refuse_unsupported(config, plan)
    refuse_unsupported(config, plan_of(wt.loads("excess_loss -> plus(kl) -> select(0.6)")))
    plan = plan_of(wt.loads("excess_loss -> plus(column(ref_loss)) -> select(0.6)"))
    config.dataloader.columns = ["ref_loss"]
    refuse_unsupported(config, plan)  # the column of that name is another signal


def test_a_flag_names_one_reference_or_several(tmp_path, monkeypatch):
    """A folder whose name has an equals sign is a folder; what cannot be told apart is refused."""
    assert references_of("") == {}
    assert references_of("runs/a,b/step-3") == {"": "runs/a,b/step-3"}
    assert references_of("old=a,b/c, new=ema:0.9") == {"old": "a,b/c", "new": "ema:0.9"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1" / "checkpoint").mkdir(parents=True)
    assert references_of("lr=0.1/checkpoint") == {"": "lr=0.1/checkpoint"}
    for text in ("a=x,a=y", "x,a=y", "a=", "a=,b=y"):
        with pytest.raises(ValueError, match="several with a name each, as in old="):
            references_of(text)
    needs = frozenset({"columns.ref_loss_a", "columns.kl_c"})
    assert references_read("a=x,b=y,c=z", needs) == "a=x,c=z"
    assert references_read("x", needs) == ""
    assert references_read("x", needs | {"columns.kl"}) == "x"
    assert reference_flag("ref_loss") == "CHECKPOINT"
    assert reference_flag("ref_entropy_old") == "old=CHECKPOINT"
    assert reference_flag("quality") == ""

"""Going on from a checkpoint: bitwise, on other layouts, after a kill, and past torn folders."""

import os
import re
import shutil
import signal
import socket
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from faulty import Before, Run
from forked import start as forked_start
from runs import HERE, ROOT, SMALL, drive, environment, torchrun
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torchtitan.components.checkpointer.dcp import AsyncMode
from warm import python, weighting

import weighting as wt
from titan_integration.state import checkpoint as resume
from titan_integration.state.run import start
from titan_integration.state.saved_weighting import SavedWeighting

MODEL = ["--module=small", "--config=debugmodel"]
SPEC = """
version: 1
name: remembers-and-draws
factors:
  domain: doremi(step_size=1, smoothing=0.05)
  instance: rank(history=24) -> pow(3) -> bernoulli
  document: mean(document) -> normalize -> temperature(step(1, 0.4, at={at})) -> clamp(4/n)
"""
"""Three memories (of domains, of losses, of an average), chance, and a schedule."""


def flags_of(folder, at):
    """Return the flags of a run with the spec above, whose schedule changes at a step."""
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(at=at))
    return [f"--weighting.spec={spec}", "--weighting.reference=ema:0.9", "--debug.seed=1"]


def train(out, ranks, *flags):
    """Train the debug model; return what each rank noted."""
    return drive(out, ranks, "small", "debugmodel", *flags)


SAVED, STEPS = 4, 8
"""A checkpoint's step, and that of the end: the history of 24 sequences is full before both."""
KEPT = [f"--training.steps={STEPS}", "--checkpoint.enable", f"--checkpoint.interval={SAVED}"]


def kill_after_saving(out, *flags):
    """Train on one rank, and kill it two steps after its first checkpoint."""
    entry = [*MODEL, *SMALL, *flags, *KEPT]
    command = [str(HERE / "drive.py"), str(out), f"--dump_folder={out}/dump", *entry]
    die = partial(signal.raise_signal, signal.SIGKILL)
    place = "titan_integration.trainer.trainer:WeightedTrainer.train_step"
    first = Before(place, SAVED + 3, die)
    log = out.parent / f"{out.name}.log"
    agent = forked_start(1, command, (log, log), environment(), first)
    agent.join(300)
    assert agent.exitcode not in (0, None), log.read_text()
    assert (out / "dump" / "checkpoint" / f"step-{SAVED}" / ".metadata").exists()
    assert not (out / "rank0.pt").exists(), "it ended by itself"


# On one rank, bit for bit.


@pytest.mark.processes
def test_killed_run_goes_on_bitwise(tmp_path):
    """Four steps, a kill -9 and four more are eight, though two later checkpoints are torn."""
    flags = [*flags_of(tmp_path, at=6), "--training.local_batch_size=8"]
    (whole,) = train(tmp_path / "whole", 1, *flags, f"--training.steps={STEPS}")

    kill_after_saving(tmp_path / "half", *flags)
    saved = tmp_path / "half" / "dump" / "checkpoint"
    assert not (saved / f"step-{STEPS}").exists()
    for step in ("step-5", "step-6"):
        shutil.copytree(saved / f"step-{SAVED}", saved / step)
    os.truncate(saved / "step-5" / "__0_0.distcp", 1000)
    (saved / "step-6" / ".metadata").unlink()

    (rest,) = train(tmp_path / "half", 1, *flags, *KEPT)
    assert [step for step, _ in rest["losses"]] == [*range(SAVED + 1, STEPS + 1)]
    assert rest["losses"] == whole["losses"][SAVED:]
    for ours, theirs in zip(rest["weights"], whole["weights"][SAVED:], strict=True):
        assert torch.equal(ours, theirs)
    assert len({weights.count_nonzero().item() for weights in rest["weights"]}) > 1, "chance"
    for name, value in whole["parameters"].items():
        assert torch.equal(value, rest["parameters"][name]), name


# On two ranks, and from there on others.


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return folder, flags and notes of eight steps on two FSDP ranks, saved at step 4."""
    out = tmp_path_factory.mktemp("sharded")
    flags = [*flags_of(out, at=6), "--training.steps=8"]
    flags += ["--checkpoint.enable", "--checkpoint.interval=4"]
    found = train(out, 2, *flags, "--training.local_batch_size=4")
    shutil.rmtree(out / "dump" / "checkpoint" / "step-8")
    return out, flags, found


def copy_of(sharded, out):
    """Copy the checkpoint of step 4 to another run's folder, and return that."""
    shutil.copytree(sharded[0] / "dump" / "checkpoint", out / "dump" / "checkpoint")
    return out


@pytest.mark.processes
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_another_layout_goes_on_with_the_same_rows_and_weights(tensor_parallel, sharded, tmp_path):
    """What two FSDP ranks saved goes on alike on one rank, and on two tensor-parallel ones."""
    _, flags, two = sharded
    layout = [f"--parallelism.tensor_parallel_degree={tensor_parallel}"]
    size = "--training.local_batch_size=8"
    found = train(copy_of(sharded, tmp_path), tensor_parallel, *flags, *layout, size)

    assert len(found[0]["losses"]) == 4
    for step, (at, loss) in enumerate(two[0]["losses"][4:]):
        ours = torch.cat([rank["weights"][4 + step] for rank in two])
        for rank in found:
            # Sums over ranks are added in another order: a few units of float32 at each step.
            torch.testing.assert_close(rank["weights"][step], ours, rtol=1e-5, atol=1e-5)
        assert found[0]["losses"][step] == (at, pytest.approx(loss, rel=1e-5))


# What is refused, and what starts afresh.


@pytest.mark.processes
def test_another_spec_is_refused_with_a_diff(sharded, tmp_path):
    """The message comes once, with what differs and the way out; the exit status is 2."""
    _, flags, _ = sharded
    other = tmp_path / "other.yaml"
    other.write_text(SPEC.format(at=6).replace("history=24", "history=32"))
    more = [*SMALL, *flags[1:], f"--dump_folder={copy_of(sharded, tmp_path)}/dump"]
    more += ["--training.local_batch_size=4"]
    done = weighting("train", other, *MODEL, "--ranks=2", "--", *more)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("the checkpoint was trained with another weighting spec") == 1
    assert """--- in the checkpoint
+++ now
@@ -1,6 +1,6 @@
 version: 1
 name: remembers-and-draws
 factors:
   domain: doremi(step_size=1, smoothing=0.05)
-  instance: rank(history=24) -> pow(3) -> bernoulli
+  instance: rank(history=32) -> pow(3) -> bernoulli
""" in re.sub(r"^\[rank0\]:", "", done.stderr, flags=re.MULTILINE)
    assert "--weighting.allow_changed_spec" in done.stderr


@pytest.mark.processes
def test_a_stock_checkpoint_goes_on_weighted(tmp_path):
    """Without an entry of ours, weighting and average start afresh, each with one warning."""
    size = ["--training.local_batch_size=4", "--debug.seed=1", "--checkpoint.enable"]
    first = ["--training.steps=4", "--checkpoint.interval=2", *size]
    drive(tmp_path, 1, "stock_configs", "debugmodel", *first)
    shutil.rmtree(tmp_path / "dump" / "checkpoint" / "step-4")

    spec = "excess_loss -> abs -> affine(shift=0.01) -> mean_one"
    entry = [*MODEL, *SMALL, *size]
    ours = [
        f"--weighting.spec={spec}",
        "--weighting.reference=ema:1",
        f"--dump_folder={tmp_path}/dump",
    ]
    done = torchrun(1, str(HERE / "drive.py"), str(tmp_path), *entry, *ours)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = torch.load(tmp_path / "rank0.pt")

    folder = tmp_path / "dump" / "checkpoint" / "step-2"
    assert done.stdout.count(f"{folder} holds no state of a weighting") == 1
    assert done.stdout.count(f"{folder} holds no moving average") == 1
    assert [step for step, _ in found["losses"]] == [3, 4, 5]
    # The average is the loaded model at first, but for rounding beside the shift of 0.01.
    assert found["weights"][0].std() < 1e-2
    assert found["weights"][2].std() > 0.1


@pytest.fixture
def group():
    """Make this process the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Kept:
    """Something with a state."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        """Return it."""
        return self.state

    def load_state_dict(self, state):
        """Take it."""
        self.state = state


def checkpoint(folder, **parts):
    """Save a small checkpoint."""
    state = {"layer.weight": torch.arange(1000.0), **parts}
    dcp.save(state, checkpoint_id=folder)
    return folder


def host_parts():
    """Return what the host saves beside model and data."""
    return {name: {"step": 3} for name in ("optimizer", "lr_scheduler", "train_state")}


@pytest.mark.usefixtures("group")
def test_the_latest_whole_checkpoint_is_taken(tmp_path, caplog):
    """Folders that are unfinished, cut short or half deleted are passed over, with the reason."""
    for step in (2, 4, 6, 8, 10):
        checkpoint(tmp_path / f"step-{step}")
    assert resume.latest_whole(tmp_path) == 10

    (tmp_path / "step-10" / ".metadata").unlink()
    os.truncate(tmp_path / "step-8" / ".metadata", 100)
    os.truncate(tmp_path / "step-6" / "__0_0.distcp", 2000)
    (tmp_path / "step-4" / "__0_0.distcp").unlink()
    assert resume.latest_whole(tmp_path) == 2
    passed = [message for message in caplog.messages if "Passing over" in message]
    reasons = [
        "step-10: it has no .metadata, so it was never finished",
        "step-8: its .metadata cannot be read: ",
        "step-6: __0_0.distcp has 2000 of ",
        "step-4: __0_0.distcp is missing",
    ]
    for message, reason in zip(passed, reasons, strict=True):
        assert reason in message
    (tmp_path / "step-2" / "__0_0.distcp").unlink()
    assert resume.latest_whole(tmp_path) == -1


def manager():
    """Return a checkpoint manager of no run in particular."""
    made = object.__new__(resume.ResumingCheckpointManager)
    made.states = {}
    return made


@pytest.mark.usefixtures("group")
def test_a_torn_checkpoint_that_was_asked_for_is_refused(tmp_path):
    """With --checkpoint.load_step, nothing else will do."""
    folder = checkpoint(tmp_path / "step-2")
    os.truncate(folder / "__0_0.distcp", 2000)
    with pytest.raises(ValueError, match=r"step-2: __0_0.distcp has 2000 of .*load_step"):
        manager().dcp_load({}, str(folder), from_hf=False, from_quantized=False)


@pytest.mark.usefixtures("group")
def test_a_checkpoint_is_none_while_it_is_overwritten(tmp_path):
    """Whoever dies in the middle leaves no old .metadata over new files."""

    class Dies(Kept):
        def state_dict(self):
            raise KeyboardInterrupt

    folder = checkpoint(tmp_path / "step-2")
    assert resume.flaw(folder) is None
    with pytest.raises(KeyboardInterrupt):
        manager().dcp_save({"optimizer": Dies()}, str(folder), AsyncMode.DISABLED)
    assert "never finished" in resume.flaw(folder)


@pytest.mark.usefixtures("group")
def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    """It says what is missing and what can be done; loading the model alone is fine."""
    folder = checkpoint(tmp_path / "step-2")
    with pytest.raises(ValueError, match=r"no lr_scheduler, optimizer, train_state.*load_step"):
        resume._without_absent(host_parts(), folder)
    alone = {"layer.weight": torch.zeros(1000)}
    assert resume._without_absent(alone, folder) == alone


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("there", "here", "reason"),
    [
        ({"dp_rank_0": "", "world_size": 1}, {"made_from": "", "row": 0}, "no made_from but dp_ra"),
        ({"dp_rank_0": "", "world_size": 1}, {"dp_rank_1": ""}, "no dp_rank_1 but dp_rank_0, wor"),
        ({}, {"made_from": ""}, "no made_from but nothing"),
    ],
)
def test_the_state_of_another_data_loader_is_refused(there, here, reason, tmp_path):
    """The message says what it lacks and has, and the flag that starts the data afresh."""
    folder = checkpoint(tmp_path / "step-2", dataloader=there, **host_parts())
    with pytest.raises(ValueError, match=f"{reason}.*--checkpoint.exclude_from_loading dataloader"):
        resume._without_absent({"dataloader": Kept(**here)}, folder)


def state_of(spec, domains=(), *, allow=False):
    """Return what a run with a spec in arrow text saves."""
    fn = wt.build(wt.loads(spec), domains=domains)
    return SavedWeighting(start(fn, torch.device("cpu")), allow_changed_spec=allow)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("history", [32, 64])
def test_another_spec_starts_afresh_when_allowed(history, tmp_path):
    """Neither a memory of another shape nor one of the same is taken over; all else is loaded."""
    old = state_of("rank(history=64) -> pow(3) -> bernoulli")
    for value in old._run.fn.state_dict().values():
        value.fill_(7)
    folder = checkpoint(tmp_path / "step-2", weighting=old, **host_parts())
    new = state_of(f"rank(history={history}) -> pow(2) -> bernoulli", allow=True)
    fresh = {key: value.clone() for key, value in new._run.fn.state_dict().items()}
    weight = torch.zeros(1000)
    state = {"layer.weight": weight, "weighting": new}
    manager().dcp_load(state, str(folder), from_hf=False, from_quantized=False)

    assert torch.equal(weight, torch.arange(1000.0))
    assert all(torch.equal(value, fresh[key]) for key, value in new._run.fn.state_dict().items())


def test_a_hash_that_differs_alone_is_called_damage():
    """Two specs that print alike have no diff to show."""
    state = state_of("linupper(alpha=1) -> temperature(1)")
    saved = {**state.state_dict(), "spec_hash": "0" * 16}
    with pytest.raises(ValueError, match=r"another weighting spec.\nBoth print alike, and only"):
        state.load_state_dict(saved)


@pytest.mark.usefixtures("group")
def test_memories_of_other_domains_are_refused(tmp_path):
    """Fewer domains, and others of the same number: both are noticed."""
    spec = "doremi(step_size=1, smoothing=1e-3)"
    state = state_of(spec, ("code", "docs"))
    folder = checkpoint(tmp_path / "step-2", weighting=state)
    for domains in (("code", "news"), ("code",)):
        wanted = {"weighting": state_of(spec, domains)}
        with pytest.raises(ValueError, match=r"domains code, docs, and the data now has code"):
            resume._without_absent(wanted, folder)
    assert "weighting" in resume._without_absent(
        {"weighting": state_of(spec, ("code", "docs"))}, folder
    )


@pytest.mark.usefixtures("group")
def test_a_memory_of_another_shape_is_refused(tmp_path):
    """A version of a stage that remembers something else does not load by halves."""
    state = state_of("rank(history=64) -> pow(3) -> bernoulli")
    saved = state.state_dict()
    name = next(key for key, value in saved.items() if getattr(value, "shape", None) == (64,))
    folder = checkpoint(tmp_path / "step-2", weighting={**saved, name: torch.zeros(63)})
    reason = rf"{name} is \[63\] there and \[64\] here.*exclude_from_loading weighting"
    with pytest.raises(ValueError, match=reason):
        resume._without_absent({"weighting": state}, folder)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.5])
def test_weights_of_domains_that_cannot_be_are_refused(value, tmp_path):
    """With key, value, and the flags that go on from an earlier one or start afresh."""
    spec = "mean(domain) -> exponentiated"
    old = state_of(spec, ("code", "docs", "web"))
    name = "pipeline__2_exponentiated__average"
    old._run.fn.get_buffer(name).fill_(value)
    folder = checkpoint(tmp_path / "step-2", weighting=old, **host_parts())
    shown = rf"{name} is \[{value:g}, {value:g}, {value:g}\] and must be "
    flags = r"--checkpoint.load_step N; .* --checkpoint.exclude_from_loading weighting"
    state = {"weighting": state_of(spec, ("code", "docs", "web"))}
    with pytest.raises(ValueError, match=f"{shown}.*{flags}"):
        manager().dcp_load(state, str(folder), from_hf=False, from_quantized=False)


@pytest.mark.usefixtures("group")
def test_a_memory_of_another_type_is_refused(tmp_path):
    """Fractions would be cut to whole numbers, and a text is none."""
    state = state_of("rank(history=64) -> pow(3) -> bernoulli")
    saved = state.state_dict()
    name = next(key for key in saved if key.endswith("count"))
    reasons = {"float32 there and torch.int64 here": torch.tensor(2.5), "no tensor there": "x"}
    for step, (reason, value) in enumerate(reasons.items()):
        folder = checkpoint(tmp_path / f"step-{step}", weighting={**saved, name: value})
        with pytest.raises(ValueError, match=rf"{name} is \S*{reason}"):
            resume._without_absent({"weighting": state}, folder)


# Which folders are gone on from.


@pytest.fixture
def made(request, tmp_path):
    """Return a function that makes a manager of a small model in a folder, as the host does."""
    request.getfixturevalue("group")
    managers = []

    def make(**flags):
        flags = {"enable": True, "interval": 1, "last_save_model_only": False, **flags}
        states = {"train_state": Kept(step=0)}
        managers.append(
            resume.ResumingCheckpointManager(
                resume.ResumingCheckpointManager.Config(**flags),
                dataloader=Kept(row=0),
                model_parts=[nn.Linear(2, 2)],
                optimizers=Kept(lr=1.0),
                lr_schedulers=Kept(epoch=1),
                states=states,
                sd_adapter=None,
                base_folder=str(tmp_path),
            )
        )
        return managers[-1]

    yield make
    for each in managers:
        each.close()


def steps_in(folder):
    """Return the names in a folder, without what is being deleted."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_half_of_every_checkpoint_is_not_started_over(made, tmp_path):
    """As on a node that has some of the files: they are named, with the likely cause."""
    manager = made()
    for step in (1, 2):
        manager.save(step)
        (tmp_path / "checkpoint" / f"step-{step}" / "__0_0.distcp").unlink()
    with pytest.raises(
        ValueError, match=r"step-2: __0_0.distcp is missing.*nodes have this folder"
    ):
        made().load()
    (tmp_path / "checkpoint" / "step-2" / ".metadata").unlink()
    (tmp_path / "checkpoint" / "step-1" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"step-2: it has no .metadata, .* a save came before it"):
        made().load()
    shutil.rmtree(tmp_path / "checkpoint" / "step-2")
    assert made().load() is False, "a first save that was cut short"


def test_a_step_that_is_not_there_is_said(made, tmp_path):
    """With those that are."""
    manager = made()
    manager.save(1)
    manager.save(3)
    with pytest.raises(ValueError, match=r"load_step 2: .*checkpoint has no step-2; steps: 1, 3"):
        manager.load(2)
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"load_step 2: .*checkpoint has no step-2; steps: none"):
        manager.load(2)


@pytest.mark.slow
def test_where_to_start_from_is_checked_by_its_own_name(made, tmp_path):
    """Nobody is told to leave out --checkpoint.load_step who has not given it."""
    before = tmp_path / "before"
    whole, torn = (checkpoint(before / f"step-{step}", **host_parts()) for step in (2, 4))
    (torn / ".metadata").unlink()
    exported = before / "step-5"
    exported.mkdir()
    (exported / "model.safetensors").touch()
    given = {
        torn: rf".*never finished; give the folder of a whole checkpoint, such as {whole}$",
        before: rf".*never finished; give the folder of a whole checkpoint, such as {whole}$",
        exported: ".*finished export .*; add --checkpoint.initial_load_in_hf$",
    }
    for folder, reason in given.items():
        manager = made(initial_load_path=str(folder))
        with pytest.raises(ValueError, match=f"^--checkpoint.initial_load_path {folder}: {reason}"):
            manager.load()
    manager = made(initial_load_path=str(whole), initial_load_in_hf=True)
    with pytest.raises(ValueError, match=rf"no \*.safetensors in initial_load_path {whole}; leave"):
        manager.load()
    manager = made(initial_load_path=str(whole), initial_load_model_only=False)
    (path,) = whole.glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()[:64]) + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^--checkpoint.initial_load_path {whole}: .*ve another"):
        manager.dcp_load({"layer.weight": torch.zeros(1000)}, str(whole), False, False)
    alone = checkpoint(before / "step-6")
    manager = made(initial_load_path=str(alone), initial_load_model_only=False)
    with pytest.raises(ValueError, match=f"_path {alone}: .*--checkpoint.initial_load_model_only"):
        manager.load()


# Which are deleted.


def test_the_last_whole_checkpoint_stays_while_the_next_is_written(made, tmp_path, monkeypatch):
    """Torn ones do not count: not the one that is being written, nor a later one."""
    folder = tmp_path / "checkpoint"
    first = made(keep_latest_k=2, async_mode="async")
    first.save(3)
    first.maybe_wait_for_saving()
    shutil.copytree(folder / "step-3", folder / "step-6")
    (folder / "step-6" / "__0_0.distcp").unlink()

    free, write = threading.Event(), FileSystemWriter.write_data

    def slow(*args):
        assert free.wait(60)
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    manager = made(keep_latest_k=2, async_mode="async")
    (folder / "step-4").mkdir()  # or it is made a moment later, in the background
    manager.save(4)
    manager.close()  # and with it what deletes
    assert resume.flaw(folder / "step-3") is None, "the only one if it were killed now"
    free.set()
    manager.maybe_wait_for_saving()
    assert resume.flaw(folder / "step-4") is None
    assert steps_in(folder) == ["step-3", "step-4", "step-6"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_only_whole_checkpoints_are_deleted(mode, made, tmp_path):
    """What was moved away, is torn or was exported stays; deletions that were cut short go on."""
    folder = tmp_path / "checkpoint"
    for name in ("old-step-1", "step-2.bak", "step-1", ".step-0.0.deleted", "step-7"):
        (folder / name).mkdir(parents=True)
        (folder / name / "kept").touch()
    (folder / "step-7" / "model.safetensors").touch()
    manager = made(keep_latest_k=2, async_mode=mode)
    for step in (2, 3, 4, 5, 6):
        manager.save(step)
        assert step == 2 or resume.latest_whole(folder) >= step - 1
    manager.maybe_wait_for_saving()
    manager.close()
    others = ["old-step-1", "step-1", "step-2.bak", "step-7"]
    kept = ["step-5", "step-6"] if mode == "disabled" else ["step-4", "step-5", "step-6"]
    assert steps_in(folder) == sorted(others + kept)
    assert not [*folder.glob(".*")], "what was deleted is gone"


# Whose folder it is.


def on_its_own_disk(place):
    """Work where no other rank does, as on a node of its own."""
    own = os.path.join(place, f"node{os.environ['RANK']}")  # noqa: PTH118 - before imports
    os.makedirs(own, exist_ok=True)  # noqa: PTH103
    os.chdir(own)
    resume._PATIENCE = 1.0


@pytest.mark.processes
def test_ranks_that_save_to_folders_of_their_own_are_stopped(tmp_path):
    """Before the first step, with one message; so is a restart on what such runs have left."""
    flags = ["--dump_folder=out", "--training.local_batch_size=2", "--training.steps=4"]
    flags += ["--weighting.spec=group-dro", "--checkpoint.enable", "--checkpoint.interval=2"]
    first = partial(on_its_own_disk, str(tmp_path))
    reason = "rank 1 on .* does not see what the first rank writes there, so each would keep a part"

    def refused(there):
        status, said = Run(tmp_path / "log", 2, *flags, first=first).ended(300)
        assert status == 2, said
        assert "Training starts" not in said
        where = re.escape(f"out/checkpoint{there}")
        assert len(re.findall(rf"^error: {where}: {reason}", said, re.MULTILINE)) == 1, said
        assert socket.gethostname() in said

    refused("")
    assert not [*tmp_path.rglob("step-*")]

    shared = [f"--dump_folder={tmp_path}/out", *flags[1:]]
    status, said = Run(tmp_path / "log", 2, *shared).ended(300)
    assert status == 0, said
    for step in ("step-2", "step-4"):
        parts = [tmp_path / f"node{rank}" / "out" / "checkpoint" / step for rank in range(2)]
        for part in parts:
            shutil.copytree(tmp_path / "out" / "checkpoint" / step, part)
        (parts[0] / "__1_0.distcp").unlink()
        (parts[1] / "__0_0.distcp").unlink()
        (parts[1] / ".metadata").unlink()
    refused(" (step-4: __1_0.distcp is missing)")


@pytest.mark.processes
def test_a_run_that_was_exported_does_not_start_over(tmp_path):
    """More steps after a last save for Hugging Face: refused, or gone on from an earlier one."""
    out = tmp_path / "out"
    keep = ["--checkpoint.enable", "--checkpoint.last-save-model-only"]
    keep += ["--checkpoint.last-save-in-hf", "--training.local_batch_size=2"]
    flags = [f"--dump_folder={out}", "--weighting.spec=group-dro", *keep]
    status, said = Run(tmp_path / "log", 1, *flags, "--training.steps=3").ended(300)
    assert status == 0, said
    more = [*flags, "--training.steps=5"]
    status, said = Run(tmp_path / "log", 1, *more).ended(300)
    assert status == 2, said
    where = out / "checkpoint" / "step-3"
    assert f"error: {where}: it is a finished export for Hugging Face" in said
    assert f"--checkpoint.initial_load_path {where} --checkpoint.initial_load_in_hf" in said

    new = [f"--dump_folder={tmp_path / 'new'}", *more[1:], "--checkpoint.interval=2"]
    new += [f"--checkpoint.initial_load_path={where}", "--checkpoint.initial_load_in_hf"]
    status, said = Run(tmp_path / "log", 1, *new).ended(300)
    assert status == 0, said
    status, said = Run(tmp_path / "log", 1, *new, "--training.steps=6").ended(300)
    assert status == 0, said
    new = tmp_path / "new" / "checkpoint"
    assert f"Passing over {new / 'step-5'}: it is a finished export" in said
    assert f"Going on from {new / 'step-4'}" in said
    assert "Training starts at step 5" in said


# Killed again and again.

EARLY = 473
"""A seed that kills the first rank 1.3 s after its first step, and the second 0.1 s after."""


@pytest.mark.processes
def test_a_run_resumes_after_every_kill():
    """Two kills of benchmarks/kill.py; its table has a line for each."""
    words = [ROOT / "benchmarks" / "kill.py", "--kills=2", "--ranks=2", f"--seed={EARLY}"]
    done = python(*words, "--", "--module=faulty", "--config=tiny", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["1", "2"]

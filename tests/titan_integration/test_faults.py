"""What goes wrong around a run: disks, files, clocks, and others in the same folder.

Each ends in one message and a status that is not 0, or in a run that goes on; nothing written
earlier is lost.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver

import pytest
import torch
import torch.distributed.checkpoint as dcp
from faulty import FLAGS, Before, Run, launched, use_first
from forked import process as forked
from forked import start_server
from recorded import steps_of
from runs import environment
from tokenizers import Tokenizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from warm import Started

from titan_integration.commands import train as launch
from titan_integration.data.tokenizer import ensure_tokenizer
from titan_integration.host import run_dir as folder
from titan_integration.observe import metrics
from titan_integration.state.checksums import IntactReader
from weighting.runs import layout
from weighting.runs.files import read_lines
from weighting.runs.record_reader import read_record

PATIENCE, SOON = 300, 60
"""Seconds for a run on a machine that does much else, and those from a fault to the end."""
SPEC = "rank(history=64) -> pow(3) -> mean_one"
"""It remembers losses, so there is a state."""
SIZE = ["--training.local_batch_size=2", f"--weighting.spec={SPEC}"]
KEEP = ["--checkpoint.enable", "--checkpoint.interval=1"]
FOREVER = "--training.steps=100000"


@pytest.fixture(scope="module", autouse=True)
def forks(tmp_path_factory):
    """Start what all are forked from, with a clock that can be set; tell whether it can."""
    out = tmp_path_factory.mktemp("clock")
    (out / "clock.c").write_text(CLOCK)
    words = ["cc", "-shared", "-fPIC", "-o", str(out / "clock.so"), str(out / "clock.c"), "-ldl"]
    made = shutil.which("cc") is not None and subprocess.run(words, check=False).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        if made:
            patch.setenv("LD_PRELOAD", str(out / "clock.so"))
        forkserver._forkserver._stop()  # one of other tests, if there is one
        start_server()
    return made


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a training; what is still there at the end is killed."""
    runs = []

    def begin(ranks, *flags, first=None):
        runs.append(Run(tmp_path / f"{len(runs)}.log", ranks, *flags, first=first))
        return runs[-1]

    yield begin
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.agent.pid, signal.SIGKILL)
        run.agent.join()


@pytest.fixture
def mounted(tmp_path):
    """Return a function that mounts an empty file system of so many MiB in memory."""
    places = []

    def mount(size):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounts no file system here, which takes root: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def until(condition, run):
    """Wait until something holds, while a training runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert run.agent.is_alive(), run.said()
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.02)


def lines_of(dump):
    """Return the lines of metrics of a run by step, without what is chance."""
    path = dump / layout.FOLDER / layout.METRICS
    return {line["step"]: {**line, "tps": 0} for line in read_lines(path)} if path.exists() else {}


def message(ended):
    """Return the one message of a run that ended with status 2, in one line."""
    status, said = ended
    assert status == 2, said
    assert "Traceback" not in said, said
    (text,) = re.findall(r"^error: (.*)$", said, re.MULTILINE)
    return text


def saved(dump):
    """Return the steps of the checkpoints that were written to the end."""
    found = (dump / "checkpoint").glob("step-*/.metadata")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the dump folder of four steps on two ranks, each saved."""
    out = tmp_path_factory.mktemp("whole")
    run = Run(out / "log", 2, f"--dump_folder={out / 'dump'}", "--training.steps=4", *SIZE, *KEEP)
    try:
        status, said = run.ended(PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.agent.pid, signal.SIGKILL)
    assert status == 0, said
    assert saved(out / "dump") == [1, 2, 3, 4]
    return out / "dump"


def copy_of(whole, out, *steps):
    """Copy some checkpoints of a run to another folder, and return that."""
    for step in steps:
        name = f"checkpoint/step-{step}"
        shutil.copytree(whole / name, out / name)
    return out


# Disks --------------------------------------------------------------------------------------------


def fill(place):
    """Leave no room on a disk."""
    with (place / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


WRITES = [
    ("weighting.runs.run_json:write_whole", 1, "{}/weighting/run.json: No space left"),
    (
        "titan_integration.observe.metrics:append_line",
        1,
        "{}/weighting/metrics.jsonl: No space left",
    ),
    (
        "titan_integration.observe.recorder:write_part",
        1,
        r"{}/weighting/record, steps \d+ to \d+: .*No spa",
    ),
    (
        "torch.distributed.checkpoint.filesystem:FileSystemWriter.write_data",
        2,
        r"the checkpoint {}/checkpoint/step-\d+: .*MiB are free there\. Those before it are whole",
    ),
    (
        "titan_integration.observe.mixture:write_whole",
        1,
        "{}/weighting/mixture.yaml: No space left",
    ),
]


@pytest.mark.processes
def test_a_full_disk_is_said_once_and_the_same_command_goes_on(start, mounted):
    """Wherever it becomes full: run.json, metrics, records, checkpoint, mixture."""
    dump = mounted(32)
    steps = 6
    flags = [f"--dump_folder={dump}", f"--training.steps={steps}", "--training.local_batch_size=2"]
    flags += ["--weighting.spec=group-dro", "--weighting.record=every=1"]
    flags += ["--checkpoint.enable", "--checkpoint.interval=2"]
    before = set()
    for place, number, expected in WRITES:
        run = start(2, *flags, first=Before(place, number, partial(fill, dump)))
        assert re.match(f"cannot write {expected.format(dump)}", message(run.ended(PATIENCE)))
        (dump / "ballast").unlink()
        assert before <= {*saved(dump)}, "the earlier checkpoints are still there"
        before = {*saved(dump)}
    status, said = start(2, *flags).ended(PATIENCE)
    assert status == 0, said
    assert [*lines_of(dump)] == [*range(1, steps + 1)]
    assert [step.step for step in steps_of(read_record(dump))] == [*range(1, steps + 1)]
    assert (dump / "weighting" / "mixture.yaml").exists()


@pytest.mark.slow
def test_a_torn_line_of_metrics_is_taken_away(tmp_path):
    """What a full disk has cut off is not in the middle of the file after the next line."""
    path = tmp_path / "metrics.jsonl"
    for torn in (b"", b'{"step": 1, "loss": 2.0}\n'):
        path.write_bytes(torn + b'{"step": 2, "lo')
        metrics.append_line(path, {"step": 3, "loss": 1.0})
        assert path.read_bytes() == torn + b'{"step": 3, "loss": 1.0}\n'


@pytest.mark.processes
def test_a_read_only_disk_is_said_before_training(mounted, tmp_path):
    """`weighting train` refuses the folder at once, and makes nothing."""
    disk = mounted(1)
    (disk / "old").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for dump in (disk / "old", disk / "new" / "er"):
        words = ["uniform", "--", f"--dump_folder={dump}"]
        process = forked(launched, tmp_path / "log", words)
        process.start()
        process.join(PATIENCE)
        found = process.exitcode, (tmp_path / "log").read_text()
        assert message(found) == (
            f"cannot write {dump}: Read-only file system; make it writable or take another folder "
            "and give the same command again"
        )


def test_what_is_no_folder_is_refused(tmp_path):
    """A file in the way is named."""
    (tmp_path / "file").touch()
    reason = f"cannot write {tmp_path}/file/out: {tmp_path}/file is no folder; "
    with pytest.raises(ValueError, match=f"^{reason}"):
        folder.refuse_unwritable(tmp_path / "file" / "out")
    folder.refuse_unwritable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


# Damaged files ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_flipped_bit_is_loaded(tmp_path):
    """Of 200 places in a checkpoint's data, each is refused or changes nothing."""
    state = {"a": torch.arange(100.0), "b": torch.arange(7), "c": {"text": "x" * 50, "step": 3}}
    dcp.save(state, checkpoint_id=tmp_path)
    (path,) = tmp_path.glob("*.distcp")
    good = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        place = chance.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        found = {"a": torch.zeros(100), "b": torch.zeros(7, dtype=torch.int64), "c": {}}
        found["c"] = {"text": "", "step": 0}
        try:
            dcp.load(found, storage_reader=IntactReader(tmp_path), no_dist=True)
        except CheckpointException:
            refused += 1
        else:
            assert torch.equal(found["a"], state["a"]), place
            assert torch.equal(found["b"], state["b"]), place
            assert found["c"] == state["c"], place
    assert refused > 50


def flip(step, key):
    """Change one bit in the middle of what a checkpoint keeps under a key."""
    stored = FileSystemReader(step).read_metadata().storage_data
    info = next(info for index, info in stored.items() if index.fqn == key)
    path = step / info.relative_path
    data = bytearray(path.read_bytes())
    archive = bytes(data[info.offset : info.offset + info.length])
    tensor = torch.load(io.BytesIO(archive))
    data[info.offset + archive.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(data)


@pytest.mark.processes
def test_a_flipped_bit_in_the_state_is_refused_and_the_checkpoint_before_it_taken(
    whole, start, tmp_path
):
    """The message names the folder to move away; then the run goes on, past a torn one too."""
    dump = copy_of(whole, tmp_path / "dump", 1, 2, 3, 4)
    flip(dump / "checkpoint" / "step-4", "weighting.pipeline__2_rank__seen")
    flags = [f"--dump_folder={dump}", "--training.steps=4", *SIZE, *KEEP]
    text = message(start(2, *flags).ended(PATIENCE))
    where = dump / "checkpoint" / "step-4"
    assert text.startswith(f"cannot resume from {where}: __")
    assert "is damaged between bytes " in text
    assert text.endswith(
        "Move this folder away, and the same command goes on from the checkpoint before it"
    )

    where.rename(tmp_path / "away")
    torn = next((dump / "checkpoint" / "step-3").glob("*.distcp"))
    os.truncate(torn, torn.stat().st_size // 2)
    status, said = start(2, *flags).ended(PATIENCE)
    assert status == 0, said
    assert said.count(f"Passing over {dump}/checkpoint/step-3: {torn.name} has ") == 1
    assert said.count("Training starts at step 3") == 2
    assert lines_of(dump)[4] == pytest.approx(lines_of(whole)[4], rel=1e-4)


@pytest.mark.processes
def test_a_reference_that_cannot_be_read_is_said_before_training(whole, start, tmp_path):
    """One that is missing, a folder of nothing, and a checkpoint that is torn or damaged."""
    (tmp_path / "nothing").mkdir()
    for name in ("torn", "damaged"):
        shutil.copytree(whole / "checkpoint" / "step-1", tmp_path / name)
    torn = next((tmp_path / "torn").glob("*.distcp"))
    os.truncate(torn, torn.stat().st_size // 2)
    flip(tmp_path / "damaged", "tok_embeddings.weight")
    reasons = {
        "missing": "no such folder",
        "nothing": "no checkpoint here",
        "torn": "cannot read ",
        "damaged": "cannot read .* is damaged between bytes",
    }
    flags = ["--weighting.spec=rho-1", "--training.local_batch_size=2", FOREVER]
    runs = [
        start(
            2 if name in {"torn", "damaged"} else 1,  # what each rank reads, or the first finds
            *flags,
            f"--dump_folder={tmp_path}/{name}-run",
            "--weighting.reference",
            tmp_path / name,
        )
        for name in reasons
    ]
    for run, (name, reason) in zip(runs, reasons.items(), strict=True):
        ended = run.ended(PATIENCE)
        assert re.match(
            rf"--weighting.reference.* {reason}|--weighting.reference.*{reason}", message(ended)
        ), ended
        assert str(tmp_path / name) in message(ended)
        assert "Training starts" not in ended[1]


# Ends and starts ----------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(start, tmp_path):
    """However that ends: killed, or told to end; what it had saved is gone on from."""
    dump = tmp_path / "dump"
    flags = [f"--dump_folder={dump}", *SIZE, *KEEP, "--checkpoint.keep_latest_k=2"]
    first = start(1, *flags, FOREVER)
    until(lambda: saved(dump), first)
    second = message(start(1, *flags, FOREVER).ended(PATIENCE))
    holder, host = re.match(rf"{dump}: process (\d+) on (\S+) is training there; ", second).groups()
    assert host == os.uname().nodename
    at = max(lines_of(dump))
    until(lambda: max(lines_of(dump)) > at + 2, first)  # unharmed

    os.kill(int(holder), signal.SIGKILL)
    assert first.ended(SOON)[0] != 0
    at = max(saved(dump))
    third = start(2, *flags, FOREVER)
    until(lambda: max(saved(dump), default=0) > at, third)
    assert third.said().count(f"Training starts at step {at + 1}\n") == 2

    third.agent.terminate()
    status, said = third.ended(SOON)
    assert status != 0, said
    at = max(saved(dump))
    last = start(1, *flags, f"--training.steps={at + 1}")
    assert last.ended(PATIENCE)[0] == 0
    assert last.said().count(f"Training starts at step {at + 1}\n") == 1
    assert [*lines_of(dump)] == [*range(1, at + 2)]


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    """Even if a child of that process lives on; within a process it may be taken again."""
    code = (
        "import os, pathlib, sys, time; from titan_integration.host.run_dir import claim\n"
        "kept = claim(pathlib.Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "child and print(child, flush=True)\n"
        "time.sleep(300)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is training there"):
            folder.claim(tmp_path)
        process.kill()
        process.wait()
        claims = [folder.claim(tmp_path) for _ in range(2)]
        assert (tmp_path / folder.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()
    for claim in claims:
        claim.close()


@pytest.mark.processes
def test_two_ranks_then_one_then_two_are_two(whole, start, tmp_path):
    """Whatever the number of ranks, steps lose and weigh what they would have."""
    dump = copy_of(whole, tmp_path / "dump", 1)
    flags = [f"--dump_folder={dump}", "--training.steps=4", f"--weighting.spec={SPEC}", *KEEP]
    status, said = start(1, *flags, "--training.local_batch_size=4").ended(PATIENCE)
    assert status == 0, said
    assert said.count("Training starts at step 2\n") == 1
    for step in (3, 4):
        shutil.rmtree(dump / "checkpoint" / f"step-{step}")
    status, said = start(2, *flags, "--training.local_batch_size=2").ended(PATIENCE)
    assert status == 0, said
    assert said.count("Training starts at step 3\n") == 2
    expected, found = lines_of(whole), lines_of(dump)
    assert [*found] == [*range(2, 5)]
    for step, line in found.items():
        # Sums over ranks are added in another order: rounding, which three steps make larger.
        assert line == pytest.approx(expected[step], rel=1e-3), step


@pytest.mark.processes
def test_weighting_train_that_is_told_to_end_ends(tmp_path):
    """SIGTERM ends launcher, torchrun and ranks with a word and status 143."""
    dump = tmp_path / "dump"
    words = ["train", "uniform", "--module=faulty", "--config=tiny", "--ranks=2", *FLAGS[2:]]
    words += [FOREVER, f"--dump_folder={dump}"]
    command = Started("-m", "weighting", *words, folder=tmp_path)
    try:
        command.until(lambda: len(lines_of(dump)) >= 2, PATIENCE)
        rank = int((dump / folder.LOCK).read_text().split()[1])
        os.kill(command.pid, signal.SIGTERM)
        done = command.ended(SOON)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.endswith("stopped by SIGTERM\n")
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)


def test_a_rank_that_was_killed_is_named():
    """Of ranks that torchrun has ended nothing is said."""
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file="")
        for rank, code in enumerate([-signal.SIGTERM, -signal.SIGKILL, 1])
    }
    said = launch._killed(ChildFailedError("train", failures))
    assert said == "error: rank 1 was ended by SIGKILL, as when memory runs short\n"
    del failures[1]
    assert launch._killed(ChildFailedError("train", failures)) == ""


# Clocks -------------------------------------------------------------------------------------------

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long offset(void) {
    const char *days = getenv("CLOCK_DAYS");
    return days ? 86400 * atol(days) : 0;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""
"""The time of day, so many days off."""


def jump(days):
    """Set this process's clock."""
    os.environ["CLOCK_DAYS"] = str(days)


class Jumps:
    """Sets the first rank's clock back, and then forward."""

    def __call__(self):
        """Put counting functions in place."""
        Before("titan_integration.observe.metrics:append_line", 1, partial(jump, -40))()
        Before(
            "titan_integration.state.checkpoint:ResumingCheckpointManager.dcp_save",
            2,
            partial(jump, 9),
        )()


@pytest.mark.processes
def test_a_clock_that_jumps_changes_nothing(whole, start, forks, tmp_path):
    """Back by 40 days in a step, forward in a save; checkpoints dated wrongly go by their step."""
    if not forks:
        pytest.skip("there is no C compiler to make a clock that jumps")
    dump = copy_of(whole, tmp_path / "dump", 1, 2)
    os.utime(dump / "checkpoint" / "step-1", (4e9, 4e9))
    os.utime(dump / "checkpoint" / "step-2", (1e9, 1e9))
    flags = [f"--dump_folder={dump}", "--training.steps=4", *SIZE, *KEEP]
    run = start(2, *flags, "--checkpoint.keep_latest_k=2", first=Jumps())
    status, said = run.ended(PATIENCE)
    assert status == 0, said
    assert said.count("Training starts at step 3\n") == 2
    assert lines_of(dump) == {step: lines_of(whole)[step] for step in range(3, 5)}
    assert saved(dump) == [2, 3, 4], "the host keeps two, and the last"
    log = [line.split()[1] for line in said.splitlines() if line.startswith("[titan]")]
    assert len(set(log)) > 2, "the clock has jumped"


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_eight_first_uses_of_a_cache_at_once_make_whole_files(tmp_path):
    """Two of them are killed while they write; the files are those that one process makes."""
    jobs = {"eight": 8, "one": 1}
    for name in jobs:
        (tmp_path / f"meeting of {name}").mkdir()
    processes = [
        forked(
            use_first,
            tmp_path / name,
            tmp_path / f"meeting of {name}",
            number,
            die=name == "eight" and i < 2,
        )
        for name, number in jobs.items()
        for i in range(number)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2 + [0] * 7
    eight, one = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*.json")
        }
        for name in ("eight", "one")
    )
    assert {path.name for path in one} == {"tokenizer.json", "tokenizer_config.json"}
    assert eight == one


# Vocabularies -------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tokenizer_larger_than_the_model_ends_the_run(ranks, start, tmp_path):
    """One message with both sizes and status 2, also where ranks share the vocabulary."""
    whole = ensure_tokenizer()
    shutil.copytree(whole, tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    tokenizer.add_tokens(["<|one more|>"])
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    flags = [f"--hf_assets_path={tmp_path / 'tokenizer'}", f"--dump_folder={tmp_path / 'dump'}"]
    flags.append(f"--parallelism.tensor_parallel_degree={ranks}")
    run = start(ranks, *SIZE, *flags, "--training.steps=3")
    assert "has 2049 tokens, and the model" in message(run.ended(PATIENCE))

"""A small training, what is done to it in the middle, and what it says."""

import functools
import os
import pkgutil
import shutil
import signal
import time

from forked import start
from runs import environment
from warm import be_warm

from titan_integration.data import tokenizer
from weighting.cli import main
from weighting.runs.files import read_lines

FLAGS = [
    "--module=faulty",
    "--config=tiny",
    "--training.seq_len=32",
    "--metrics.disable_color_printing",
    "--debug.seed=1",
]


def tiny():
    """Return the debug model's config with one layer of width 32."""
    from titan_integration.config_registry import llama3_debugmodel  # noqa: PLC0415 - in its ranks
    from titan_integration.paper import resized  # noqa: PLC0415

    config = llama3_debugmodel()
    config.model_spec = resized(config.model_spec, layers=1, heads=2, width=32)
    config.activation_checkpoint = None
    return config


def small_qwen3():
    """Return the host's Qwen3 with two layers."""
    return _of_two_layers("qwen3_debugmodel")


def small_deepseek_v3():
    """Return the host's DeepSeek-V3 with two layers, the second a mixture of experts."""
    return _of_two_layers("deepseek_v3_debugmodel")


def small_mtp():
    """Return the same with a head that predicts two tokens ahead."""
    return _of_two_layers("deepseek_v3_debugmodel_mtp")


def _of_two_layers(name):
    from titan_integration import config_registry  # noqa: PLC0415 - in its ranks

    config = getattr(config_registry, name)()
    del config.model_spec.model.layers[2:]
    config.activation_checkpoint = None
    return config


def fails_alone():
    """Return the same; the second rank finds an error in step 2, and waits a second for others."""
    from titan_integration.host import user_errors  # noqa: PLC0415 - in its ranks

    user_errors._HEARING = 1.0

    def fail():
        msg = "only here"
        raise ValueError(msg)

    if os.environ.get("RANK") == "1":
        _before_step(2, fail)
    return tiny()


def chats():
    """Return the same on chats, through the host's own loader; `CHATS` names their folder."""
    from torchtitan.hf_datasets.text_datasets import ChatDataLoader  # noqa: PLC0415 - in its ranks

    folder = os.environ["CHATS"]
    config = tiny()
    config.hf_assets_path = folder
    files = {"data_files": f"{folder}/chats.json", "split": "train", "cache_dir": f"{folder}/hf"}
    config.dataloader = ChatDataLoader.Config(
        dataset_path="json", load_dataset_kwargs=files, sample_processor=lambda x: x["messages"]
    )
    return config


def dies_once():
    """Return the same; the second rank is killed before step 4, the first time it is started."""
    if (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0"):
        _before_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return tiny()


def impatient():
    """Return the same; ranks look for files of others for a second."""
    from titan_integration.state import checkpoint  # noqa: PLC0415 - in its ranks

    checkpoint._PATIENCE = 1.0
    return tiny()


def _before_step(step, action):
    from titan_integration.trainer.trainer import WeightedTrainer  # noqa: PLC0415 - in its ranks

    train_step = WeightedTrainer.train_step

    def changed(self, batches):
        if self.step == step:
            action()
        train_step(self, batches)

    WeightedTrainer.train_step = changed


class Run:
    """A training that was started, first of a process group; its ranks speak to a file.

    Args:
        log: That file.
        ranks: How many.
        flags: Of torchtitan, after those above.
        first: What each rank calls before it trains; can be pickled.
        meet: Of several nodes, `nodes`, `node` and `meeting` as `start` takes them.
    """

    def __init__(self, log, ranks, *flags, first=None, **meet):
        self.log = log
        self.log.unlink(missing_ok=True)
        command = ["-m", "torchtitan.train", *FLAGS, *map(str, flags)]
        self.agent = start(ranks, command, (log, log), environment(), first, **meet)

    def ended(self, patience):
        """Wait until it has ended; return its status and what was said."""
        self.agent.join(patience)
        assert self.agent.exitcode is not None, f"still there after {patience} s: {self.said()}"
        return self.agent.exitcode, self.said()

    def said(self):
        """Return what has been said by now, without torchrun's words."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "".join(x for x in text.splitlines(keepends=True) if "torch/distributed/el" not in x)


def whole_and_resumed(folder, *flags):
    """Train six steps, then go on from the checkpoint of step 3; yield metrics of both by step."""
    for name in ("whole", "resumed"):
        out, saved = folder / name, folder / "whole/checkpoint/step-3"
        if name == "resumed":
            shutil.copytree(saved, out / "checkpoint/step-3")
        kept = ["--training.steps=6", "--checkpoint.enable", "--checkpoint.interval=3"]
        kept += ["--checkpoint.keep_latest_k=0", "--metrics.log_freq=1", f"--dump_folder={out}"]
        status, said = Run(folder / "log", 1, "--weighting.spec=linupper", *flags, *kept).ended(300)
        assert status == 0, said[-3000:]
        yield {line["step"]: line for line in read_lines(out / "weighting/metrics.jsonl")}


def check_resumed(whole, resumed, *keys):
    """Check that a run went on from step 3 as the whole one did, in the numbers of some names."""
    assert ([*whole], [*resumed]) == ([1, 2, 3, 4, 5, 6], [4, 5, 6])
    for step, line in resumed.items():
        for key in ("unweighted_loss", "weighted_loss", *keys):
            assert line[key] == whole[step][key], (step, key)


class Before:
    """Does something on the first rank before a certain call of a function.

    Args:
        place: The function, as "package.module:name.name".
        number: Which call, from 1 on.
        action: What is done; can be pickled.
    """

    def __init__(self, place, number, action):
        self.place, self.number, self.action = place, number, action

    def __call__(self):
        """Put a counting function in the place of the other."""
        if os.environ["RANK"] != "0":
            return
        module, _, path = self.place.partition(":")
        owner, _, name = path.rpartition(".")
        owner = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
        function, calls = getattr(owner, name), []

        @functools.wraps(function)
        def counting(*args, **kwargs):
            calls.append(1)
            if len(calls) == self.number:
                self.action()
            return function(*args, **kwargs)

        setattr(owner, name, counting)


def launched(log, words):
    """Be `weighting train` in a process of its own."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    main(["train", *words])


def on_node(home, log, words):
    """Be `weighting train` on a node with a home of its own, first of a process group."""
    os.setsid()
    be_warm()
    home.mkdir(exist_ok=True)
    os.environ.update(environment(), HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(["train", *words])


def use_first(cache, meeting, number, *, die):
    """Make a tokenizer in a cache as so many others do, or die in the middle of that.

    Each leaves a file in a folder when it has begun to write, and waits for the others'.
    """
    os.environ["WEIGHTING_CACHE"] = str(cache)
    tokenizer.SAMPLE_CHARS = 10_000
    fsync = os.fsync

    def held(file):
        os.fsync = fsync
        (meeting / str(os.getpid())).touch()
        while len([*meeting.iterdir()]) < number:
            time.sleep(0.02)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = held
    tokenizer.ensure_tokenizer(300)

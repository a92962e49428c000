"""What is wrong with data, tokenizer or settings is said before the host builds anything."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.trainer import Trainer

from titan_integration.config_registry import llama3_debugmodel
from titan_integration.data import documents
from titan_integration.data import loader as data
from titan_integration.data.loader import DomainTextDataLoader
from titan_integration.trainer import preflight, trainer
from weighting.build import plan_of
from weighting.language.read import resolve

TABLE = "table(code=2, prse=1) -> mean_one"
GOOD = [{"text": f"word {i} " * 20, "domain": ("code", "prose")[i % 2]} for i in range(40)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return the config of a small run on a good file."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = llama3_debugmodel()
    config.dump_folder = str(tmp_path / "dump")
    config.training.seq_len = 32
    config.training.local_batch_size = 2
    config.weighting.spec = "linupper"
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in GOOD))
    config.dataloader = DomainTextDataLoader.Config(dataset_path=str(path))
    return config


def write(config, content):
    """Have the config read a file of this content."""
    path = Path(config.dataloader.dataset_path).with_name("bad.jsonl")
    path.write_bytes(content)
    config.dataloader.dataset_path = str(path)


def spec(text):
    """Return a change of the spec."""
    return lambda config: setattr(config.weighting, "spec", text)


def validate(**loader):
    """Return a change that validates, on data of which this is different."""

    def change(config):
        config.validator.enable = True
        config.validator.dataloader = replace(config.dataloader, infinite=False, **loader)

    return change


def stream(config):
    """Stream a file whose first record has no text."""
    write(config, b'{"domain": "code"}\n')
    config.dataloader.streaming, config.dataloader.domains = True, ["code"]


def global_batch(config):
    """Ask for a global batch that has not a microbatch of every domain."""
    config.weighting.spec = "doge-proxy"
    config.training.global_batch_size = 6


def foreign_checkpoints(config):
    """Record, and save checkpoints by the host's own manager."""
    config.weighting.record = "every=10"
    config.checkpoint = CheckpointManager.Config(enable=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (spec(TABLE), "the data has no domain 'prse'; did you mean"),
        (spec("rho-1"), "good.jsonl:1: no column 'ref_loss'"),
        (lambda config: write(config, b""), "bad.jsonl: no text in any record"),
        (lambda config: write(config, b'{"text": "\xff"}'), "bad.jsonl:1: not UTF-8 text"),
        (lambda config: write(config, b'{"text": "a"}'), "bad.jsonl: too little text"),
        (lambda config: Path(config.dataloader.dataset_path).unlink(), "no such file or directory"),
        (stream, "no column 'text'"),
        (validate(dataset_path="nowhere.jsonl"), "nowhere.jsonl: no such file or directory"),
        (validate(split="train", text_column="body"), "no column 'body'"),
        (lambda config: setattr(config, "hf_assets_path", "nowhere"), "--hf_assets_path nowhere"),
        (foreign_checkpoints, "make yours a subclass of titan_integration.state.checkpoint"),
        (global_batch, "takes a microbatch of each of the 2 domains"),
    ],
    ids=[
        "misspelt domain in the spec",
        "missing column",
        "empty file",
        "undecodable text",
        "too little text",
        "missing file",
        "stream",
        "missing validation file",
        "validation column",
        "missing tokenizer",
        "a record beside checkpoints of another manager",
        "global batch",
    ],
)
def test_errors_come_before_the_model_is_built(config, monkeypatch, capsys, change, told):
    """Each is one message and status 2, and the host's trainer has not begun."""
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("the host builds"))
    monkeypatch.setattr(trainer, "claim", lambda _: None)  # would stay open as long as the error
    change(config)
    with pytest.raises(SystemExit) as stopped:
        config.build()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert told in said


def test_what_was_opened_before_is_not_read_again(config, monkeypatch):
    """The loaders of training and validation take the documents that were checked; only once."""
    validate()(config)
    read, count = documents.local_documents, []
    monkeypatch.setattr(data, "local_documents", lambda *args: count.append(1) or read(*args))
    facts = preflight.open_data(config, plan_of(resolve("linupper")))
    assert facts["training"] == facts["validation"]
    opened = len(count)
    common = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 32, "local_batch_size": 2}
    common["tokenizer"] = preflight.build_tokenizer(config)
    config.dataloader.build(**common)
    assert len(count) == opened, "read again"
    config.dataloader.build(**common)
    assert len(count) == opened + 1, "kept for one loader only"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["index", "stream"])
def test_a_document_of_five_million_characters_is_tokenized_once(config, monkeypatch, streaming):
    """From the checks to the first batch, which together take little longer than that."""
    write(config, json.dumps({"text": ("=" * 200 + " ") * 25_000, "domain": "a"}).encode())
    config.dataloader = replace(config.dataloader, streaming=streaming, domains=["a"])
    encode, took = HuggingFaceTokenizer.encode, []

    def timed(self, text, **marks):
        start = time.process_time()
        found = encode(self, text, **marks)
        took.extend([time.process_time() - start] * (len(text) > 5_000_000))
        return found

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", timed)
    start = time.process_time()
    preflight.open_data(config, plan_of(resolve("linupper")))
    common = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 32, "local_batch_size": 2}
    next(iter(config.dataloader.build(tokenizer=preflight.build_tokenizer(config), **common)))
    assert len(took) == 1
    assert time.process_time() - start < 2 * took[0]

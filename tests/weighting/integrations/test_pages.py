"""The `py` blocks of the pages on other trainers and on fine-tuning run, in their order."""

import importlib
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers import Trainer as HuggingFaceTrainer
from trl import SFTConfig, SFTTrainer

from weighting.integrations import versions
from weighting.integrations.transformers import WeightingCallback

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "other-trainers.md"
sys.path.insert(0, str(ROOT / "tests" / "docs"))
from blocks import blocks  # noqa: E402

sys.path.pop(0)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning",
        "ignore:.*does not have many workers",
        "ignore:.*LeafSpec",
        "ignore:.*`training_step` returned",
        "ignore:.*number of training batches",
        "ignore::weighting.OneUnitWarning",
        "ignore::UserWarning:trl",
    ),
]


def before():
    """Return what a reader has: a model, its data, and the settings of a trainer."""
    words = {str(i): i for i in range(tiny.VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="0"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2")
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    options |= {"dataloader_pin_memory": False}
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in tiny.rows()]
    batch = tiny.padded(tiny.rows())
    del batch["domain"]
    model = tiny.model()
    return {
        "model": model,
        "reference": tiny.model().eval(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": torch.utils.data.DataLoader([batch] * 10, batch_size=None),
        "data": Dataset.from_list(
            [
                {k: v.tolist() for k, v in zip(batch, x, strict=True)}
                for x in zip(*batch.values(), strict=True)
            ]
        ),
        "collator": DataCollatorForTokenClassification(tokenizer),
        "chats": Dataset.from_list([{"prompt": "3 4", "completion": f" {i} 9"} for i in range(8)]),
        "tokenizer": tokenizer,
        "args": TrainingArguments("out", **options),
        "sft_args": SFTConfig("sft", bf16=False, gradient_checkpointing=False, **options),
        "Trainer": HuggingFaceTrainer,
        "SFTTrainer": SFTTrainer,
        "rows": rows,
    }


@pytest.mark.parametrize("page", ["other-trainers", "fine-tuning"])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    """Each `py` block trains with what the page says a reader has."""
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks() if block.page == page and block.language == "py"]
    assert len(found) >= 3
    names = {}
    swift = types.ModuleType("swift.callbacks")
    swift.callbacks_map = {}
    monkeypatch.setitem(sys.modules, "swift.callbacks", swift)
    for number, block in enumerate(found):
        names = {**names, **{k: v for k, v in before().items() if k != "rows" or k not in names}}
        exec(compile(block.text, f"{page}.md, block {number}", "exec"), names)
    if page == "other-trainers":
        assert "unweighted_loss" in capsys.readouterr().out
        assert isinstance(swift.callbacks_map["weighting"](None, None), WeightingCallback)
    assert (tmp_path / "out" / "weighting" / "run.json").exists()


def test_the_page_names_the_versions():
    """Those that are tested, which the lock has, those that were read, and what is refused."""
    text = PAGE.read_text(encoding="utf-8")
    assert f"Tested with {', '.join(f'{n} {v}' for n, v in versions.TESTED.items())}." in text
    for package, floor in versions.FLOORS.items():
        assert f"{package} before {floor} and from {versions.CEILINGS[package]} on" in text
    for package, read in versions.READ.items():
        assert f"{package}'s source" in text
        assert f"read at {read}" in text
    lock = (ROOT / ".ci" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for package, tested in versions.TESTED.items():
        assert f"{package}=={tested} \\" in lock


def test_the_table_of_costs_has_each_way_to_train(monkeypatch):
    """The page was made by the script as it is, with the versions that are tested."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("integrations")
    page = (ROOT / "benchmarks" / "integrations.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\w.*?) \| [\dn]", page, re.MULTILINE)
    assert found == list(script.WAYS)
    for package, tested in versions.TESTED.items():
        assert f"{package} {tested}" in page
    assert re.search(r"^\d+ cores, no GPU; process-CPU time", page, re.MULTILINE)


def test_what_is_said_of_each_host_fits_a_screen():
    """No section has more than fifty lines of a hundred characters."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) >= 7
    for section in sections:
        lines = [part for x in section.splitlines() for part in textwrap.wrap(x, 100) or [""]]
        assert len(lines) <= 50, section.partition("\n")[0]


def test_hosts_outside_the_versions_are_refused_and_others_than_the_tested_warned_of(monkeypatch):
    """A message says which version there must be, and why; a warning, which one was tested."""
    found = {"transformers": "5.7.1", "accelerate": "1.15.0", "peft": "0.21.2"}
    monkeypatch.setattr(versions, "version", found.get)
    monkeypatch.setattr(versions, "_warned", set())
    with pytest.raises(ImportError, match=r"transformers 5\.7\.1 is too old.*>=5\.8,<6"):
        versions.need("transformers")
    found["transformers"] = "6.0.1"
    with pytest.raises(ImportError, match=r"transformers 6\.0\.1 is newer than what"):
        versions.need("transformers")
    found |= {"transformers": "5.8.0", "peft": "0.22.0"}
    with pytest.warns(UserWarning, match="not tested with") as told:
        versions.need("transformers")
    for (package, here, tested), warning in zip(
        [("transformers", "5.8.0", "5.24.0"), ("peft", "0.22.0", "0.21.2")], told, strict=True
    ):
        assert str(warning.message).endswith(f"{package} {here} but with {tested}")
    versions.need("transformers")  # once

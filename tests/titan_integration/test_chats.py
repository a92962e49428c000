"""Chats through torchtitan's own loader: prompts weigh nothing, and a run resumes."""

import json
import shutil

import faulty
import pytest
import torch
from faulty import Run
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_integration.data.tokenizer import ensure_tokenizer
from weighting.runs.files import read_lines

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with chats, and a tokenizer that has a template for them."""
    folder = shutil.copytree(ensure_tokenizer(), tmp_path / "chats")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " * (1 + i % 3)},
                {"role": "assistant", "content": f"reply {i} " * (1 + i % 5)},
            ]
        }
        for i in range(40)
    ]
    (folder / "chats.json").write_text(json.dumps(chats))
    monkeypatch.setenv("CHATS", str(folder))
    return folder


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_run_on_the_hosts_chats_predicts_answers_alone_and_resumes(folder, tmp_path):
    """What the host masks has no label; after a stop come the same chats."""
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(folder))
    loader = faulty.chats().dataloader.build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=64, local_batch_size=4
    )
    labels = torch.stack([labels for (_, labels), _ in zip(iter(loader), range(6), strict=False)])
    said = tokenizer.decode(labels[labels != -100].tolist())
    assert "reply" in said
    assert "question" not in said

    found = []
    for name in ("whole", "resumed"):
        out = tmp_path / name
        if found:
            shutil.copytree(tmp_path / "whole/checkpoint/step-3", out / "checkpoint/step-3")
        flags = ["--config=chats", "--weighting.spec=linupper", f"--dump_folder={out}"]
        flags += ["--training.seq_len=64", "--training.local_batch_size=4", "--training.steps=6"]
        flags += ["--checkpoint.enable", "--checkpoint.interval=3", "--metrics.log_freq=1"]
        flags += ["--checkpoint.keep_latest_k=0"]
        status, said = Run(tmp_path / "log", 1, *flags).ended(300)
        assert status == 0, said[-3000:]
        found.append({x["step"]: x for x in read_lines(out / "weighting/metrics.jsonl")})
    whole, resumed = found
    assert ([*whole], [*resumed]) == ([1, 2, 3, 4, 5, 6], [4, 5, 6])
    for step, line in resumed.items():
        for key in ("unweighted_loss", "weighted_loss"):
            assert line[key] == whole[step][key], (step, key)

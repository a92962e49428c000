"""Chats through torchtitan's own loader: prompts weigh nothing, and a run resumes."""

import json
import shutil

import faulty
import pytest
import torch
from faulty import check_resumed, whole_and_resumed
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_integration.data.tokenizer import ensure_tokenizer

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

    flags = ["--config=chats", "--training.seq_len=64", "--training.local_batch_size=4"]
    check_resumed(*whole_and_resumed(tmp_path, *flags))

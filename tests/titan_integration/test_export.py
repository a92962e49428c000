"""A checkpoint for Hugging Face: the same logits there, and the same tokens of a text."""

import functools
import importlib
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.testing import assert_close
from warm import weighting

import titan_integration.host.cpu as on_cpu

on_cpu.use_cpu()

from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.models.qwen3 import model_registry as qwen3  # noqa: E402

from titan_integration import config_registry  # noqa: E402
from titan_integration.commands import evaluate, export, train_and_export  # noqa: E402
from titan_integration.host.hf_configs import hf_config  # noqa: E402
from titan_integration.loss.reference_model import find_checkpoint, load_model  # noqa: E402
from titan_integration.paper import resized  # noqa: E402
from weighting.report import tables  # noqa: E402
from weighting.report.read import read_runs  # noqa: E402

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

LENGTH = 48
TASKS = Path(__file__).parent / "tasks"
# What transformers itself does, and what torch says of a process alone.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def transformers():
    """Return the library, which takes seconds to import, when a test asks for it."""
    return importlib.import_module("transformers")


def tiny_llama():
    """Return the debug model's config with two layers, two heads for keys and Llama 3.1's RoPE."""
    config = config_registry.llama3_debugmodel()
    config.model_spec = resized(config.model_spec, layers=2, heads=4, width=64)
    for block in config.model_spec.model.layers:
        block.attention.rope = replace(
            block.attention.rope, scaling="llama", original_max_position_embeddings=16
        )
    return config


def tiny_tied():
    """Return the same with one matrix for both ends."""
    config = tiny_llama()
    config.model_spec.model.enable_weight_tying = True
    return config


def tiny_qwen3():
    """Return the host's Qwen3 with two layers; its embeddings are tied."""
    return _of_two_layers("qwen3_debugmodel")


def tiny_qwen3_moe():
    """Return the host's Qwen3 of experts with two layers."""
    return _of_two_layers("qwen3_moe_debug")


def tiny_deepseek_v3():
    """Return the host's DeepSeek-V3 with two layers, one of experts, which sigmoids score."""
    config = _of_two_layers("deepseek_v3_debugmodel")
    config.model_spec.model.layers[1].moe.router.score_func = "sigmoid"
    return config


OF_EXPERTS = (tiny_qwen3_moe, tiny_deepseek_v3)


def _of_two_layers(name):
    config = getattr(config_registry, name)()
    del config.model_spec.model.layers[2:]
    return config


def saved(config, folder):
    """Return a model with random weights, which a checkpoint in the folder holds."""
    config.training.seq_len = LENGTH
    torch.manual_seed(0)
    model_config = config.model_spec.model
    model_config.update_from_config(config=config)
    model = model_config.build()
    model.init_weights(buffer_device=None)
    dcp.save(model.state_dict(), checkpoint_id=str(folder / "step-3"))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_tied, tiny_qwen3, *OF_EXPERTS])
def test_logits_in_transformers_are_ours(make, tmp_path, transformers):
    """Of every token, to 1e-5, and of experts, which the host multiplies in bfloat16, to that."""
    config = make()
    model = saved(config, tmp_path)
    export.write(config, tmp_path / "step-3", tmp_path / "hf", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.tie_word_embeddings == config.model_spec.model.enable_weight_tying
    tokens = torch.randint(0, 2048, (2, LENGTH))
    positions = torch.arange(LENGTH).repeat(2, 1)
    with torch.no_grad():
        masks = model.get_attention_masks(positions)
        ours = model(tokens, positions=positions, attention_masks=masks)
        there = theirs(tokens).logits
    if make in OF_EXPERTS:
        assert (there - ours).norm() < 3e-3 * ours.norm()
    else:
        assert_close(there, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_a_folder_for_hugging_face_is_a_checkpoint_too(make, tmp_path):
    """What was exported is loaded again, bit for bit, and misfits are told."""
    config = make()
    model = saved(config, tmp_path)
    export.write(config, tmp_path / "step-3", tmp_path / "hf", torch.float32)
    assert find_checkpoint(str(tmp_path / "hf")) == tmp_path / "hf"
    spec = config.model_spec
    adapter = spec.state_dict_adapter(spec.model, None)
    other = spec.model.build()
    load_model(other, tmp_path / "hf", "it", "CHECKPOINT", adapter)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    (wrong := make()).model_spec.model.layers.append(wrong.model_spec.model.layers[0])
    with pytest.raises(ValueError, match=r"is no checkpoint of it: it has no model\.layers\.2"):
        load_model(wrong.model_spec.model.build(), tmp_path / "hf", "it", "CHECKPOINT", adapter)


@pytest.mark.slow
def test_a_text_begins_in_transformers_as_in_training(tmp_path, transformers):
    """With the token that begins documents, once; the model's files know it, too."""
    config = tiny_llama()
    saved(config, tmp_path)
    export.write(config, tmp_path / "step-3", tmp_path / "hf", torch.bfloat16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
    text = "def weigh(tokens):\n    return tokens"
    assert theirs(text).input_ids == ours.encode(text, add_bos=True, add_eos=False)
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16


def test_experts_scored_by_softmax_are_refused(tmp_path):
    """Transformers' DeepSeek-V3 scores them by sigmoid alone, as the released one does."""
    spec = config_registry.deepseek_v3_debugmodel().model_spec
    with pytest.raises(ValueError, match="scored by softmax, and transformers' DeepSeek-V3"):
        hf_config(spec, str(tmp_path), 32)


@pytest.mark.slow
def test_experts_chosen_with_a_bias_are_refused(tmp_path):
    """Transformers' Qwen3 has no place for it."""
    config = tiny_qwen3_moe()
    config.training.seq_len = LENGTH
    config.model_spec.model.update_from_config(config=config)
    model = config.model_spec.model.build()
    model.init_weights(buffer_device=None)
    model.layers["0"].moe.expert_bias_E.fill_(0.5)
    dcp.save(model.state_dict(), checkpoint_id=str(tmp_path / "step-3"))
    with pytest.raises(ValueError, match="chosen with a bias that balances their load"):
        export.write(config, tmp_path / "step-3", tmp_path / "hf", torch.float32)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("deepseek_v3_debugmodel", "scored by softmax"),
        ("qwen3_moe_debug", "a bias that balances their load"),
        ("llama3_x", "no config function 'llama3_x'"),
    ],
)
def test_what_cannot_be_exported_is_said_before_training(config, reason, tmp_path, monkeypatch):
    """By `weighting train --hf`; nothing has been trained by then."""
    given = {"module": "titan_integration", "config": config, "spec": "uniform", "name": "uniform"}
    monkeypatch.setattr(train_and_export.train, "on_ranks", None)
    with pytest.raises(ValueError, match=reason):
        train_and_export.main(**given, flags=[f"--dump_folder={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--checkpoint.no-enable", "--checkpoint.load_only"])
def test_a_run_that_would_save_nothing_is_not_exported(flag, tmp_path, monkeypatch):
    """Said before training, as the model would be lost."""
    given = {"module": "titan_integration", "config": "llama3_debugmodel"}
    given |= {"spec": "uniform", "name": "uniform"}
    monkeypatch.setattr(train_and_export.train, "on_ranks", None)
    with pytest.raises(ValueError, match="none would be saved"):
        train_and_export.main(**given, flags=[f"--dump_folder={tmp_path / 'out'}", flag])


def test_flags_that_are_none_are_refused_with_models_for_hugging_face_too(tmp_path):
    """Before anything is asked."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    given = {"module": "titan_integration", "config": "llama3_debugmodel", "tasks": ["sciq"]}
    with pytest.raises(ValueError, match="no flag '--device'"):
        evaluate.main(models=[str(tmp_path)], **given, flags=["--device", "cuda:1"])


def test_a_model_whose_config_is_not_known_takes_the_published_one(tmp_path):
    """From beside the tokenizer; without it, it is refused."""
    spec = replace(qwen3("debugmodel"), name="another")
    with pytest.raises(ValueError, match=r"another debugmodel: its config\.json is not written"):
        hf_config(spec, str(tmp_path), 32)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert hf_config(spec, str(tmp_path), 32) == {"model_type": "other"}
    assert hf_config(model_registry("8B"), "", 8192)["rope_scaling"]["rope_type"] == "llama3"


def test_the_command_makes_a_new_folder_alone(tmp_path):
    """One that is there is left alone, and a checkpoint that is not is said."""
    given = {"module": "titan_integration", "config": "llama3_debugmodel"}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    with pytest.raises(ValueError, match=re.escape(f"CHECKPOINT {tmp_path / 'no'}: no such")):
        export.main(checkpoint=str(tmp_path / "no"), out=str(tmp_path / "x"), **given)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / ".metadata").touch()
    with pytest.raises(ValueError, match="exists already"):
        export.main(checkpoint=str(tmp_path), out=str(tmp_path / "there"), **given)
    assert [x.name for x in (tmp_path / "there").iterdir()] == ["kept"]
    with pytest.raises(ValueError, match="no config function 'llama3_x'"):
        export.main(checkpoint="a", out="b", module="titan_integration", config="llama3_x")


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_is_exported_at_its_end_evaluated_and_goes_on(
    tmp_path, capsys, transformers, monkeypatch
):
    """By `weighting train --hf`: what is exported is its last step, from which more steps go on.

    Asked the questions in `tasks`, offline, it answers as it does as a checkpoint, and so again.
    """
    out = tmp_path / "out"
    words = ["linupper", "--module=faulty", "--config=tiny", "--ranks=1", f"--out={out}", "--hf"]
    words += ["--training.seq_len=32", "--training.local_batch_size=2", "--debug.seed=1"]

    def started(*more):
        done = weighting("train", *words, *more)
        return done.returncode, done.stdout + done.stderr

    status, said = started("--steps=3")
    assert status == 0, said
    assert f"exported: {out / 'hf'}, of {out / 'checkpoint' / 'step-3'}" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "hf")
    assert theirs.config.num_hidden_layers == 1
    # Else the harness reads its own tasks as well, 14,000 files, whenever it is asked.
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    own_alone = functools.partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", own_alone)
    asked_twice(out, capsys)
    status, said = started("--steps=4")
    assert status == 2
    assert f"--hf: {out / 'hf'} exists already" in said
    (out / "hf").rename(out / "before")
    status, said = started("--steps=4", f"--checkpoint.initial_load_path={out / 'before'}")
    assert status == 0, said
    assert "Training starts at step 4" in said


def asked_twice(run, capsys):
    """Evaluate a run's checkpoint and its export, twice, and look at what is said and kept."""
    given = {"module": "faulty", "config": "tiny", "flags": ["--training.seq_len=32"]}
    ask = {"tasks": ["next_word"], "shots": 1, "task_folder": str(TASKS), **given}
    kept, said = [], []
    for _ in range(2):
        assert evaluate.main(models=[str(run), str(run / "hf")], **ask) == 0
        said.append(capsys.readouterr().out)
        kept.append((run / "weighting" / "evaluation.json").read_bytes())
    assert kept[0] == kept[1]
    assert said[0] == said[1]
    assert "+0.00 [+0.00, +0.00]" in said[0]
    found = json.loads(kept[0])["checkpoints"]
    assert [*found] == ["step-3", "hf"]
    score = found["hf"]["next_word"]
    assert (score["metric"], score["shots"], len(score["items"])) == ("acc", 1, 6)
    assert {*score["items"].values()} <= {0, 1}
    table = tables.benchmarks(read_runs([run]))
    assert table.rows == [("next_word, 1-shot acc", f"{100 * score['value']:.2f}")]
    (run / "weighting" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="--tasks whole_text: has no number for each"):
        evaluate.main(models=[str(run)], **ask | {"tasks": ["next_word", "whole_text"]})
    found = json.loads((run / "weighting" / "evaluation.json").read_text())["checkpoints"]
    assert [*found["step-3"]] == ["next_word"], "what was found before is kept"
    with pytest.raises(ValueError, match=r"no task 'next_wrd' \(did you mean next_word"):
        evaluate.main(models=[str(run)], **ask | {"tasks": ["next_wrd"]})

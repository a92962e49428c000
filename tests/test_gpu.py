"""Packing and the loop for a GPU, on CPU with a tiny model: runs, resumes, refusals, the table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from weighting.runs.files import read_lines

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
END = "<|end_of_text|>"
TEXTS = {
    "words": "the {} of a {} is not the {} but the sea – and that’s that. ",
    "code": "def f_{}(x):\n    return x[{}:] + {} * g(x)\n",
    "digits": "{} + {} = {}; ",
}


def load(name):
    """Return a script of benchmarks/ as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


gpu, pack = load("gpu"), load("pack")


def documents(split):
    """Return records of each domain, lengths and numbers differing."""
    g = np.random.default_rng(len(split))
    for domain, text in TEXTS.items():
        for length in range(3, 60 if split == "train" else 15):
            numbers = g.integers(0, 50, (length, 3))
            yield {"domain": domain, "text": "".join(text.format(*x) for x in numbers)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder of text and one of a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "valid"):
        (folder / split).mkdir()
        lines = "".join(json.dumps(x) + "\n" for x in documents(split))
        (folder / split / "text.jsonl").write_text(lines)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([x["text"] for x in documents("train")], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": END}))
    return folder


@pytest.fixture(scope="module")
def tokens(data):
    """Return the packed file."""
    out = data / "tokens.npz"
    told = ["--data", data, "--tokenizer", data / "tokenizer", "--out", out, "--seq_len", 32]
    assert pack.main([*map(str, told)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tokens, tmp_path_factory):
    """Return the folder of finished runs: four methods from one seed."""
    out = tmp_path_factory.mktemp("runs")
    for method in ("uniform", "linupper", "mile"):
        assert train(method, tokens, out) == 0
    assert train("rho-1", tokens, out, "--reference", out / "uniform-seed1") == 0
    return out


def train(method, tokens, out, *more):
    """Run the script with a tiny model on CPU; return its status."""
    told = ["--tokens", tokens, "--out", out, "--model=tiny", "--device=cpu", "--steps", STEPS]
    return gpu.main([*map(str, (method, *told, *more))])


def test_packed_rows_are_the_texts_of_their_domain(data, tokens):
    """Decoded, the rows of a domain are pieces of its documents with an end behind each."""
    cutter = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    found = np.load(tokens)
    about = json.loads(str(found["about"]))
    assert about["domains"] == sorted(TEXTS)
    assert about["vocabulary"] == cutter.get_vocab_size() == 300
    for split in ("train", "valid"):
        rows, ids = found[split], found[f"{split}_domain"]
        assert rows.dtype == np.uint16
        assert rows.shape == (len(ids), 33)
        for index, domain in enumerate(about["domains"]):
            texts = [x["text"] for x in documents(split) if x["domain"] == domain]
            encoded = [[*cutter.encode(x).ids, about["end"]] for x in texts]
            whole = [token for one in encoded for token in one]
            wanted = [tuple(whole[i : i + 33]) for i in range(0, len(whole) - 32, 33)]
            assert sorted(map(tuple, rows[ids == index].tolist())) == sorted(wanted)
            # Every document but those cut at the very end comes back.
            back = cutter.decode([t for row in wanted for t in row], skip_special_tokens=False)
            assert back.split(END)[:-1] == texts[: back.count(END)]
            assert back.count(END) >= len(texts) - 1
    assert (np.diff(found["train_domain"].astype(int)) != 0).sum() > len(TEXTS)  # shuffled
    assert (found["counts"] == np.bincount(found["train"].ravel(), minlength=300)).all()


def test_bytes_of_rows_are_those_of_their_text(data, tokens):
    """A byte-level token is as many bytes as it has letters, and the end is none."""
    cutter = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    found = np.load(tokens)
    length = [0 if x == END else len(x) for x in map(cutter.id_to_token, range(300))]
    exact = np.array(length)[found["train"]][:, 1:].sum(1)
    # Tokens of one character share its bytes unevenly, and a row may begin within one.
    assert np.abs(found["train_bytes"] - exact).max() <= 3
    assert (found["train_bytes"] == exact).mean() > 0.8
    assert pack.bytes_of("a–b", [(0, 1), (1, 2), (1, 2), (2, 3)]).tolist() == [1, 3, 0, 1]


def test_a_text_that_spells_the_end_is_no_end(data):
    """Only the end of a document is an end."""
    cutter = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    cutter.encode_special_tokens = True
    rows, _ = pack.cut(cutter, [f"a {END} b"], 0, 4)
    assert 0 not in rows


def test_what_cannot_be_packed_is_refused(data, tmp_path, capsys):
    """A vocabulary beyond two bytes, and a domain too small for a row."""
    out = tmp_path / "tokens.npz"
    words = {str(i): i for i in range(65_537)}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
    assert pack.main(["--data", str(data), "--tokenizer", str(tmp_path), "--out", str(out)]) == 2
    assert "65,537 tokens, and two bytes tell 65,536 apart" in capsys.readouterr().err

    told = ["--data", str(data), "--tokenizer", str(data / "tokenizer"), "--out", str(out)]
    assert pack.main([*told, "--seq_len", "100000"]) == 2
    assert "has no whole row of 100001 tokens in train" in capsys.readouterr().err
    told[1] = str(data / "train")
    assert pack.main(told) == 2
    assert "put what to train on into train/" in capsys.readouterr().err
    assert not out.exists()


def test_words_are_parted_by_how_often_they_come():
    """Half of all tokens, the next two fifths, the rest; words never seen are rare."""
    assert gpu.part_of(np.array([0, 30, 50, 20])).tolist() == [2, 1, 0, 1]
    assert gpu.part_of(np.array([1, 90, 9, 0])).tolist() == [2, 0, 2, 2]


@pytest.mark.slow
def test_runs_learn_from_the_same_start(runs):
    """All methods begin with one loss, and what is never weighted falls."""
    lines = {x.name: read_lines(x / "metrics.jsonl") for x in runs.iterdir()}
    assert len({line[0]["unweighted_loss"] for line in lines.values()}) == 1
    for name, line in lines.items():
        assert [x["step"] for x in line] == [1, 10, 12]
        assert line[-1]["unweighted_loss"] < line[0]["unweighted_loss"] - 0.05, name
        checks = read_lines(runs / name / "evaluation.jsonl")
        assert checks[-1]["step"] == STEPS
        assert checks[-1]["domain_mean_loss"] < checks[0]["domain_mean_loss"] - 0.05
    assert all(x["weighted_loss"] == x["unweighted_loss"] for x in lines["uniform-seed1"])
    assert all(x["max_weight"] == 1 for x in lines["uniform-seed1"])
    assert all(0.2 < x["ess_frac"] < 0.999 for x in lines["linupper-seed1"])
    # Of 32 x 32 tokens 60 % are kept, and all alike.
    assert lines["rho-1-seed1"][-1]["max_weight"] == pytest.approx(1024 / 614, rel=1e-5)
    assert lines["rho-1-seed1"][-1]["ess_frac"] == pytest.approx(614 / 1024, rel=1e-5)


@pytest.mark.slow
def test_an_evaluation_is_what_its_parts_are(runs, tokens):
    """Means over tokens, domains and bytes, against logits of the whole."""
    data = gpu.Data.read(tokens)
    model = gpu.Model(gpu.SIZES["tiny"], 300)
    model.load_state_dict(torch.load(runs / "mile-seed1" / "model.pt", weights_only=True))
    rows = data.valid.long()
    with torch.no_grad():
        logits = model(rows[:, :-1]) @ model.embedding.weight.T
    nll = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].double()
    each = [nll[data.valid_domain == i].mean().item() for i in range(3)]
    found = read_lines(runs / "mile-seed1" / "evaluation.jsonl")[-1]
    close = {"rel": 1e-5}  # float32, summed in another order
    assert found["loss"] == pytest.approx(nll.mean().item(), **close)
    assert found["domain_mean_loss"] == pytest.approx(sum(each) / 3, **close)
    assert found["domain/digits/loss"] == pytest.approx(each[1], **close)
    bits = nll.sum().item() / np.load(tokens)["valid_bytes"].sum() / np.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits, **close)
    shares = [(data.part[rows[:, 1:]] == i).double().mean().item() for i in range(3)]
    parts = sum(share * found[x] for share, x in zip(shares, gpu.PARTS, strict=True))
    assert parts == pytest.approx(found["loss"], **close)


def test_a_token_sees_only_the_tokens_before_it():
    """What follows changes nothing; what precedes, and where it is, does."""
    torch.manual_seed(0)
    model = gpu.Model(gpu.SIZES["tiny"], 50)
    row = torch.randint(50, (1, 16))
    other = row.clone()
    other[0, 8] = (row[0, 8] + 1) % 50
    with torch.no_grad():
        a, b, swapped = model(row), model(other), model(row[:, [1, 0, *range(2, 16)]])
    assert torch.equal(a[:, :8], b[:, :8])
    assert (a[:, 8:] - b[:, 8:]).abs().amin(1).max() > 0
    assert (a[:, 8] - swapped[:, 8]).abs().max() > 1e-6


@pytest.mark.slow
def test_interrupted_after_every_step_it_ends_with_the_same_bits(runs, tokens, tmp_path, capsys):
    """`--minutes 0` takes one step; six such and the rest are one run."""
    more = ("--reference", runs / "uniform-seed1")
    for step in range(1, 7):
        assert train("rho-1", tokens, tmp_path, *more, "--minutes=0") == 0
        assert f"stopped after step {step} of {STEPS}" in capsys.readouterr().out
        assert not (tmp_path / "rho-1-seed1" / "result.json").exists()
    assert train("rho-1", tokens, tmp_path, *more) == 0
    alike(tmp_path / "rho-1-seed1", runs / "rho-1-seed1")


STATEFUL = "loss -> mean(domain) -> exponentiated(0.5)"


@pytest.mark.slow
def test_killed_between_checkpoints_it_ends_with_the_same_bits(tokens, tmp_path, monkeypatch):
    """Lines after the checkpoint are made again, and a weighting that remembers goes on."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert train(STATEFUL, tokens, whole) == 0
    monkeypatch.setattr(gpu, "SAVE", 4)
    rate = gpu.learning_rate

    def kill(step, steps):
        if step == 7:
            raise KeyboardInterrupt
        return rate(step, steps)

    monkeypatch.setattr(gpu, "learning_rate", kill)
    with pytest.raises(KeyboardInterrupt):
        train(STATEFUL, tokens, cut)
    (folder,) = cut.iterdir()
    assert [x["step"] for x in read_lines(folder / "evaluation.jsonl")] == [2, 3, 5, 6]
    assert (folder / "checkpoint.pt").exists()
    monkeypatch.setattr(gpu, "learning_rate", rate)
    assert train(STATEFUL, tokens, cut) == 0
    alike(folder, whole / folder.name)


def alike(run, other):
    """Assert that two runs ended with the same bits."""
    a, b = (torch.load(x / "model.pt", weights_only=True) for x in (run, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ((x / "evaluation.jsonl").read_text() for x in (run, other))
    assert a == b
    a, b = (read_lines(x / "metrics.jsonl") for x in (run, other))
    shared = ("step", "unweighted_loss", "weighted_loss", "ess_frac", "gradient_norm")
    assert [[x[key] for key in shared] for x in a] == [[x[key] for key in shared] for x in b]


@pytest.mark.slow
def test_a_changed_argument_is_refused(runs, tokens, tmp_path, capsys):
    """A run is one thing; the message says what differs and what to do."""
    before = (runs / "mile-seed1" / "result.json").read_text()
    assert train("mile", tokens, runs, "--steps", "13") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "mile-seed1 was begun with steps 12, not 13; give the same, or another --out" in said
    assert (runs / "mile-seed1" / "result.json").read_text() == before
    assert train("mile", tokens, runs) == 0
    assert "mile-seed1 is finished" in capsys.readouterr().out

    changed = tmp_path / "mile.yaml"
    changed.write_text("version: 1\nname: mile\npipeline: entropy(gamma=2) -> token_scale\n")
    assert train(changed, tokens, runs) == 2
    assert "was begun with spec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("rho-1", (), "reads the losses of a reference; train one, and give --reference RUN"),
        ("mile", ("--reference", "nowhere"), "mile reads no ref_loss; leave out --reference"),
        ("rho-1", ("--reference", "nowhere"), "nowhere: no finished run is there"),
        ("uniform-domains", (), "draws data or waits for news"),
        ("longce", (), "reads columns.short_loss_4096, which this script does not have"),
        ("table-x-linupper", (), "domain"),
        ("linuper", (), "did you mean 'linupper'?"),
        ("uniform", ("--steps", "0"), "--steps: at least 1"),
        ("uniform", ("--tokens", "nowhere.npz"), "nowhere.npz: not a file of tokens"),
        ("uniform", ("--tokens", ROOT / "README.md"), "README.md: not a file of tokens"),
    ],
)
def test_what_cannot_be_run_is_refused(method, more, said, tokens, tmp_path, capsys):
    """Before anything is written."""
    assert train(method, tokens, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_table_compares_with_uniform_by_seed(runs, capsys):
    """One seed: bare differences; unfinished runs are left out."""
    (runs / "half-seed1").mkdir()
    assert gpu.main(["table", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Model tiny (")
    assert lines[2] == "| nats | uniform | linupper | mile | rho-1 |"
    cells = {x.split("|")[1].strip(): x.split("|")[2:-1] for x in lines[4:] if x}
    assert set(cells) == {"seeds", *gpu.LABELS.values(), *(f"domain/{x}/loss" for x in TEXTS)}
    found = {
        name: json.loads((runs / f"{name}-seed1" / "result.json").read_text())["evaluation"]
        for name in ("uniform", "mile")
    }
    mile, uniform = (found[x]["domain_mean_loss"] for x in ("mile", "uniform"))
    assert cells["mean over domains"][0].strip() == f"{uniform:.4f}"
    assert cells["mean over domains"][2].strip() == f"{mile:.4f} ({mile - uniform:+.4f})"
    assert gpu.main(["table", str(runs / "half-seed1")]) == 2
    assert "no finished run is there" in capsys.readouterr().err


def test_three_seeds_have_an_interval():
    """Around the mean of the paired differences, whatever the seeds themselves do."""
    base = {1: {"x": 3.0}, 2: {"x": 5.0}, 3: {"x": 4.0}, 4: {"x": 9.0}}
    mine = {1: {"x": 2.9}, 2: {"x": 4.7}, 3: {"x": 3.8}}
    # Drawn three times of three, the smallest or largest alone comes once in 27: within 2.5 %.
    assert gpu.cell(mine, base, "x") == "3.8000 (-0.2000, -0.3000 to -0.1000)"
    assert gpu.cell({1: mine[1], 2: mine[2]}, base, "x") == "3.8000 (-0.1000, -0.3000)"
    assert gpu.cell({7: mine[1]}, base, "x") == "2.9000"
    assert gpu.cell(base, base, "x") == "5.2500"


@pytest.mark.slow
def test_the_loop_needs_nothing_but_what_the_core_needs(runs, tokens, tmp_path):
    """Where these packages are not, a run still is."""
    absent = ("torchtitan", "transformers", "tokenizers", "pyarrow", "datasets", "matplotlib")
    code = f"""
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = ROOT / "benchmarks" / "gpu.py"
    told = ["uniform", "--tokens", tokens, "--out", tmp_path, "--model=tiny", "--device=cpu"]
    command = [sys.executable, "-c", code, script, *told, f"--steps={STEPS}"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    assert (tmp_path / "uniform-seed1" / "result.json").exists()
    alike(tmp_path / "uniform-seed1", runs / "uniform-seed1")

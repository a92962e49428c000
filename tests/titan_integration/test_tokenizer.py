"""The cached tokenizer: exact, the same everywhere, and never half-written."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from titan_integration.data.tokenizer import BOS, EOS, cache_dir, ensure_tokenizer

ENSURE = "from titan_integration.data.tokenizer import ensure_tokenizer; print(ensure_tokenizer())"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give every test an empty cache."""
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def little_text(monkeypatch):
    """Train on little text, where only the files matter."""
    monkeypatch.setattr("titan_integration.data.tokenizer.SAMPLE_CHARS", 10_000)


def start(code):
    """Start a Python that imports from this checkout, whatever the current directory."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder):
    """Read all files of a tokenizer directory."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_the_host_loads_it_with_the_exact_vocabulary():
    """The host's tokenizer class finds 2048 tokens, of which 0 and 1 are the special ones."""
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))
    assert tokenizer.get_vocab_size() == 2048
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)


@pytest.mark.slow
def test_any_text_comes_back_from_its_tokens():
    """Any text comes back from its tokens, and only asked-for special tokens are added."""
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(ensure_tokenizer()))
    for text in ["", "def f(x):\n\treturn x\r\n", "naïve 文字 🙂 \x00 é", "  a  "]:
        tokens = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert tokens[0] == 0
        assert tokens[-1] == 1
        assert tokenizer.decode(tokens[1:-1]) == text
        assert tokenizer.encode(text) == tokens[1:-1]


@pytest.mark.usefixtures("little_text")
def test_other_vocabularies_have_directories_of_their_own():
    """The smallest vocabulary is bytes and specials; each size is cached apart."""
    small = ensure_tokenizer(258)
    assert HuggingFaceTokenizer(tokenizer_path=str(small)).get_vocab_size() == 258
    assert small != ensure_tokenizer(300)


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize(
    ("size", "message"), [(257, "too small.*258"), (50_000, "too large.*yields")]
)
def test_a_vocabulary_size_that_cannot_be_reached_is_refused(size, message):
    """A size that cannot be reached exactly is refused."""
    with pytest.raises(ValueError, match=message):
        ensure_tokenizer(size)


@pytest.mark.usefixtures("little_text")
def test_the_second_call_does_not_train():
    """A cached tokenizer is returned as it is."""
    before = ensure_tokenizer()
    times = {path: path.stat().st_mtime_ns for path in before.iterdir()}
    assert ensure_tokenizer() == before
    assert {path: path.stat().st_mtime_ns for path in before.iterdir()} == times


@pytest.mark.usefixtures("little_text")
def test_training_is_deterministic(monkeypatch, tmp_path):
    """Another cache gets the same bytes."""
    first = contents(ensure_tokenizer())
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path / "other"))
    assert contents(ensure_tokenizer()) == first


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [None, b"", b'{"version": "1.0", "mod'])
def test_a_half_written_cache_is_repaired(name, damage):
    """A file that is missing, empty or cut off is written again."""
    folder = ensure_tokenizer()
    whole = contents(folder)
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    assert contents(ensure_tokenizer()) == whole


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_is_used(cache):
    """After a kill in the middle of writing, the next process still gets a whole tokenizer."""
    slow = "import os, time; os.fsync = lambda _: time.sleep(60); "
    process = start(slow + ENSURE)
    deadline = time.monotonic() + 300
    while not list(cache.rglob(".tokenizer*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert list(cache.rglob(".tokenizer*"))
    folder = ensure_tokenizer()
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] == BOS
    assert HuggingFaceTokenizer(tokenizer_path=str(folder)).get_vocab_size() == 2048


@pytest.mark.usefixtures("little_text")
def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    """The message names the directory and the variable to set."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("WEIGHTING_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write .*file.*set WEIGHTING_CACHE"):
        ensure_tokenizer()


def test_the_cache_follows_the_users_settings(monkeypatch, tmp_path):
    """The own variable wins over the desktop's, which wins over the home directory."""
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("WEIGHTING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "weighting-dsl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_dir() == tmp_path / "me" / ".cache" / "weighting-dsl"

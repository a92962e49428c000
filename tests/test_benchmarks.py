"""Benchmarks run, and give no number to what is wrong."""

import contextlib
import importlib
import io
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from runs import environment, seed_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def loss_path(monkeypatch):
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("loss_path")


def rows_of(text):
    """Return the cells of each row of a Markdown table, without its two lines of heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def run(module, *arguments):
    """Return what a benchmark prints; what its many ways warn of is no error of a test."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        assert module.main([*map(str, arguments)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return the rows of all ways at tiny sizes, and what was printed of them."""
    out, rows = tmp_path_factory.mktemp("quick") / "found.md", []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        module = importlib.import_module("loss_path")
        measured = module.measured
        patch.setattr(module, "measured", lambda *x, **k: rows.extend(measured(*x, **k)) or rows)
        text = run(module, "--quick", "--no-memory", f"--out={out}")
    assert out.read_text() == text
    return rows, text


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(loss_path):
    """Of each way, beside the first, and told by the goals that ask for it."""
    text = run(loss_path, "--quick", "--only", "uniform late", "linupper late")
    for name, *_, peak, mebibytes, _ in rows_of(text):
        if name != "the three products alone (no loss)":
            assert float(peak) >= 0, name
            assert float(mebibytes) >= 0, name  # so little may round to 0
    goals = [line for line in text.splitlines() if line.startswith("- ") and "memory" in line]
    assert len(goals) == 2
    assert all(line.startswith(("- PASS: ", "- MISS: ")) for line in goals)


@pytest.mark.slow
def test_every_row_has_numbers_or_a_reason(quick):
    """Tiny sizes: every way is right and measured, but the one that the library refuses."""
    _, text = quick
    rows = rows_of(text)
    assert len(rows) >= 30
    reasons = {}
    for name, first, *rest in rows:
        if first.startswith("no number: "):
            reasons[name] = first
            continue
        time, *others = rest
        assert float(first) > 1  # products
        # In hundredths of a baseline of milliseconds, which a busy machine may make long.
        assert 0 <= float(time.split()[0]) < 100
        if name != "the three products alone (no loss)":
            least, cpu, *memory, error = others
            assert all(float(x) >= 0 for x in (least, cpu, error)), name
            assert memory == ["?", "?"], name
    missing = {name for name, reason in reasons.items() if "not installed" in reason}
    assert all(name.startswith(("CCE", "Liger")) for name in missing)
    assert reasons.keys() - missing == {"rho-1 late"}
    assert "weighs every token late" in reasons["rho-1 late"]
    goals = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(goals) == 14
    for line in goals:  # not measured where another's package is missing
        measured = "memory" not in line and ("relative to CCE" not in line or not missing)
        assert line.startswith(("- PASS: ", "- MISS: ") if measured else "- not measured: "), line


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_where_there_is_none(quick, monkeypatch):
    """Tiny sizes: no claim fails, and those about a GPU are not said to hold."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_check = importlib.import_module("gpu_check")
    monkeypatch.setattr(gpu_check, "measured", lambda *_, **__: quick[0])
    text = run(gpu_check, "--quick")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert [line for line in lines if line.startswith("- holds")] == [
        "- holds: gradients of ours are those of float64"
    ]
    assert len(lines) == 15
    assert all(line.startswith("- not seen: ") for line in lines[1:])


def forgets_the_weights(batch, hidden, weight):
    """Give the right loss and the gradient of the unweighted one."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    nll = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    plain = nll.sum() / batch.count
    right = (batch.given.flatten() * nll).sum() / batch.count
    return right.detach() + plain - plain.detach(), batch.given


def forgets_the_zero(batch, hidden, weight):
    """Train on the first token, whose weight is 0, as well."""
    token = batch.given.clone()
    token[0, 0] = 0.01
    logits = F.linear(hidden, weight).flatten(0, 1)
    nll = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    return (token.flatten() * nll).sum() / batch.count, batch.given


def is_not_a_number(batch, hidden, weight):
    """Give gradients that are NaN."""
    loss, token = forgets_the_zero(batch, hidden, weight)
    return loss + (hidden * torch.nan).sum().nan_to_num(), token


def fails(batch, hidden, weight):
    """Raise what a kernel of somebody else's might."""
    del batch, hidden, weight
    msg = "no kernel\nfor this machine"
    raise RuntimeError(msg)


WRONG = {
    forgets_the_weights: "no number: WRONG: error ",
    forgets_the_zero: "no number: WRONG: error ",
    is_not_a_number: "no number: WRONG: error nan",
    fails: "no number: RuntimeError: no kernel",
}


@pytest.mark.slow
def test_wrong_ways_get_no_number(loss_path):
    """Beside a right one, which does."""
    setting = loss_path.QUICK
    batch = loss_path.batch_of(setting)
    right, *_ = loss_path.variants(batch)
    ways = [right, *(loss_path.Variant(way.__name__, way) for way in WRONG)]
    row, *wrong, products = loss_path.measured(setting, batch, ways)
    assert products.wall
    assert len(row.wall) == setting.rounds
    assert row.peak > 0
    assert not any(x.wall or x.peak for x in wrong)

    first, *others = rows_of("\n".join(loss_path.table([row, *wrong])))
    assert not first[1].startswith("no number")
    for shown, reason in zip(others, WRONG.values(), strict=True):
        assert shown[1].startswith(reason)
        assert not any(shown[2:])


def test_every_mutant_breaks_a_line_that_is_there(monkeypatch):
    """Its expression stands in its file once, and the tests that should notice are there."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    mutants = importlib.import_module("mutants").MUTANTS
    assert len(mutants) >= 20
    for mutant in mutants:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant
        file, _, name = mutant.tests.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, mutant


@pytest.mark.processes
def test_the_picture_of_tokens_has_every_character(tmp_path):
    """Twice, as text, each line as wide as its shades; under a checkpoint of a small model."""
    pytest.importorskip("torchtitan")
    text, out = "def f(x):\n\tif x < 1 & é:\n\n    return 'a  b'", tmp_path / "tokens.svg"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    seed = seed_checkpoint(tmp_path / "seed", "--training.seq_len=64")
    given = ["--checkpoint", seed, "--text", tmp_path / "text.txt", "--training.seq_len=64"]
    given += ["--module", "small", "--config", "debugmodel"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tokens.py", out, *given],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    svg, root = "{http://www.w3.org/2000/svg}", ET.parse(out).getroot()
    lines = [node for node in root.iter(f"{svg}text") if node.get("class") == "code"]
    shown = "".join("".join(node.itertext()) for node in lines)
    # The second of the two bytes of é is a token of its own.
    wanted = text.replace("\n", "↵").replace("\t", "    ").replace("é", "é▪") + "‹end›"
    assert shown == 2 * wanted
    words = ["".join(node.itertext()) for node in root.iter(f"{svg}text")]
    assert "weight (mean one)" in words
    for name in ("mile", "focal"):
        assert any(word.startswith(f"{name}: ") for word in words)
    told = [box for box in root.iter(f"{svg}rect") if box.find(f"{svg}title") is not None]
    wide = sum(float(box.get("width")) for box in told)
    # Two decimals each.
    assert wide == pytest.approx(sum(float(node.get("textLength")) for node in lines), abs=1)


@pytest.mark.slow
def test_growth_has_times_of_all_work_and_exponents_of_known_numbers(monkeypatch):
    """All kinds of work run; a square grows by 2, and what is steep is named."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    growth = importlib.import_module("growth")
    monkeypatch.setattr(growth, "free_at_once", lambda: None)  # it would slow other tests down
    found = growth.found(quick=True)
    assert all(len(x.times) == len(x.memory) == 2 for x in found.values())
    sizes = (10, 100, 1000, 10_000)
    assert growth.exponent(sizes, [x**2 for x in sizes]) == pytest.approx(2)
    assert growth.exponent(sizes, [7, 5, 5, 5]) == pytest.approx(0)  # fixed costs at first
    steep = {"rank, sequences": growth.Found([1e-3, 1.0], [2**20, 2**21])}
    *rows, above = growth.table(found | steep, {})
    assert len(rows_of("\n".join(rows))) == len(growth.ROWS)
    assert "time of rank, sequences: 4.98" in above
    assert "memory of rank" not in above

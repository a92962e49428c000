"""Specs from strangers: refused with a place and a way out, soon, in little memory, and not run."""

import builtins
import importlib
import os
import subprocess
import sys
import time
import tracemalloc

import click.testing
import generators as tables
import pytest
import yaml
from looping import for_each

import weighting as wt
from weighting.cli import main
from weighting.errors import Problem, Source
from weighting.registry import stages
from weighting.schedules import SCHEDULES

SECONDS, BYTES = 1.0, 200e6
GOOD = "version: 1\nname: x\npipeline: normalize -> linupper(alpha=1) -> temperature(0.4)\n"
PIPELINE = "normalize -> linupper(alpha=1) -> temperature(step(100, 0.4, at=500)) -> clamp(2/n)"


def numbers():
    """Yield a stage and an argument of it that must be a number, with arguments that are right."""
    for name, cls in stages().items():
        if not cls.__module__.startswith("weighting.stages."):
            continue
        text = tables.STAGE_PIPELINES[name]
        [stage] = [x for p in wt.loads(text).factors.values() for x in p if x.name == name][:1]
        for field, value in ((field, getattr(stage, field)) for field in cls.model_fields):
            if isinstance(value, float | int | bool):
                yield name, field


BAD = (".nan", ".inf", "1e999", "[1]", "{a: 1}", "'1'", "yes", "0x1p3", "2024-01-01")


def bad_values():
    """Every number and flag of every stage, as a third of what is neither."""
    for i, (name, field) in enumerate(numbers()):
        for value in BAD[i % 3 :: 3]:
            text = f"version: 1\npipeline:\n- {name}: {{{field}: {value}}}\n"
            yield f"{name}.{field}={value}", text


def keys():
    """Keys that are not there, in the wrong case, twice, or of another kind."""
    known = ("version", "name", "pipeline", "factors", "plugins", "apply", "normalize")
    known = (*known, "reduction", "scope", "on_nonfinite")
    for key in known:
        yield f"upper {key}", GOOD.replace("version: 1", f"version: 1\n{key.upper()}: 1")
        yield f"typo {key}", f"{GOOD}{key}s_: 1\n"
        yield f"space {key}", f"{GOOD}'{key} ': 1\n"
        yield f"zero-width {key}", f"{GOOD}{key}\u200b: 1\n"
        for value in ("[[]]", "{a: {b: c}}", "1e999", "''"):
            yield f"{key}: {value}", f"{key}: {value}\n" + ("" if key == "version" else GOOD)
    for line in GOOD.splitlines():
        yield f"twice {line}", f"{GOOD}{line}\n"
    for version in (
        "0",
        "2",
        "-1",
        "'1'",
        "true",
        "null",
        "[1]",
        "99999999999999999",
    ):
        yield f"version {version}", GOOD.replace("version: 1", f"version: {version}")


def brackets():
    """A pipeline with one bracket too few or too many, or cut off in the middle of a call."""
    for at, character in enumerate(PIPELINE):
        if character in "()":
            yield f"without {at}", f"version: 1\npipeline: '{PIPELINE[:at]}{PIPELINE[at + 1 :]}'\n"
            yield f"twice {at}", PIPELINE[:at] + character + PIPELINE[at:]
    for at in (x for x, c in enumerate(PIPELINE) if c in "(,=>"):
        yield f"cut at {at}", PIPELINE[: at + 1]
    for bad in (
        "((((",
        "))))",
        "[{(",
        "->" * 50,
        "normalize ->" * 50,
        "(" * 5_000,
        "clamp(" * 5_000,
    ):
        yield f"only {bad[:12]}", bad
        yield f"after {bad[:12]}", f"{PIPELINE} -> {bad}"


def deep():
    """Nested until a parser that calls itself would end the process."""
    for count in (40, 20_000):
        yield f"lists {count}", "pipeline: " + "[" * count + "]" * count
        yield f"maps {count}", "pipeline: " + "{a: " * count + "1" + "}" * count
        yield f"open {count}", "version: 1\npipeline: " + "[" * count
        yield f"block {count}", "\n".join(" " * i + "a:" for i in range(min(count, 1_000)))
        yield f"dashes {count}", "pipeline:\n" + "- " * count + "x"
        yield f"calls {count}", "temperature(" * count + "1" + ")" * count
        yield f"keys {count}", "? " * count + "x"


def bombs():
    """Aliases, tags and merges; none is ever followed."""
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    yield "billion laughs", "\n".join(lines)
    yield "self", "version: 1\npipeline: &a [*a]\n"
    yield "merge", f"{GOOD}<<: {{name: y}}\n"
    calls = {
        "os.system": "['touch hacked']",
        "builtins.exec": "['1/0']",
        "subprocess.call": "[[ls]]",
    }
    for name, argument in calls.items():
        for tag in ("object/apply:", "object/new:", "name:", "module:"):
            yield f"{tag}{name}", f"version: 1\npipeline: !!python/{tag}{name} {argument}\n"
    for tag in ("!!binary aGk=", "!!set {a}", "!!timestamp 2001-01-01", "!!float 1", "!x 1", "! 1"):
        yield tag, f"version: 1\nname: {tag}\npipeline: uniform\n"
    yield "directive", f"%YAML 9.9\n---\n{GOOD}"
    yield "tag directive", f"%TAG ! tag:evil,2000:\n---\n{GOOD}".replace("x", "!x x")
    yield "several", f"{GOOD}---\n{GOOD}"


def letters():
    """Letters that look like others, that do not show, or that are none."""
    strange = {"cyrillic": "а", "full width": "ａ", "zero width": "\u200b", "no-break": "\u00a0"}
    strange |= {"right to left": "\u202e", "soft hyphen": "\u00ad", "private": "\ue000"}
    strange |= {"line": "\u2028", "next line": "\x85", "combining": "e\u0301", "emoji": "🦜"}
    for name, letter in strange.items():
        yield f"{name} in a stage", f"version: 1\npipeline: norm{letter}lize -> temperature(1)\n"
        yield f"{name} in an argument", f"version: 1\npipeline: temperature(t{letter}u=1)\n"
        yield f"{name} for a number", f"version: 1\npipeline: temperature({letter})\n"
    for number in (
        "١",
        "１",
        "Ⅷ",
        "½",
        "1_000",
        "0b1",
        "0o7",
        "1,5",
        "1'000",
        "1e",
        "e1",
        "--1",
        "+-1",
    ):
        yield f"digit {number}", f"version: 1\npipeline: temperature({number})\n"


def plugins():
    """Names that are paths, programs, or nothing a module could be called."""
    names = (
        "../evil",
        "/etc/passwd",
        ".evil",
        "evil.",
        "a..b",
        "os; import sys",
        "a b",
        "a/b",
        "''",
    )
    names += ("__import__('os')", "C:\\evil", "http://evil", "a\u200bb", "1a", "class", "*", "a-b")
    for name in names:
        text = name if name == "''" else yaml.safe_dump(name).strip().removesuffix("...").strip()
        yield f"plugin {name}", f"version: 1\nplugins: [{text}]\npipeline: uniform\n"
    for name in ("antigravity", "this", "my_absence", "idlelib.idle"):
        yield f"no leave for {name}", f"version: 1\nplugins: [{name}]\npipeline: uniform\n"


def sizes():
    """Numbers that are right but for being more than memory, float32 or 64 bits can hold."""
    for history in ("1000001", "3000000000", "9" * 18):
        yield f"history {history}", f"rank(history={history}) -> mean_one"
    for name in ("doremi", "exponentiated"):
        source = "" if name == "doremi" else "mean(domain) -> "
        yield f"unseen of {name}", f"{source}{name}(unseen=1e308)"
    long = "9" * 19
    for written in (
        "step: {before: 1, after: 2, at: N}",
        "linear: {start: 1, end: 2, over: N}",
        "linear: {start: 1, end: 2, over: 3, begin: N}",
        "piecewise: {0: 1, N: 2}",
    ):
        text = f"- temperature: {{tau: {{{written.replace('N', long)}}}}}"
        yield written, f"version: 1\npipeline:\n{text}\n"
    for stages_ in ("mean(domain)\n- topical: {every: N}", "topk_entropy: N\n- mean_one"):
        yield stages_, f"version: 1\npipeline:\n- {stages_.replace('N', long)}\n"


def orders():
    """Stages where they cannot stand, factors of a level that is none, and words twice."""
    for name in SCHEDULES:
        yield f"schedule {name}", f"normalize -> {name}(1, 2) -> temperature(1)"
    for name in ("token", "sequence", "document", "domain", "step", "rank", "none", "all"):
        yield f"level {name}", f"version: 1\npipeline: mean({name}z) -> temperature(1)\n"
    for left in ("clamp(2/n)", "temperature(1)", "mean_one", "token_scale"):
        for right in ("normalize", "linupper", "entropy", "mean(domain)", "temperature(2)"):
            yield f"{left} first, {right}", f"{left} -> {right}"


def many():
    """More stages, factors or entries than a spec can mean, right and wrong ones."""
    yield "101 stages", "normalize -> " + "abs -> " * 99 + "temperature(1)"
    for count in (3_000, 30_000):
        yield f"{count} stages", "normalize -> " + "abs -> " * count + "temperature(1)"
        yield f"{count} wrong stages", "a(" + "->a(" * count
        yield f"{count} arrows", "->" * count
    yield "3000 listed", "version: 1\npipeline:\n" + "- abs\n" * 3_000
    yield "lists of arrow texts", "version: 1\npipeline:\n" + f"- {'abs -> ' * 50}abs\n" * 90
    yield (
        "101 factors",
        "version: 1\nfactors:\n" + "".join(f"  f{i}: temperature(1)\n" for i in range(101)),
    )
    yield "entries twice", "table(" + ", ".join(f"a{i}=1" for i in range(4_000)) + ", a7=1)"
    yield "pairs twice", "table({" + ", ".join(f"a{i}: 1" for i in range(4_000)) + ", a7: 1})"
    yield "arguments", "temperature(" + ", ".join("1" for _ in range(4_000)) + ")"


FAMILIES = (many, bad_values, keys, brackets, deep, bombs, letters, plugins, sizes, orders)
CASES = {f"{family.__name__}: {name}": text for family in FAMILIES for name, text in family()}
BYTES_OF = {
    "random": bytes((i * 2_654_435_761 >> 7) & 255 for i in range(4_096)),
    "gzip": b"\x1f\x8b\x08\0" + b"\xff" * 64,
    "elf": b"\x7fELF" + bytes(64),
    "zip": b"PK\x03\x04" + bytes(64),
    "parquet": b"PAR1" + bytes(64),
    "zeros": bytes(4_096),
    "utf-16": GOOD.encode("utf-16"),
    "utf-32": GOOD.encode("utf-32"),
    "latin-1": "version: 1\nname: é\npipeline: uniform\n".encode("latin-1"),
    "torn utf-8": "version: 1\nname: é".encode()[:-1],
    "overlong": b"version: 1\nname: \xc0\xaf\n",
    "surrogate": b"version: 1\nname: \xed\xa0\x80\n",
    "mark inside": GOOD.encode().replace(b"name", b"\xef\xbb\xbfname"),
    "old mac": GOOD.replace("\n", "\r").encode() + b"zzz: 1\r",
    "tabs": GOOD.replace(": ", ":\t\t").replace("name", "\tname").encode(),
    "escape codes": b"version: 1\nname: \x1b[31mred\n",
}


def refused(read):
    """Return the error of a text, which must come soon and in little memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(wt.SpecError) as caught:
            read()
    finally:
        spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert spent < 5 * SECONDS  # tracemalloc takes several times as long
    assert peak < BYTES
    return caught.value


def test_there_are_many():
    """The catalogue is what it says, and none of its families is empty."""
    assert len(CASES) >= 200
    for family in FAMILIES:
        assert len([*family()]) >= 10, family.__name__


@pytest.mark.slow
@for_each("case", CASES)
def test_a_hostile_text_is_refused_with_a_place(case):
    """A SpecError with line and column, in words that a terminal can show."""
    error = refused(lambda: wt.build(wt.loads(CASES[case]), domains=tables.DOMAINS))
    assert all(x.place and x.place.line >= 1 for x in error.problems)
    assert len(str(error)) < 20_000
    shown = str(error).replace("\n", "")
    assert shown.isprintable(), ascii(shown)


def test_as_many_stages_and_factors_as_allowed_are_read():
    """A hundred stages, in either spelling, and a hundred factors; one more is refused."""
    listed = "version: 1\npipeline:\n- normalize\n" + "- abs\n" * 98 + "- temperature: 1\n"
    for text in ("normalize -> " + "abs -> " * 98 + "temperature(1)", listed):
        (pipeline,) = wt.loads(text).factors.values()
        assert len(pipeline) == 100
    factors = "".join(f"  f{i}: temperature(1)\n" for i in range(100))
    spec = wt.loads("version: 1\nfactors:\n" + factors)
    assert len(spec.factors) == 100
    assert str(refused(lambda: wt.loads(CASES["many: 101 stages"]))).startswith(
        "<spec>:1:704: a pipeline has at most 100 stages, and this one more; leave some out\n"
    )
    error = refused(lambda: wt.loads(CASES["many: 101 factors"]))
    assert "<spec>:103:3: a spec has at most 100 factors, and this one more" in str(error)
    with pytest.raises(ValueError, match="factor 'long': a pipeline has at most 100 stages"):
        wt.Spec(factors={"long": pipeline * 2})
    with pytest.raises(ValueError, match="a spec has at most 100 factors, and this one more"):
        wt.Spec(factors={f"f{i}": pipeline for i in range(101)})


def test_places_on_one_long_line_take_linear_time():
    """Every problem points into the same text, which is not looked through for each."""
    text = "\n" * 1_000 + "x" * 900_000
    source = Source("it", text)
    began = time.process_time()
    places = [source.place(at, at + 1) for at in range(1_000, 901_000, 45)]
    assert time.process_time() - began < 5 * SECONDS
    assert (places[3].line, places[3].column, places[3].width) == (1_001, 136, 1)
    error = wt.SpecError([Problem(f"wrong {i:05}", x) for i, x in enumerate(places)])
    assert len(error.problems) == 20_000
    assert str(error).endswith("\nand 19,950 more")


@pytest.mark.parametrize("content", BYTES_OF.values(), ids=BYTES_OF)
def test_bytes_that_are_no_spec_are_refused(content, tmp_path):
    """Whatever they are, the message names the file."""
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    error = refused(lambda: wt.load(path))
    assert str(error).startswith(f"{path}:")


@pytest.mark.parametrize("size", [5_000_000, 100_000_000])
@pytest.mark.parametrize("byte", [b" ", b"x", b"[", b"\n", b"a: 1\n", b"normalize -> "])
def test_a_large_file_is_not_read_to_its_end(size, byte, tmp_path):
    """Its size is said, and what may be."""
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.write(byte * (5_000_000 // len(byte)))
        file.truncate(size)
    error = refused(lambda: wt.load(path))
    assert str(error) == (
        f"{path}: a spec is at most 1,000,000 characters; this has {size:,} bytes"
    )


@pytest.mark.slow
def test_nothing_of_a_text_is_run(tmp_path, monkeypatch):
    """No import, no program, no file is opened while all of them are read."""
    monkeypatch.chdir(tmp_path)
    wt.loads(GOOD)  # whatever is imported late is there now
    for text in [*CASES.values()][:50]:
        with pytest.raises(wt.SpecError):
            wt.build(wt.loads(text))
    modules = {*sys.modules}

    def never(*arguments, **_):
        pytest.fail(f"called with {arguments}")

    monkeypatch.setattr(builtins, "exec", never)
    monkeypatch.setattr(builtins, "eval", never)
    monkeypatch.setattr(os, "system", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr(importlib, "import_module", never)
    texts = [*bombs(), *plugins(), *letters()]
    for _, text in texts:
        with pytest.raises(wt.SpecError):
            wt.build(wt.loads(text))
    assert not [*tmp_path.iterdir()]
    assert not {"antigravity", "this", "idlelib.idle"} & ({*sys.modules} - modules)


def test_the_command_line_says_so_with_status_2(tmp_path):
    """One of each family as a file: the message, no traceback, status 2."""
    for family in FAMILIES:
        for name, text in [*family()][:3]:
            path = tmp_path / "spec.yaml"
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            done = click.testing.CliRunner().invoke(main, ["check", str(path)])
            assert done.exit_code == 2, (family.__name__, name, done.output)
            assert isinstance(done.exception, SystemExit)
            assert "spec.yaml:" in done.output

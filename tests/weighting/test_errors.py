"""What is wrong with a spec is said with its place, its line, a caret and a way out.

Every file of specs_invalid/ holds one or more mistakes and, beside it, the full message.  Its
first lines say which edit makes it valid: `# "new" instead of "old"`.
"""

import json
import re
import sys
from pathlib import Path

import generators as tables
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import for_each

import weighting as wt
from weighting import registry

FOLDER = Path(__file__).parent / "specs_invalid"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WITHOUT_EDIT = {"empty-file", "only-a-comment", "not-utf-8", "utf-16"}
_EDIT = re.compile(r'# (".*") instead of (".*")')

each_case = for_each("name", CASES)


def message_of(name):
    """Return the message of an invalid file, loaded by its bare name and built."""
    with pytest.raises(wt.SpecError) as caught:
        wt.build(wt.load(f"{name}.yaml"))
    return caught.value


def edited(text):
    """Return the text below the lines that say how to mend it, mended."""
    lines = text.split("\n")
    edits = []
    while found := _EDIT.fullmatch(lines[0].removeprefix("\ufeff")):
        edits.append([json.loads(part) for part in found.groups()])
        del lines[0]
    body = "\n".join(lines)
    for new, old in edits:
        assert old in body, f"{old!r} is not in the file"
        body = body.replace(old, new, 1)
    return body, len(edits)


def test_every_invalid_file_has_a_message_and_every_message_a_file():
    """There are many invalid files, each with a message, and no message without a file."""
    assert len(CASES) >= 100
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == CASES


@each_case
def test_the_message_is_the_text_beside_the_file(name, monkeypatch):
    """The full text of the error is the one beside the file."""
    monkeypatch.chdir(FOLDER)
    expected = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert str(message_of(name)) + "\n" == expected


@each_case
def test_the_message_points_at_its_place(name, monkeypatch):
    """Problems come in reading order, each with its source line and a caret under its column."""
    monkeypatch.chdir(FOLDER)
    error = message_of(name)
    if name in {"not-utf-8", "utf-16"}:  # no text, no place
        assert (error.line, error.column) == (0, 0)
        return
    lines = (FOLDER / f"{name}.yaml").read_bytes().decode("utf-8-sig").split("\n")
    places = [problem.place for problem in error.problems]
    assert [(p.line, p.column) for p in places] == sorted((p.line, p.column) for p in places)
    assert (error.file, error.line, error.column) == (
        f"{name}.yaml",
        places[0].line,
        places[0].column,
    )
    for place in places:
        line = lines[place.line - 1].rstrip("\r")
        shown, carets = place.picture().split("\n")
        assert 1 <= place.column <= len(line) + 1
        assert len(shown) <= 104
        under = len(carets) - len(carets.lstrip())
        pointed = shown[under : len(carets)]
        printable = "".join(c if c.isprintable() else " " for c in line)
        assert printable[place.column - 1 :].startswith(pointed)


@each_case
def test_the_valid_text_is_one_edit_away(name):
    """With the edits its first lines name, each file loads and builds."""
    if name in WITHOUT_EDIT:
        return
    text = (FOLDER / f"{name}.yaml").read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    body, edits = edited(text)
    assert edits >= 1
    spec = wt.loads(body)
    names = {n for p in spec.factors.values() for s in p for n in getattr(s, "weights", {})}
    wt.build(spec, domains=sorted(names) or ["only"])


VALID = {
    "a byte order mark": "\ufeffversion: 1\npipeline: uniform\n",
    "windows line ends": "version: 1\r\npipeline:\r\n- normalize\r\n- temperature: 1\r\n",
    "no line end": "version: 1\npipeline: uniform",
    "a number without quotes": "version: 1\npipeline:\n- normalize\n- temperature: 1e-3\n",
    "a block": "version: 1\npipeline: >-\n  normalize\n  -> temperature(1)\n# end\nname: x\n",
    "a kept block": "version: 1\npipeline: |\n  normalize ->\n\n  temperature(1)\n\nname: x\n",
    "double quotes": 'version: 1\npipeline: "normalize -> temperature(1)"\n',
    "an escaped arrow": 'version: 1\npipeline: "normalize \\u2192 temperature(1)"\n',
    "a plain text over two lines": "version: 1\npipeline: normalize\n  -> temperature(1)\n",
    "arrow text alone": "normalize -> temperature(1)",
    "unicode arrows": "normalize → temperature(1)",
    "braces in arrow text alone": "temperature(piecewise({0: 100, 500: 0.4}))",
    "a word YAML 1.1 takes for false": "version: 1\nname: no\npipeline: table(on=1) -> mean_one\n",
}


@pytest.mark.parametrize("text", VALID.values(), ids=VALID)
def test_what_looks_odd_but_is_right_is_read(text):
    """Odd but harmless texts load, and read back from both spellings."""
    spec = wt.loads(text)
    for spelling in ("arrow", "yaml"):
        assert wt.loads(wt.dumps(spec, spelling)) == spec


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("""'table("it''s"=1) -> mean_one'""", "it's"),
        ('''"table('a\\tb'=1) -> mean_one"''', "a\tb"),
        ('''"table('\\u00e9'=1) -> mean_one"''', "\u00e9"),
    ],
)
def test_quoted_arrow_text_is_unquoted_before_it_is_read(written, meant):
    """Doubled quotes and escapes of a quoted YAML scalar stand for what YAML says they do."""
    spec = wt.loads(f"version: 1\npipeline: {written}\n")
    assert list(spec.factors["pipeline"][0].weights) == [meant]


ODD_NAMES = ["it's", 'say "x"', "a'b\"c", "1e-3", "1e5", "08", "", "two\nlines", "a: b", "->", "\\"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("spelling", ["arrow", "yaml"])
def test_any_domain_name_reads_back(name, spelling):
    """A table of oddly named domains is written so that it reads back equal, or refused."""
    entries = json.dumps({name: {"piecewise": {"0": 1}}, "b": 2}).replace('"0"', "0")
    try:
        spec = wt.loads(f"version: 1\npipeline:\n- table: {entries}\n- mean_one\n")
    except wt.SpecError:
        return
    assert wt.loads(wt.dumps(spec, spelling)) == spec


@pytest.mark.parametrize("name", ["1e3", "08", "1e5", "1.10", "7", "no", "null", "true", "0x1"])
def test_any_spec_name_reads_back(name):
    """A name that looks like a number or a truth value is kept as written, or refused unquoted."""
    spec = wt.loads(f"version: 1\nname: '{name}'\npipeline: uniform\n")
    assert spec.name == name
    assert wt.loads(wt.dumps(spec)) == spec
    try:
        plain = wt.loads(f"version: 1\nname: {name}\npipeline: uniform\n")
    except wt.SpecError:
        return
    assert plain.name == name


ESCAPES = {
    "a zero byte": "version: 1\nname: a\x00b\npipeline: uniform\n",
    "half a surrogate pair": "version: 1\nname: a\ud800b\npipeline: uniform\n",
    "an infinite share": "temperature(1) -> clamp(1e999/n)",
    "a share that is no number": (
        "version: 1\npipeline:\n- temperature: 1\n- clamp: {max: 1.2.3/n}\n"
    ),
    "a share of points": "version: 1\npipeline:\n- temperature: 1\n- clamp: {max: ./n}\n",
    "a flag for a number": "temperature(step(true, 2, at=5))",
    "text for a number of a schedule": "temperature(step('1', 2, at=5))",
    "text for a step": "temperature(step(1, 2, at='5'))",
    "a step beyond all integers": "temperature(step(1, 2, at=99999999999999999999))",
    "a step beyond 64 bits": "temperature(step(1, 2, at=9223372036854775808))",
    "a schedule and more": (
        "version: 1\npipeline:\n- normalize\n- temperature:\n    tau: step(9, 1, at=5) -> abs\n"
    ),
    "a temperature that is zero in float32": "temperature(1e-46)",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES)
def test_nothing_escapes_as_another_error_or_passes_unseen(text):
    """Each of these is refused with a SpecError when read or built."""
    with pytest.raises(wt.SpecError):
        wt.build(wt.loads(text))


_SNIPPETS = [
    *"\t\n:,-=()[]{}'\"#%@`|>&*!?~/\\.",
    *(": ", "- ", " -> ", "→", "&a", "*a", "!!x", "---\n", "...", "<<", "1e999", ".inf", ".nan"),
    *("/n", "1.2.3/n", "\x00", "\ufeff", "\x85", "\u2028", "true", "null", "step(", "1e5", "  "),
    *("max: ", "{0: 1}", "normalize", "clamp(2/n)", "'", '""', "\ud800", "\r"),
]
_BASES = [
    *sorted({*tables.CASES.values()}),
    "version: 1\npipeline:\n- temperature: {tau: {linear: {start: 2, end: 1, over: 9}}}\n",
    "version: 1\npipeline:\n  - normalize\n  - temperature: 1\n  - clamp: {max: 2/n}\n",
    "version: 1\nname: x\npipeline: [normalize, 'temperature(step(9, 1, at=5))']\n",
    "version: 1\npipeline:\n- table: {web: 1, code: {piecewise: {0: 1, 5: 2}}}\n- mean_one\n",
]
_mutations = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 12),
        st.one_of(st.sampled_from(_SNIPPETS), st.text(max_size=3)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(text, mutations):
    """Return a text with stretches of it replaced."""
    for where, length, new in mutations:
        start = int(where * len(text))
        text = text[:start] + new + text[start + length :]
    return text


@pytest.mark.slow
@settings(max_examples=300)
@given(st.sampled_from(_BASES), _mutations)
def test_broken_text_raises_nothing_but_a_spec_error(base, mutations):
    """However a valid text is mangled, it is refused with a SpecError or it reads back."""
    text = mutated(base, mutations)
    try:
        spec = wt.loads(text)
        wt.build(spec, domains=tables.DOMAINS)
    except wt.SpecError as caught:
        error = caught
    else:
        assert wt.loads(wt.dumps(spec)) == spec
        return
    assert all(problem.place.line >= 1 for problem in error.problems if problem.place)
    assert error.problems[0].message in str(error)


def test_a_missing_file_names_the_nearest_shipped_one(tmp_path):
    """A path that does not exist suggests a shipped spec, and a directory is called one."""
    with pytest.raises(wt.SpecError, match=r"linuper: no such file; did you mean 'linupper'\?"):
        wt.load("linuper")
    with pytest.raises(wt.SpecError, match="is a directory"):
        wt.load(tmp_path)


def test_a_text_that_is_too_long_is_not_read():
    """More than a million characters are refused without being parsed."""
    with pytest.raises(wt.SpecError, match="at most 1,000,000 characters; this has 1,000,017"):
        wt.loads("version: 1\nname: " + "x" * 1_000_000)


def test_a_text_of_many_aliases_stops_at_the_first():
    """The text that would grow to a billion nodes is refused at its first anchor."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(wt.SpecError, match=r":1:5: anchors are not allowed"):
        wt.loads("\n".join(lines))


PLUGIN = """
from weighting import Shape, stage

@stage("{name}")
class Doubled(Shape):
    def apply(self, x, scope):
        return 2 * x
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Give a plugin module in the working directory, forgotten afterwards."""
    monkeypatch.setattr(registry, "_STAGES", dict(registry._STAGES))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_stages.py").write_text(PLUGIN.format(name="doubled"))
    (tmp_path / "my_clash.py").write_text(PLUGIN.format(name="normalize"))
    (tmp_path / "my_accident.py").write_text("raise RuntimeError('oh')\n")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def _with_plugin(name):
    return f"version: 1\nplugins: [{name}]\npipeline: normalize -> doubled -> temperature(1)\n"


@pytest.mark.usefixtures("plugin")
def test_a_plugin_runs_only_when_allowed():
    """A plugin is not imported without permission; with it, its stages are words like any."""
    with pytest.raises(wt.SpecError, match="importing my_stages runs its code"):
        wt.loads(_with_plugin("my_stages"))
    assert "my_stages" not in sys.modules
    spec = wt.loads(_with_plugin("my_stages"), allow_plugins=True)
    assert wt.loads(wt.dumps(spec)) == spec
    got = wt.simulate(spec, [1.0, 2.0, 4.0])
    expected = wt.simulate("normalize -> affine(2) -> temperature(1)", [1.0, 2.0, 4.0])
    assert got.tolist() == expected.tolist()


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_absence", r"plugin my_absence cannot be imported: ModuleNotFoundError"),
        ("my_accident", r"plugin my_accident cannot be imported: RuntimeError: oh"),
        ("my_clash", r"plugin my_clash cannot be imported: ValueError: two stages are named"),
    ],
)
def test_a_plugin_that_fails_is_an_error_of_the_spec(name, message):
    """Whatever goes wrong while a plugin is imported is reported at its name."""
    with pytest.raises(wt.SpecError, match=message) as caught:
        wt.loads(_with_plugin(name), allow_plugins=True)
    assert (caught.value.line, caught.value.column) == (2, 11)

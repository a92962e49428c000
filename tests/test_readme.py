"""The README is short, and it and the pages name all there is; test_blocks runs their code."""

import re
from pathlib import Path

import weighting as wt
from weighting.language.find import shipped

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def prose(text):
    """Return the sentences of a page, without code, tables, headings and addresses."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [part.split() for part in re.split(r"(?<=[.:!?])\s+|\n\n|\n- ", text)]


def test_it_fits_on_a_few_screens():
    """At most 150 lines, and no sentence of more than 30 words."""
    assert len(README.splitlines()) <= 150
    sentences = prose(README)
    assert len(sentences) > 20
    assert not [" ".join(words) for words in sentences if len(words) > 30]


def test_long_sentences_are_seen():
    """The counter sees a sentence of 31 words, and two of 16 as two."""
    assert max(map(len, prose("a " * 30 + "end."))) == 31
    assert max(map(len, prose(("a " * 15 + "end. ") * 2))) == 16


def test_yaml_blocks_are_two_spellings_of_one_spec():
    """The first YAML block is arrow text, the second its lists, exactly as printed."""
    arrow, lists = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    spec = wt.loads(arrow)

    assert wt.loads(lists) == spec
    assert wt.dumps(spec, "yaml") == lists


def test_it_names_the_test_command_and_ten_specs():
    """`make test` is in a block of commands; the table has ten shipped specs."""
    assert "\nmake test " in README
    rows = re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)
    assert len({*rows}) == 10
    assert {*rows} <= {*shipped()}


def test_every_page_is_linked():
    """The README links every page under docs/ but the site's own index."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}

    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README)) == pages


def test_every_spec_has_a_row():
    """The page of specs names every file in specs/, and no other."""
    page = (ROOT / "docs" / "specs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)

    assert sorted(rows) == sorted(shipped())


def test_every_config_function_is_listed():
    """The page on training says what lists the configs, and that names every function there is."""
    from titan_integration import config_registry  # noqa: PLC0415 - imports torchtitan
    from titan_integration.commands.configs import OURS, configs  # noqa: PLC0415 - likewise

    functions = {name for name in vars(config_registry) if name.startswith("llama3_")}
    assert functions
    assert functions <= {found.name for found in configs()[OURS]}
    assert "`weighting list configs`" in TRAINING

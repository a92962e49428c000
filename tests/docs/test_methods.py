"""The table of published methods: its texts are specs, and the specs it names are shipped."""

import re
from pathlib import Path

from looping import for_each

import weighting as wt
from weighting.build import plan_of
from weighting.language.find import shipped

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| method")
]
COUNTS = r"Of (\d+) rows (\d+) are shipped, (\d+) can be written, and (\d+) need more"
SHIPPED = {row[0]: row[3].strip("*`") for row in ROWS if row[3].startswith("**")}
WRITTEN = {row[0]: (row[3].strip("`"), row[4].strip("`")) for row in ROWS if row[3][:1] == "`"}


def test_the_table_is_long_and_counts_itself():
    """There are at least seventy methods, each with a text or what is missing, and none twice."""
    assert len(ROWS) >= 70
    assert len({row[0] for row in ROWS}) == len(ROWS)
    assert all(len(row) == 6 and (row[3] or row[5]) for row in ROWS)
    said = re.search(COUNTS, PAGE.read_text("utf-8"))
    assert said is not None
    missing = len(ROWS) - len(SHIPPED) - len(WRITTEN)
    assert [int(x) for x in said.groups()] == [len(ROWS), len(SHIPPED), len(WRITTEN), missing]


@for_each("method", SHIPPED)
def test_a_bold_name_is_a_shipped_spec(method):
    """Its file is there and is what `load` finds."""
    assert SHIPPED[method] in set(shipped())
    assert wt.load(SHIPPED[method]).name == SHIPPED[method]


@for_each("method", WRITTEN)
def test_a_text_is_a_spec_whose_stages_fit(method):
    """It loads with the keys beside it, and has a plan."""
    pipeline, keys = WRITTEN[method]
    spec = wt.loads(f"version: 1\n{keys}\npipeline: '{pipeline}'\n")
    assert plan_of(spec).factors["pipeline"]

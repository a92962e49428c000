"""The page on seams names everything of the host's that is overridden."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_OTHERS = {
    "write",
    "state_dict",
    "load_state_dict",
    "forward",
    "backward",
    "token_losses",
    "construct_mapping",
}
"""Overridden of Python's, of torch's protocols, of PyYAML's, or of our own classes."""


def test_the_page_on_seams_names_every_method_that_is_overridden():
    """Each is a place that a new version of the host can break."""
    page = (ROOT / "docs/host-seams.md").read_text()
    found = {
        node.name: file.relative_to(ROOT)
        for file in sorted((ROOT / "titan_integration").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(x, ast.Name) and x.id == "override" for x in node.decorator_list)
    }
    assert len(found) > 15
    missing = {n: str(f) for n, f in found.items() if n not in OF_OTHERS and n not in page}
    assert not missing


def test_the_page_on_seams_names_files_and_tests_that_are_there():
    """So that a walk down its tables ends somewhere."""
    words = (ROOT / "docs/host-seams.md").read_text().split("`")[1::2]
    files = {x for x in words if x.endswith(".py")}
    assert len(files) > 15
    for file in files:
        places = ROOT / "titan_integration" / file, ROOT / "tests/titan_integration" / file
        assert any(place.exists() for place in places), file

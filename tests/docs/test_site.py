"""The site is built strictly: dead links between pages and unresolved references fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.processes


def build(docs, target):
    """Build a site as `make docs` does; return the status and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", docs, target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """Return the docs in a copy of the parts of the repository that they link to."""
    skipped = shutil.ignore_patterns("_build", "__pycache__")
    for name in ("docs", "specs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    for name in ("README.md", "CHANGELOG.md", ".ci"):
        source, target = ROOT / name, tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path / "docs"


def test_the_site_builds_without_a_warning(tmp_path):
    """Every page is made, and nothing is said."""
    status, said = build(ROOT / "docs", tmp_path)

    assert (status, said) == (0, "")
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in tmp_path.glob("*.html")} >= pages
    assert len(pages) >= 19


def test_dead_links_and_references_fail(copy, tmp_path):
    """A missing page, heading, file and Python name are each named, and the build fails."""
    with (copy / "faq.md").open("a", encoding="utf-8") as page:
        page.write(
            "\n[a](no-page.md) [b](training.md#no-heading) [c](../specs/no-file.md)\n"
            "\n```{eval-rst}\n:py:func:`weighting.no_name`\n```\n"
        )

    status, said = build(copy, tmp_path / "site")

    assert status == 1
    for name in ("no-page", "no-heading", "no-file", "no_name"):
        assert name in said, said

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build a copy of the docs and of what they link to; return docs, site and what came of it."""
    folder = tmp_path_factory.mktemp("site")
    skipped = shutil.ignore_patterns("_build", "__pycache__")
    for name in ("docs", "specs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("README.md", "CHANGELOG.md", ".ci"):
        source, target = ROOT / name, folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    docs, site = folder / "docs", folder / "site"
    return docs, site, build(docs, site)


def test_the_site_builds_without_a_warning(built):
    """Every page is made, and nothing is said."""
    docs, site, outcome = built

    assert outcome == (0, "")
    pages = {path.stem for path in docs.glob("*.md")}
    assert {path.stem for path in site.glob("*.html")} >= pages
    assert len(pages) >= 19


def test_dead_links_and_references_fail(built):
    """A missing page, heading, file and Python name are each named, and the build fails."""
    docs, site, _ = built
    with (docs / "faq.md").open("a", encoding="utf-8") as page:
        page.write(
            "\n[a](no-page.md) [b](training.md#no-heading) [c](../specs/no-file.md)\n"
            "\n```{eval-rst}\n:py:func:`weighting.no_name`\n```\n"
        )

    status, said = build(docs, site)  # reads again what has changed

    assert status == 1
    for name in ("no-page", "no-heading", "no-file", "no_name"):
        assert name in said, said

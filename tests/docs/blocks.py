"""The code blocks of the README and of the pages under docs/."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A block: its page, language and text, and why it is not run, if it is not."""

    page: str
    language: str
    text: str
    reason: str | None


def blocks():
    """Return every fenced block that is no directive of the site."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^(?:<!-- not run: (.+?) -->\n)?```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        ):
            reason, language, body = match.groups()
            found.append(Block(path.stem, language, body, reason))
    return found

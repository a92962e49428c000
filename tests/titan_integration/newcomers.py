"""Three newcomers, each with the README and one more page: what they type, and what answers them.

    python tests/titan_integration/newcomers.py

runs their lines in an empty folder as they stand in the pages, and prints a table of the pages
opened, the commands typed and the time to the answer.  The stage author's `train` is left out: the
trainer's is the same.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Newcomer(NamedTuple):
    """Who comes, what they want to know, and how they find it.

    Attributes:
        who: Their name.
        asks: Their question.
        pages: What they open, in this order; each is linked from one before.
        files: What they write first, as a page shows it.
        lines: What they type, word by word.
        answer: What the last lines print, as a pattern.
    """

    who: str
    asks: str
    pages: tuple[str, ...]
    files: dict[str, str]
    lines: list[list[str]]
    answer: str


def newcomers() -> list[Newcomer]:
    """Return the three of them."""
    looks = [line for line in ten_minutes() if line[1] in {"check", "explain", "simulate", "plot"}]
    runs = [line for line in ten_minutes() if line not in looks]
    spec, own = own_stage()
    return [
        Newcomer(
            "spec writer",
            "Is my spec right, and what does it weigh?",
            ("README.md", "docs/tutorial.md"),
            {},
            looks,
            r"^ *mean( +1\.0000)+$",
        ),
        Newcomer(
            "trainer",
            "Does it train here, and what did it do?",
            ("README.md", "docs/tutorial.md"),
            {},
            [*runs, *(line for line in after_make_train() if line not in runs)],
            r"^effective sample size",
        ),
        Newcomer(
            "stage author",
            "Does my stage keep the laws, and can a spec use it?",
            ("README.md", "docs/own-stages.md"),
            {"soft.yaml": spec},
            [line for line in own if line[1] != "train"],
            r"^ *mean +1\.0000$",
        ),
    ]


def page(name: str) -> str:
    """Return the text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def ten_minutes() -> list[list[str]]:
    """Return the lines of the tutorial's ten minutes."""
    section = page("docs/tutorial.md").split("\n## Ten minutes\n")[1].split("\n## ")[0]
    [block] = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return _lines(block)


def after_make_train() -> list[list[str]]:
    """Return the lines of the README that follow `make train`."""
    [block] = re.findall(
        r"^```sh\n(\.venv/bin.*?)^```", page("README.md"), re.MULTILINE | re.DOTALL
    )
    found = _lines(block)
    assert {line[0] for line in found} == {".venv/bin/weighting"}
    return [["weighting", *line[1:]] for line in found]


def own_stage() -> tuple[str, list[list[str]]]:
    """Return the spec with a stage of one's own, and the lines that make and try it."""
    part = page("docs/own-stages.md").partition("## From an empty folder")[2]
    [(spec, block)] = re.findall(r"```yaml\n(.*?)```.*```sh\n(.*?)```", part, re.DOTALL)
    return spec, _lines(block)


def settle(folder: Path) -> None:
    """Put into a folder what the newcomers have before they type."""
    shutil.copy(ROOT / "README.md", folder)
    for newcomer in newcomers():
        for name, text in newcomer.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def _lines(block: str) -> list[list[str]]:
    """Return the commands of a block as words; what follows a # is for the reader."""
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run them, and print the table."""
    print("| newcomer | pages opened | commands | seconds | CPU seconds | answered |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        settle(Path(name))
        for newcomer in newcomers():
            begun, before, said = time.monotonic(), _cpu(), ""
            for line in newcomer.lines:
                module = [] if line[0] == "python" else ["-m", "weighting"]
                command = [sys.executable, *module, *line[1:]]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{shlex.join(line)}\n{done.stdout}{done.stderr}")
                said += done.stdout
            answered = "yes" if re.search(newcomer.answer, said, re.MULTILINE) else "NO"
            pages = ", ".join(newcomer.pages)
            took = f"{time.monotonic() - begun:.0f} | {_cpu() - before:.0f}"
            print(  # noqa: T201
                f"| {newcomer.who} | {pages} | {len(newcomer.lines)} | {took} | {answered} |"
            )


if __name__ == "__main__":
    main()

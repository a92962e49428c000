"""How many packages an installation brings and under what licences, for docs/compatibility.md.

python .ci/dependencies.py

Packages are asked what they say of themselves; so all of them must be installed.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- made by .ci/dependencies.py -->\n", "<!-- end -->\n"
PLATFORM = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
"""What is counted is the same wherever it is counted."""
SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD, which one not said",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD, which one not said",
    "LicenseRef-NVIDIA-Proprietary": "NVIDIA's own",
    "MIT License": "MIT",
    "NVIDIA Proprietary Software": "NVIDIA's own",
    "": "not said",
}
"""Licences told in other words than SPDX's."""


def main() -> None:
    """Write the lines where they stand."""
    path = ROOT / "docs" / "compatibility.md"
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(before + BEGIN + lines() + END + rest.partition(END)[2], encoding="utf-8")


def lines() -> str:
    """Return the counts, and the licences with their packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = project["dependencies"]
    titan = core + project["optional-dependencies"]["titan"]
    small, large = reached(core), reached(titan)
    found = [
        "| on Linux x86_64, Python 3.11 | named here | with all that they bring |",
        "|---|---|---|",
        f"| core | {len(names(core))} | {len(small)} |",
        f"| with the extra `titan` | {len(names(titan))} | {len(large)} |",
        "",
        "| licence | core | `titan` adds |",
        "|---|---|---|",
    ]
    told = {name: licence(name) for name in large}
    for text in sorted(set(told.values()), key=str.lower):
        mine = {name for name in large if told[name] == text}
        found.append(f"| {text} | {cell(mine & small)} | {cell(mine - small)} |")
    return "\n".join([*found, ""])


def names(requirements: list[str]) -> set[str]:
    """Return the packages that requirements name."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def reached(requirements: list[str]) -> set[str]:
    """Return the packages that requirements bring, themselves and each other's."""
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            asked = map(Requirement, metadata.requires(name) or [])
            environment = PLATFORM | {"extra": extra}
            todo += [x for x in asked if x.marker is None or x.marker.evaluate(environment)]
    return {name for name, _ in seen}


def licence(name: str) -> str:
    """Return a package's licence in its own words, or SPDX's where those are known."""
    about = metadata.metadata(name)
    classifiers = [x for x in about.get_all("Classifier", []) if x.startswith("License :: ")]
    texts = [about.get("License-Expression"), about.get("License"), *classifiers]
    told = next((text for text in texts if text), "")
    first = told.strip().partition("\n")[0].rpartition(" :: ")[2].strip()
    return SPELLINGS.get(first, first)


def cell(packages: set[str]) -> str:
    """Return how many packages and which; nothing for none."""
    return f"{len(packages)}: {', '.join(sorted(packages))}" if packages else ""


if __name__ == "__main__":
    main()

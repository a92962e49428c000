"""Let `pytest specs/` test the spec files themselves: they load, round trip and obey the laws.

A YAML file is taken for a spec when

- it is named on the command line and looks like one: it has a line `version:` and a line
  `pipeline:` or `factors:`;
- it lies in a folder named on the command line, not in one below it, and looks like one;
- it lies in or below a folder of the ini option `weighting_specs`, whatever it looks like.

So nothing happens in a project that has no specs, nor when pytest is run without arguments and
without that option.  Plugins of a spec (`plugins: [my_stages]`) are imported only if a
conftest.py, or the spec's own tests, import them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _pytest._code.code import TracebackStyle

    from weighting.spec import Spec

_LINES = (r"^version\s*:", r"^(pipeline|factors)\s*:")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare where specs live."""
    parser.addini("weighting_specs", "folders whose YAML files are weighting specs", "paths", [])


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpecFile | None:
    """Take a YAML file for a spec, if it is one; see the module's docstring."""
    if file_path.suffix not in {".yaml", ".yml"}:
        return None
    if not _in_declared_folder(file_path, parent.config) and not (
        _is_asked_for(file_path, parent.config) and _looks_like_spec(file_path)
    ):
        return None
    return SpecFile.from_parent(parent, path=file_path)


class SpecFile(pytest.File):
    """A spec file, and what is tested about it."""

    @override
    def collect(self) -> Iterable[SpecItem]:
        """Return a test per claim."""
        for name, claim in _CLAIMS.items():
            yield SpecItem.from_parent(self, name=name, claim=claim)


class SpecItem(pytest.Item):
    """One claim about a spec file."""

    def __init__(self, *, claim: Callable[[Path], None], **given: object) -> None:
        super().__init__(**given)  # pyrefly: ignore[bad-argument-type]
        self._claim = claim

    @override
    def runtest(self) -> None:
        """Test the claim."""
        self._claim(self.path)

    @override
    def repr_failure(
        self,
        excinfo: pytest.ExceptionInfo[BaseException],
        style: TracebackStyle | None = None,
    ) -> str:
        """Return what is wrong, without a traceback into files the reader did not write."""
        from weighting.errors import SpecError  # noqa: PLC0415 - see `_load`

        if not isinstance(excinfo.value, SpecError | AssertionError):
            return str(super().repr_failure(excinfo, style))
        text = str(excinfo.value)
        if "allow_plugins" in text:
            text += "\n(under pytest: import it in a conftest.py)"
        return text

    @override
    def reportinfo(self) -> tuple[Path, None, str]:
        """Return what a report calls it."""
        return self.path, None, f"{self.path.name}: {self.name}"


def _loads(path: Path) -> None:
    _load(path)


def _round_trips(path: Path) -> None:
    from weighting.testing.checks import check_round_trip  # noqa: PLC0415 - see `_load`

    check_round_trip(_load_or_skip(path))


def _laws(path: Path) -> None:
    from weighting.testing.checks import check_stage  # noqa: PLC0415 - see `_load`

    check_stage(_load_or_skip(path))


_CLAIMS = {"loads": _loads, "round trips": _round_trips, "laws": _laws}


def _load(path: Path) -> Spec:
    # This module is imported by every run of pytest on the machine; the language, and torch with
    # it, only when there is a spec to test.
    from weighting.language.read import load  # noqa: PLC0415

    here = Path.cwd()
    return load(path.relative_to(here) if path.is_relative_to(here) else path)


def _load_or_skip(path: Path) -> Spec:
    from weighting.errors import SpecError  # noqa: PLC0415 - see `_load`

    try:
        return _load(path)
    except SpecError:
        pytest.skip("it does not load")


def _in_declared_folder(path: Path, config: pytest.Config) -> bool:
    folders: list[Path] = config.getini("weighting_specs")
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


def _is_asked_for(path: Path, config: pytest.Config) -> bool:
    """Tell whether the command line names the file or its folder."""
    if config.args_source is not config.ArgsSource.ARGS:
        return False
    here = config.invocation_params.dir
    named = {(here / argument.partition("::")[0]).resolve() for argument in config.args}
    return path.resolve() in named or path.parent.resolve() in named


def _looks_like_spec(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return all(re.search(line, text, re.MULTILINE) for line in _LINES)

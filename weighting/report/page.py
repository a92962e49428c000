"""A report of runs: one HTML file with everything in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from weighting import __version__
from weighting.build import plan_of
from weighting.errors import SpecError
from weighting.language.html import escaped
from weighting.report import figures, tables
from weighting.report.read import read_runs
from weighting.runs.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weighting.build import Plan
    from weighting.report.charts import Chart
    from weighting.report.read import Run
    from weighting.spec import Spec

    Explain = Callable[[Spec, Plan], list[str]]

_FOLDER = Path(__file__).parent
_PAGE, _SCRIPT = "page.html.j2", "page.js"
_DATA = re.compile(r" data-[a-z]+='[^']*'")
"""What only the script reads of a drawing."""


def write_report(
    folders: Sequence[Path], out: Path, explain: Explain, *, static: bool = False
) -> None:
    """Write the report of some runs; the file is there whole or not at all.

    Args:
        folders: Dump folders of runs; the others are compared with the first.
        out: File to write.
        explain: Returns lines that tell what a spec means.
        static: Whether to leave the script out.

    Raises:
        ValueError: As `read_runs`.
        OSError: `out` cannot be written.
    """
    write_whole(out, page(read_runs(folders), explain, static=static))


def page(runs: Sequence[Run], explain: Explain, *, static: bool = False) -> str:
    """Return the report as HTML."""
    measured = [tables.validation(runs), tables.over_seeds(runs)]
    sections = [
        _section("Loss", figures.losses(runs), [tables.differences(runs)]),
        _section(
            "Loss by domain",
            figures.by_domain(runs),
            measured,
            "None of the runs was validated.",
        ),
        _section(
            "Weights",
            figures.weights(runs),
            [table for run in runs for table in tables.most_moved(run)],
            "No weights were logged.",
        ),
        _section(
            "Domains",
            [chart for run in runs for chart in figures.domains(run)],
            [tables.masses(run) for run in runs],
            "The data had no domains.",
        ),
        *([_section("Benchmarks", [], [asked])] if (asked := tables.benchmarks(runs)) else []),
        _section("Throughput", figures.throughput(runs), [], "No tokens/s were logged."),
    ]
    about = [
        {"run": run, "expansion": _expansion(run, explain), "tables": tables.settings(run)}
        for run in runs
    ]
    script = "" if static else (_FOLDER / _SCRIPT).read_text(encoding="utf-8")
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_finalized,
        undefined=strict,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = _without_data if static else Markup
    return environment.get_template(_PAGE).render(
        overview=tables.overview(runs),
        sections=sections,
        about=about,
        version=__version__,
        script=Markup(script),  # noqa: S704 - our own file
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _section(
    title: str, charts: list[Chart], found: Sequence[tables.Table | None], without: str = ""
) -> dict[str, object]:
    found = [table for table in found if table]
    lacking = without if not charts and not found else ""
    place = title.lower().replace(" ", "-")
    return {"id": place, "title": title, "charts": charts, "tables": found, "without": lacking}


def _expansion(run: Run, explain: Explain) -> str:
    """Return what the run's spec means, as far as it can be read here."""
    if run.spec is None:
        return str(run.about["spec"]["text"]) if run.about else ""
    try:
        return "\n".join(explain(run.spec, plan_of(run.spec)))
    except SpecError:
        return str(run.about["spec"]["text"])


def _finalized(value: object) -> object:
    """Return what a template writes, its words as `escaped` has them; drawings as they are."""
    return value if isinstance(value, Markup) else Markup(escaped(str(value)))  # noqa: S704


def _without_data(svg: str) -> Markup:
    """Return a drawing of ours, whose words are escaped already, for a page without script."""
    return Markup(_DATA.sub("", svg))  # noqa: S704

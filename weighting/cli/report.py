"""`weighting report`: what runs did, as one page."""

from __future__ import annotations

from pathlib import Path

import click

from weighting.cli.common import check_out, echo, give_up, reason

SUFFIXES = (".html", ".htm")


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="HTML file to write, or replace."
)
@click.option("--static", is_flag=True, help="Leave the script out; values are in tooltips.")
def report(runs: tuple[Path, ...], out: Path, *, static: bool) -> None:
    """Make one page of what runs did: RUN is the folder a run left, its --dump_folder.

    Losses, weights, domains, validation and throughput as charts, what weighed
    and with which settings; several runs are compared with the first, step by
    step. The page needs nothing else and no network. Its own script shows the
    values under the pointer.

    \b
    Examples:
      weighting report outputs/linupper --out report.html
      weighting report outputs/uniform outputs/linupper --out report.html
    """  # noqa: D301
    check_out(out, SUFFIXES)
    from weighting.cli.explanation import explanation  # noqa: PLC0415 - imports torch
    from weighting.report.page import write_report  # noqa: PLC0415

    try:
        write_report(runs, out, explanation, static=static)
    except ValueError as error:
        give_up(str(error))
    except OSError as error:
        give_up(f"--out {reason(error)}; choose another place")
    echo(str(out))

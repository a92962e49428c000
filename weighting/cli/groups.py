"""Help whose options stand in groups, each with a heading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def in_groups(
    groups: Mapping[str, Sequence[str]], more: Mapping[str, Sequence[tuple[str, str]]]
) -> type[click.Command]:
    """Return a kind of command whose help lists its options by group.

    Args:
        groups: Names of parameters by heading; what is in none stands under the last one.
        more: Further groups: what another program takes, and what that does.
    """

    class Grouped(click.Command):
        @override
        def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            named = {name for names in groups.values() for name in names}
            params = [*self.get_params(ctx)]
            for title, names in groups.items():
                is_last = title == [*groups][-1]
                rows = [
                    row
                    for x in params
                    if isinstance(x, click.Option)
                    and (x.name in names or (is_last and x.name not in named))
                    and (row := x.get_help_record(ctx))
                ]
                with formatter.section(title):
                    formatter.write_dl(rows)
            for title, rows in more.items():
                with formatter.section(title):
                    formatter.write_dl(rows)

    return Grouped

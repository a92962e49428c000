"""`weighting check`: is this spec right?"""

from __future__ import annotations

import click

from weighting.cli.common import (
    allow_plugins,
    complain,
    echo,
    give_up,
    read,
    specs_named,
    wrapped,
)
from weighting.errors import SpecError
from weighting.language.plugins import imported


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True, shell_complete=specs_named)
@allow_plugins
def check(specs: tuple[str, ...], *, allow_plugins: bool) -> None:
    """Check specs and show every error with its place; exit 2 if there is any.

    \b
    Examples:
      weighting check specs/*.yaml
      weighting check "entropy(gamma=1) -> token_scale"
    """  # noqa: D301
    wrong = 0
    for argument in specs:
        try:
            spec, plan = read(argument, plugins=allow_plugins)
        except SpecError as error:
            wrong += 1
            complain(str(error))
            continue
        levels = dict.fromkeys(
            f"per {steps[-1].level}"
            for name, steps in plan.factors.items()
            if plan.targets[name] != "sampling"
        )
        does = [f"weighs {' x '.join(levels)}"] if levels else []
        does += ["draws by domain"] if plan.sampling else []
        reads = ", ".join(sorted(plan.needs)) or "nothing"
        name = argument if spec.name in {"unnamed", argument} else f"{argument}: {spec.name}"
        name = spec.name if "\n" in argument else name
        echo("\n".join(wrapped(f"ok  {name}, {', '.join(does)}, reads {reads}")))
        if spec.plugins:
            echo(f"    plugins: {imported(spec)}")
    if wrong:
        count = f"{wrong} of {len(specs)} specs" if len(specs) > 1 else "the spec"
        give_up(f"{count} cannot be used")

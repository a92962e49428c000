"""The `weighting` command; each of its own commands has a file here."""

from __future__ import annotations

import click

from weighting import __version__
from weighting.cli.check import check
from weighting.cli.compare import compare
from weighting.cli.completion import completion
from weighting.cli.count import count
from weighting.cli.doctor import doctor
from weighting.cli.evaluate import evaluate
from weighting.cli.explain import explain
from weighting.cli.export import export
from weighting.cli.listing import list_words
from weighting.cli.mix import mix
from weighting.cli.new_stage import new_stage
from weighting.cli.plot import plot
from weighting.cli.replay import replay_command
from weighting.cli.report import report
from weighting.cli.schema import print_schema
from weighting.cli.score import score
from weighting.cli.simulate import simulate
from weighting.cli.tokens import tokens
from weighting.cli.train import train
from weighting.cli.tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="weighting")
def main() -> None:
    """Say how much each token's gradient counts, in a few lines of YAML.

    \b
    Wherever SPEC is asked for, give
      a file           specs/linupper.yaml
      a shipped spec   linupper
      arrow text       "normalize -> linupper(alpha=1) -> temperature(0.4)"

    \b
    Examples:
      weighting check linupper
      weighting simulate linupper --losses 1,2,3,5
      weighting train linupper
    """  # noqa: D301 - \b is click's, for text it must not rewrap


main.add_command(check)
main.add_command(explain)
main.add_command(list_words)
main.add_command(print_schema)
main.add_command(simulate)
main.add_command(plot)
main.add_command(new_stage)
main.add_command(train)
main.add_command(compare)
main.add_command(mix)
main.add_command(score)
main.add_command(count)
main.add_command(export)
main.add_command(evaluate)
main.add_command(report)
main.add_command(tokens)
main.add_command(replay_command)
main.add_command(tune)
main.add_command(doctor)
main.add_command(completion)

"""`weighting completion`: a script with which a shell completes commands, flags and spec names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete `weighting`: commands, flags and specs.

    \b
    Examples:
      weighting completion bash >> ~/.bashrc
      weighting completion zsh >> ~/.zshrc
      weighting completion fish > ~/.config/fish/completions/weighting.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these shells"
    made = kind(context.find_root().command, {}, "weighting", "_WEIGHTING_COMPLETE")
    if shell == "bash":  # click would run bash to learn its version; ours says what it needs
        click.echo("# needs bash 4.4 or newer")
    click.echo(made.source_template % made.source_vars())

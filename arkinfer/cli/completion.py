"""`arkinfer completion`."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
      bash   eval "$(arkinfer completion bash)"      in ~/.bashrc
      zsh    eval "$(arkinfer completion zsh)"       in ~/.zshrc
      fish   arkinfer completion fish | source       in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    root = context.find_root()
    # The script text alone: `source()` would also ask the installed shell for its version.
    completion = kind(root.command, {}, "arkinfer", "_ARKINFER_COMPLETE")
    click.echo(completion.source_template % completion.source_vars())

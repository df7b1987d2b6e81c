"""The command line: one file per command, loaded when used; errors become text and an exit status here."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from arkinfer import __version__
from arkinfer.errors import ArkError, InternalError, UnsupportedError, nearest

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Command -> what it does. The command `name` is `command` in arkinfer/cli/name.py.
COMMANDS = {
    "plan": "Say what a build would take, and whether it fits.",
    "build": "Compile a model for a target into an artifact.",
    "finish": "Build on this device what cannot be built elsewhere.",
    "run": "Answer one prompt.",
    "chat": "Talk with a model.",
    "verify": "Compare an artifact with the reference.",
    "bench": "Measure speed, beside the machine's limits.",
    "inspect": "Show what an artifact or a model is.",
    "targets": "List the targets, or show one.",
    "doctor": "Check this machine.",
    "completion": "Print a shell's completion script.",
}


class Commands(click.Group):
    """Loads a command's module only when the command is called: help for all of them needs none."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"arkinfer.cli.{name}").command
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
            context.fail(f"No such command '{arguments[0]}'; {nearest(arguments[0], list(COMMANDS))}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="arkinfer", message="%(prog)s %(version)s")
def commands() -> None:
    """Compile a language model once, run it on every device.

    \b
      arkinfer build tiny-minicpm -o tiny.ark
      arkinfer run --artifact tiny.ark "Once upon a time"
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 ok, 1 user error, 2 usage, 3 unsupported, 4 parity, 5 artifact, 70 internal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_status(given))


def _status(arguments: list[str]) -> int:
    try:
        # Without standalone mode, click returns what a command passed to `context.exit`, or what it returned: None.
        status = commands.main(args=arguments, prog_name="arkinfer", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("interrupted", err=True)
        # click raises its Abort from the KeyboardInterrupt, to which a build adds what it leaves behind.
        for note in getattr(error.__cause__ or error, "__notes__", ()):
            click.echo(note, err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ArkError as error:
        return _report(error, arguments)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return _report(_needs_torch(), arguments)
        if os.environ.get("ARKINFER_DEBUG"):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        hint = "ARKINFER_DEBUG=1 shows where; please report it with the command that you ran"
        return _report(InternalError("arkinfer has failed", facts={"reason": reason}, hint=hint), arguments)


def _needs_torch() -> UnsupportedError:
    """Return the error of commands that capture or compare a model where only what runs artifacts is installed."""
    return UnsupportedError(
        "this command computes with torch, which is not installed",
        hint="pip install 'arkinfer[build]' to build, 'arkinfer[torch]' to verify",
        code="ARK-E318",
    )


def _report(error: ArkError, arguments: list[str]) -> int:
    if "--json" in arguments:
        import json

        click.echo(json.dumps(error.to_json(), ensure_ascii=False, indent=1))
    else:
        click.echo(error.render(), err=True)
    return error.exit_code
